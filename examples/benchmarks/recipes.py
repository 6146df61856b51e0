"""A training recipe as data: the optimizer, weight decay and a schedule of the learning rate.

Retraining needs the recipe in a form that can be hashed, repeated for any number of examples and applied to
many models at once, which an optimizer object is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_influence.evaluation.harness.run import derive_seed

Optimizer = Literal["sgd", "adam", "adamw"]
Schedule = Literal["constant", "linear", "cosine"]
_OPTIMIZERS = ("sgd", "adam", "adamw")
_DECAY: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: what an optimizer of ``torch.optim`` and a shuffled ``DataLoader`` would do.

    Every epoch visits the kept examples once in a fresh order, in batches of ``batch_size`` whose last may be
    short; the batch loss is a mean. The schedule runs per step from ``learning_rate`` to 0 (``"linear"``,
    ``"cosine"``) over all the steps of the run; a subset has fewer of them.

    Args:
        learning_rate: the learning rate of the first step.
        epochs: passes over the kept examples.
        batch_size: examples in a step.
        momentum: SGD's momentum; Adam's is the first of ``betas``.
        weight_decay: on every parameter; coupled for SGD and Adam, decoupled for AdamW.
        schedule: how the learning rate decays.
        optimizer: ``"sgd"``, ``"adam"`` (Kingma & Ba 2015) or ``"adamw"`` (Loshchilov & Hutter 2019).
        betas: Adam's decay rates of the first and second moment.
        eps: Adam's term beside the root of the second moment.

    Raises:
        ValueError: if a number is out of range or the schedule unknown.

    Example:
        >>> recipe = Recipe(learning_rate=0.1, epochs=2, batch_size=4, momentum=0.9, weight_decay=1e-3)
        >>> recipe.steps(10)
        6
        >>> [round(recipe.rate(step, 6), 3) for step in (0, 3, 5)]
        [0.1, 0.05, 0.017]
    """

    learning_rate: float
    epochs: int
    batch_size: int
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: Schedule = "linear"
    optimizer: Optimizer = "sgd"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        self._check_adam()
        if self.schedule not in _DECAY:
            raise ValueError(f"Unknown schedule {self.schedule!r}; choose one of {tuple(_DECAY)}.")
        if not self.learning_rate > 0 or self.epochs < 1 or self.batch_size < 1:
            raise ValueError(
                "A recipe needs learning_rate > 0, epochs >= 1 and batch_size >= 1, got "
                f"{self.learning_rate}, {self.epochs} and {self.batch_size}."
            )
        if not 0 <= self.momentum < 1 or self.weight_decay < 0:
            raise ValueError(
                "A recipe needs 0 <= momentum < 1 and weight_decay >= 0, got "
                f"{self.momentum} and {self.weight_decay}."
            )

    def _check_adam(self) -> None:
        """Refuse an unknown optimizer, and settings that are another optimizer's.

        Raises:
            ValueError: saying what was got.
        """
        if self.optimizer not in _OPTIMIZERS:
            raise ValueError(f"Unknown optimizer {self.optimizer!r}; choose one of {_OPTIMIZERS}.")
        if self.optimizer != "sgd" and self.momentum:
            raise ValueError(
                f"momentum is SGD's, got {self.momentum} with {self.optimizer!r}: set betas[0] instead."
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas) or not self.eps > 0:
            raise ValueError(
                f"Adam needs two betas with 0 <= beta < 1 and eps > 0, got {self.betas} and {self.eps}."
            )

    def steps_per_epoch(self, num_examples: int) -> int:
        """Return the number of batches in one epoch over ``num_examples`` examples."""
        return math.ceil(num_examples / self.batch_size)

    def steps(self, num_examples: int) -> int:
        """Return the number of optimizer steps of a whole run on ``num_examples`` examples."""
        return self.epochs * self.steps_per_epoch(num_examples)

    def rate(self, step: int, total: int) -> float:
        """Return the learning rate of step ``step`` (from 0) of ``total``; 0 once the run is over."""
        return self.learning_rate * _DECAY[self.schedule](step / total) if step < total else 0.0

    def effective_time(self, num_examples: int) -> float:
        """Return ``sum_k lr_k / (1 - momentum)`` over the run's steps: the step a constant gradient makes."""
        total = self.steps(num_examples)
        return sum(self.rate(k, total) for k in range(total)) / (1 - self.momentum)

    def damping(self, num_examples: int) -> float:
        """Return the curvature that a run of SGD does not resolve, plus weight decay.

        That is ``w + (1 - momentum) / sum_k lr_k`` (Bae et al. 2024), before the factor on its second term
        that ``damping="auto"`` has.

        Args:
            num_examples: examples the run trains on.

        Returns:
            The damping, in the unit of the mean loss's curvature.

        Raises:
            ValueError: for Adam, whose damping also depends on the second moments at the end of the run.
        """
        if self.optimizer != "sgd":
            raise ValueError(
                f"The damping of a run with {self.optimizer!r} depends on its second moments, which a recipe "
                "does not know: train with InfluenceCallback and use damping='auto'."
            )
        return self.weight_decay + 1 / self.effective_time(num_examples)


def draw_orders(mask: Tensor, recipe: Recipe, seed: int) -> list[Tensor]:
    """Order in which a run visits its examples: one permutation of the kept indices per epoch.

    Each is the restriction to the kept examples of a permutation of all ``N``, which is a function of the
    seed and the epoch only: runs of one seed visit the examples they share in the same order. On its own, a
    restricted uniform permutation is a uniform permutation of the kept examples, as in a plain shuffled run.

    Args:
        mask: kept examples, boolean, shape ``(N,)``.
        recipe: gives the number of epochs.
        seed: the run's seed.

    Returns:
        ``epochs`` tensors of indices, shape ``(n_kept,)`` each.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "order"))
    kept = mask.cpu()
    orders = (torch.randperm(len(kept), generator=generator) for _ in range(recipe.epochs))
    return [order[kept[order]] for order in orders]


def make_optimizer(parameters: Iterable[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
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
