"""Inner products and orthonormal bases of long vectors, made in the memory of the vectors."""

from __future__ import annotations

import torch
from torch import Tensor, float64

# Columns that are converted at once.
_COLUMNS = 2**15


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right.T`` in float64, for vectors ``(V, P)`` and ``(W, P)`` in rows."""
    result = left.new_zeros(len(left), len(right), dtype=float64)
    for start in range(0, left.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        result += left[:, columns].double() @ right[:, columns].double().T
    return result


# Columns of the vectors that are worked on at once where a result takes their place.
_COLUMNS = 2**15


def orthonormal(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis ``Q (m, P)`` of vectors ``(M, P)``, in their place, and the mixing.

    Args:
        vectors: overwritten.

    Returns:
        ``Q`` and ``mixing (m, M)`` with ``Q = mixing @ vectors``.
    """
    scale = normalise(vectors)
    basis, whitening = whitened(vectors)
    return basis, whitening / scale.T


def normalise(vectors: Tensor) -> Tensor:
    """Divide vectors by their norms, in place.

    Returns:
        The norms, ``(V, 1)``.
    """
    scale: Tensor = vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
    vectors.div_(scale)
    return scale


def whitened(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal ``W V``, in the memory of the vectors, and ``W``."""
    # Twice: the conditioning of the Gram matrix costs the first step orthogonality; the second restores it.
    first = _whitening(vectors)
    basis = _mixed_in_place(vectors, first)
    second = _whitening(basis)
    return _mixed_in_place(basis, second), second @ first


def _mixed_in_place(vectors: Tensor, weights: Tensor) -> Tensor:
    """Return ``weights @ vectors``, not more rows than there are, in the memory of the vectors."""
    result = vectors[: len(weights)]
    for start in range(0, vectors.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        result[:, columns] = weights @ vectors[:, columns]
    return result if len(result) == len(vectors) else result.clone()


def _whitening(vectors: Tensor) -> Tensor:
    """Return ``W`` with orthonormal ``W V``, leaving out directions that are numerically dependent."""
    gram = (vectors @ vectors.T).double()
    values, basis = torch.linalg.eigh(gram)
    floor = values.amax() * gram.shape[0] * 4 * torch.finfo(vectors.dtype).eps if len(values) else 0.0
    keep = values > floor
    whitened: Tensor = (basis[:, keep] / values[keep].sqrt()).T.to(vectors.dtype)
    return whitened
