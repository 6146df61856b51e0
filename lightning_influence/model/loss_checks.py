"""Checks that the losses of a batch are those of its examples, in their order, whatever the others are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.model.batches.rearranging import Layout, find_layouts, missing_positions, rearranged
from lightning_influence.model.captured import Captured
from lightning_influence.model.losses.combined import WEIGHTED
from lightning_influence.model.losses.ragged import RaggedLoss
from lightning_influence.support.batches import find_tensors
from lightning_influence.support.errors import UnsupportedModelError
from lightning_influence.support.notes import warn
from lightning_influence.support.random_states import RandomStates, preserve_rng
from lightning_influence.support.whole import holds_stand_ins

# Fewest examples whose halves have several orders.
_FEWEST = 6
# Chosen by hand: a coin that a step flips comes up the same in so many runs once in 250 questions.
_DRAWS = 8

_RANDOM = (
    "The losses of one and the same batch differ from call to call: `training_step` draws noise or mixes "
    "examples in eval mode too, or keeps a state. The scores are those of one draw of each batch. Define "
    "`influence_loss(batch) -> (B,)` on the module without it, if it is not what you want to explain."
)

_OTHERS = (
    "The losses of half of the examples of a batch are others where the rest is left out, so they depend on "
    "it. Accepted are models and losses that treat examples independently in eval mode: move contrastive or "
    "in-batch terms out of the loss with `influence_loss`, or pass `loss=`."
)


def check_part(
    readings: Sequence[tuple[Tensor, Callable[[Any, int], Tensor]]],
    batch: Any,
    dtype: torch.dtype,
    layout: Layout,
    *,
    are_shares: bool = False,
) -> None:
    """Check that parts of a batch have the losses that they have among the others.

    Gradients in weights do not show what other examples do to the inputs of one, nor do those that are taken
    loss by loss. Nothing is concluded where the batch cannot be taken apart, or where its losses change from
    call to call.

    Args:
        readings: the loss of each example ``(B,)``, in units one of which has to fit, and what maps a batch
            and its number of examples to their losses in this unit. NaN for an example without any.
        batch: the batch they are of.
        dtype: precision of the model's outputs.
        layout: how the batch is taken apart.
        are_shares: whether weights are shares of their batch, so that a part's losses are larger by a factor.

    Raises:
        UnsupportedModelError: if they have others.
    """
    differs = partial(_part_differs, batch=batch, dtype=dtype, layout=layout, are_shares=are_shares)
    if all(differs(values.detach(), losses) for values, losses in readings):
        raise UnsupportedModelError(_OTHERS)


def _part_differs(
    values: Tensor,
    losses: Callable[[Any, int], Tensor],
    *,
    batch: Any,
    dtype: torch.dtype,
    layout: Layout,
    are_shares: bool,
) -> bool:
    count, limit = len(values), _limit(values.nan_to_num(0, 0, 0), dtype)
    half = (count + 1) // 2
    with preserve_rng():
        for part in (list(range(half)), list(range(half, count))):
            # A way of reading that no part can be run in was found by reordering alone, of two examples.
            runs = (
                _try(losses, _try(rearranged, batch, part, count, way), len(part)) for way in (layout, {})
            )
            alone, own = next((run for run in runs if run is not None), None), values[part]
            if alone is not None and are_shares:
                alone = alone * (alone.nan_to_num() @ own.nan_to_num()) / alone.nan_to_num().square().sum()
            if alone is None or not bool(((alone - own).abs() > limit).any()):
                continue
            again = _try(losses, batch, count)
            if again is not None and not bool(((again - values).abs() > limit).any()):
                return True
    return False


def _limit(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return up to which difference losses of two runs are the same."""
    return (1e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-4) * values.abs().max()


_CHOSEN = (
    "Some examples of the first batch have no part in its loss, and have one where others are left out, as "
    "where the hardest of a batch are chosen: which ones count depends on the others. Define "
    "`influence_loss(batch) -> (B,)` on the module, or pass `loss=`, with the loss that each example is to "
    "have."
)


