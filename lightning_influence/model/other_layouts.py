"""Batches whose sizes do not tell where their examples stand: readings are tried until one is right."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from lightning_influence.model.batches.forms import assume_layout, read_form
from lightning_influence.model.batches.rearranging import Layout, find_layouts
from lightning_influence.model.captured import Captured
from lightning_influence.model.layers.plan import LayerPlan
from lightning_influence.model.verified import FOR_LOSS
from lightning_influence.support.batches import find_tensors
from lightning_influence.support.whole import holds_stand_ins

# Chosen by hand: each reading takes a forward pass and the checks of a first batch.
_MOST_TRIALS = 12


def read_otherwise(
    plan: LayerPlan,
    module: nn.Module,
    batch: Any,
    num_examples: int,
    slow: set[str],
    read: Callable[[], Captured | None],
) -> Captured | None:
    """Read a batch whose gradients are wrong as if its examples stood elsewhere.

    What passes note of the way that is right stays noted, for this batch and those of its form.

    Args:
        plan: the covered layers; what has been verified, and which are slow, is completed.
        module: where parts of its weights are elsewhere, all processes do the same, and nothing is tried.
        batch: the batch.
        num_examples: ``B``.
        slow: names of parameters that took a backward pass for each example before this batch.
        read: runs and checks the batch; None if it is not right.

    Returns:
        The batch, checked; None if it is right in no such way, or its sizes leave no other.
    """
    if holds_stand_ins(module):
        return None
    verified, now_slow = set(plan.verified), set(plan.slow)
    forgotten = {text for text in verified if text == "loss" or text.endswith(FOR_LOSS)}
    for layout in itertools.islice(_find_others(verified, batch, num_examples), _MOST_TRIALS):
        _put(plan.verified, verified - forgotten)
        _put(plan.slow, slow)
        assume_layout(plan.verified, batch, num_examples, layout)
        captured = read()
        if captured is not None and plan.slow == slow:
            return captured
    _put(plan.verified, verified)
    _put(plan.slow, now_slow)
    return None


def _find_others(verified: set[str], batch: Any, count: int) -> Iterator[Layout]:
    """Yield other readings of a batch than the present one, none if its sizes tell the examples."""
    tensors = find_tensors(batch)
    if count < 2 or all(tensor.shape.count(count) < 2 for tensor in tensors):
        return
    usual: dict[int, int | None] = {
        number: tensor.shape.index(count) for number, tensor in enumerate(tensors) if count in tensor.shape
    }
    present = usual | dict(read_form(verified, batch, count))
    for layout in find_layouts(batch, count):
        other = usual | dict(layout)
        if other != present and any(dim is not None for dim in other.values()):
            yield other


def _put(texts: set[str], others: set[str]) -> None:
    """Let a set that others refer to hold something else."""
    texts.clear()
    texts.update(others)
