r"""The parameters that lower the edit's residual most, each on its own.

Generalized influence minimises :math:`\|H_{:,S} x - g\|^2 + r \|x\|^2`. With one parameter :math:`i` alone
the minimum is :math:`\|g\|^2 - (Hg)_i^2 / ((H^2)_{ii} + r)`: the second term is the gain of that parameter,
the first step of an orthogonal matching pursuit. It looks at parameters and not at channels, counts the
curvature that a change meets, and needs no notion of a channel's activity. Own rule of this library.

Relabelling counts the ridge, the damping's square; without it the rule prefers parameters with hardly any
curvature, which are of little use to a descent. Forgetting goes a long way along one direction and is better
off with just these: the ridge counts as zero there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.selection.base import SelectionRule, Shape, budget, register_rule


@register_rule("gain")
class Gain(SelectionRule):
    """Parameters with the largest gain, layer by layer."""

    source = "gain"

    def mask(self, scores: Tensor | None, shape: Shape, ratio: float, generator: torch.Generator) -> Tensor:
        """Return the budget's worth of highest gains; of equal ones the first."""
        assert scores is not None
        order = scores.flatten().argsort(descending=True, stable=True).cpu()
        chosen = torch.zeros(len(order), dtype=torch.bool)
        chosen[order[: budget(shape, ratio)]] = True
        return chosen.view(shape)


def gains(hg: Tensor, squared_norms: Tensor, ridge: float = 0.0) -> Tensor:
    """Return ``(Hg)_i^2 / ((H^2)_ii + r)``, zero where a parameter has no curvature and there is no ridge.

    Args:
        hg: ``H g``, ``(P,)``.
        squared_norms: diagonal of ``H^2``: the squared norm of each column of ``H``, ``(P,)``.
        ridge: ``r``.

    Returns:
        ``(P,)``.
    """
    squared_norms = squared_norms + ridge
    tiny = torch.finfo(hg.dtype).tiny
    return torch.where(squared_norms > tiny, hg.square() / squared_norms.clamp_min(tiny), 0.0)