def check_chosen(values: Tensor, batch: Any, losses: Callable[[Any, int], Tensor], layout: Layout) -> None:
    """Check that examples which add nothing to the loss of a batch add nothing among fewer, either.

    Args:
        values: the loss of each example with its weight, ``(B,)``.
        batch: the batch they are of.
        losses: maps a batch and its number of examples to their losses.
        layout: how the batch is taken apart.

    Raises:
        UnsupportedModelError: if they do, so that others have decided it.
    """
    values, count = values.detach(), len(values)
    idle = (values == 0).nonzero().flatten().tolist()
    if not idle:
        return
    for part in ([idle[0]], [idle[0], int(values.abs().argmax())], idle):
        with preserve_rng():
            found = _try(losses, _try(rearranged, batch, part, count, layout), len(part))
        own = found if found is None or part is idle else found[:1]
        if own is not None and bool((own.isfinite() & (own != 0)).any()):
            raise UnsupportedModelError(_CHOSEN)


class _Watched:
    """What maps batches to losses, watched for draws from the global generators.

    Args:
        losses: the function.
        most: runs that are compared where it draws.
    """

    def __init__(self, losses: Callable[..., Tensor], most: int) -> None:
        self._losses, self._most, self.draws = losses, most, False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        states = RandomStates.read()
        try:
            return self._losses(*args, **kwargs)
        finally:
            self.draws |= states.have_moved()

    def tell_draws(self, values: Tensor, batch: Any, limit: Tensor) -> bool:
        """Warn if a batch has other losses when it is run again; a coin may come up the same, so draw on.

        Losses that are the same each time, and not the given ones, were read in another way than these.

        Returns:
            Whether it has, so that nothing can be concluded from other runs.
        """
        first = None
        with preserve_rng():
            for _ in range(self._most + 1):
                again = _try(self, batch, len(values))
                known = [values] if self.draws else [] if first is None else [first]
                if again is None or any(bool(((again - other).abs() > limit).any()) for other in known):
                    warn(_RANDOM)
                    return True
                if first is not None and not self.draws:
                    return False
                first = again
        return False


OTHER_ORDER = (
    "The losses do not come in the order of the batch's examples: when the examples change places, they do "
    "not. Accepted are losses whose rows are the examples, in their order. Before the loss, bring "
    "time-first outputs (T, B, C) into the form (B, T, C), and undo the sorting or packing of sequences; "
    "several views of an example have to stand together (`x.repeat_interleave(2, 0)`, not `cat([x, x])`); or "
    "define `influence_loss(batch) -> (B,)` on the module. Batches that are time-first themselves need a "
    "batch size that is not the number of time steps."
)


def check_order(values: Tensor, batch: Any, losses: _Watched, dtype: torch.dtype) -> Layout | None:
    """Check that a batch in another order has its losses in that order.

    Nothing is concluded where that cannot be told: batches of unknown parts, steps that fail on a reordered
    batch (as packing sorted sequences does), and losses that change from call to call, which are warned of.

    Args:
        values: the loss of each example, ``(B,)``.
        batch: the batch they are of.
        losses: maps a batch and its number of examples to their losses.
        dtype: precision of the model's outputs.

    Returns:
        How the batch is taken apart; None where that cannot be told.

    Raises:
        UnsupportedModelError: if the losses come in another order.
    """
    values, count = values.detach(), len(values)
    limit = _limit(values, dtype)

    def same(others: Tensor | None, order: list[int]) -> bool:
        return others is not None and bool(((others - values[order]).abs() <= limit).all())

    def fits(layout: Layout) -> bool | None:
        """Return whether the losses come in the order of the examples; None if that cannot be told."""
        known = None
        for order in _orders(values, limit):
            other = _try(losses, _try(rearranged, batch, order, count, layout), len(order))
            if other is None:
                continue
            known = same(other, order)
            if not known:
                return False
        return known

    with preserve_rng():
        known = fits({})
        if known is not False:
            is_cut = known or all(len(part) == count for part in find_tensors(batch) if part.ndim)
            return {} if is_cut else None
        if losses.tell_draws(values, batch, limit):
            return None
        found = next((layout for layout in find_layouts(batch, count) if layout and fits(layout)), None)
    if found is None:
        raise UnsupportedModelError(OTHER_ORDER)
    return found


