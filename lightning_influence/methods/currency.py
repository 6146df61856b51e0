"""Whether what an earlier call computed is of the data, loss and buffers of this one.

Weights, layers and number of examples are known before a pass, and are part of what results are kept under.
The rest shows in the mean loss of the training data, which passes that score it see on the way: if it is
another one, what was kept is computed again, and so is the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from lightning_influence.methods.context import Context
from lightning_influence.passes.losses import LossSum, same_mean
from lightning_influence.state import InfluenceState

Answer = TypeVar("Answer")


class OtherDataError(Exception):
    """What is kept between calls was computed for other data."""


def current(state: InfluenceState, answer: Callable[[], Answer]) -> Answer:
    """Return an answer; once more from scratch if it rests on what was computed for other data.

    Args:
        state: what is kept between calls.
        answer: computes the answer, with :func:`check_current` on the way.
    """
    try:
        return answer()
    except OtherDataError:
        state.forget()
        return answer()


def check_current(context: Context, losses: LossSum) -> None:
    """Compare the mean loss with that of the data which kept factors and coarse space were made on.

    Args:
        context: of the call, after its method was prepared.
        losses: of all training examples.

    Raises:
        OtherDataError: if it is another one.
    """
    if not (context.made or context.reused):
        return
    state, mean = context.state, losses.mean(context.runner.all_reduce_sum)
    if not context.reused or state.mean_loss is None:
        state.mean_loss = mean
    elif not same_mean(state.mean_loss, mean, _precision(context)):
        context.notes.add(
            "What an earlier call computed was for other training data, another loss or other buffers (mean "
            f"loss {state.mean_loss:.6g} then, {mean:.6g} now); it is computed again. Where the data are "
            "augmented at random, that is so in every call: switch the augmentation off."
        )
        raise OtherDataError


def _precision(context: Context) -> torch.dtype:
    """Return the precision of the model; gradients of one in half precision are in single precision."""
    layer = next(iter(context.plan.layers.values()))
    return layer.rule.weight(layer.module).dtype
