"""Each example's loss and margin in every training step, seen on the user's own call of the loss function.

A function mode keeps the calls of loss functions that a step makes. What a call says of each example is
computed from its own arguments, without a backward pass and without random numbers. That the batch's loss is
made of the call is found out from the graph, as for any capture; where it is the plain value of one call, the
next steps only compare values, and on an accelerator nobody waits for the comparison. Small steps of that
kind are held, as copies, and read many at once: an operation takes longer to begin than to run on one.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_influence.model.live_capture import StepLosses
from lightning_influence.model.losses.bce import BinaryCrossEntropyLoss, ProbabilityLoss
from lightning_influence.model.losses.capture import LossCall, same_value, versions_of
from lightning_influence.model.losses.combined import ScaledLoss, SumLoss
from lightning_influence.model.losses.cross_entropy import CrossEntropyLoss
from lightning_influence.model.losses.loss import OutputLoss, Reduction, working
from lightning_influence.model.losses.reductions import tolerance
from lightning_influence.support.errors import LossCaptureError

# Chosen by hand: steps of one fit put rows into another order always or never.
_FOLLOWED = 2
_OTHER_ORDER = (
    "The training step computes its losses on rows in another order than the examples of the batch, so that "
    "it is not known which loss is whose."
)


class ExampleLosses(NamedTuple):
    """What one batch says of its examples.

    Attributes:
        losses: ``(B,)``, an example's own share of the training loss, its positions averaged.
        margins: ``(B,)``: by how much the model prefers the true label to the best other one, in logits,
            averaged over positions or labels (Pleiss et al. 2020); None where the loss has no labels.
    """

    losses: Tensor
    margins: Tensor | None


# Chosen by hand: numbers of a step that is read with others; of more, reading is no matter of how often.
_HELD_NUMBERS = 2**14


class HeldStep(NamedTuple):
    """A step that is read with others, see :meth:`LossWatch.read_held`.

    Attributes:
        kind: equal for steps that can be read as one.
        call: the call of the loss function, with copies of its arguments.
        loss: a copy of the batch's loss, in the units of the call.
        num_examples: ``B``.
        reduction: of the call.
    """

    kind: Hashable
    call: LossCall
    loss: Tensor
    num_examples: int
    reduction: Reduction


class LossWatch:
    """Watches the loss calls of one step at a time, between :meth:`open` and :meth:`take`.

    Attributes:
        is_open: whether a step is being watched.
        excess: on the loss's device, the largest relative difference, beyond the tolerance, between a batch's
            loss and the call that makes it up, among batches whose graph was not walked; None before any.
    """

    def __init__(self) -> None:
        self._mode = StepLosses()
        self.is_open = False
        self.excess: Tensor | None = None
        self._plain: dict[Hashable, Reduction] = {}
        self._followed = 0

    def open(self, batch: Any = None, num_examples: int = 0) -> None:
        """Watch the calls of loss functions from here on.

        Args:
            batch: what the step is given. In the first steps its examples are followed to the losses, which
                must have them in their order; None to trust that they do.
            num_examples: ``B``.
        """
        self._mode.hooks = False
        self._mode.__enter__()
        self.is_open = True
        if self._followed < _FOLLOWED and num_examples > 1 and batch is not None:
            self._mode.follow(batch, num_examples)

    def close(self) -> None:
        """Watch no longer, and let go of what was seen."""
        if self.is_open:
            self.is_open = False
            self._mode.__exit__(None, None, None)
        self._mode.clear()

    @torch.no_grad()
    def take(self, batch_loss: Tensor, num_examples: int, divisor: float = 1.0) -> ExampleLosses | HeldStep:
        """Read the losses of the examples of the step that was watched, which ends here, or hold the step.

        Args:
            batch_loss: the scalar that is about to be differentiated.
            num_examples: ``B``.
            divisor: what the training loss was divided by to give ``batch_loss``.

        Returns:
            Losses and margins, or what :meth:`read_held` makes them of.

        Raises:
            LossCaptureError: if the loss is not made of calls that can be read.
            NonFiniteError: if it is NaN or infinite.
        """
        try:
            self._stop()
            if self._mode.hooks:
                raise LossCaptureError("The training step registers a hook on a tensor.")
            if not self._mode.are_in_order():
                raise LossCaptureError(_OTHER_ORDER)
            self._followed += self._mode.watch is not None
            with torch._C.DisableTorchFunction():
                held = self._hold(batch_loss, num_examples, divisor)
                return held or read_examples(self._read(batch_loss, num_examples, divisor))
        finally:
            self._mode.clear()

    @torch.no_grad()
    def read_held(self, steps: Sequence[HeldStep]) -> ExampleLosses:
        """Read the losses of the examples of several steps of one kind, one after the other.

        Args:
            steps: of one kind, as :meth:`take` returned them.

        Returns:
            Losses and margins of all.

        Raises:
            LossCaptureError: if the calls cannot be read.
        """
        first = steps[0]
        with torch._C.DisableTorchFunction():
            call = _join_calls([step.call for step in steps])
            self._compare(torch.stack([step.loss for step in steps]), call.value)
            loss = call.read(sum(step.num_examples for step in steps))
            return read_examples(replace(loss, reduction=first.reduction))

    def distrust(self) -> None:
        """Walk every graph from the next batch on, because a value did not agree."""
        self._plain, self.excess = {}, None

    def _stop(self) -> None:
        if self.is_open:
            self.is_open = False
            self._mode.__exit__(None, None, None)

    def _hold(self, batch_loss: Tensor, num_examples: int, divisor: float) -> HeldStep | None:
        """Return copies of a step that can be read later; None for one that is to be read now."""
        calls = self._mode.calls
        key = _key_of(calls[0]) if len(calls) == 1 else None
        if key is None or key not in self._plain:
            return None
        call = calls[0]
        own = [part for part in (*call.args, *call.kwargs.values()) if isinstance(part, Tensor)]
        shapes = [part.shape for part in own]
        if len(own) != 2 or not all(shapes) or shapes[0][0] != shapes[1][0] or call.picked or call.value.ndim:
            return None
        count, numbers = shapes[0][0], shapes[0].numel() + shapes[1].numel()
        if count % num_examples or numbers > _HELD_NUMBERS or call.versions != versions_of(own):
            return None
        kind = (key, count // num_examples, shapes[0][1:], shapes[1][1:], batch_loss.dtype)
        copies = {id(part): part.detach().clone() for part in own}
        args = tuple(copies.get(id(part), part) for part in call.args)
        kwargs = {name: copies.get(id(part), part) for name, part in call.kwargs.items()}
        kept = replace(call, args=args, kwargs=kwargs, node=None)
        return HeldStep(kind, kept, batch_loss.detach() * divisor, num_examples, self._plain[key])

    def _compare(self, found: Tensor, values: Tensor) -> None:
        """Take up by how much losses of batches differ from values of their calls, beyond rounding."""
        limit = max(tolerance(values.dtype), tolerance(found.dtype))
        differences = (found - values).abs().double() - limit * values.abs().double()
        excess = differences.amax()
        self.excess = excess if self.excess is None else torch.fmax(self.excess, excess)

    def _read(self, batch_loss: Tensor, num_examples: int, divisor: float) -> OutputLoss:
        calls = self._mode.calls
        key = _key_of(calls[0]) if len(calls) == 1 else None
        if key is not None and key in self._plain:
            loss = calls[0].read(num_examples)
            self._compare(batch_loss.detach() * divisor, calls[0].value.mean())
            return replace(loss, reduction=self._plain[key])
        loss = self._mode.resolve(batch_loss, num_examples, divisor=divisor)
        # A value that no example's loss is told apart by, zero, would let any other loss pass.
        is_plain = not isinstance(loss, ScaledLoss | SumLoss) and bool(batch_loss != 0)
        if key is not None and is_plain and same_value(calls[0].value.mean(), batch_loss * divisor):
            self._plain[key] = loss.reduction
        return loss


def _join_calls(calls: Sequence[LossCall]) -> LossCall:
    """Return one call on the rows of all; its value are theirs, ``(S,)``."""

    def join(parts: Sequence[Any]) -> Any:
        return torch.cat(list(parts)) if isinstance(parts[0], Tensor) else parts[0]

    args = tuple(join(parts) for parts in zip(*(call.args for call in calls), strict=True))
    kwargs = {name: join([call.kwargs[name] for call in calls]) for name in calls[0].kwargs}
    value = torch.stack([call.value for call in calls])
    versions = versions_of((*args, *kwargs.values()))
    return replace(calls[0], args=args, kwargs=kwargs, value=value, versions=versions)


def read_examples(loss: OutputLoss) -> ExampleLosses:
    """Read losses and margins of the examples of a batch.

    Args:
        loss: the batch's loss.

    Returns:
        Detached values. An example without any weight in the loss has a loss of NaN: nothing is known of it.
    """
    weights = loss.weights().detach().double()
    losses = loss.per_example().detach().double()
    if loss.divides_by_positions:
        losses = losses / weights  # 0 / 0 is NaN
    return ExampleLosses(losses.float(), _margins_of(loss))


def _margins_of(loss: OutputLoss) -> Tensor | None:
    if isinstance(loss, ScaledLoss):
        return _margins_of(loss.inner)
    if isinstance(loss, SumLoss):
        found = [part for part in map(_margins_of, loss.terms) if part is not None]
        return found[0] if len(found) == 1 else None
    if isinstance(loss, CrossEntropyLoss):
        return _softmax_margins(loss)
    if isinstance(loss, BinaryCrossEntropyLoss | ProbabilityLoss):
        outputs = loss.detached
        log_odds = outputs if isinstance(loss, BinaryCrossEntropyLoss) else torch.logit(outputs, 1e-6)
        signs = 2 * loss.goals - 1
        return (signs * log_odds).reshape(loss.num_examples, -1).mean(1).float()
    return None


def _softmax_margins(loss: CrossEntropyLoss) -> Tensor | None:
    """Return the true label's logit less the highest other one; of soft targets, the likeliest label's."""
    classes = loss.outputs.shape[1]
    if classes < 2:
        return None
    logits = working(loss.outputs.detach()).movedim(1, -1).reshape(loss.num_examples, -1, classes)
    if loss.has_probabilities:
        labels = loss.targets.movedim(1, -1).reshape(logits.shape).argmax(-1)
        kept = torch.ones_like(labels, dtype=logits.dtype)
    else:
        labels = loss.targets.reshape(loss.num_examples, -1).long()
        counts = labels != loss.ignore_index
        labels, kept = labels.where(counts, 0), counts.to(logits.dtype)
    # The best two logits give the best other one of any label, with one pass over the classes.
    best, places = logits.topk(2, dim=-1)
    own = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    others = torch.where(places[..., 0] == labels, best[..., 1], best[..., 0])
    margins = (own - others) * kept
    return (margins.sum(1) / kept.sum(1).clamp_min(1)).float()


def _key_of(call: LossCall) -> Hashable | None:
    """Return what a call shares with those of other batches, None where it cannot be told."""
    named = [*enumerate(call.args), *sorted(call.kwargs.items())]
    plain = [(name, value) for name, value in named if not isinstance(value, Tensor)]
    if not all(isinstance(value, bool | int | float | str | None) for _, value in plain):
        return None
    tensors = [(name, value.ndim, value.dtype) for name, value in named if isinstance(value, Tensor)]
    return call.function, tuple(plain), tuple(tensors), call.value.ndim
