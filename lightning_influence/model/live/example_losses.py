"""Each example's loss and margin in every training step, seen on the user's own call of the loss function.

A function mode keeps the calls of loss functions that a step makes. What a call says of each example is
computed from its own arguments, without a backward pass and without random numbers. That the batch's loss is
made of the call is found out from the graph, as for any capture; where it is the plain value of one call, the
next steps are not watched at all: the call is read off its node in their graph, or, of losses that have no
such node, values are compared, and on an accelerator nobody waits for the comparison. Small steps of that
kind are held, as copies, and read many at once: an operation takes longer to begin than to run on one.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_influence.model.live.live_capture import StepLosses
from lightning_influence.model.live.loss_nodes import LossNode
from lightning_influence.model.losses.bce import BinaryCrossEntropyLoss, ProbabilityLoss
from lightning_influence.model.losses.calls import LossCall, versions_of
from lightning_influence.model.losses.capture import same_value
from lightning_influence.model.losses.combined import ScaledLoss, SumLoss
from lightning_influence.model.losses.cross_entropy import CrossEntropyLoss
from lightning_influence.model.losses.loss import OutputLoss, Reduction, working
from lightning_influence.model.losses.reductions import tolerance
from lightning_influence.support.batches import find_tensors
from lightning_influence.support.errors import LossCaptureError

# Chosen by hand: steps of one fit put rows into another order always or never.
_FOLLOWED = 2
_OTHER_STEP = "The loss of this training step is made otherwise than those of the steps before it."
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


def _find_memory(tensor: Tensor) -> int | None:
    """Return where a tensor's numbers are, the same for its views; None if it has no memory of its own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # sparse ones, and those that wrap others
        return None


