"""Preconditioned block Krylov: all queries of a group share one subspace (O'Leary 1980, in Galerkin form)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.linalg.estimates import Product
from lightning_influence.linalg.orthonormal import inner, orthonormalise
from lightning_influence.linalg.stopping import Progress, Solution

# Columns of the residuals that are summed in float64 at once. Chosen by hand: 64 vectors take 16 MiB.
_COLUMNS = 2**15


class Subspace:
    """An orthonormal basis in blocks, its products with ``A``, and the Galerkin solution in it.

    Blocks are never copied together: the memory is that of the vectors themselves.

    Args:
        vectors: the right-hand sides ``(V, P)``.
        start: an orthonormal basis ``(m, P)`` to begin with, such as a coarse space's, and its products ``(m,
            P)``.
    """

    def __init__(self, vectors: Tensor, start: tuple[Tensor, Tensor] | None = None) -> None:
        self.vectors = vectors
        self._basis: list[Tensor] = []
        self._products: list[Tensor] = []
        self._small = vectors.new_zeros(0, 0, dtype=torch.float64)  # Q^T A Q
        self._right = vectors.new_zeros(0, len(vectors), dtype=torch.float64)  # Q^T V
        self._coordinates = vectors.new_zeros(len(vectors), 0, dtype=torch.float64)
        if start is not None:
            self.add(*start)

    @property
    def size(self) -> int:
        """Number of directions."""
        return len(self._small)

    @property
    def basis(self) -> Tensor:
        """All directions, copied together, ``(m, P)``."""
        return torch.cat([self.vectors[:0], *self._basis])

    def add(self, fresh: Tensor, image: Tensor) -> None:
        """Take in directions ``(k, P)``, orthonormal and outside, with their products; solve anew."""
        # Only the new rows and columns are computed: the rest of Q^T A Q is as before.
        cross = torch.cat([inner(block, image) for block in [*self._basis, fresh]])  # (m + k, k)
        size = len(self._small)
        small = cross.new_zeros(len(cross), len(cross))
        small[:size, :size] = self._small
        small[:, size:] = cross
        small[size:, :size] = cross[:size].T
        small[size:, size:] = (cross[size:] + cross[size:].T) / 2
        self._basis.append(fresh)
        self._products.append(image)
        self._small, self._right = small, torch.cat([self._right, inner(fresh, self.vectors)])
        self._coordinates = torch.linalg.solve(small, self._right).T

    def find_outside(self, directions: Tensor) -> Tensor:
        """Return an orthonormal basis of what is numerically outside; the directions are overwritten."""
        # Chosen by hand: what is nearer to the basis brings mostly rounding of what is taken out of it.
        least = 1e2 * torch.finfo(directions.dtype).eps ** 0.5
        return orthonormalise(directions, self._basis, least=least)[0]

    def compute_remainder(self) -> Tensor:
        """Return ``V - A X``, ``(V, P)``, with sums in float64.

        The products are those of the basis, so that this costs no further one.
        """
        result = torch.empty_like(self.vectors)
        for start in range(0, result.shape[1], _COLUMNS):
            columns = slice(start, start + _COLUMNS)
            result[:, columns] = self.vectors[:, columns].double() - self._combine(self._products, columns)
        return result

    def compute_solutions(self) -> Tensor:
        """Return ``X``, ``(V, P)``."""
        result = torch.empty_like(self.vectors)
        for start in range(0, result.shape[1], _COLUMNS):
            columns = slice(start, start + _COLUMNS)
            result[:, columns] = self._combine(self._basis, columns)
        return result

    def _combine(self, blocks: list[Tensor], columns: slice) -> Tensor:
        result = self.vectors[:, columns].new_zeros(self.vectors[:, columns].shape, dtype=torch.float64)
        start = 0
        for block in blocks:
            result += self._coordinates[:, start : start + len(block)] @ block[:, columns].double()
            start += len(block)
        return result


def block_krylov(
    product: Product,
    precondition: Product,
    space: Subspace,
    *,
    max_steps: int = 8,
    tolerance: float = 1e-6,
    shorten: bool = False,
) -> Solution:
    """Solve ``A X = V`` in the subspace that all right-hand sides span together.

    Step ``k`` adds the preconditioned residuals (at first the preconditioned right-hand sides) to the
    subspace and projects. In exact arithmetic ``P / V`` steps solve exactly. Right-hand sides below the
    tolerance add nothing further.

    Args:
        product: ``A`` (with its damping), positive definite.
        precondition: ``P^{-1}``.
        space: the right-hand sides and what their subspace begins with; it is enlarged.
        max_steps: largest number of steps.
        tolerance: relative residual at which a right-hand side counts as solved.
        shorten: whether solutions with residuals above 1, those of nothing at all, are multiplied by the
            number that makes them smallest. What is best in the norm of ``A`` may be too long for that.

    Returns:
        The solutions with their residuals, and with ``shorten`` how many were shortened.
    """
    progress = Progress(space.vectors, tolerance)
    directions, remainder, steps = space.vectors, space.compute_remainder(), 0
    open_ = progress.observe(remainder)
    while steps < max_steps and bool(open_.any()):
        fresh = space.find_outside(precondition(directions[open_]))
        if not len(fresh) and not steps and space.size:  # the start holds the right-hand sides already
            fresh = space.find_outside(precondition(remainder[open_]))
        if not len(fresh):
            break
        space.add(fresh, product(fresh))
        steps += 1
        directions = remainder = space.compute_remainder()
        open_ = progress.observe(remainder)
    facts, solutions, residuals = {"subspace": space.size}, space.compute_solutions(), progress.residuals
    if shorten:
        long = residuals > 1
        image = (space.vectors - remainder)[long]
        lengths = (image * space.vectors[long]).sum(dim=1) / image.square().sum(dim=1)
        solutions[long] *= lengths[:, None]
        rest = (space.vectors[long] - lengths[:, None] * image).norm(dim=1)
        residuals[long] = (rest / space.vectors[long].norm(dim=1)).to(residuals.dtype)
        facts["shortened"] = int(long.sum())
    return Solution(solutions, residuals, steps, steps, progress.history, facts)
