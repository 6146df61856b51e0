"""Groups of examples, read from the labels that a user gave by dataset index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

#: Labels of examples by dataset index: a sequence, a tensor or an array of texts or integers, or a mapping.
GroupLabels = Any

_ACCEPTED = (
    "a list, tensor or array with one text or integer for each example of the dataset, or a mapping from "
    "dataset indices to them"
)


class Source(Protocol):
    """A loader that has been read."""

    @property
    def indices(self) -> Tensor:
        """Dataset indices in the order of visiting, ``(N,)``."""
        ...

    @property
    def size(self) -> int | None:
        """Length of the dataset, None if it is not known."""
        ...


@dataclass(frozen=True)
class Groups:
    """Groups that together hold every example of some loaders once.

    Attributes:
        names: of the groups, those of integers first, each kind in its order.
        members: of each loader the dataset indices, ascending, and the group of each, ``(N,)`` both.
    """

    names: tuple[str, ...]
    members: tuple[tuple[Tensor, Tensor], ...]

    @property
    def positions(self) -> Tensor:
        """``0, 1, ...``, ``(G,)``: what stands for the groups in place of dataset indices."""
        return torch.arange(len(self.names))

    @property
    def counts(self) -> Tensor:
        """How many examples each group has, ``(G,)``."""
        return torch.cat([groups for _, groups in self.members]).bincount(minlength=len(self.names))

    def find(self, indices: Tensor, loader: int = 0) -> Tensor:
        """The groups of some examples of a loader.

        Args:
            indices: dataset indices ``(B,)``.
            loader: its position.

        Returns:
            ``(B,)`` positions in :attr:`names`.
        """
        known, groups = self.members[loader]
        return groups[torch.searchsorted(known, indices.cpu())]


def check_labels(name: str, labels: GroupLabels) -> None:
    """Refuse what cannot be labels of examples.

    Args:
        name: of the argument.
        labels: what was given.

    Raises:
        TypeError: saying what is accepted.
    """
    if isinstance(labels, str | bytes) or not (
        isinstance(labels, Mapping | Sequence) or (hasattr(labels, "tolist") and hasattr(labels, "__len__"))
    ):
        raise TypeError(f"Got {name}={labels!r:.80}; accepted is {_ACCEPTED}.")


def read_groups(name: str, labels: GroupLabels, loaders: Sequence[Source]) -> Groups:
    """Read the labels of all examples of some loaders.

    Args:
        name: of the argument.
        labels: by dataset index; with several loaders a list with those of each.
        loaders: the loaders.

    Returns:
        The groups.

    Raises:
        ValueError: if an example has no label, there are labels of other examples, or an integer and a text
            name a group alike.
        TypeError: if a label is no text and no integer.
    """
    if len(loaders) == 1:
        labels = [labels]
    elif not isinstance(labels, list | tuple) or len(labels) != len(loaders):
        raise ValueError(
            f"Got {name} of type {type(labels).__name__} for {len(loaders)} loaders; accepted is a list with "
            "the labels of each loader's dataset."
        )
    found = [_read(name, own, loader) for own, loader in zip(labels, loaders, strict=True)]
    order = sorted({_sort_key(label) for own, _ in found for label in own})
    names = [text for _, _, text in order]
    texts = {text for is_text, _, text in order if is_text}
    twice = next((text for is_text, _, text in order if not is_text and text in texts), None)
    if twice is not None:
        raise ValueError(
            f"{name} has both {twice} and {twice!r}, a number and a text that name a group alike; accepted "
            "are labels that differ as texts: map one of them to another label."
        )
    position = {key: number for number, key in enumerate(order)}
    members = tuple(
        (indices, torch.tensor([position[_sort_key(label)] for label in own])) for own, indices in found
    )
    return Groups(tuple(names), members)


def _sort_key(label: str | int) -> tuple[bool, str | int, str]:
    """Return what labels are told apart and put in order by: numbers first, and ``True`` is not 1."""
    return isinstance(label, str), label, str(label)


def join_all(loaders: Sequence[Source], name: str) -> Groups:
    """Return one group of all examples of some loaders."""
    return Groups(
        (name,), tuple((loader.indices.sort().values, torch.zeros_like(loader.indices)) for loader in loaders)
    )


def _read(name: str, labels: GroupLabels, loader: Source) -> tuple[list[str | int], Tensor]:
    """Return the label of each example of a loader, by ascending dataset index, and the indices."""
    check_labels(name, labels)
    indices = loader.indices.sort().values
    if hasattr(labels, "tolist"):
        labels = labels.tolist()
    if isinstance(labels, Mapping):
        missing = [index for index in indices.tolist() if index not in labels]
        if missing:
            raise ValueError(
                f"{name} has no label for {len(missing)} examples (dataset indices {missing[:5]}); accepted "
                "is a mapping that holds every example of the loader. Leave others out of the loader."
            )
    else:
        size = int(indices[-1]) + 1 if loader.size is None else loader.size
        if len(labels) != size:
            raise ValueError(
                f"{name} has {len(labels)} labels for a dataset of {size} examples; accepted is {_ACCEPTED}."
            )
    return [_to_label(name, labels[index], index) for index in indices.tolist()], indices


def _to_label(name: str, label: Any, index: int) -> str | int:
    value = label.tolist() if hasattr(label, "tolist") else label  # of an array of one number, the number
    if isinstance(value, str | int):
        return value
    raise TypeError(
        f"{name} gives {label!r:.60} to dataset index {index}; accepted are texts and integers, one for each "
        "example."
    )
