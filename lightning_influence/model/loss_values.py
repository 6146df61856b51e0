"""Values of the losses of a batch's examples, without anything that gradients need."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_influence.model.batches.forms import place_examples, read_form
from lightning_influence.model.batches.rearranging import rearranged
from lightning_influence.model.losses.capture import LossCapture
from lightning_influence.model.losses.picked import WholeRows
from lightning_influence.model.training_step import call_loss
from lightning_influence.model.unnamed.alone import ONE_BY_ONE, Run, compute_alone, read_layout
from lightning_influence.model.uses.watch import Watch
from lightning_influence.model.verified import LOST
from lightning_influence.support.errors import LossCaptureError, NonFiniteError
from lightning_influence.support.random_states import preserve_rng

#: Says that batches are read by the values of their losses, not by the functions these are made of.
OTHER_ROWS = "losses are read by their values"
#: Says that rows of layers or losses are not the examples' by their number, so that they are followed.
ROWS_VARY = "rows of layers vary"


def compute_losses(
    module: Any,
    batch: Any,
    num_examples: int,
    run: Run | None = None,
    *,
    verified: Collection[str] = (),
    normalised: bool = False,
) -> Tensor:
    """Forward one batch for the losses of its examples alone, which are not differentiated.

    Args:
        module: the user's LightningModule, checked on such batches by a pass before.
        batch: a batch, on the module's device.
        num_examples: ``B``.
        run: computes the loss; that of the module if None.
        verified: what passes on such batches have found.
        normalised: whether to divide the losses by their weights.

    Returns:
        Losses, ``(B,)``, unnormalised if not asked for otherwise. Where the loss has no name they are those
        of the examples alone.

    Raises:
        NonFiniteError: if the batch's loss is NaN or infinite.
    """
    run = call_loss if run is None else run
    layout = {**read_form(verified, batch, num_examples), **read_layout(verified)}
    if OTHER_ROWS in verified or ONE_BY_ONE in verified:
        return compute_alone(run, module, batch, num_examples, layout)
    read = partial(_read_losses, run, module, verified=verified, normalised=normalised)
    try:
        return read(batch, num_examples, is_followed=ROWS_VARY in verified)
    except (_PickedError, _OtherWayError) as error:
        is_picked = isinstance(error, _PickedError)
    except LossCaptureError:
        return compute_alone(run, module, batch, num_examples, layout)
    try:
        with preserve_rng():
            if is_picked:  # there may be as many rows of each example, as a pass before has found of them
                return read(batch, num_examples, is_followed=True)
            examples = [rearranged(batch, [number], num_examples, layout) for number in range(num_examples)]
            return torch.cat([read(example, 1, is_followed=False) for example in examples])
    except NonFiniteError:
        raise
    except Exception as error:  # whatever the user's code may raise on an example alone
        if is_picked and not isinstance(error, LossCaptureError):
            raise
        return compute_alone(run, module, batch, num_examples, layout)


class _PickedError(LossCaptureError):
    """Losses are computed on picked rows, and nobody followed these to the examples."""


class _OtherWayError(Exception):
    """Nothing is known of the order of losses.

    The step has called other functions than for the batches that were checked, or values have left torch.
    """


def _read_losses(
    run: Run,
    module: Any,
    batch: Any,
    num_examples: int,
    *,
    verified: Collection[str],
    is_followed: bool,
    normalised: bool,
) -> Tensor:
    """Return the losses by the functions that they are made of.

    Raises:
        _OtherWayError: if nothing is known of the batch's way.
        _PickedError: if rows were picked, and nobody follows them.
        LossCaptureError: if it is not known which are whose.
    """
    capture = LossCapture()

    def pack(saved: Tensor) -> Tensor:
        # The graph need not hold activations, but what follows the losses, through which factors are found.
        return saved if capture.calls else saved.new_empty(0)

    follow: Any = None
    if is_followed:
        follow = Watch({}, batch, num_examples, place_examples(verified, batch, num_examples))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved),
        nullcontext() if follow is None else follow,
        capture,
    ):
        values, batch_loss = run(module, batch)
    if follow is not None:
        capture.put_in_order(follow.place_of, num_examples, picks=follow.picks)
        capture.acquit(follow.place_of)
    if batch_loss is None:
        assert values is not None
        return values.detach()
    if num_examples > 1 and (LOST in verified or capture.way.is_new(verified, module)):
        raise _OtherWayError
    if num_examples == 1:
        capture.judge(WholeRows(batch, 1, ()))
    try:
        loss = capture.resolve(batch_loss, num_examples)
        return (loss.per_example() / (loss.weights() if normalised else 1)).detach()
    except LossCaptureError as error:
        if follow is None and any(call.picked for call in capture.calls):
            raise _PickedError(str(error)) from error
        raise
