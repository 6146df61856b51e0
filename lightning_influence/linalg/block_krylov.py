"""Preconditioned block Krylov: all queries of a group share one subspace (O'Leary 1980, in Galerkin form)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_influence.linalg.estimates import Product
from lightning_influence.linalg.orthonormal import inner
from lightning_influence.linalg.stopping import Progress, Solution


@dataclass(frozen=True)
class KrylovResult(Solution):
    """Solutions, and the subspace they were found in.

    Attributes:
        subspace: orthonormal directions ``(m, P)`` and their products ``(m, P)``, which a later call can
            start from; None unless they were asked for.
    """

    subspace: tuple[Tensor, Tensor] | None = field(default=None, repr=False)


def block_krylov(
    product: Product,
    precondition: Product,
    vectors: Tensor,
    *,
    start: tuple[Tensor, Tensor] | None = None,
    guess: Tensor | None = None,
    max_steps: int = 8,
    tolerance: float = 1e-6,
    keep_subspace: bool = False,
) -> KrylovResult:
    """Solve ``A X = V`` in the subspace that all right-hand sides span together.

    Step ``k`` adds the preconditioned residuals (at first the preconditioned right-hand sides) to the
    subspace and projects. In exact arithmetic ``P / V`` steps solve exactly. Right-hand sides below the
    tolerance add nothing further.

    Args:
        product: ``A`` (with its damping), positive definite.
        precondition: ``P^{-1}``.
        vectors: ``V``, ``(V, P)``.
        start: an orthonormal subspace ``(m, P)`` and its products ``(m, P)``, such as a coarse space, or the
            subspace of an earlier call.
        guess: answers of an earlier call, ``(V, P)``; they join the subspace at the cost of one product.
        max_steps: largest number of steps.
        tolerance: relative residual at which a right-hand side counts as solved.
        keep_subspace: whether the result holds the subspace.

    Returns:
        The solutions with their residuals.
    """
    space = _Subspace(vectors)
    if start is not None:
        space.add(*start)
    products = 0
    if guess is not None:
        known = space.outside(guess[guess.norm(dim=1) > 0])
        if len(known):
            space.add(known, product(known))
            products = 1
    progress = Progress(vectors, tolerance)
    remainder = space.remainder()
    open_ = progress.observe(remainder)
    directions, steps = vectors, 0
    while steps < max_steps and bool(open_.any()):
        fresh = space.outside(precondition(directions[open_]))
        if not len(fresh) and directions is vectors and space.size:  # all in the start already
            fresh = space.outside(precondition(remainder[open_]))
        if not len(fresh):
            break
        space.add(fresh, product(fresh))
        steps += 1
        directions = remainder = space.remainder()
        open_ = progress.observe(remainder)
    return KrylovResult(
        space.solutions(),
        progress.residuals,
        steps,
        products + steps,
        progress.history,
        {"subspace": space.size},
        subspace=space.joined() if keep_subspace else None,
    )


class _Subspace:
    """An orthonormal basis in blocks, its products with ``A``, and the Galerkin solution in it.

    Blocks are never copied together: the memory is that of the vectors themselves.

    Args:
        vectors: the right-hand sides ``(V, P)``.
    """

    def __init__(self, vectors: Tensor) -> None:
        self._vectors = vectors
        self._basis: list[Tensor] = []
        self._products: list[Tensor] = []
        self._small = vectors.new_zeros(0, 0, dtype=torch.float64)  # Q^T A Q
        self._right = vectors.new_zeros(0, len(vectors), dtype=torch.float64)  # Q^T V
        self._coordinates = vectors.new_zeros(len(vectors), 0)

    @property
    def size(self) -> int:
        """Number of directions."""
        return len(self._small)

    def add(self, fresh: Tensor, image: Tensor) -> None:
        """Take in directions ``(k, P)``, orthonormal and outside, with their products; solve anew."""
        cross = torch.cat([inner(block, image) for block in [*self._basis, fresh]])  # (m + k, k)
        size = self.size
        small = cross.new_zeros(len(cross), len(cross))
        small[:size, :size] = self._small
        small[:, size:] = cross
        small[size:, :size] = cross[:size].T
        small[size:, size:] = (cross[size:] + cross[size:].T) / 2
        self._basis.append(fresh)
        self._products.append(image)
        self._small, self._right = small, torch.cat([self._right, inner(fresh, self._vectors)])
        coordinates: Tensor = torch.linalg.solve(small, self._right)
        self._coordinates = coordinates.T.to(self._vectors.dtype)

    def outside(self, directions: Tensor) -> Tensor:
        """Return the part of ``directions`` that is numerically outside the basis, orthonormal."""
        scale = directions.norm(dim=1, keepdim=True)
        directions = directions / scale.clamp_min(torch.finfo(directions.dtype).tiny)
        # Twice: a single projection leaves rounding errors of the size of what it removed.
        directions = self._project_out(self._project_out(directions))
        values, vectors = torch.linalg.eigh(inner(directions, directions))
        keep = values > 1e4 * torch.finfo(directions.dtype).eps
        fresh = (vectors[:, keep] / values[keep].sqrt()).T.to(directions.dtype) @ directions
        fresh = self._project_out(fresh)
        orthonormal: Tensor = torch.linalg.qr(fresh.T).Q.T.contiguous() if len(fresh) else fresh
        return orthonormal

    def remainder(self) -> Tensor:
        """Return ``V - A X``, ``(V, P)``."""
        return self._vectors - self._combine(self._products)

    def solutions(self) -> Tensor:
        """Return ``X``, ``(V, P)``."""
        return self._combine(self._basis)

    def joined(self) -> tuple[Tensor, Tensor]:
        """Return all directions and their products, ``(m, P)`` each."""
        empty = self._vectors[:0]
        return torch.cat([empty, *self._basis]), torch.cat([empty, *self._products])

    def _project_out(self, directions: Tensor) -> Tensor:
        for block in self._basis:
            directions = directions - (directions @ block.T) @ block
        return directions

    def _combine(self, blocks: list[Tensor]) -> Tensor:
        result, start = torch.zeros_like(self._vectors), 0
        for block in blocks:
            result += self._coordinates[:, start : start + len(block)] @ block
            start += len(block)
        return result
