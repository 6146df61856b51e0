"""Rows of the outputs that a loss is a function of, by example; calls that share out the examples are one.

A step that runs a network on one example after the other, or on one part of the batch after the other, has
the same output in several calls, each of other examples. Taken apart they would be as many outputs, of which
each example has one and no other, and those of a part of the batch would not be those of the whole.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.model.uses.places import Place, from_owners


@dataclass(frozen=True)
class OutputRows:
    """One output, made by one call or by several.

    Attributes:
        members: positions of the calls' tensors among all.
        place: where the examples stand in them when joined; None for rows that are the examples in order.
    """

    members: tuple[int, ...]
    place: Place | None

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the tensor of all calls.

        Args:
            tensors: one for each call, of all outputs.
        """
        own = [tensors[number] for number in self.members]
        if len(own) == 1:
            return own[0]
        assert self.place is not None
        assert self.place.dim is not None
        return torch.cat(own, self.place.dim)

    def split(self, tensors: Sequence[Tensor], num_examples: int) -> Tensor:
        """Return the rows of each example, ``(B, R, ...)``, filled up with zeros where others have more.

        Args:
            tensors: one for each call, of all outputs.
            num_examples: ``B``.
        """
        tensor = self.join(tensors)
        if self.place is None:
            return tensor.reshape(num_examples, len(tensor) // num_examples, *tensor.shape[1:])
        return self.place.split(tensor, num_examples)


def keep_apart(places: Sequence[Place | None]) -> tuple[OutputRows, ...]:
    """Return outputs of one call each, at these places."""
    return tuple(OutputRows((number,), place) for number, place in enumerate(places))


def join_calls(
    tensors: Sequence[Tensor], places: Sequence[Place | None], names: Sequence[Hashable], num_examples: int
) -> tuple[OutputRows, ...]:
    """Find calls that made one output together: of one name and form, and of different examples.

    Args:
        tensors: what the calls made, in their order.
        places: where the examples stand in them.
        names: of what each call has made; equal for the calls of one module.
        num_examples: ``B``.

    Returns:
        The outputs, in the order of their first calls.
    """
    found: list[tuple[Hashable, list[int], list[int]]] = []  # what they have in common, calls, owners
    for number, (tensor, place, name) in enumerate(zip(tensors, places, names, strict=True)):
        own = _owners(tensor, place, num_examples)
        form = (number,) if own is None or place is None else (name, *_form(tensor, place))
        for other, members, owners in found:
            if other == form and not set(owners) & set(own or ()):
                members.append(number)
                owners += own or ()
                break
        else:
            found.append((form, [number], own or []))
    return tuple(
        OutputRows(
            tuple(members),
            places[members[0]]
            if len(members) == 1
            else from_owners(_dim(places[members[0]]), owners, num_examples),
        )
        for _, members, owners in found
    )


def _dim(place: Place | None) -> int:
    """Return the dimension of the examples; a tensor of one example has its own in all rows."""
    return 0 if place is None or place.dim is None else place.dim


def _form(tensor: Tensor, place: Place) -> tuple[Hashable, ...]:
    """Return what calls have to have in common to be joined."""
    dim = _dim(place)
    return dim, tensor.dtype, tensor.device, tensor.shape[:dim], tensor.shape[dim + 1 :]


def _owners(tensor: Tensor, place: Place | None, num_examples: int) -> list[int] | None:
    """Return the example of each slice; None where it is not known."""
    if place is None or not tensor.dim():
        return None
    if place.dim is None:
        assert place.owners is not None
        return [place.owners[0]] * len(tensor)
    owners: list[int] = place.owner_vector(num_examples).tolist()
    return owners
