"""Lanczos (1950): eigenvalues and spectral density of a symmetric matrix that is known by its products.

There are two forms. With full reorthogonalisation (:func:`block_lanczos`) all vectors are kept, and the Ritz
values come with error bounds. The short recursion (:class:`Recursion`) keeps two vectors and works in the
inner product of a preconditioner; MINRES is built on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.linalg.estimates import Estimate, Product, Traces, average, draw_vectors
from lightning_influence.linalg.orthonormal import inner, orthonormalise
from lightning_influence.support.errors import IndefiniteError

# Columns that are brought to float64 at once. Chosen by hand: 64 vectors take 128 MiB.
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
        chosen = self.coefficients[:, -count:].flip(1).to(self.basis)
        return chosen.T @ self.basis

    def share_below(self, threshold: float) -> Estimate:
        """Return the share of eigenvalues below a threshold, with its standard error over random vectors."""
        return average((self.weights * (self.values < threshold)).sum(1))

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
    # What is left of a product below this is rounding of sums over P numbers; the space is then exhausted.
    rounding = torch.finfo(probes.dtype).eps * max(10.0, probes.shape[1] ** 0.5)
    last = orthonormalise(probes.clone())[0]
    basis, products, size = [last], [], 0.0
    for step in range(steps):
        products.append(product(last))
        size = max([size, *products[-1].norm(dim=1).tolist()])
        room = probes.shape[1] - sum(map(len, basis))
        if step == steps - 1 or room == 0 or not size:
            break
        last = orthonormalise(products[-1].clone(), basis, scale=size, least=rounding)[0][:room]
        if not len(last):
            break
        basis.append(last)
    start, basis = inner(probes, basis[0]), [torch.cat(basis)]  # one after the other, to hold less at once
    return _ritz(basis[0], torch.cat(products), start)


def estimate_largest_eigenvalue(product: Product, start: Tensor, steps: int = 10) -> float:
    """Estimate the eigenvalue of largest absolute value from below.

    Args:
        product: a symmetric matrix on ``(V, P)``.
        start: a vector ``(P,)`` with some part along the eigenvector sought, such as a random one.
        steps: products.

    Returns:
        Its absolute value; 0 if the matrix maps ``start`` to zero.
    """
    return block_lanczos(product, start[None], steps).norm().value if bool(start.any()) else 0.0


def _ritz(basis: Tensor, products: Tensor, start: Tensor) -> Ritz:
    """Return the Ritz values of ``Q H Q^T`` with residuals from ``H Q`` itself."""
    parts = list(
        zip(torch.split(basis, _COLUMNS, dim=1), torch.split(products, _COLUMNS, dim=1), strict=True)
    )
    projected = inner(basis, products)
    values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
    squares = torch.zeros_like(values)
    inside = 0.0
    for rows, pushed in parts:
        remainder = vectors.T @ pushed.double() - values[:, None] * (vectors.T @ rows.double())
        squares += remainder.square().sum(1)
        inside += float(pushed.double().square().sum())
    # What is small is for questions that are asked later, wherever the vectors are.
    values, vectors, start = values.cpu(), vectors.cpu(), start.cpu()
    first = start @ vectors[: start.shape[1]]
    weights = first.square()
    return Ritz(
        values=values,
        residuals=squares.sqrt().cpu(),
        coefficients=vectors,
        basis=basis,
        weights=weights / weights.sum(1, keepdim=True),
        inside=Traces(Estimate(float(values.sum()), 0.0), Estimate(inside, 0.0)),
    )


@dataclass
class Recursion:
    """Lanczos in the inner product of ``P^{-1}``, for several vectors ``(k, P)`` apart from each other.

    Attributes:
        vectors: the last Lanczos vectors, not normalised.
        before: those before, not normalised.
        corrected: ``P^{-1}`` times the last ones.
        norm: ``sqrt(v^T P^{-1} v)`` of the last ones, ``(k, 1)``: the next off-diagonals.
        norm_before: of those before.
    """

    vectors: Tensor
    before: Tensor
    corrected: Tensor
    norm: Tensor
    norm_before: Tensor

    @classmethod
    def begin(cls, vectors: Tensor, precondition: Product | None) -> Recursion:
        """Return the state before the first step, from vectors ``(k, P)``."""
        corrected = vectors if precondition is None else precondition(vectors)
        norm = _norm(vectors, corrected)
        return cls(vectors, torch.zeros_like(vectors), corrected, norm, torch.ones_like(norm))

    def advance(self, product: Product, precondition: Product | None) -> tuple[Tensor, Tensor, Tensor]:
        """Take one step, with one product.

        Returns:
            What the matrix was multiplied with, ``(k, P)``, the product, ``(k, P)``, and the diagonal of the
            tridiagonal matrix, ``(k, 1)``.

        Raises:
            IndefiniteError: if the preconditioner is not positive definite.
        """
        unit = self.corrected / self.norm
        pushed = product(unit)
        diagonal = (unit * pushed).sum(dim=1, keepdim=True)
        following = pushed - (diagonal / self.norm) * self.vectors
        following = following - (self.norm / self.norm_before) * self.before
        self.before, self.vectors, self.norm_before = self.vectors, following, self.norm
        self.corrected = following if precondition is None else precondition(following)
        self.norm = _norm(following, self.corrected)
        return unit, pushed, diagonal


def _norm(vectors: Tensor, corrected: Tensor) -> Tensor:
    """Return ``sqrt(v^T P^{-1} v)``, ``(k, 1)``.

    Raises:
        IndefiniteError: if the preconditioner is not positive definite.
    """
    # A norm that is zero may come out negative by the rounding of its sum, which is no fault of the matrix.
    squared = (vectors * corrected).sum(dim=1, keepdim=True)
    rounding = 8 * torch.finfo(vectors.dtype).eps * vectors.norm(dim=1) * corrected.norm(dim=1)
    if bool((squared[:, 0] < -rounding).any()):
        raise IndefiniteError(
            "The iteration needs a positive definite preconditioner, and this one gives a vector a negative "
            "norm. Refit the factors, raise the damping, or solve without a preconditioner."
        )
    return squared.clamp_min(0).sqrt()


@dataclass(frozen=True)
class PreconditionedSpectrum:
    """Eigenvalues of ``P^{-1} A``, as far as a stationary iteration needs them.

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


def measure_preconditioned_spectrum(
    product: Product, precondition: Product, like: Tensor, *, steps: int = 8, probes: int = 4, seed: int = 0
) -> PreconditionedSpectrum:
    """Estimate the ends of the spectrum of ``P^{-1} A`` from several random sign vectors at once.

    The largest Ritz value of each is a lower bound of the largest eigenvalue; with the norm of its residual
    added it is nearly always an upper one (Paige 1971).

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
    signs = draw_vectors(probes, numel, seed, dtype=like.dtype, device=like.device)
    recursion = Recursion.begin(signs, precondition)
    trace = float((recursion.corrected * product(signs)).sum(dim=1).mean())
    diagonals: list[Tensor] = []
    norms: list[Tensor] = []
    for _ in range(min(steps, numel)):
        _, _, diagonal = recursion.advance(product, precondition)
        diagonals.append(diagonal[:, 0].double())
        norms.append(recursion.norm[:, 0].double())
        # An invariant subspace: the next vector would be rounding. Chosen by hand.
        if bool((recursion.norm <= 1e-6 * diagonal.abs()).any()):
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
