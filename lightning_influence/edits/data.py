"""The training data of an edit: which examples it is about, and their new targets if they have any."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_influence.running.loaders import IndexedLoader
from lightning_influence.support.arguments import list_some
from lightning_influence.support.errors import UnsupportedDataError
from lightning_influence.support.random_states import preserve_rng

SetTargets = Callable[[Any, Tensor, Tensor], Any]
"""Maps ``(batch, rows, targets)`` to a copy of the batch whose examples ``rows`` have these targets."""

_NOTHING = "There is nothing to edit: `examples` is empty. Pass dataset indices or a mask."
# Examples that are read again and again are kept in memory up to this size. Chosen by hand: it holds some
# thousand small images, and is little beside what a forward pass of a model that needs more of them takes.
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
        return self.loader.holding(self.edited).held(HELD_BYTES)

    @cached_property
    def every_loader(self) -> IndexedLoader:
        """A loader of all examples, whose losses are taken before an edit and after it."""
        every = torch.cat([self.edited, self.kept])
        # The edited ones first: few batches get new targets, and are copied for them.
        loader = self.loader.only(every) if self.loader.ordered else self.loader
        return loader.held(HELD_BYTES)

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
    every = loader.indices.sort().values
    chosen = _read_indices(examples, every, int(every[-1]) + 1 if loader.size is None else loader.size)
    order = chosen.argsort(stable=True)
    edited = chosen[order]
    _check_once(edited)
    kept = every[~torch.isin(every, edited)]
    if not len(kept):
        raise ValueError(
            f"All {len(every)} training examples are to be edited, which leaves nothing to keep the rest of "
            "the model for. Train a new model, or name fewer examples."
        )
    new = None if targets is None else _read_targets(targets, len(edited), loader, set_targets)[order]
    return EditData(loader, edited, kept, new, set_targets)


def _read_indices(examples: Any, every: Tensor, size: int) -> Tensor:
    accepted = "accepted are dataset indices (n,) or a boolean mask over the dataset"
    chosen = _read_tensor(examples, f"examples of type {type(examples).__name__}; {accepted}")
    if chosen.dtype == torch.bool:
        return _read_mask(chosen, every, size)
    if chosen.numel() == 0:
        raise ValueError(_NOTHING)
    if chosen.ndim != 1 or chosen.is_floating_point() or chosen.is_complex():
        raise ValueError(f"Got examples of shape {tuple(chosen.shape)} and {chosen.dtype}; {accepted}.")
    missing = chosen[~torch.isin(chosen, every)]
    if len(missing):
        raise UnsupportedDataError(
            f"Examples {list_some(missing.sort().values)} are not among the {len(every)} training examples. "
            "Pass indices of the training loader's dataset."
        )
    return chosen.long()


def _read_mask(mask: Tensor, every: Tensor, size: int) -> Tensor:
    """Return the indices at which a mask over the dataset is true.

    Raises:
        ValueError: if it is over something else, or true nowhere.
        UnsupportedDataError: if it is true at an example that the loader does not draw.
    """
    if mask.shape != (size,):
        drawn = "" if len(every) == size else f", whether or not the loader draws it ({len(every)} are)"
        raise ValueError(
            f"Got a mask of shape {tuple(mask.shape)} over {size} training examples; pass one entry for each "
            f"example of the dataset{drawn}."
        )
    chosen = mask.nonzero().flatten()
    if not len(chosen):
        raise ValueError(_NOTHING)
    missing = chosen[~torch.isin(chosen, every)]
    if len(missing):
        raise UnsupportedDataError(
            f"The mask is True at examples {list_some(missing)} of the dataset, which the training loader "
            f"does not draw: it draws {len(every)} of {size}. Set the mask to False there, or pass a "
            "loader that draws them."
        )
    return chosen


def _check_once(edited: Tensor) -> None:
    """Refuse indices, ascending, that name an example twice.

    Raises:
        ValueError: naming it; says so if they look like a mask.
    """
    again = torch.unique(edited[1:][edited.diff() == 0])
    if len(again):
        mask = len(edited) > 2 and bool((edited <= 1).all())
        hint = " Zeros and ones are no mask unless they are booleans: pass mask.bool()." if mask else ""
        raise ValueError(f"Examples {list_some(again)} come twice; name each one once.{hint}")


def _read_tensor(values: Any, what: str) -> Tensor:
    try:
        return torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"Got {what}. ({error})") from error


def _read_targets(targets: Any, count: int, loader: IndexedLoader, set_targets: SetTargets | None) -> Tensor:
    """Return new targets ``(count, ...)``, of which one may have been given for all.

    Raises:
        ValueError: if their number is another.
    """
    new = _read_tensor(targets, f"new targets of type {type(targets).__name__}; pass numbers or a tensor")
    # As many integers as examples are labels; all else may be one target that is a vector.
    unclear = set_targets is None and new.ndim > 0 and (len(new) != count or new.is_floating_point())
    if new.ndim == 0:
        new = new.expand(count)
    elif unclear and new.shape == _find_target_shape(loader):
        new = new.expand(count, *new.shape)
    if len(new) != count:
        raise ValueError(
            f"Got {len(new)} new targets for {count} examples; pass one each, or one for all, of the shape "
            "of a single one."
        )
    return new


def _find_target_shape(loader: IndexedLoader) -> torch.Size | None:
    """Return the shape of one example's target, from the first batch; None if that is no pair."""
    with preserve_rng():
        batch, _ = next(iter(loader.shard()))
    return batch[1].shape[1:] if _is_pair(batch) else None


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor)


def replace_second(batch: Any, rows: Tensor, targets: Tensor) -> Any:
    """Return ``(inputs, targets)`` with other targets at ``rows``.

    Raises:
        UnsupportedDataError: if the batch is no such pair, or the targets do not fit in.
    """
    if not _is_pair(batch):
        raise UnsupportedDataError(
            f"New targets go into batches that are pairs (inputs, targets); this one is a "
            f"{type(batch).__name__}. Pass set_targets=f, where f(batch, rows, targets) returns a copy of "
            "the batch with these targets at these rows."
        )
    changed = batch[1].clone()
    if _drop_ones(targets) != _drop_ones(changed):
        raise UnsupportedDataError(
            f"A new target has shape {tuple(targets.shape[1:])}, those of the training data "
            f"{tuple(changed.shape[1:])}. Pass targets of the same shape."
        )
    if targets.is_floating_point() and not changed.is_floating_point():
        raise UnsupportedDataError(
            f"The new targets are {targets.dtype}, those of the training data {changed.dtype}. Pass integers."
        )
    changed[rows.to(changed.device)] = targets.to(changed).reshape(-1, *changed.shape[1:])
    return batch[0], changed


def _drop_ones(targets: Tensor) -> list[int]:
    """Return the shape of one target without ones, which say nothing."""
    return [size for size in targets.shape[1:] if size != 1]


def hold_equal(batch: Any, other: Any) -> bool:
    """Return whether two batches hold equal tensors, numbers and texts, and otherwise the same objects."""
    if batch is other:
        return True
    if isinstance(batch, Tensor) and isinstance(other, Tensor):
        return torch.equal(batch, other)
    if isinstance(batch, Mapping) and isinstance(other, Mapping):
        return batch.keys() == other.keys() and all(hold_equal(batch[key], other[key]) for key in batch)
    if isinstance(batch, list | tuple) and isinstance(other, list | tuple):
        return len(batch) == len(other) and all(map(hold_equal, batch, other))
    return isinstance(batch, int | float | str | bytes) and bool(batch == other)