class HeldStep(NamedTuple):
    """A step that is read with others, see :meth:`LossWatch.read_held`.

    Attributes:
        kind: equal for steps that can be read as one.
        call: the call of the loss function, with copies of its arguments.
        loss: a copy of the batch's loss, in the units of the call; None where it is known to be the call's.
        num_examples: ``B``.
        reduction: of the call.
    """

    kind: Hashable
    call: LossCall
    loss: Tensor | None
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
        self._batch: Any = None  # of the step that is being watched
        # Whether targets are the batch's own tensors, which a step that rearranges examples makes anew; and
        # whether a step did so after others had not.
        self._is_own: bool | None = None
        self._is_wary = False
        # The node that the calls of steps are read off, with what is known of them; while it is known, steps
        # run without the mode.
        self._node: tuple[LossNode, Hashable, Reduction] | None = None
        self._is_regular = True  # whether no step has been met whose loss is made otherwise
        self._is_entered = False  # whether the mode is on

    def open(self, batch: Any = None, num_examples: int = 0) -> None:
        """Watch the calls of loss functions from here on; a step that was watched before is let go.

        Args:
            batch: what the step is given. In the first steps its examples are followed to the losses, which
                must have them in their order; None to trust that they do.
            num_examples: ``B``.
        """
        self.close()
        self.is_open, self._batch = True, batch
        if self._node is not None:
            return
        self._mode.hooks, self._is_entered = False, True
        self._mode.__enter__()
        is_new = self._followed < _FOLLOWED or self._is_wary
        if is_new and num_examples > 1 and batch is not None:
            self._mode.follow(batch, num_examples)

    def close(self) -> None:
        """Watch no longer, and let go of what was seen."""
        if not self.is_open:
            return
        self._stop()
        self._mode.clear()
        self._batch = None

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
            if self._node is not None:
                return self._take_node(batch_loss, num_examples, divisor)
            if self._mode.hooks:
                raise LossCaptureError("The training step registers a hook on a tensor.")
            if not self._mode.are_in_order():
                raise LossCaptureError(_OTHER_ORDER)
            # Rows that were picked may be in order by chance: such steps are followed for ever.
            self._followed += self._mode.watch is not None and not self._mode.watch.picks
            with torch._C.DisableTorchFunction():
                return self._take_call(batch_loss, num_examples, divisor)
        finally:
            self._mode.clear()
            self._batch = None

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
            found = [step.loss for step in steps if step.loss is not None]
            if found:
                self._compare(torch.stack(found), call.value)
            loss = call.read(sum(step.num_examples for step in steps))
            return read_examples(replace(loss, reduction=first.reduction))

    def take_met(self) -> int:
        """Return how many functions of torch have passed the mode since this was asked last."""
        met, self._mode.met = self._mode.met, 0
        return met

    def distrust(self) -> None:
        """Walk every graph from the next batch on, because a value did not agree."""
        self._plain, self.excess = {}, None
        self._node, self._is_regular = None, False

    def _stop(self) -> None:
        self.is_open = False
        if self._is_entered:
            self._is_entered = False
            self._mode.__exit__(None, None, None)

    def _take_node(self, batch_loss: Tensor, num_examples: int, divisor: float) -> ExampleLosses | HeldStep:
        """Read a step off its graph.

        Returns:
            As :meth:`take`.

        Raises:
            LossCaptureError: if its loss is made otherwise; the next steps are watched again.
        """
        assert self._node is not None
        node, key, reduction = self._node
        call = node.read(batch_loss, divisor)
        if call is None:
            self.distrust()
            raise LossCaptureError(_OTHER_STEP)
        self._check_targets(call)
        return self._hold_or_read(key, call, None, num_examples, reduction)

    def _take_call(self, batch_loss: Tensor, num_examples: int, divisor: float) -> ExampleLosses | HeldStep:
        """Read a step by the calls that were seen."""
        calls = self._mode.calls
        for call in calls[:1]:
            self._check_targets(call)
        key = _key_of(calls[0]) if len(calls) == 1 else None
        if key is None or key not in self._plain:
            loss = self._resolve(key, batch_loss, num_examples, divisor)
            if key is None or key not in self._plain:
                return read_examples(loss)
        call, reduction = calls[0], self._plain[key]
        node = LossNode.find(batch_loss, call)
        if node is not None and self._is_regular and self._followed >= _FOLLOWED:
            self._node = node, key, reduction
        # Also where it was seen, so that numbers do not go, by a digit, with when the watch began.
        off_node = None if node is None else node.read(batch_loss, divisor)
        if off_node is not None:
            return self._hold_or_read(key, off_node, None, num_examples, reduction)
        return self._hold_or_read(key, call, batch_loss.detach() * divisor, num_examples, reduction)

    def _check_targets(self, call: LossCall) -> None:
        """Refuse a step whose targets are made anew where they were the batch's own before.

        Raises:
            LossCaptureError: if they are; the next steps are followed from their examples on.
        """
        own = set(map(_find_memory, find_tensors(self._batch))) - {None}
        is_own = any(_find_memory(part) in own for part in call.tensors[1:])
        if self._is_own is None:
            self._is_own = is_own
        elif self._is_own and not (is_own or self._is_wary):
            self._is_wary = True
            self.distrust()
            raise LossCaptureError(_OTHER_STEP)

    def _hold_or_read(
        self, key: Hashable, call: LossCall, loss: Tensor | None, num_examples: int, reduction: Reduction
    ) -> ExampleLosses | HeldStep:
        held = self._hold(key, call, loss, num_examples, reduction)
        if held is not None:
            return held
        if loss is not None:
            self._compare(loss, call.value.mean())
        return read_examples(replace(call.read(num_examples), reduction=reduction))

    def _hold(
        self, key: Hashable, call: LossCall, loss: Tensor | None, num_examples: int, reduction: Reduction
    ) -> HeldStep | None:
        """Return copies of a step that can be read later; None for one that is to be read now."""
        own = call.tensors
        shapes = [part.shape for part in own]
        if len(own) != 2 or not all(shapes) or shapes[0][0] != shapes[1][0] or call.picked or call.value.ndim:
            return None
        count, numbers = shapes[0][0], shapes[0].numel() + shapes[1].numel()
        if count % num_examples or numbers > _HELD_NUMBERS or call.versions != versions_of(own):
            return None
        # Calls of several steps are joined to one: their tensors are alike but for the number of rows.
        alike = [(shape[1:], part.dtype) for shape, part in zip(shapes, own, strict=True)]
        kind = (key, count // num_examples, *alike, None if loss is None else loss.dtype)
        kept = call.with_tensors([part.detach().clone() for part in own], call.value)
        return HeldStep(kind, kept, loss, num_examples, reduction)

    def _compare(self, found: Tensor, values: Tensor) -> None:
        """Take up by how much losses of batches differ from values of their calls, beyond rounding."""
        limit = max(tolerance(values.dtype), tolerance(found.dtype))
        differences = (found - values).abs().double() - limit * values.abs().double()
        excess = differences.amax()
        self.excess = excess if self.excess is None else torch.fmax(self.excess, excess)

    def _resolve(
        self, key: Hashable | None, batch_loss: Tensor, num_examples: int, divisor: float
    ) -> OutputLoss:
        """Find out from the graph what the loss is made of; note if it is the plain value of one call."""
        loss = self._mode.resolve(batch_loss, num_examples, divisor=divisor)
        # A value that no example's loss is told apart by, zero, would let any other loss pass.
        is_plain = not isinstance(loss, ScaledLoss | SumLoss) and bool(batch_loss != 0)
        whole = batch_loss * divisor
        if key is not None and is_plain and same_value(self._mode.calls[0].value.mean(), whole):
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
    if isinstance(loss, CrossEntropyLoss) and not loss.has_probabilities:
        values, margins = _read_labels(loss)
    else:
        values, margins = None, _margins_of(loss)
    losses = (loss.per_example().detach() if values is None else values).double()
    if loss.divides_by_positions:
        losses = losses / loss.weights().detach().double()  # 0 / 0 is NaN
    return ExampleLosses(losses.float(), margins)


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
    if not loss.has_probabilities:
        return _read_labels(loss)[1]
    logits = _logits_of(loss)
    labels = loss.targets.movedim(1, -1).reshape(logits.shape).argmax(-1, keepdim=True)
    return None if logits.shape[-1] < 2 else _margins_at(logits, labels).mean(1).float()


def _read_labels(loss: CrossEntropyLoss) -> tuple[Tensor | None, Tensor | None]:
    """Read losses and margins of a loss on class indices with one pass over the logits.

    Returns:
        The unnormalised losses ``(B,)``, None if labels or classes are weighed; and the margins ``(B,)``.
    """
    logits = _logits_of(loss)
    logits = logits - logits.amax(-1, keepdim=True)
    labels = loss.targets.reshape(loss.num_examples, -1).long()
    counts = labels != loss.ignore_index
    labels, kept = labels.where(counts, 0).unsqueeze(-1), counts.to(logits.dtype)
    margins = None
    if logits.shape[-1] > 1:
        margins = (_margins_at(logits, labels) * kept).sum(1) / kept.sum(1).clamp_min(1)
        margins = margins.float()
    if loss.class_weights is not None or loss.label_smoothing or loss.position_weights is not None:
        return None, margins
    # Torch's own log_softmax takes four times as long for ten classes.
    values = logits.exp().sum(-1).log() - logits.gather(-1, labels).squeeze(-1)
    return (values * kept).sum(1), margins


def _logits_of(loss: CrossEntropyLoss) -> Tensor:
    """Return the logits as ``(B, T, C)``, detached."""
    classes = loss.outputs.shape[1]
    return working(loss.outputs.detach()).movedim(1, -1).reshape(loss.num_examples, -1, classes)


def _margins_at(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each position's margin ``(B, T)`` for labels ``(B, T, 1)``."""
    others = logits.scatter(-1, labels, -torch.inf).amax(-1)
    return logits.gather(-1, labels).squeeze(-1) - others


def _key_of(call: LossCall) -> Hashable | None:
    """Return what a call shares with those of other batches, None where it cannot be told."""
    named = [*enumerate(call.args), *sorted(call.kwargs.items())]
    plain = [(name, value) for name, value in named if not isinstance(value, Tensor)]
    if not all(isinstance(value, bool | int | float | str | None) for _, value in plain):
        return None
    tensors = [(name, value.ndim, value.dtype) for name, value in named if isinstance(value, Tensor)]
    return call.function, tuple(plain), tuple(tensors), call.value.ndim
