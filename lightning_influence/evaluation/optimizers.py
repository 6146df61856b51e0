"""Optimizer steps of many models at once, with the arithmetic of ``torch.optim``.

Every tensor has a leading dimension ``K``, one row a model; learning rates are given per model, since runs of
different length are at different points of their schedules. A rate of 0 leaves a model as it is, whatever its
moments: a run that is over waits for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_influence.evaluation.recipe import Recipe

_Step = Callable[[Tensor, Tensor, Sequence[Tensor], Tensor, int, Recipe], None]


def _sgd(
    value: Tensor, grad: Tensor, moments: Sequence[Tensor], rate: Tensor, count: int, recipe: Recipe
) -> None:
    """``b <- momentum b + g + w theta``, ``theta <- theta - rate b``."""
    buffer = moments[0]
    buffer.mul_(recipe.momentum).add_(grad).add_(value, alpha=recipe.weight_decay)
    value.sub_(buffer * rate)


def _adam(
    value: Tensor, grad: Tensor, moments: Sequence[Tensor], rate: Tensor, count: int, recipe: Recipe
) -> None:
    """Adam with coupled weight decay: the decay is part of the gradient."""
    _adam_update(value, grad.add(value, alpha=recipe.weight_decay), moments, rate, count, recipe)


def _adamw(
    value: Tensor, grad: Tensor, moments: Sequence[Tensor], rate: Tensor, count: int, recipe: Recipe
) -> None:
    """Adam with decoupled weight decay: ``theta <- (1 - rate w) theta`` before the update."""
    value.mul_(1 - rate * recipe.weight_decay)
    _adam_update(value, grad, moments, rate, count, recipe)


def _adam_update(
    value: Tensor, grad: Tensor, moments: Sequence[Tensor], rate: Tensor, count: int, recipe: Recipe
) -> None:
    (first, second), (beta1, beta2) = moments, recipe.betas
    first.lerp_(grad, 1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = second.sqrt().div_((1 - beta2**count) ** 0.5).add_(recipe.eps)
    value.sub_(first / root * (rate / (1 - beta1**count)))


# How many moments an optimizer keeps for a parameter, and its step.
_RULES: dict[str, tuple[int, _Step]] = {"sgd": (1, _sgd), "adam": (2, _adam), "adamw": (2, _adamw)}


class StackedOptimizer:
    """The optimizer of ``K`` runs, which all start together.

    Args:
        parameters: stacked parameters, ``(K, ...)`` each; changed in place by every step.
        recipe: the optimizer and its settings; the learning rates are given to :meth:`step`.
    """

    def __init__(self, parameters: Mapping[str, Tensor], recipe: Recipe) -> None:
        self._recipe, self._count = recipe, 0
        moments, self._rule = _RULES[recipe.optimizer]
        self._values = list(parameters.values())
        self._moments = [[torch.zeros_like(value) for _ in range(moments)] for value in self._values]

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor], rates: Tensor) -> None:
        """Take one step.

        Args:
            grads: one for each parameter, in order, of its shape.
            rates: learning rate of each run, ``(K,)``; 0 for one that is over.
        """
        self._count += 1
        for value, grad, moments in zip(self._values, grads, self._moments, strict=True):
            rate = rates.to(value.dtype).view(-1, *[1] * (value.ndim - 1))
            self._rule(value, grad, moments, rate, self._count, self._recipe)


def torch_optimizer(parameters: Iterable[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """Optimizer of one run, as ``configure_optimizers`` returns it; the schedule is the caller's.

    Args:
        parameters: of the model.
        recipe: the optimizer and its settings.

    Returns:
        ``torch.optim.SGD``, ``Adam`` or ``AdamW``.
    """
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, rate, momentum=recipe.momentum, weight_decay=decay)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, rate, betas=recipe.betas, eps=recipe.eps, weight_decay=decay)
