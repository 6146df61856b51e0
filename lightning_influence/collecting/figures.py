"""Figures of the curvature and the gradients that a fit logs, when its Trainer logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.curvature.factors import Factors
from lightning_influence.curvature.training_record import effective_rate
from lightning_influence.model.layers.gradients import LayerGradients
from lightning_influence.model.layers.layer import Layer
from lightning_influence.support.whole import is_sharded


def sum_squared_norms(gradients: Mapping[str, LayerGradients]) -> Tensor:
    """Return the squared norm of each example's gradient over all layers, summed over seeds, ``(B,)``."""
    return torch.stack([layer.squared_norms().sum(0) for layer in gradients.values()]).sum(0)


def estimate_noise_and_signal(gradients: Mapping[str, LayerGradients]) -> tuple[float, float] | None:
    """Estimate the two parts of the gradient noise scale from one batch of per-example gradients.

    Args:
        gradients: of the training loss, ``K = 1``.

    Returns:
        Unbiased estimates of the trace of the per-example gradients' covariance and of the squared norm of
        their expectation; None for fewer than two examples. The ratio of their averages over batches is the
        simple noise scale in examples (McCandlish, Kaplan, Amodei et al. 2018).
    """
    each = sum_squared_norms(gradients)
    count = each.shape[0]
    if count < 2:
        return None
    mean = torch.zeros((), dtype=each.dtype, device=each.device)
    for layer in gradients.values():
        ones = layer.like.new_ones(1, count, 1)
        mean = mean + (layer.combine(ones) / count).square().sum()
    noise = (each.mean() - mean) * count / (count - 1)
    found: list[float] = torch.stack([noise, mean - noise / count]).tolist()  # one wait for the device
    return found[0], found[1]


def measure_spectrum(factors: Factors) -> dict[str, float]:
    """Return trace, largest eigenvalue and stable rank of EK-FAC; nothing without eigenvalues.

    The stable rank is that of the Jacobian whose Gram matrix the curvature is: trace over largest eigenvalue.
    """
    if not factors.has_squares:
        return {}
    moments = [layer.second_moment() for layer in factors.layers.values()]
    pairs = torch.stack([torch.stack([m.sum(), m.max()]) for m in moments if m is not None])
    trace, largest = torch.stack([pairs[:, 0].sum(), pairs[:, 1].max()]).tolist()
    scale = factors.mean_weight
    result = {"trace": trace / scale, "top_eigenvalue": largest / scale}
    return {**result, "stable_rank": trace / largest} if largest > 0 else result


def measure_gradient_norms(module: nn.Module, layers: Mapping[str, Layer]) -> dict[str, float]:
    """Return norms of the gradients that are there: of all parameters together, and of each layer."""
    named = [(name, _dense(p.grad)) for name, p in module.named_parameters() if p.grad is not None]
    if not named or any(is_sharded(gradient) for _, gradient in named):
        return {}  # a norm of all parts takes all processes, and one alone may be measuring
    norms = torch.stack([g.norm().float() for g in torch._foreach_norm([g for _, g in named])]).tolist()
    by_name = dict(zip((name for name, _ in named), norms, strict=True))
    result = {"grad_norm": sum(n * n for n in norms) ** 0.5}
    for name in layers:
        own = [norm for key, norm in by_name.items() if key.rpartition(".")[0] == name]
        if own:
            result[f"grad_norm/{name}"] = sum(n * n for n in own) ** 0.5
    return result


def _dense(gradient: Tensor) -> Tensor:
    """Return the entries that a gradient stores; those of sparse embeddings are few of many."""
    return gradient.coalesce().values() if gradient.layout is torch.sparse_coo else gradient


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

    def is_due(self, loggers: Sequence[Any], steps: int, every: int) -> bool:
        """Return whether to measure figures of this step: at most one in ``every``, if anybody logs."""
        return self._enabled and bool(loggers) and (self._last is None or steps - self._last >= every)

    def keep(self, values: dict[str, float]) -> None:
        """Take up what was measured on the step's gradients by example; nothing if it was not due."""
        self._values = values

    def add_step(
        self, module: nn.Module, layers: Mapping[str, Layer], optimizer: torch.optim.Optimizer
    ) -> None:
        """Add what the optimizer is about to do, if there are figures of this step."""
        if self._values:
            group = optimizer.param_groups[0]
            self._values.update(measure_gradient_norms(module, layers))
            self._values["effective_learning_rate"] = effective_rate(group)
            self._values["weight_decay"] = float(group.get("weight_decay", 0.0))

    def log(self, loggers: Sequence[Any], steps: int, global_step: int) -> None:
        """Log the step's figures under ``influence/``, if there are any."""
        if self._values:
            self._last = steps
            named = {f"influence/{name}": value for name, value in self._values.items()}
            for logger in loggers:
                logger.log_metrics(named, step=global_step)
