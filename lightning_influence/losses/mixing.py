"""Few random mixtures of many curvature columns, whose outer products are right on average.

Let ``b_1 .. b_K`` be the columns of the square root of an example's output curvature. Put each into one of
``S`` groups, and let a seed be the sum of a group's columns with independent random signs. The seeds' outer
products sum to the curvature plus products of *different* columns of the same group, whose signs average to
zero: the estimate is unbiased, and exact with ``S = K``. Its variance is about the sum over groups of the
squared energy (total of ``||b_k||^2``) less the sum of the squared energies of the columns, so large columns
are spread over the groups.

Labels drawn from the model have the same mean, but a class of probability ``p`` enters with weight ``1 / p``
once in ``1 / p`` draws: where the model is sure of itself, nearly all of the curvature then comes from rare
draws. Signs give every column the same share each time (Hutchinson 1990, for traces). One mixture costs one
backward pass, as one drawn label does: on the digits MLP EK-FAC from one mixture scores .573 of the .575 that
all columns reach, from one drawn label .542 (``examples/benchmarks/fisher.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.losses.draws import draw_signs


def balanced_signs(energies: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Random signs in ``count`` groups of about equal energy.

    Args:
        energies: squared norm of each column, ``(B, K)``, not negative.
        count: number of groups ``S``.
        generator: source of the signs; its device may differ from that of the energies.

    Returns:
        Weights of the columns in each seed, ``(S, B, K)``: every column has weight 1 or -1 in one seed and 0
        in the others.

    Raises:
        ValueError: if there is no group.
    """
    if count < 1:
        raise ValueError(f"Got count={count}; accepted are positive numbers of groups.")
    order = energies.argsort(dim=1, descending=True, stable=True)
    # Dealt out there and back, from the largest: 0 1 .. S-1 S-1 .. 1 0 0 1 ..
    place = torch.arange(energies.shape[1], device=energies.device) % (2 * count)
    group = torch.empty_like(order).scatter_(
        1, order, torch.minimum(place, 2 * count - 1 - place).expand_as(order)
    )
    signs = draw_signs(energies, generator)
    return energies.new_zeros(count, *energies.shape).scatter_(0, group[None], signs[None])
