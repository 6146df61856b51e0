"""Sharded tensors made whole, those of one module in one collective, as FSDP gathers them itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def make_whole(parts: Sequence[Any]) -> list[Tensor]:
    """Gather distributed tensors; every process of their mesh has to call it with its parts of the same ones.

    What a call of a collective costs does not depend on how little it carries, and a module has many small
    parameters. So those that are spread over one dimension of the same processes travel together; others,
    which ``fully_shard`` does not make by itself, come one by one.

    Args:
        parts: distributed tensors.

    Returns:
        The whole tensors, contiguous and each in its own memory.
    """
    together: dict[Any, list[int]] = {}
    found: list[Any] = [None] * len(parts)
    for place, part in enumerate(parts):
        if part.device_mesh.ndim == 1 and part.placements[0].is_shard():
            key = part.device_mesh.get_group(), part.dtype, part.to_local().device
            together.setdefault(key, []).append(place)
        else:
            found[place] = part.full_tensor()
    for (group, *_), places in together.items():
        gathered = _gather_together([parts[place] for place in places], group)
        for place, whole in zip(places, gathered, strict=True):
            found[place] = whole
    return found


def _gather_together(parts: Sequence[Any], group: Any) -> list[Tensor]:
    """Gather parts that one process group shares, of one kind of number and on one device."""
    count = dist.get_world_size(group)
    dims = [part.placements[0].dim % part.ndim for part in parts]
    widths = [-(-part.shape[dim] // count) for part, dim in zip(parts, dims, strict=True)]
    shapes = [
        (*part.shape[:dim], width, *part.shape[dim + 1 :])
        for part, dim, width in zip(parts, dims, widths, strict=True)
    ]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    own = parts[0].to_local().new_zeros(sum(sizes))
    for part, dim, shape, into in zip(parts, dims, shapes, torch.split(own, sizes), strict=True):
        local = part.to_local()
        into.view(shape).narrow(dim, 0, local.shape[dim]).copy_(local)
    everyone = own.new_empty(count * own.numel())
    dist.all_gather_into_tensor(everyone, own, group=group)
    pieces = [torch.split(of_one, sizes) for of_one in everyone.view(count, -1)]
    found = []
    for place, (part, dim, width, shape) in enumerate(zip(parts, dims, widths, shapes, strict=True)):
        # The last processes hold less than the others, or nothing.
        held = [max(0, min(width, part.shape[dim] - rank * width)) for rank in range(count)]
        views = [
            of_one[place].view(shape).narrow(dim, 0, size) for of_one, size in zip(pieces, held, strict=True)
        ]
        found.append(torch.cat(views, dim))
    return found
