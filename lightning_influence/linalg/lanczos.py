"""Eigenvalues and spectral density of a symmetric matrix that is known by its products: block Lanczos."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.linalg.estimates import Estimate, Product, mean_of, orthonormal_rows
from lightning_influence.linalg.traces import Traces

# Columns that are brought to double precision at once.
_COLUMNS = 2**18


@dataclass(frozen=True)
class Ritz:
    """What a block Krylov space of random vectors tells of a spectrum.

    Attributes:
        values: Ritz values, ascending, ``(m,)``, float64.
        residuals: ``||H y - theta y||`` of each, ``(m,)``: some eigenvalue is within this distance.
        coefficients: eigenvectors of the projected matrix in columns, ``(m, m)``.
        basis: orthonormal rows, ``(m, P)``.
        weights: share of each Ritz value in each random vector's spectral measure, ``(V, m)``; rows sum to 1.
        inside: ``Tr(Q H Q^T)`` and ``Tr(Q H^2 Q^T)`` for the rows ``Q`` of the basis.
    """

    values: Tensor
    residuals: Tensor
    coefficients: Tensor
    basis: Tensor
    weights: Tensor
    inside: Traces

    def top(self, count: int) -> list[Estimate]:
        """Return the largest eigenvalues, largest first, with their residuals as error bounds.

        A Ritz value is never above the eigenvalue of its rank, and some eigenvalue lies within the bound.
        """
        chosen = range(len(self.values) - 1, max(-1, len(self.values) - 1 - count), -1)
        return [self._estimate(i) for i in chosen]

    def bottom(self) -> Estimate:
        """Return the smallest eigenvalue with its residual as error bound; never below the true one."""
        return self._estimate(0)

    def norm(self) -> Estimate:
        """Return the largest magnitude of an eigenvalue, with the residual as error bound."""
        largest = self._estimate(int(self.values.abs().argmax()))
        return Estimate(abs(largest.value), largest.error)

    def vectors(self, count: int) -> Tensor:
        """Return Ritz vectors of the largest Ritz values, largest first, ``(count, P)``."""
        chosen = self.coefficients[:, -count:].flip(1).to(self.basis.dtype)
        return chosen.T @ self.basis

    def share_below(self, threshold: float) -> Estimate:
        """Return the share of eigenvalues below a threshold, with its standard error over random vectors."""
        return mean_of((self.weights * (self.values < threshold)).sum(1))

    def density(self, points: Tensor, width: float) -> tuple[Tensor, Tensor]:
        """Spectral density smoothed by a Gaussian (Lin, Saad and Yang 2016; Ghorbani et al. 2019).

        Args:
            points: where, ``(T,)``.
            width: standard deviation of the Gaussian.

        Returns:
            The density, which integrates to 1, and its standard error over the random vectors, each ``(T,)``.
        """
        scaled = (points.double()[:, None] - self.values) / width
        kernel = torch.exp(-scaled.square() / 2) / (width * math.sqrt(2 * math.pi))
        each = self.weights @ kernel.T
        count = len(each)
        spread = each.std(0) / math.sqrt(count) if count > 1 else torch.full_like(each[0], math.inf)
        return each.mean(0), spread

    def _estimate(self, i: int) -> Estimate:
        return Estimate(float(self.values[i]), float(self.residuals[i]))


def block_lanczos(product: Product, probes: Tensor, steps: int) -> Ritz:
    """Run block Lanczos with full reorthogonalisation (Golub and Underwood 1977) from random vectors.

    All random vectors share one Krylov space, which finds leading eigenvalues in fewer passes than as many
    single runs; Gauss quadrature in it gives the spectral measure of each random vector (Golub and Meurant
    2010), and their mean the density.

    Args:
        product: ``H``, called once a step with at most ``V`` vectors.
        probes: ``(V, P)``, independent with ``E[z z^T] = I``.
        steps: how many products; fewer if the space is exhausted.

    Returns:
        The Ritz values and what comes with them.

    Raises:
        ValueError: if there is no probe or no step.
    """
    if steps < 1 or not len(probes):
        raise ValueError(f"Got {len(probes)} probes and steps={steps}; accepted are at least 1 of each.")
    eps = torch.finfo(probes.dtype).eps
    block, start = orthonormal_rows(probes, eps * float(probes.norm()))
    basis, products, last = block, [], block
    size = 0.0
    for step in range(steps):
        pushed = product(last)
        products.append(pushed)
        size = max(size, float(pushed.norm(dim=1).max()))
        remainder = pushed
        for _ in range(2):
            remainder = remainder - (remainder @ basis.T) @ basis
        room = basis.shape[1] - len(basis)
        if step == steps - 1 or room == 0:
            break
        rounding = eps * size * max(10.0, basis.shape[1] ** 0.5)
        fresh, _ = orthonormal_rows(remainder, rounding)
        if not len(fresh):
            break
        fresh = fresh[:room]
        fresh = fresh - (fresh @ basis.T) @ basis
        last = torch.linalg.qr(fresh.T).Q.T
        basis = torch.cat([basis, last])
    return _ritz(basis, torch.cat(products), start)


def _ritz(basis: Tensor, products: Tensor, start: Tensor) -> Ritz:
    """Return the Ritz values of ``Q H Q^T`` with residuals from ``H Q`` itself."""
    parts = list(
        zip(torch.split(basis, _COLUMNS, dim=1), torch.split(products, _COLUMNS, dim=1), strict=True)
    )
    projected = torch.stack([rows.double() @ pushed.double().T for rows, pushed in parts]).sum(0)
    values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
    squares = torch.zeros_like(values)
    inside = 0.0
    for rows, pushed in parts:
        remainder = vectors.T @ pushed.double() - values[:, None] * (vectors.T @ rows.double())
        squares += remainder.square().sum(1)
        inside += float(pushed.double().square().sum())
    first = start.double() @ vectors[: start.shape[1]]
    weights = first.square()
    return Ritz(
        values=values,
        residuals=squares.sqrt(),
        coefficients=vectors,
        basis=basis,
        weights=weights / weights.sum(1, keepdim=True),
        inside=Traces(Estimate(float(values.sum()), 0.0), Estimate(inside, 0.0)),
    )
