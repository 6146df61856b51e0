"""Batches whose examples are run one after the other, where nothing else tells what is whose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_influence.model.captured import Captured
from lightning_influence.model.layers.recorder import Recorder
from lightning_influence.model.layers.use_recorder import UseRecorder
from lightning_influence.model.unnamed.alone import REMEDY, Run, to_scalar
from lightning_influence.support.errors import UnsupportedModelError
from lightning_influence.support.random_states import preserve_rng

SLOWER = (
    "Which rows of the training loss are which examples' is not known, and it is no function of the outputs "
    "of modules. It is the mean of the losses of single examples, which are run one by one: slower, and with "
    "the squared gradients of the examples for the curvature."
)


def run(
    recorder: Recorder, uses: UseRecorder, compute: Run, module: Any, parts: Sequence[Any]
) -> tuple[Captured, Tensor]:
    """Run each example of a batch alone, on one record.

    Args:
        recorder: records the layers.
        uses: what it has them from.
        compute: computes the loss.
        module: the user's module.
        parts: the examples of the batch, each a batch of one.

    Returns:
        The batch, with the losses of its examples as values, without gradients of penalties on weights; and
        the losses with these, ``(B,)``.
    """
    values, penalties = [], []
    with recorder:
        for number, part in enumerate(parts):
            uses.add_example(part, number)
            values.append(to_scalar(*compute(module, part)))
            penalties.append(uses.take_penalties())
    own = [_without(value, added) for value, added in zip(values, penalties, strict=True)]
    return Captured(len(parts), None, torch.stack(own), recorder), torch.stack(values)


def _without(value: Tensor, penalties: list[Tensor]) -> Tensor:
    """Return a loss of the same value without the gradient of penalties, which is that of no example."""
    slopes = torch.autograd.grad(value, penalties, retain_graph=True, allow_unused=True) if penalties else ()
    for penalty, slope in zip(penalties, slopes, strict=True):
        if slope is not None:
            value = value - (slope * (penalty - penalty.detach())).sum()
    return value


def is_mean_of_examples(losses: Tensor, run: Run, module: Any, batch: Any) -> bool:
    """Return whether the loss of a batch has the value and the gradient of the mean of its examples' losses.

    Args:
        losses: of its examples, ``(B,)``, with their graph.
        run: computes the loss.
        module: the user's module.
        batch: the batch.
    """
    with preserve_rng():
        whole = to_scalar(*run(module, batch))
    parameters = [p for p in module.parameters() if p.requires_grad]
    found, expected = (_gradient(loss, parameters) for loss in (losses.mean(), whole))
    bent = [_bend(loss, parameters) for loss in (losses.mean(), whole)]
    limit = 1e-6 if found.dtype == torch.float64 else 1e-3
    # Where examples have one loss and one gradient, as at weights of zero, the rest tells coupled ones.
    values = losses.detach()
    is_mean = (whole.detach() - values.mean()).abs() <= limit * values.abs().mean()
    same = bent[0] is None or bent[1] is None or (bent[0] - bent[1]).norm() <= 1e2 * limit * bent[1].norm()
    return bool(same) and bool(is_mean & ((found - expected).norm() <= limit * expected.norm()))


def check_mean(captured: Captured, run: Run, module: Any, batch: Any) -> None:
    """Refuse a batch whose loss is not the mean of those of its examples, as that of the first one was.

    Args:
        captured: the batch, run one by one.
        run: computes the loss.
        module: the user's module.
        batch: the batch.

    Raises:
        UnsupportedModelError: if it is not, as a mean over positions where examples have unlike numbers.
    """
    with preserve_rng(), torch.no_grad():
        whole, mean = to_scalar(*run(module, batch)), captured.per_example().detach().mean()
    limit = 1e-6 if mean.dtype == torch.float64 else 1e-3
    if not bool((whole - mean).abs() <= limit * captured.per_example().detach().abs().mean()):
        raise UnsupportedModelError(
            f"The loss of a batch is {float(whole):.6g}, and the mean of its examples' losses "
            f"{float(mean):.6g}, though they were one in the first batch. " + REMEDY
        )


def _gradient(loss: Tensor, parameters: list[Tensor], *, create_graph: bool = False) -> Tensor:
    parts = torch.autograd.grad(
        loss,
        parameters,
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return torch.cat([part.to_dense().flatten() for part in parts])


def _bend(loss: Tensor, parameters: list[Tensor]) -> Tensor | None:
    """Return the product of a loss's Hessian with a vector; None where torch has no second derivatives."""
    try:
        slope = _gradient(loss, parameters, create_graph=True)
        probe = torch.randn(slope.shape, generator=torch.Generator().manual_seed(0)).to(slope)
        return _gradient(slope @ probe, parameters) if slope.requires_grad else torch.zeros_like(slope)
    except RuntimeError:
        return None
