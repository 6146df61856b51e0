"""The training objective after a relabelling, with its gradient, at the weights that a module has now."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.edits.data import HELD_BYTES, EditData
from lightning_influence.edits.editable_weights import EditableWeights
from lightning_influence.edits.losses import LossPass, Sample
from lightning_influence.model.forward import Forward
from lightning_influence.model.loss_values import compute_losses
from lightning_influence.running.loaders import IndexedLoader
from lightning_influence.running.runner import Runner
from lightning_influence.support.errors import NonFiniteError


@dataclass(frozen=True)
class Source:
    """Examples of one loader that an objective is about.

    Attributes:
        loader: the loader.
        sample: whose losses, times their coefficients, count.
        data: of which they are, with new targets of the edited ones; None for other data.
    """

    loader: IndexedLoader
    sample: Sample
    data: EditData | None = None

    def view(self, batch: Any, indices: Tensor) -> Any:
        """Return the batch as the objective sees it."""
        return batch if self.data is None else self.data.view(batch, indices)


@dataclass(frozen=True)
class Whole:
    """What an objective is over all examples, at the weights as they were and without weight decay.

    Attributes:
        value: the value.
        gradient: the gradient, ``(P,)``.
    """

    value: float
    gradient: Tensor


class Objective:
    r"""Mean loss of the edited examples at their new targets and of the kept ones, with weight decay.

    .. math:: (U_{E'} + W_K \bar\ell_K) / (W_E + W_K) + \tfrac12 \sum_i w_i \theta_i^2

    One pass of forward and backward; gradients of single examples are never formed. Where a sample of the
    kept examples stands for all, value and gradient at the weights as they were are those of all, and the
    sample tells how they change from there: with few examples a model that is at its optimum would not be
    at the optimum of the sample, and be trained on it. The correction is linear in the weights, as in
    stochastic variance-reduced gradients (Johnson & Zhang 2013).

    Args:
        runner: an entered runner on the module.
        weights: the editable weights, with the decay ``w`` of each.
        sources: examples whose losses, times their coefficients, stand for the first term.
        whole: the first term over all examples at the weights as they were; None if the sources are all.
    """

    def __init__(
        self, runner: Runner, weights: EditableWeights, sources: list[Source], whole: Whole | None = None
    ) -> None:
        self._runner, self._weights, self._sources, self._whole = runner, weights, sources, whole
        self._loaders = [source.loader.holding(source.sample.indices).held(HELD_BYTES) for source in sources]
        nothing = torch.zeros_like(weights.decay)
        # What the sources miss, and the gradient at the weights as they were: both are found once.
        self._missing, self._first_gradient = Whole(0.0, nothing), nothing
        self._last: tuple[Tensor, _ObjectivePass] | None = None

    def value(self, change: Tensor) -> float:
        """Return the objective at a change of the weights; the module keeps the change.

        Args:
            change: of the editable weights as they were, ``(P,)``.

        Returns:
            The value; infinity if it is not finite.
        """
        self._compare()
        one_pass = self._run(change, gradient=False)
        return math.inf if one_pass is None else self._correct(one_pass.value, change)

    def __call__(self, change: Tensor) -> tuple[float, Tensor] | None:
        """Return the objective and its gradient at a change of the weights; the module keeps the change.

        Args:
            change: of the editable weights as they were, ``(P,)``.

        Returns:
            The value and the gradient ``(P,)``; None if they are not finite.
        """
        self._compare()
        one_pass = self._run(change, gradient=True)
        if one_pass is None:
            return None
        theta = self._weights.flat()
        own = self._weights.join(one_pass.gradients).to(theta)
        gradient = own + self._missing.gradient + self._weights.decay * theta
        value = self._correct(one_pass.value, change)
        return (value, gradient) if bool(torch.isfinite(gradient.sum())) else None

    def slope(self, change: Tensor) -> float:
        """Return the derivative along a change at the weights as they were; 0 if no sample stands for all."""
        return float(self._first_gradient @ change)

    def shrinkage(self) -> float:
        """Return the term of the weight decay at the weights that the module has now."""
        theta = self._weights.flat()
        return 0.5 * float(theta @ (self._weights.decay * theta))

    def _correct(self, value: float, change: Tensor) -> float:
        missing = self._missing
        return value + missing.value + float(missing.gradient @ change) + self.shrinkage()

    def _compare(self) -> None:
        """Find out, once, what the sources miss where the weights are as they were."""
        whole, self._whole = self._whole, None
        if whole is None:
            return
        one_pass = self._run(torch.zeros_like(self._weights.decay), gradient=True)
        if one_pass is not None:
            own = self._weights.join(one_pass.gradients).to(whole.gradient)
            self._missing = Whole(whole.value - one_pass.value, whole.gradient - own)
            self._first_gradient = whole.gradient + self._weights.decay * self._weights.flat()

    def _run(self, change: Tensor, *, gradient: bool) -> _ObjectivePass | None:
        self._weights.move(change)
        if self._last is not None and torch.equal(self._last[0], change):
            return self._last[1]
        one_pass = _ObjectivePass(self._sources, self._weights, differentiates=gradient)
        try:
            self._runner.run(one_pass, self._loaders)
        except NonFiniteError:
            return None
        if not math.isfinite(one_pass.value):
            return None
        if gradient:
            self._last = change, one_pass
        return one_pass


class _Gradients:
    """Sums gradients of the editable parameters, by name."""

    def __init__(self, weights: EditableWeights) -> None:
        self._parameters = weights.parameters
        self.sums = {name: torch.zeros_like(p) for name, p in self._parameters.items()}

    def add(self, total: Tensor, *, keep_graph: bool = False) -> None:
        parameters = list(self._parameters.values())
        gradients = torch.autograd.grad(total, parameters, retain_graph=keep_graph, allow_unused=True)
        for name, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is not None:
                self.sums[name] += gradient


class _ObjectivePass:
    """Sums weighted losses and their gradients."""

    description = "Edit: objective"

    def __init__(self, sources: list[Source], weights: EditableWeights, *, differentiates: bool) -> None:
        self._forward, self._verified = Forward(weights.plan), weights.plan.verified
        self._sources, self._gradients = sources, _Gradients(weights)
        self.value, self._differentiates = 0.0, differentiates

    @property
    def gradients(self) -> dict[str, Tensor]:
        return self._gradients.sums

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one batch."""
        source = self._sources[dataloader_idx]
        seen, count = source.view(batch, indices), len(indices)
        if self._differentiates:
            values = self._forward(module, seen, count).per_example()
        else:
            values = compute_losses(module, seen, count, verified=self._verified)
        rows, coefficients = source.sample.find(indices)
        total = values[rows.to(values.device)] @ coefficients.to(values)
        self.value += float(total.detach())
        if self._differentiates:
            self._gradients.add(total)


class LossGradientPass(LossPass):
    """Losses of some examples, all that is told of them, and the gradient of their sum.

    Args:
        weights: the editable weights.
        data: the examples, whose new targets count; None for other data.
        chosen: dataset indices of those to look at; all examples if None.
    """

    def __init__(self, weights: EditableWeights, data: EditData | None, chosen: Tensor | None = None) -> None:
        super().__init__(weights.plan, data, chosen)
        self._weights, self._gradients = weights, _Gradients(weights)

    def _take_graph(self, values: Tensor, rows: Tensor) -> None:
        if len(rows):  # the graph is kept: the curvature in the outputs is asked for next
            self._gradients.add(values[rows.to(values.device)].sum(), keep_graph=True)

    @property
    def gradient(self) -> Tensor:
        """The sum of the gradients, ``(P,)``."""
        return self._weights.join(self._gradients.sums)
