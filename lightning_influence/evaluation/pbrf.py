r"""Proximal Bregman response functions: a ground truth for influence at the trained parameters themselves.

Retraining also measures what influence functions do not claim to know: another start, another order of the
batches, an optimizer that stops early. The proximal Bregman response function (Bae, Ng, Lo, Ghassemi, Grosse
2022, "If Influence Functions are the Answer, Then What is the Question?") stays with the trained parameters
:math:`\theta_0`:

.. math:: \theta_\epsilon = \arg\min_\theta \frac1N \sum_n D(f_\theta(x_n), f_{\theta_0}(x_n))
    + \epsilon\, \ell(\theta, z) + \frac\lambda2 \lVert\theta - \theta_0\rVert^2

with :math:`D` the Bregman divergence of the loss in the outputs: for a loss :math:`\ell(f, y)` convex in
:math:`f` it is :math:`\ell(f, y) - \ell(f_0, y) - \langle\nabla\ell(f_0, y), f - f_0\rangle`, the
Kullback-Leibler divergence for cross-entropy and the squared distance for squared error. At
:math:`\epsilon = 0` the solution is :math:`\theta_0` whether or not training had converged; its derivative is
:math:`-(G + \lambda I)^{-1} g_z`: damped Gauss-Newton influence is exact for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vjp
from typing_extensions import Self

from lightning_influence.evaluation.losses import ExampleLoss, cross_entropy
from lightning_influence.linalg.conjugate_gradients import ConjugateDirections
from lightning_influence.support.arguments import check_losses, read_examples
from lightning_influence.support.errors import InfluenceError, NonFiniteError

_BACKTRACKS = 30


@dataclass(frozen=True)
class Response:
    """What the proximal problem answers for some training examples.

    Attributes:
        scores: ``(Q, M)``, in the unit and sign of attribution scores: the change of each query's measurement
            for removing each example, ``-(m(theta_eps) - m(theta_0)) / (eps N)``.
        residuals: gradient norm of the objective at the solution over that at the start, ``(M,)``.
        distances: ``||theta_eps - theta_0||``, ``(M,)``.
    """

    scores: Tensor
    residuals: Tensor
    distances: Tensor


def proximal_response(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    queries: tuple[Tensor, Tensor],
    examples: Sequence[int] | Tensor,
    *,
    damping: float,
    loss: ExampleLoss = cross_entropy,
    measurement: ExampleLoss | None = None,
    epsilon: float | None = None,
    tolerance: float = 1e-8,
    max_steps: int = 100,
) -> Response:
    """Solve the proximal Bregman problem for training examples, one at a time.

    Every problem is solved to convergence from the trained parameters by Newton steps with conjugate
    gradients on all ``N`` examples at once (Gauss-Newton steps need many times as many where the example's
    residual is large). Use float64: in float32 the changes of a small ``epsilon`` are lost in rounding. The
    model is left as it was.

    Args:
        model: the trained model, ``forward`` takes a batch of inputs; it runs in eval mode.
        data: training inputs ``(N, ...)`` and targets ``(N, ...)``.
        queries: query inputs ``(Q, ...)`` and targets ``(Q, ...)``.
        examples: ``M`` indices of training examples, or a boolean mask ``(N,)`` over them.
        damping: ``lambda``, positive.
        loss: per-example loss of outputs and targets, convex in the outputs.
        measurement: what is measured on a query; the loss if None.
        epsilon: weight of the example's loss, added to the ``1/N`` it has: ``-1/N``, the default, removes the
            example, a small number of either sign approaches the derivative.
        tolerance: the gradient's norm at which a problem counts as solved, relative to the start's.
        max_steps: most Newton steps.

    Returns:
        Scores, and how well each problem was solved.

    Raises:
        ValueError: if a number or an index is out of range, shapes do not fit, or the loss or the measurement
            is not per example.
        InfluenceError: if a problem did not converge.
        NonFiniteError: if the model's loss is not finite.

    Example:
        >>> line = nn.Linear(1, 1).double()
        >>> x = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
        >>> from lightning_influence.evaluation.losses import squared_error
        >>> proximal_response(line, (x, x), (x, x), [0, 2], damping=0.1, loss=squared_error).scores.shape
        torch.Size([3, 2])
    """
    count = len(data[0])
    weight = -1.0 / count if epsilon is None else epsilon
    _check(data, queries, damping, weight, tolerance)
    chosen = read_examples(examples, count)
    objective = _Objective(model, data, loss, damping)
    measure = measurement or loss
    before = objective.measure(objective.start, queries, measure)
    scores, residuals, distances = [], [], []
    for example in chosen:
        solution, residual = _minimise(objective.at(example, weight), objective.start, tolerance, max_steps)
        if residual > tolerance:
            raise InfluenceError(
                f"The proximal problem of example {example} did not converge: the gradient is {residual:.1e} "
                f"of its start's after {max_steps} steps, {tolerance:.1e} was asked for. Use float64, a "
                "larger damping, a smaller |epsilon| or a smooth activation, or accept a larger tolerance."
            )
        change = objective.measure(solution, queries, measure) - before
        scores.append(-change / (weight * count))
        residuals.append(residual)
        distances.append(float((solution - objective.start).norm()))
    return Response(
        torch.stack(scores, dim=1),
        torch.tensor(residuals, dtype=torch.float64),
        torch.tensor(distances, dtype=torch.float64),
    )


class _Objective:
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
        recursion = ConjugateDirections(-gradient[None])
        step, goal = torch.zeros_like(gradient), gradient.dot(gradient) * max(relative, least) ** 2
        for _ in range(2 * len(gradient)):
            change, curvature = recursion.advance(lambda vectors: multiply(vectors[0])[None])
            if not float(curvature) > 0:
                return step if bool(step.any()) else -gradient
            step = step + change[0]
            if recursion.remainder.square().sum() <= goal:
                break
            recursion.turn(torch.ones_like(curvature, dtype=torch.bool))
        return step


def _minimise(problem: _Objective, start: Tensor, tolerance: float, max_steps: int) -> tuple[Tensor, float]:
    """Newton's method with conjugate gradients and a backtracking line search.

    Returns:
        The solution ``(P,)`` and its relative gradient norm.

    Raises:
        NonFiniteError: if the gradient at the start is not finite.
    """
    theta = start
    value, gradient = problem.value_and_gradient(theta)
    first = float(gradient.norm())
    if not math.isfinite(first):
        raise NonFiniteError("The loss of the model has no finite gradient at its trained parameters.")
    if first == 0.0:
        return theta, 0.0  # the example has no gradient: it does not matter
    for _ in range(max_steps):
        residual = float(gradient.norm()) / first
        if residual <= tolerance:
            break
        # Solved ever more tightly, so that the steps converge superlinearly.
        step = problem.newton_step(theta, gradient, min(0.1, residual), tolerance)
        found = _search(problem, theta, step, value, gradient)
        if found is None:
            break  # no step helps: rounding, or a kink
        theta, value, gradient = found
    return theta, float(gradient.norm()) / first


def _search(
    problem: _Objective, theta: Tensor, step: Tensor, value: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """First halving of the step that lowers the objective, or the gradient where rounding hides the former.

    Returns:
        The new parameters with their value and gradient, or None.
    """
    slope, size, norm = torch.dot(step, gradient), 1.0, gradient.norm()
    rounding = 1e-3 * abs(float(slope))
    for _ in range(_BACKTRACKS):
        reached = theta + size * step
        new_value, new_gradient = problem.value_and_gradient(reached)
        lower = bool(new_value <= value + 1e-4 * size * slope)
        flatter = bool(new_gradient.norm() < 0.9 * norm) and bool(new_value <= value + rounding)
        tiny = torch.finfo(value.dtype).eps * 64
        at_rounding = abs(float(slope)) <= tiny and bool(new_gradient.norm() < norm)
        if lower or flatter or at_rounding:
            return reached, new_value, new_gradient
        size /= 2
    return None


def _check(
    data: tuple[Tensor, Tensor],
    queries: tuple[Tensor, Tensor],
    damping: float,
    epsilon: float,
    tolerance: float,
) -> None:
    """Refuse arguments that do not fit together.

    Raises:
        ValueError: saying what was got.
    """
    count = len(data[0])
    if len(data[1]) != count or len(queries[0]) != len(queries[1]):
        raise ValueError(
            f"Got {count} training inputs with {len(data[1])} targets and {len(queries[0])} query inputs "
            f"with {len(queries[1])} targets; accepted are as many targets as inputs."
        )
    if not (damping > 0 and math.isfinite(damping)) or not tolerance > 0:
        raise ValueError(f"damping and tolerance must be positive and finite, got {damping} and {tolerance}.")
    if not math.isfinite(epsilon) or epsilon == 0 or epsilon < -1.0 / count * (1 + 1e-9):
        raise ValueError(
            f"epsilon must be finite, not 0 and at least -1/N = {-1 / count:.3g}, which removes the example, "
            f"got {epsilon}: beyond it the objective is not bounded below."
        )
