"""Figures of the curvature and the gradients that a fit logs, when its Trainer logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_influence.collecting.gradient_statistics import gradient_norms
from lightning_influence.factors.training_record import effective_rate
from lightning_influence.layers import Layer


class Figures:
    """The figures of one step at a time.

    Args:
        enabled: whether to measure any.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._values: dict[str, float] | None = None
        self._last: int | None = None

    def clear(self) -> None:
        """Begin a step."""
        self._values = None

    def due(self, loggers: Sequence[Any], steps: int, every: int) -> bool:
        """Return whether to measure figures of this step: at most one in ``every``, if anybody logs."""
        return self._enabled and bool(loggers) and (self._last is None or steps - self._last >= every)

    def take(self, values: dict[str, float]) -> None:
        """Take up what was measured on the step's gradients by example; nothing if it was not due."""
        self._values = values

    def add_step(
        self, module: nn.Module, layers: Mapping[str, Layer], optimizer: torch.optim.Optimizer
    ) -> None:
        """Add what the optimizer is about to do, if there are figures of this step."""
        if self._values:
            group = optimizer.param_groups[0]
            self._values.update(gradient_norms(module, layers))
            self._values["effective_learning_rate"] = effective_rate(group)
            self._values["weight_decay"] = float(group.get("weight_decay", 0.0))

    def log(self, loggers: Sequence[Any], steps: int, global_step: int) -> None:
        """Log the step's figures under ``influence/``, if there are any."""
        if self._values:
            self._last = steps
            named = {f"influence/{name}": value for name, value in self._values.items()}
            for logger in loggers:
                logger.log_metrics(named, step=global_step)
