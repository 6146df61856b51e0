"""Sums over the processes of a distributed run."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_processes(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the sum of a tensor over the processes, computed in place.

    Args:
        tensor: this process's part, of any shape and on any device.
        device: where the processes communicate.
    """
    buffer = tensor.to(device).contiguous()
    dist.all_reduce(buffer)
    return tensor if buffer is tensor else tensor.copy_(buffer)
