"""Finite sums with known curvature: h_n = x_n x_n^T, H their mean, minibatches without replacement."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.linalg.lanczos import PreconditionedSpectrum, measure_preconditioned_spectrum


class FiniteSum:
    """N rank-one curvatures in P dimensions whose spectrum falls by `decay` orders of magnitude."""

    def __init__(
        self,
        N: int = 400,
        P: int = 30,
        damping: float = 0.1,
        decay: float = 1.5,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        scale = torch.logspace(0, -decay, P, dtype=torch.float64)
        rotation = torch.linalg.qr(torch.randn(P, P, dtype=torch.float64)).Q
        rows = torch.randn(N, P, dtype=torch.float64) * scale * (0.5 + torch.rand(N, 1, dtype=torch.float64))
        rows = rows @ rotation
        self.rows = rows.to(dtype)
        self.N, self.P, self.damping = N, P, damping
        self.H = rows.T @ rows / N
        self.A = self.H + damping * torch.eye(P, dtype=torch.float64)
        self.vectors = torch.randn(4, P, dtype=torch.float64).to(dtype)
        self.exact = torch.linalg.solve(self.A, self.vectors.double().T).T
        self.examples = 0  # example products that were taken

    @property
    def largest(self) -> float:
        return float(torch.linalg.eigvalsh(self.H)[-1])

    @property
    def kappa(self) -> float:
        """The smallest constant of E[h^2] <= kappa Tr(H) H."""
        squares = (self.rows * self.rows.square().sum(dim=1, keepdim=True)).T @ self.rows / self.N
        values, vectors = torch.linalg.eigh(self.H)
        root = vectors / values.sqrt()
        return float(torch.linalg.eigvalsh(root.T @ squares.double() @ root)[-1] / self.H.trace())

    def product(self, vectors: Tensor) -> Tensor:
        self.examples += self.N
        return vectors @ self.A.to(vectors.dtype)

    def batch_product(self, vectors: Tensor, count: int, seed: int) -> Tensor:
        self.examples += count
        generator = torch.Generator().manual_seed(seed)
        rows = self.rows[torch.randperm(self.N, generator=generator)[:count]]
        return (vectors @ rows.T) @ rows / count + self.damping * vectors

    def residuals(self, solutions: Tensor) -> Tensor:
        rest = self.vectors.double() - solutions.double() @ self.A
        return rest.norm(dim=1) / self.vectors.double().norm(dim=1)

    def errors(self, solutions: Tensor) -> Tensor:
        return (solutions.double() - self.exact).norm(dim=1) / self.exact.norm(dim=1)


class Preconditioned(FiniteSum):
    """With a preconditioner in a basis that is a little off, as EK-FAC's is."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        identity = torch.eye(self.P, dtype=torch.float64)
        basis = torch.linalg.qr(identity + 0.02 * torch.randn(self.P, self.P, dtype=torch.float64)).Q
        _, vectors = torch.linalg.eigh(self.A)
        basis = vectors @ basis
        spread = torch.exp(0.3 * torch.randn(self.P, dtype=torch.float64))
        self.M = basis / ((basis.T @ self.A @ basis).diagonal() * spread) @ basis.T
        self.eigenvalues = torch.linalg.eigvals(self.M @ self.A).real.sort().values

    def precondition(self, v: Tensor) -> Tensor:
        return v @ self.M.to(v.dtype)

    def spectrum(self, **options) -> PreconditionedSpectrum:
        return measure_preconditioned_spectrum(self.product, self.precondition, self.vectors, **options)
