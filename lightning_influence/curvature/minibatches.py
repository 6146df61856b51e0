"""What minibatches of a curvature tell: how much single examples vary."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lightning_influence.linalg.estimates import Estimate, average


class SampledOperator(Protocol):
    """A curvature as products with all the data, and with minibatches whose size it tells."""

    @property
    def num_examples(self) -> int:
        """``N``."""
        ...

    def product(self, vectors: Tensor) -> Tensor:
        """``H V`` for ``V (V, P)``."""
        ...

    def batch_product(self, vectors: Tensor, count: int, seed: int) -> Tensor:
        """``H_b V`` on a minibatch ``b`` of ``count`` examples."""
        ...

    def batch_examples(self, count: int, seed: int) -> int:
        """Number of examples in the minibatch of this seed."""
        ...


def measure_example_variance(
    operator: SampledOperator,
    directions: Tensor,
    trace: float,
    *,
    count: int = 1,
    minibatches: int = 64,
    seed: int = 0,
) -> Estimate:
    """How much single examples' curvature varies: the least ``kappa`` of which directions tell.

    ``kappa`` is the number in ``E[h_x^2] <= kappa Tr(H) H``, for the curvature ``h_x`` of one example
    (Klochkov and Liu 2024), which bounds the steps of stochastic solvers. Along ``v`` it is at least
    ``E||h_x v||^2 / (Tr(H) v^T H v)``; the largest such ratio over the directions is returned. Leading
    eigenvectors are the directions to try, as these limit the step. It is a lower bound: other directions may
    have larger ratios.

    Minibatches of ``b`` of ``N`` examples, drawn without replacement, have
    ``E||H_b v||^2 - ||H v||^2 = (E||h_x v||^2 - ||H v||^2) (N - b) / (b (N - 1))``.

    Args:
        operator: ``H``.
        directions: ``v``, ``(V, P)``.
        trace: ``Tr(H)``.
        count: ``b``; single examples are best. Where only whole batches can be drawn, ``b`` is their size,
            and the batches are taken for random ones.
        minibatches: how many are drawn.
        seed: of the minibatches.

    Returns:
        The largest ratio, with its standard error over the minibatches. If every minibatch is all the data (a
        single ready-made batch), what is known is ``E||h_x v||^2 >= ||H v||^2``: the ratio of that, with None
        as error.

    Raises:
        ValueError: if ``count`` is all the data, the trace is not positive, or no direction has positive
            curvature.
    """
    total = operator.num_examples
    if not 1 <= count < total:
        raise ValueError(f"Got count={count}; accepted are 1 to {total - 1}, fewer than all examples.")
    if not trace > 0:
        raise ValueError(f"Got trace={trace:g}; accepted are positive numbers.")
    full = operator.product(directions).double()
    along = (directions.double() * full).sum(1)
    if not bool((along > 0).any()):
        raise ValueError("None of the directions has positive curvature. Pass leading eigenvectors.")
    mean = full.square().sum(1)
    samples = []
    for number in range(minibatches):
        chosen = _seed(seed, number, 3)
        size = operator.batch_examples(count, chosen)
        if size < total:
            squares = operator.batch_product(directions, count, chosen).double().square().sum(1)
            samples.append(mean + size * (total - 1) / (total - size) * (squares - mean))
    singles = torch.stack(samples or [mean])
    ratios = singles / (trace * along)
    best = int(torch.where(along > 0, ratios.mean(0), -torch.inf).argmax())
    found = average(ratios[:, best])
    return found if samples else Estimate(found.value, None)


def _seed(seed: int, number: int, purpose: int) -> int:
    return (seed * 1_000_003 + number * 4 + purpose) % 2**62