def _orders(values: Tensor, limit: Tensor) -> list[list[int]]:
    """Return the orders to try; the first example alone where no order would show anything."""
    count = len(values)
    if count == 2 or bool(values.max() - values.min() <= limit):
        return [list(range(count))[::-1], [0]]
    return [list(range(count))[::-1], [count - 1, *range(count - 1)]]


def _try(function: Callable[..., Any], argument: Any, *more: Any) -> Any:
    """Return what the function returns, None if it fails or has no argument."""
    if argument is None:
        return None
    try:
        return function(argument, *more)
    except Exception:  # whatever the user's code may raise
        return None


def _halves_agree(
    values: Tensor, batch: Any, losses: Callable[[Any, int], Tensor], dtype: torch.dtype
) -> bool:
    """Return whether both halves of a batch, each in another order, have the losses of their examples.

    That shows at once what :func:`check_order` and :func:`check_part` do, in a third of the time. Where they
    do not, or that would not show anything, these say what there is to say.
    """
    count, limit = len(values), _limit(values.nan_to_num(0, 0, 0), dtype)
    half = (count + 1) // 2
    orders = [list(range(half))[::-1], [count - 1, *range(half, count - 1)]]
    moved = [bool(((values[order] - values[sorted(order)]).abs() > limit).any()) for order in orders]
    if count < _FEWEST or not all(moved):
        return False
    with preserve_rng():
        for order in orders:
            alone = _try(losses, _try(rearranged, batch, order, count, {}), len(order))
            if alone is None or not bool(((alone - values[order]).abs() <= limit).all()):
                return False
    return True


def count_left_out(captured: Captured, batch: Any) -> int:
    """Return how many positions of each example the loss leaves out, of whose rows as many are known."""
    loss, count = captured.loss, captured.num_examples
    rows = count if isinstance(loss, RaggedLoss) or loss is None else len(loss.outputs)
    return 0 if rows == count else missing_positions(batch, count, rows)


def check_losses(captured: Captured, module: nn.Module, batch: Any, losses: Callable[..., Tensor]) -> None:
    """Check that the losses of a batch are those of its examples, in their order, whatever the others are.

    Args:
        captured: the batch.
        module: the model.
        batch: what was captured.
        losses: maps a batch and its number of examples to their losses; divided by their weights where
            ``normalised=True``.

    Raises:
        UnsupportedModelError: if they are not.
    """
    values, loss = captured.per_example(), captured.loss
    dtype = values.dtype if loss is None else loss.outputs.dtype
    is_shared = holds_stand_ins(module)
    losses, limit = _Watched(losses, 1 if is_shared else _DRAWS), _limit(values.detach(), dtype)
    if not is_shared and _halves_agree(values.detach(), batch, losses, dtype):
        check_chosen(values, batch, losses, {})
        if losses.draws:
            losses.tell_draws(values.detach(), batch, limit)
        return
    layout = check_order(values, batch, losses, dtype)
    if layout is None or is_shared:
        return  # processes that share parameters out have to run the same batches, whatever these hold
    if losses.draws and losses.tell_draws(values.detach(), batch, limit):
        return
    check_chosen(values, batch, losses, layout)
    normalised = values / captured.weights, partial(losses, normalised=True)
    are_shares = loss is not None and loss.note == WEIGHTED
    check_part([(values, losses), normalised], batch, dtype, layout, are_shares=are_shares)
