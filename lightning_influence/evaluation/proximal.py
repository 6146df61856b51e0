"""The objective behind :mod:`.pbrf` as a function of flat parameters: gradient and Newton step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vjp
from typing_extensions import Self

from lightning_influence.evaluation.stacked import ExampleLoss
from lightning_influence.support.arguments import check_losses


class ProximalObjective:
    """Mean Bregman divergence from the trained outputs, an example's loss, and the distance of parameters.

    Args:
        model: the trained model; parameters that require a gradient vary, and nothing of it is changed.
        data: training inputs ``(N, ...)`` and targets ``(N, ...)``.
        loss: per-example loss, convex in the outputs.
        damping: ``lambda``.

    Raises:
        ValueError: if the loss is not per example.
    """

    def __init__(
        self, model: nn.Module, data: tuple[Tensor, Tensor], loss: ExampleLoss, damping: float
    ) -> None:
        self._model, self._loss, self._damping = model, loss, damping
        self._inputs, self._targets = data
        values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        self._shapes = {name: value.shape for name, value in values.items()}
        self.start = torch.cat([value.reshape(-1) for value in values.values()])
        self._anchor = self.outputs(self.start, self._inputs)
        check_losses(loss(self._anchor, self._targets), len(self._inputs), "loss")
        self._slope = grad(lambda f: loss(f, self._targets).sum())(self._anchor)
        # Average over the examples and, once `at` has been called, the example's own weight on top.
        self._weights = self._anchor.new_full((len(self._inputs),), 1.0 / len(self._inputs))
        self._added = torch.zeros_like(self._weights)

    def at(self, example: int, epsilon: float) -> Self:
        """Return the same objective for the loss of ``example`` with weight ``epsilon``."""
        self._added = torch.zeros_like(self._weights)
        self._added[example] = epsilon
        return self

    def outputs(self, theta: Tensor, inputs: Tensor) -> Tensor:
        """Return the outputs ``(B, ...)`` at flat parameters ``(P,)``, in eval mode."""
        parts = torch.split(theta, [shape.numel() for shape in self._shapes.values()])
        named = {
            name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }
        modes = [(module, module.training) for module in self._model.modules()]
        self._model.eval()
        try:
            result: Tensor = functional_call(self._model, named, (inputs,))
        finally:
            for module, training in modes:
                module.training = training
        return result

    @torch.no_grad()
    def measure(self, theta: Tensor, queries: tuple[Tensor, Tensor], measurement: ExampleLoss) -> Tensor:
        """Return the measurement of every query at ``theta``, ``(Q,)``, refused if it is not per example."""
        values = measurement(self.outputs(theta, queries[0]), queries[1])
        check_losses(values, len(queries[0]), "measurement")
        return values

    def value_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the objective and its gradient ``(P,)`` at ``theta``."""
        gradient, value = grad_and_value(self._value)(theta)
        return value, gradient

    def _value(self, theta: Tensor) -> Tensor:
        away = theta - self.start
        return self._of_outputs(self.outputs(theta, self._inputs)) + self._damping / 2 * away.dot(away)

    def _of_outputs(self, outputs: Tensor) -> Tensor:
        """Return divergence and example's loss; the loss at the trained outputs is left out as a constant."""
        losses = self._loss(outputs, self._targets)
        linear = (self._slope * (outputs - self._anchor)).reshape(len(losses), -1).sum(1)
        base = self._loss(self._anchor, self._targets)
        return self._weights.dot(losses - base - linear) + self._added.dot(losses - base)

    def hessian(self, theta: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the product of the objective's Hessian at ``theta`` with a vector, both ``(P,)``."""
        # The Hessian is its own transpose, so its products can be pulled back through the gradient, which is
        # then evaluated once for all of them.
        pull_back = vjp(grad(self._value), theta)[1]
        return lambda vector: pull_back(vector)[0]

    def newton_step(self, theta: Tensor, gradient: Tensor, relative: float, least: float) -> Tensor:
        """Solve ``H step = -gradient``, ``H`` the Hessian at ``theta``, by conjugate gradients.

        Args:
            theta: where, ``(P,)``.
            gradient: of the objective there, ``(P,)``.
            relative: residual at which to stop, relative to the gradient.
            least: lower bound of ``relative``.

        Returns:
            The step ``(P,)``; a shorter one where the curvature turns out negative on the way.
        """
        multiply = self.hessian(theta)
        step, residual = torch.zeros_like(gradient), -gradient
        direction, square = residual, residual.dot(residual)
        goal = square * max(relative, least) ** 2
        for _ in range(2 * len(gradient)):
            product = multiply(direction)
            curvature = direction.dot(product)
            if curvature <= 0:
                return step if bool(step.any()) else -gradient
            length = square / curvature
            step, residual = step + length * direction, residual - length * product
            square, previous = residual.dot(residual), square
            if square <= goal:
                break
            direction = residual + square / previous * direction
        return step
