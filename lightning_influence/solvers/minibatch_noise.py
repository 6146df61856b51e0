"""How noisy minibatch curvature is: the constant ``kappa`` of ``E[h_x^2] <= kappa Tr(H) H``.

``h_x`` is the curvature of one example, ``H`` its mean (Klochkov and Liu 2024, after Bach and Moulines 2013).
The smallest such constant is the largest generalized eigenvalue of ``(E[h_x^2], H)`` over the trace; here it
is the largest ratio over a set of directions, which it cannot fall below.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.solvers.sampled import BatchProduct
from lightning_influence.solvers.stopping import Product


def kappa(squares: Tensor, forms: Tensor, trace: float) -> float:
    """Return ``kappa`` from quadratic forms on some directions.

    Args:
        squares: ``v^T E[h_x^2] v``, ``(V,)``.
        forms: ``v^T H v``, ``(V,)``; directions in which it vanishes say nothing.
        trace: ``Tr(H)``.

    Returns:
        At least ``1 / P``; 1 where there is nothing to tell from.
    """
    kept = forms > 1e-6 * forms.max() if len(forms) else forms > 0
    if not bool(kept.any()) or not trace > 0:
        return 1.0
    return float((squares[kept] / forms[kept]).max()) / trace


def squares_from_batches(
    product: Product,
    batch_product: BatchProduct,
    directions: Tensor,
    num_examples: int,
    *,
    batch: int = 32,
    draws: int = 8,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Estimate ``v^T E[h_x^2] v`` where only products with minibatches are to be had.

    For batches of ``b`` out of ``N`` without replacement ``E||H_b v||^2 - ||H v||^2`` is ``(N - b) / (b (N -
    1))`` times what single examples have.

    Args:
        product: ``H``, without damping.
        batch_product: ``H_b``, without damping.
        directions: ``(V, P)``.
        num_examples: ``N``.
        batch: ``b``.
        draws: number of batches.
        seed: of the batches.

    Returns:
        The squares ``(V,)`` and ``v^T H v``, ``(V,)``.
    """
    image = product(directions)
    forms, full = (directions * image).sum(dim=1), image.square().sum(dim=1)
    batch = max(1, min(batch, num_examples // 2))
    share = (num_examples - batch) / (batch * max(1, num_examples - 1))
    excess = torch.zeros_like(full)
    for draw in range(draws):
        excess += (batch_product(directions, batch, seed + draw) - image).square().sum(dim=1) / draws
    return full + (excess / share if share > 0 else 0.0), forms
