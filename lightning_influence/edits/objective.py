"""The training objective after a relabelling, with its gradient, at the weights that a module has now."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_influence.edits.data import HELD_BYTES, EditData
from lightning_influence.edits.sampling import Sample
from lightning_influence.edits.weights import Weights
from lightning_influence.errors import NonFiniteError
from lightning_influence.layers import LayerPlan
from lightning_influence.passes.forward import Forward
from lightning_influence.running.base import Runner


class Objective:
    r"""Mean loss of the edited examples at their new targets and of the kept ones, with weight decay.

    .. math:: (U_{E'} + W_K \bar\ell_K) / (W_E + W_K) + \tfrac12 \sum_i w_i \theta_i^2

    where the mean loss of the kept examples comes from a sample of them. One pass of forward and backward
    over as many examples; gradients of single examples are never formed.

    Args:
        runner: an entered runner on the module.
        plan: the covered layers.
        data: the examples.
        weights: the covered weights.
        decay: weight decay ``w`` of each of them, ``(P,)``.
        sample: examples whose losses, times their coefficients, stand for the first term.
    """

    def __init__(
        self,
        runner: Runner,
        plan: LayerPlan,
        data: EditData,
        weights: Weights,
        decay: Tensor,
        sample: Sample,
    ) -> None:
        self._runner, self._plan, self._data, self._weights = runner, plan, data, weights
        self._decay, self._sample = decay, sample
        self._loader = data.subset(sample.indices).held(HELD_BYTES)
        self._known: tuple[Tensor, float] | None = None

    def value(self, change: Tensor) -> float:
        """Return the objective at a change of the weights; the module keeps the change.

        Args:
            change: of the covered weights as they were, ``(P,)``.

        Returns:
            The value; infinity if it is not finite.
        """
        if self._known is not None and torch.equal(self._known[0], change):
            return self._known[1]
        one_pass = self._run(change, gradient=False)
        return math.inf if one_pass is None else one_pass.value + self._shrinkage(self._weights.flat())

    def __call__(self, change: Tensor) -> tuple[float, Tensor] | None:
        """Return the objective and its gradient at a change of the weights; the module keeps the change.

        Args:
            change: of the covered weights as they were, ``(P,)``.

        Returns:
            The value and the gradient ``(P,)``; None if they are not finite.
        """
        one_pass = self._run(change, gradient=True)
        if one_pass is None:
            return None
        theta = self._weights.flat()
        gradient = self._weights.join(one_pass.gradients).to(theta) + self._decay * theta
        self._known = change, one_pass.value + self._shrinkage(theta)
        return (self._known[1], gradient) if bool(torch.isfinite(gradient.sum())) else None

    def _run(self, change: Tensor, *, gradient: bool) -> _ObjectivePass | None:
        self._weights.move(change)
        one_pass = _ObjectivePass(self._plan, self._data, self._sample, self._weights)
        one_pass.differentiates = gradient
        try:
            self._runner.run(one_pass, self._loader)
        except NonFiniteError:
            return None
        return one_pass if math.isfinite(one_pass.value) else None

    def _shrinkage(self, theta: Tensor) -> float:
        return 0.5 * float(theta @ (self._decay * theta))


class _ObjectivePass:
    """Sums weighted losses and their gradients."""

    description = "Edit: objective"

    def __init__(self, plan: LayerPlan, data: EditData, sample: Sample, weights: Weights) -> None:
        self.forward = Forward(plan)
        self._data, self._sample = data, sample
        self._parameters = weights.parameters()
        self.value, self.differentiates = 0.0, True
        self.gradients = {name: torch.zeros_like(p) for name, p in self._parameters.items()}

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one batch."""
        values = self.forward(module, self._data.view(batch, indices), len(indices)).per_example()
        rows, coefficients = self._sample.rows(indices)
        total = values[rows.to(values.device)] @ coefficients.to(values)
        self.value += float(total.detach())
        if not self.differentiates:
            return
        gradients = torch.autograd.grad(total, list(self._parameters.values()), allow_unused=True)
        for name, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is not None:
                self.gradients[name] += gradient
