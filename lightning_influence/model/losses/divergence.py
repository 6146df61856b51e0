"""Kullback-Leibler divergence: ``F.kl_div`` on log-probabilities, as in distillation.

``sum_c q_c (log q_c - log p_c)`` is the cross-entropy of soft targets less their entropy, which no parameter
moves. As with ``F.nll_loss`` the curvature is that of the softmax before the log-probabilities: the
divergence alone is linear in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import Self

from lightning_influence.model.losses.cross_entropy import CrossEntropyLoss
from lightning_influence.model.losses.loss import Reduction, working
from lightning_influence.model.losses.registry import constant, register_loss
from lightning_influence.support.errors import LossCaptureError


@dataclass(frozen=True, eq=False)
class DivergenceLoss(CrossEntropyLoss):
    """Divergence of target distributions from those of the outputs, in the shape of the outputs.

    Attributes:
        by_rows: whether the mean is over the rows of the outputs (``batchmean``), not over all elements.
    """

    by_rows: bool = False

    def per_example(self) -> Tensor:
        """Return the summed divergence of each example, shape ``(B,)``, differentiable in ``outputs``."""
        entropy: Tensor = torch.special.entr(self.targets.to(self.detached.dtype))
        return super().per_example() - entropy.reshape(self.num_examples, -1).sum(1)

    def weighted(self, coefficients: Tensor) -> Self:
        """Refuse weights by element: those of one position would have to be equal.

        Raises:
            LossCaptureError: always.
        """
        raise LossCaptureError("F.kl_div with weights by element has no known output curvature.")

    def weights(self) -> Tensor:
        """Return how many rows or elements an example has, where the mean is over them, else 1, ``(B,)``."""
        if not self.divides_by_positions:
            return self.ones()
        of_all = len(self.outputs) if self.by_rows else self.outputs.numel()
        return self.ones() * (of_all // self.num_examples)


@register_loss(functional.kl_div)
def parse_kl_div(
    input: Tensor,
    target: Tensor,
    reduction: Reduction | Literal["batchmean"] = "mean",
    log_target: bool = False,
) -> DivergenceLoss:
    """Read a call of ``F.kl_div``; the classes are in the second or in the last dimension.

    Returns:
        The loss, with one example per row.

    Raises:
        LossCaptureError: if the inputs are not log-probabilities, or targets cannot be used.
    """
    constant("target", target)
    if input.dim() < 2 or input.shape != target.shape:
        raise LossCaptureError(
            f"F.kl_div compared log-probabilities of shape {tuple(input.shape)} with targets of shape "
            f"{tuple(target.shape)}. Accepted are targets of the same shape, with a batch dimension."
        )
    totals = {dim: float(working(input.detach()).logsumexp(dim).abs().max()) for dim in (1, -1)}
    dim = min(totals, key=totals.__getitem__)
    if not totals[dim] <= max(1e-4, 4 * torch.finfo(input.dtype).eps):
        raise LossCaptureError(
            "F.kl_div was called with inputs that are not log-probabilities: log(sum(exp(input))) is as far "
            f"as {totals[dim]:.4g} from 0. Accepted are normalised ones: apply F.log_softmax first."
        )
    if log_target:
        target = target.exp()
    constant("target", target, non_negative=True)
    with torch.enable_grad():
        outputs, target = input.movedim(dim, 1), target.movedim(dim, 1)
    by_rows = reduction == "batchmean"
    return DivergenceLoss(
        outputs, target, len(outputs), "mean" if reduction == "batchmean" else reduction, by_rows=by_rows
    )
