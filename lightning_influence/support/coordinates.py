"""Complex tensors as real ones: an entry ``a + ib`` is two coordinates, ``a`` and ``b``.

PyTorch's gradient of a real number by a complex tensor is ``d/da + i d/db``, so that the coordinates of a
gradient are the gradient by the coordinates, and inner products over them are those of real vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_coordinates(x: Tensor) -> Tensor:
    """Return a complex ``x`` as ``(*x.shape, 2)``, a real one as it is."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def from_coordinates(values: Tensor) -> Tensor:
    """Return ``values (..., 2)`` as a complex tensor ``(...)``."""
    return torch.complex(values[..., 0], values[..., 1])


def count_coordinates(x: Tensor) -> int:
    """Return the number of entries of ``x``, complex ones counted twice."""
    return x.numel() * (1 + x.is_complex())


def is_trainable_kind(x: Tensor) -> bool:
    """Return whether ``x`` is of a type that has gradients: of real or complex floating point numbers."""
    return x.is_floating_point() or x.is_complex()


def square_norm(x: Tensor) -> float:
    """Return the sum of the squared coordinates of ``x``, in float64."""
    return float(to_coordinates(x.detach()).double().square().sum())
