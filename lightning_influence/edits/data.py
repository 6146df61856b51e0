"""The training data of an edit: which examples it is about, and their new targets if they have any."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_influence.errors import UnsupportedDataError
from lightning_influence.results.base import some
from lightning_influence.running.loaders import IndexedLoader

SetTargets = Callable[[Any, Tensor, Tensor], Any]
"""Maps ``(batch, rows, targets)`` to a copy of the batch whose examples ``rows`` have these targets."""


# Examples that are read again and again are kept in memory up to this size.
HELD_BYTES = 256 * 2**20


@dataclass(frozen=True)
class EditData:
    """Training examples, split into edited and kept ones.

    Attributes:
        loader: all of them.
        edited: dataset indices of the examples that the edit is about, ascending.
        kept: those of all others, ascending.
        targets: new targets ``(E, ...)`` in the order of ``edited``; None to forget them.
        set_targets: how they get into a batch.
    """

    loader: IndexedLoader
    edited: Tensor
    kept: Tensor
    targets: Tensor | None = None
    set_targets: SetTargets | None = None

    @cached_property
    def edited_loader(self) -> IndexedLoader:
        """A loader of the edited examples, which is gone through once for every step that is tried."""
        return self.subset(self.edited).held(HELD_BYTES)

    @cached_property
    def every_loader(self) -> IndexedLoader:
        """A loader of all examples, whose losses are taken before an edit and after it."""
        return self.subset(torch.cat([self.edited, self.kept])).held(HELD_BYTES)

    @property
    def after(self) -> Tensor:
        """Indices of the examples that the edited objective is about."""
        return self.kept if self.targets is None else torch.cat([self.edited, self.kept]).sort().values

    def view(self, batch: Any, indices: Tensor) -> Any:
        """Return the batch with the new targets of its edited examples.

        Args:
            batch: a batch.
            indices: dataset indices of its examples, ``(B,)``.

        Returns:
            The same batch if none of its examples has a new target, else a copy.
        """
        rows = torch.isin(indices, self.edited).nonzero().flatten()
        if self.targets is None or not len(rows):
            return batch
        targets = self.targets[torch.searchsorted(self.edited, indices[rows])]
        return (self.set_targets or replace_second)(batch, rows, targets)

    def subset(self, indices: Tensor) -> IndexedLoader:
        """Return a loader of these examples; of whole batches where only the user's can be collated."""
        loader = self.loader
        if loader.ordered:
            return loader.only(indices)
        return loader.with_any(indices)


def split(
    loader: IndexedLoader,
    examples: Sequence[int] | Tensor,
    targets: Any = None,
    set_targets: SetTargets | None = None,
) -> EditData:
    """Find the examples of an edit among the training examples.

    Args:
        loader: the training examples.
        examples: dataset indices, or a boolean mask over the dataset.
        targets: new targets, one for each example or one for all.
        set_targets: how they get into a batch; None for batches that are pairs ending in the targets.

    Returns:
        The split data.

    Raises:
        ValueError: if there is nothing or everything to edit, an example comes twice, or the number of
            targets differs.
        UnsupportedDataError: if an example is not among the training examples.
    """
    chosen = _as_indices(examples, loader.indices)
    order = chosen.argsort(stable=True)
    edited = chosen[order]
    if bool((edited.diff() == 0).any()):
        raise ValueError(f"Examples {some(edited[1:][edited.diff() == 0])} come twice; name each one once.")
    every = loader.indices.sort().values
    missing = edited[~torch.isin(edited, every)]
    if len(missing):
        raise UnsupportedDataError(
            f"Examples {some(missing)} are not among the {len(every)} training examples. Pass indices of the "
            "training loader's dataset."
        )
    kept = every[~torch.isin(every, edited)]
    if not len(kept):
        raise ValueError(
            f"All {len(every)} training examples are to be edited, which leaves nothing to keep the rest of "
            "the model for. Train a new model, or name fewer examples."
        )
    new = None if targets is None else _as_targets(targets, len(edited))[order]
    return EditData(loader, edited, kept, new, set_targets)


def _as_indices(examples: Any, every: Tensor) -> Tensor:
    accepted = "accepted are dataset indices (n,) or a boolean mask over the dataset"
    chosen = _as_tensor(examples, f"examples of type {type(examples).__name__}; {accepted}")
    if chosen.dtype == torch.bool:
        if chosen.ndim != 1 or len(chosen) not in {len(every), int(every.max()) + 1}:
            raise ValueError(
                f"Got a mask of shape {tuple(chosen.shape)} over {len(every)} training examples; pass one "
                "entry for each example of the dataset."
            )
        chosen = chosen.nonzero().flatten()
    if chosen.numel() == 0:
        raise ValueError("There is nothing to edit: `examples` is empty. Pass dataset indices or a mask.")
    if chosen.ndim != 1 or chosen.is_floating_point() or chosen.is_complex():
        raise ValueError(f"Got examples of shape {tuple(chosen.shape)} and {chosen.dtype}; {accepted}.")
    return chosen.long()


def _as_tensor(values: Any, what: str) -> Tensor:
    try:
        return torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"Got {what}. ({error})") from error


def _as_targets(targets: Any, count: int) -> Tensor:
    new = _as_tensor(targets, f"new targets of type {type(targets).__name__}; pass numbers or a tensor")
    if new.ndim == 0:
        new = new.expand(count)
    if len(new) != count:
        raise ValueError(f"Got {len(new)} new targets for {count} examples; pass one each, or one for all.")
    return new


def replace_second(batch: Any, rows: Tensor, targets: Tensor) -> Any:
    """Return ``(inputs, targets)`` with other targets at ``rows``.

    Raises:
        UnsupportedDataError: if the batch is no such pair, or the targets do not fit in.
    """
    pair = isinstance(batch, tuple | list) and len(batch) == 2
    if not (pair and isinstance(batch[1], Tensor)):
        raise UnsupportedDataError(
            f"New targets go into batches that are pairs (inputs, targets); this one is a "
            f"{type(batch).__name__}. Pass set_targets=f, where f(batch, rows, targets) returns a copy of "
            "the batch with these targets at these rows."
        )
    changed = batch[1].clone()
    if targets.shape[1:] != changed.shape[1:]:
        raise UnsupportedDataError(
            f"A new target has shape {tuple(targets.shape[1:])}, those of the training data "
            f"{tuple(changed.shape[1:])}. Pass targets of the same shape."
        )
    if targets.is_floating_point() and not changed.is_floating_point():
        raise UnsupportedDataError(
            f"The new targets are {targets.dtype}, those of the training data {changed.dtype}. Pass integers."
        )
    changed[rows.to(changed.device)] = targets.to(changed)
    return batch[0], changed


def same(batch: Any, other: Any) -> bool:
    """Return whether two batches hold equal tensors, numbers and texts, and otherwise the same objects."""
    if batch is other:
        return True
    if isinstance(batch, Tensor) and isinstance(other, Tensor):
        return torch.equal(batch, other)
    if isinstance(batch, Mapping) and isinstance(other, Mapping):
        return batch.keys() == other.keys() and all(same(batch[key], other[key]) for key in batch)
    if isinstance(batch, list | tuple) and isinstance(other, list | tuple):
        return len(batch) == len(other) and all(map(same, batch, other))
    return isinstance(batch, int | float | str | bytes) and bool(batch == other)
