"""The spectrum of a preconditioned matrix, as far as a stationary iteration needs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.linalg.estimates import Product
from lightning_influence.support.errors import IndefiniteError


@dataclass(frozen=True)
class PreconditionedSpectrum:
    """Eigenvalues of ``P^{-1} A``.

    Attributes:
        largest: the largest, from above up to the size of Lanczos' own error bound.
        smallest: the smallest that was found; the true one may be smaller.
        trace: ``Tr(P^{-1} A)``, estimated from random signs (Hutchinson 1990).
        products: products with ``A`` it took.
    """

    largest: float
    smallest: float
    trace: float
    products: int


def preconditioned_spectrum(
    product: Product, precondition: Product, like: Tensor, *, steps: int = 8, probes: int = 4, seed: int = 0
) -> PreconditionedSpectrum:
    """Estimate the ends of the spectrum of ``P^{-1} A`` by Lanczos in the inner product of ``P``.

    Lanczos (1950) on several random sign vectors at once. The largest Ritz value of each is a lower bound of
    the largest eigenvalue; with the norm of its residual added it is nearly always an upper one (Paige 1971).

    Args:
        product: ``A``, positive definite.
        precondition: ``P^{-1}``, positive definite.
        like: any tensor ``(..., P)`` of the device and precision to work in.
        steps: products with ``A``, each on all probes.
        probes: number of random vectors.
        seed: of the random vectors.

    Returns:
        The estimates.

    Raises:
        IndefiniteError: if an eigenvalue is not positive.
    """
    numel = like.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (probes, numel), generator=generator).mul_(2).sub_(1)
    plain = signs.to(like.device, like.dtype)
    trace = float((precondition(plain) * product(plain)).sum(dim=1).mean())
    lanczos, before = plain, torch.zeros_like(plain)
    corrected = precondition(lanczos)
    norm, norm_before = _norm(lanczos, corrected), torch.ones(probes, 1).to(plain)
    diagonals: list[Tensor] = []
    norms: list[Tensor] = []
    for _ in range(min(steps, numel)):
        unit = corrected / norm
        pushed = product(unit)
        diagonal = (unit * pushed).sum(dim=1, keepdim=True)
        following = pushed - (diagonal / norm) * lanczos - (norm / norm_before) * before
        before, lanczos, norm_before = lanczos, following, norm
        corrected = precondition(lanczos)
        norm = _norm(lanczos, corrected)
        diagonals.append(diagonal[:, 0].double())
        norms.append(norm[:, 0].double())
        if bool((norm <= 1e-6 * diagonal.abs()).any()):  # an invariant subspace
            break
    largest, smallest = _ends(torch.stack(diagonals), torch.stack(norms))
    if not smallest > 0:
        raise IndefiniteError(
            f"The preconditioned curvature has an eigenvalue of {smallest:.3g}; positive ones are accepted. "
            "Raise the damping, or use method='minres'."
        )
    return PreconditionedSpectrum(largest, smallest, trace, 1 + len(diagonals))


def _ends(diagonals: Tensor, norms: Tensor) -> tuple[float, float]:
    """Return the ends of the Ritz values ``(steps, probes)``, the upper one with its error bound."""
    uppers, lowers = [], []
    for column in range(diagonals.shape[1]):
        off = norms[:-1, column]
        tridiagonal = torch.diag(diagonals[:, column]) + torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(tridiagonal)
        uppers.append(float(values[-1] + norms[-1, column] * vectors[-1, -1].abs()))
        lowers.append(float(values[0]))
    return max(uppers), min(lowers)


def _norm(vectors: Tensor, corrected: Tensor) -> Tensor:
    return (vectors * corrected).sum(dim=1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny).sqrt()
