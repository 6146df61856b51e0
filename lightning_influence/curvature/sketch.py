"""Eigenvalues from a two-sided random sketch: one product with as many vectors as the sketch has rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.linalg.estimates import Estimate, Product, random_vectors


@dataclass(frozen=True)
class Sketch:
    """A centred sketch ``Phi H Phi^T`` and what it tells.

    Attributes:
        matrix: ``Phi H Phi^T``, ``(s, s)``, for ``Phi`` with independent normal entries of variance ``1/s``.
    """

    matrix: Tensor

    @property
    def size(self) -> int:
        """``s``."""
        return len(self.matrix)

    @property
    def trace(self) -> Estimate:
        """``Tr(H)``, unbiased: the mean of ``s`` Hutchinson estimates."""
        values = self.matrix.diagonal() * self.size
        return Estimate(float(values.mean()), float(values.std() / math.sqrt(self.size)))

    @property
    def frobenius(self) -> float:
        """``||H||_F``, from an unbiased estimate of its square.

        With ``S = Phi H Phi^T``: ``E Tr(S^2) = (1 + 1/s) ||H||_F^2 + Tr(H)^2 / s`` and
        ``E Tr(S)^2 = Tr(H)^2 + 2 ||H||_F^2 / s``, two equations for two unknowns.
        """
        s = self.size
        square, trace = float(self.matrix.square().sum()), float(self.matrix.trace())
        return math.sqrt(max(0.0, (square - trace**2 / s) / (1 + 1 / s - 2 / s**2)))

    def top(self, count: int) -> list[Estimate]:
        """Return the largest eigenvalues of ``H``, largest first; zeros for those that the noise hides.

        The many small eigenvalues act on the sketch as ``Tr / s`` times the identity plus noise of the order
        of ``||H||_F / sqrt(s)``; the former is taken off. The error is additive, as in Swartworth and
        Woodruff (2023), who show that ``s = O(1 / eps^2)`` is enough for ``eps ||H||_F`` and that no sketch
        does better; it is given as ``2 sqrt(2 / s) ||H||_F``, two standard deviations of a dominant
        eigenvalue ``lambda``, whose sketch is ``lambda ||phi||^2``.
        """
        values = torch.linalg.eigvalsh(self.matrix).flip(0)
        error = 2 * math.sqrt(2 / self.size) * self.frobenius
        trace = float(self.matrix.trace())
        found: list[Estimate] = []
        taken = 0.0
        for value in values[:count].tolist():
            eigenvalue = max(0.0, value - (trace - taken - value) / self.size)
            taken += eigenvalue
            found.append(Estimate(eigenvalue, error))
        return found


def sketch(
    product: Product,
    numel: int,
    size: int,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Sketch:
    """Sketch a symmetric matrix from both sides, in the spirit of Swartworth and Woodruff (2023).

    The product may be a minibatch's: the sketch is linear in ``H``, so that it is unbiased then.

    Args:
        product: ``H``.
        numel: ``P``.
        size: ``s``, at least 2: for an additive error ``eps ||H||_F`` about ``8 / eps^2``.
        seed: of the sketching matrix.
        dtype: precision of the vectors.
        device: where they are.

    Returns:
        The sketch, from one call of the product.

    Raises:
        ValueError: if the size is below 2.
    """
    if size < 2:
        raise ValueError(f"Got size={size}; accepted are sizes of at least 2.")
    rows = random_vectors(size, numel, seed, kind="normal", dtype=dtype, device=device) / math.sqrt(size)
    matrix = product(rows).double() @ rows.double().T
    return Sketch((matrix + matrix.T) / 2)
