"""Where tensors hold the examples of their batch, as batches of the same form have shown before.

A tensor of a batch holds its examples in a dimension of their number. Where several dimensions are that long,
as in a time-first batch of as many examples as time steps, or where one is by chance, as that of a mask of
time steps, the batch itself does not tell. Batches of another size do: what is noted of a form of batches,
among all that passes have found in order, is which dimensions have had the batch's size in each so far.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from lightning_influence.model.batches.ragged import find_places, find_rows
from lightning_influence.model.batches.rearranging import Layout
from lightning_influence.model.uses.places import Place
from lightning_influence.support.batches import find_tensors

Dims = list[int] | None
"""Dimensions of a tensor that may hold the examples; None where these are told by an index."""

_FORM = "examples of form {}: "


def note_form(verified: set[str], batch: Any, count: int) -> None:
    """Note which dimensions of a batch's tensors may hold its examples.

    Args:
        verified: what passes have found in order; completed here.
        batch: the batch.
        count: number of examples ``B``. A batch of one shows nothing.
    """
    tensors = find_tensors(batch)
    if count < 2 or not tensors:
        return
    dims, known = [_dims_of(tensor, count) for tensor in tensors], _read(verified, tensors)
    shown = dims if known is None else [_join(*pair) for pair in zip(known, dims, strict=True)]
    if shown == known:
        return
    # Those that belong to the examples by an index may be as many by chance, and show nothing.
    rows = find_rows(tensors, count)
    _write(verified, tensors, [None if number in rows else own for number, own in enumerate(shown)])


def assume_layout(verified: set[str], batch: Any, count: int, layout: Layout) -> None:
    """Note how a batch is read, whatever batches before have shown of single tensors.

    Args:
        verified: what passes have found in order; completed here.
        batch: the batch.
        count: number of examples ``B``.
        layout: where single tensors hold the examples.
    """
    tensors = find_tensors(batch)
    known = _read(verified, tensors) or [_dims_of(tensor, count) for tensor in tensors]
    for number, dim in layout.items():
        known[number] = [] if dim is None else [dim]
    _write(verified, tensors, known)


def read_form(verified: Collection[str], batch: Any, count: int) -> Layout:
    """Return where single tensors hold the examples, if it is not in their first dimension of that size.

    Args:
        verified: what passes have found in order.
        batch: the batch.
        count: number of examples ``B``.
    """
    tensors = find_tensors(batch)
    known = None if count < 2 else _read(verified, tensors)
    layout: dict[int, int | None] = {}
    for number, (tensor, dims) in enumerate(zip(tensors, known or (), strict=False)):
        sizes = _dims_of(tensor, count)
        if dims is None or not sizes:
            continue
        held = next((dim for dim in dims if dim in sizes), None)
        if held != sizes[0] and (held is not None or not dims):
            layout[number] = held
    return layout


def place_examples(verified: Collection[str], batch: Any, count: int) -> dict[Tensor, Place | None]:
    """Return where the examples stand in the tensors of a batch that do not tell it by their sizes.

    Args:
        verified: what passes have found in order.
        batch: any nesting.
        count: number of examples ``B``.

    Returns:
        By tensor: what an index says, or batches before have shown; None for one that holds no examples.
    """
    tensors, layout = find_tensors(batch), read_form(verified, batch, count)
    shown = {tensors[number]: None if dim is None else Place(dim) for number, dim in layout.items()}
    return shown | dict[Tensor, Place | None](find_places(batch, count))


def _join(old: Dims, new: Dims) -> Dims:
    """Return the dimensions that batches before and this one have had of their sizes."""
    if old is None or new is None:
        return None
    # Where none is left of several, data of another question have their examples elsewhere.
    return [dim for dim in old if dim in new] or (new if old else [])


def _dims_of(tensor: Tensor, count: int) -> Dims:
    return [dim for dim, size in enumerate(tensor.shape) if size == count]


def _key(tensors: Sequence[Tensor]) -> str:
    """Return what is noted of batches with as many tensors of these kinds."""
    kinds = json.dumps([(tensor.ndim, str(tensor.dtype)) for tensor in tensors])
    return _FORM.format(zlib.crc32(kinds.encode()))


def _read(verified: Collection[str], tensors: Sequence[Tensor]) -> list[Dims] | None:
    """Return the dimensions that have had the batch's size so far, by tensor; None for what is not known."""
    key = _key(tensors)
    noted = next((text for text in verified if text.startswith(key)), None)
    return None if noted is None else list(json.loads(noted.removeprefix(key)))


def _write(verified: set[str], tensors: Sequence[Tensor], dims: Sequence[Dims]) -> None:
    key = _key(tensors)
    verified -= {text for text in verified if text.startswith(key)}
    verified.add(key + json.dumps(list(dims)))
