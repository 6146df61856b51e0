"""Find the training loss inside a step that was written without this library in mind."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from lightning_influence.model.losses.calls import LossCall, is_packed, versions_of
from lightning_influence.model.losses.divisors import find_divisor, find_factor
from lightning_influence.model.losses.graphs import walk
from lightning_influence.model.losses.loss import OutputLoss, Reduction
from lightning_influence.model.losses.picked import PICKERS, WholeRows, count_picked
from lightning_influence.model.losses.reductions import Alike, count_ways, reduced, summed, tolerance
from lightning_influence.model.losses.registry import (
    find_losses,
    loss_name,
    supported_losses,
)
from lightning_influence.model.losses.way import Way
from lightning_influence.model.uses.places import Place
from lightning_influence.support.errors import LossCaptureError, NonFiniteError
from lightning_influence.support.waiting import expect


def same_value(value: Tensor, batch_loss: Tensor) -> bool:
    """Return whether two scalars agree to the tolerance of the less precise one."""
    limit = max(tolerance(value.dtype), tolerance(batch_loss.dtype))
    a, b = value.double().reshape(()), batch_loss.to(value.device).double().reshape(())
    return bool((a - b).abs() <= limit * b.abs())


def same_loss(first: OutputLoss, second: OutputLoss) -> bool:
    """Return whether two calls are one and the same loss: of one kind, on equal outputs and targets."""
    return type(first) is type(second) and all(
        a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
        for a, b in ((first.outputs, second.outputs), (first.targets, second.targets))
    )


_LISTED = 10
_REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum", "position_mean", "example_mean")
_REMEDY = (
    "To solve it, define `influence_loss(batch) -> (B,)` on the module: the training loss of each example of "
    "the batch."
)


class LossCapture(TorchFunctionMode):
    """Context manager that records calls of torch's loss functions whose result requires a gradient.

    The calls of ``nn.CrossEntropyLoss`` and other loss modules are recorded as those of the functions they
    call. A loss that runs inside a compiled function is not seen; compiled submodules before the loss do no
    harm. Entering it again forgets earlier calls. The recorded calls hold on to the autograd graph:
    :meth:`clear` lets it go.

    Example:
        >>> logits = torch.zeros(4, 3, requires_grad=True)
        >>> with LossCapture() as capture:
        ...     value = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0]))
        >>> loss = capture.resolve(value, batch_size=4)
        >>> loss.num_examples, loss.reduction, round(loss.batch_value().item(), 4)
        (4, 'mean', 1.0986)

    Attributes:
        calls: what was recorded.
        way: which functions were called.
        allows_weights: whether parameters that the loss alone uses may weigh its terms: the gradients of
            outputs are right then, and those of such parameters are not seen.
    """

    allows_weights = False

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[LossCall] = []
        self._losses = find_losses()
        self._picked: set[int] = set()
        self._alike = Alike()
        self.way = Way()

    def __enter__(self) -> Self:
        """Start recording, with an empty list of calls.

        Returns:
            The capture itself.
        """
        self.clear()
        self.way = Way()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the function, and keep the call if it is a loss.

        Returns:
            What the function returns.
        """
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # the compiler must not trace what follows
            return func(*args, **kwargs)
        self.way.note(func)
        if func is functional.l1_loss and "weight" not in kwargs:
            kwargs = {**kwargs, **_lost_weight()}
        result = func(*args, **kwargs)
        if type(result).__module__.startswith("torch._subclasses."):
            return result  # the compiler traces it after all: torch 2.4 does not say so
        if func in PICKERS:
            self.note_picked(func, args, result)
        if func in self._losses and isinstance(result, Tensor) and result.requires_grad:
            versions = versions_of((*args, *kwargs.values()))
            # A copy, because `loss += penalty` would change the value that was seen.
            value = result.detach().clone()
            call = LossCall(
                func, args, kwargs, value, result.grad_fn, result.output_nr, versions, is_packed=is_packed()
            )
            picked = any(part.dim() and len(part) in self._picked for part in call.tensors)
            self.calls.append(replace(call, picked=picked))
        return result

    def note_picked(self, func: Callable[..., Any], args: Sequence[Any], result: Any) -> None:
        """Note how many rows a function picked by a mask, if it did."""
        count = count_picked(func, args, result)
        self._picked |= set() if count is None else {count}

    def put_in_order(
        self, place_of: Callable[[Tensor], Place | None], num_examples: int, *, picks: bool = False
    ) -> bool:
        """Note whose the rows of calls are where they are not the examples in their order.

        Outputs that are compared with targets of other examples are left as they are.

        Args:
            place_of: tells where the examples stand in a tensor.
            num_examples: ``B``.
            picks: whether the step picks rows, of which there are as many of each example by chance only.

        Returns:
            Whether some are not.
        """
        for number, call in enumerate(self.calls):
            place, outputs = place_of(call.outputs), call.outputs
            if place is None or not outputs.dim():
                continue
            rows = [place_of(part) for part in call.tensors if part.dim() and len(part) == len(outputs)]
            if not all(other is None or other.holds_the_same(place, num_examples) for other in rows):
                continue
            order = place.row_order(num_examples)
            is_uneven = order is None and not place.is_plain() and num_examples > 1
            by_rows = call.picked or is_uneven or (picks and len(outputs) != num_examples)
            owners = place.row_owners(len(outputs), num_examples) if by_rows else None
            # Examples, or parts of the batch, may have a call each, as in a loop over them.
            is_part = owners is not None and len(set(owners.tolist())) < num_examples
            if is_part and len(self.calls) > 1 and not (call.picked and place.dim is not None):
                continue
            self.calls[number] = replace(call, order=order if owners is None else None, owners=owners)
        return any(call.is_followed for call in self.calls)

    def judge(self, whole: WholeRows, is_in_order: Callable[[Tensor], bool] | None = None) -> set[int]:
        """Decide which calls are on rows of which it is not known whose they are.

        Args:
            whole: numbers of rows that are all positions of the examples.
            is_in_order: tells whether the rows of a tensor are known to be the examples in their order,
                whatever their number.

        Returns:
            Numbers of rows that are not whole, and are the examples' in their order.
        """
        acquitted = set()
        for number, call in enumerate(self.calls):
            outputs = call.outputs
            other = outputs.dim() > 0 and len(outputs) not in whole
            picked = call.picked and not (outputs.dim() and whole.are_of_one(len(outputs)))
            is_odd = (picked or other) and not call.is_followed
            in_order = is_odd and is_in_order is not None and is_in_order(outputs)
            acquitted |= {len(outputs)} if other and in_order else set()
            self.calls[number] = replace(call, picked=is_odd and not in_order)
        return acquitted

    def is_lost(self, place_of: Callable[[Tensor], Place | None]) -> bool:
        """Return whether values have left torch, and nobody can follow rows of losses or their targets.

        Args:
            place_of: tells where the examples stand in a tensor.
        """
        known = any(place_of(part) is not None for call in self.calls for part in call.tensors)
        return self.way.leaves_torch and not known

    def acquit(self, place_of: Callable[[Tensor], Place | None]) -> None:
        """Trust calls on picked rows that are known to be the examples', as many of each.

        Args:
            place_of: tells where the examples stand in a tensor.
        """
        for number, call in enumerate(self.calls):
            place = place_of(call.outputs) if call.picked else None
            if call.is_followed or (place is not None and place.is_plain()):
                self.calls[number] = replace(call, picked=False)

    def clear(self) -> None:
        """Forget the recorded calls and their graph."""
        self.calls, self._picked = [], set()

    @torch.no_grad()
    def resolve(
        self,
        batch_loss: Tensor,
        batch_size: int,
        *,
        activations: Collection[object] = (),
        divisor: float = 1.0,
    ) -> OutputLoss:
        """Find the call, or the calls, that make up the training loss.

        The graph of the loss is walked back to the recorded calls. The derivative of the loss in what a call
        returned says how it was reduced, scaled or weighed, whatever the values are. What the loss holds
        beside the calls may depend on weights alone, as penalties do: gradients at activations are none of
        theirs.

        Args:
            batch_loss: what the training step returned, one element. Without a graph (``detach()``) calls
                are recognised by their values.
            batch_size: number of examples ``B``.
            activations: autograd nodes of layers' outputs, by which a term that passes all calls by is
                recognised.
            divisor: what the training loss was divided by to give ``batch_loss``.

        Returns:
            The loss, with its outputs attached to the graph.

        Raises:
            LossCaptureError: if the loss is not made of calls that can be read.
            NonFiniteError: if the loss is NaN or infinite, unless no example has a weight in it.
            ValueError: if the batch size is not positive.
        """
        _check_request(batch_loss, batch_size)
        if not self.calls:
            _check_finite(batch_loss)
            _refuse_no_calls(batch_loss)
        with torch._C.DisableTorchFunction():
            if batch_loss.grad_fn is None:
                _check_finite(batch_loss)
                return self._by_value(batch_loss * divisor, batch_size)
            terms = self._terms(batch_loss, activations)
            factor = find_factor(batch_loss.grad_fn, terms[0].node) if len(terms) == 1 else None
            if factor is not None and factor * divisor > 0 and terms[0].value.dim() == 0:
                return self._take_one(terms[0], batch_loss, batch_size, factor * divisor, divisor)
            if not bool(torch.isfinite(batch_loss).all()):
                loss = terms[0].read(batch_size) if len(terms) == 1 else None
                if loss is None or bool(loss.weights().any()):
                    _check_finite(batch_loss)
                assert loss is not None
                return loss
            return self._join(terms, batch_loss, batch_size, divisor)

    def _take_one(
        self, call: LossCall, batch_loss: Tensor, batch_size: int, factor: float, divisor: float
    ) -> OutputLoss:
        """Return a call of one value that the loss is a known multiple of, as steps have it as a rule.

        Neither derivatives nor, on an accelerator, values are read for that.

        Raises:
            LossCaptureError: if the call cannot be read.
        """
        with _explained(call, batch_loss):
            loss = call.read(batch_size)
            # The mean over labels that are all ignored is NaN, and no loss of any example.
            value = batch_loss.detach().reshape(())
            finite = torch.isfinite(value)
            if not (finite.is_cpu and bool(finite)):
                expect(finite | ~loss.weights().any(), partial(_refuse_value, value))
            slope = torch.as_tensor(factor)
            own = find_divisor(
                batch_loss.grad_fn, call.node, {call.node}, partial(count_ways, loss, slope), divisor
            )
            taken = reduced(loss, factor, own)
            self._alike.check(loss, taken)
        return taken

    def _terms(self, batch_loss: Tensor, activations: Collection[object]) -> list[LossCall]:
        """Return the calls that the loss's graph leads to.

        Raises:
            LossCaptureError: if it leads to none, or passes them by to what the outputs are made of.
        """
        by_node = {call.node: call for call in self.calls if call.node is not None}
        with torch.enable_grad():  # to find a leaf's node, torch takes a view of it, 2.4 as it is called
            outputs = {
                get_gradient_edge(part).node
                for call in self.calls
                for part in (*call.args, *call.kwargs.values())
                if isinstance(part, Tensor) and part.requires_grad
            }
        met, beside, ends = walk(batch_loss.grad_fn, by_node, outputs.union(activations))
        # Leaves beside the calls are weights: penalties, unless the way there is one of the outputs' too.
        if not met or ends == "layer" or (ends == "leaf" and beside & walk(met, (), ())[1]):
            _refuse_calls(self.calls, batch_loss)
        return [by_node[node] for node in met]

    def _join(
        self, calls: Sequence[LossCall], batch_loss: Tensor, batch_size: int, divisor: float
    ) -> OutputLoss:
        """Return one call under its reduction, or the sum of several.

        Raises:
            LossCaptureError: if a call cannot be read or has a negative factor.
        """
        edges = [GradientEdge(call.node, call.output_number) for call in calls]
        with torch.enable_grad():
            slopes = torch.autograd.grad(batch_loss, edges, create_graph=True)
            # A slope with a graph goes with other calls' values, or with parameters that the loss alone uses.
            bent = [slope.sum() for slope in slopes if slope.requires_grad]
            if bent and not (self.allows_weights and _is_independent(bent, edges)):
                _refuse_calls(self.calls, batch_loss)
        slopes = tuple(slope.detach() for slope in slopes)
        nodes = {call.node for call in calls}
        losses = []
        for call, slope in zip(calls, slopes, strict=True):
            with _explained(call, batch_loss):
                loss = call.read(batch_size)
                slope = call.sort_rows(slope.to(loss.detached.dtype)) * divisor
                ways = partial(count_ways, loss, slope)
                own = find_divisor(batch_loss.grad_fn, call.node, nodes, ways, divisor)
                losses.append(reduced(loss, slope, own))
                self._alike.check(loss, losses[-1], len(losses))
        if len(losses) == 1:
            return losses[0]
        return summed(losses)

    def _by_value(self, batch_loss: Tensor, batch_size: int) -> OutputLoss:
        """Return the one call whose value is the loss's.

        Raises:
            LossCaptureError: if there is none, or several, or it cannot be read.
        """
        losses: list[tuple[LossCall, OutputLoss]] = []
        for call in self.calls:
            try:
                loss = call.read(batch_size)
            except LossCaptureError:
                continue
            for reduction in _REDUCTIONS[:1] if loss.reduction == "mean" else _REDUCTIONS:
                reduced = replace(loss, reduction=reduction)
                if same_value(reduced.batch_value(), batch_loss):
                    losses.append((call, reduced))
                    break
        if not losses:
            _refuse_calls(self.calls, batch_loss)
        if any(not same_loss(losses[0][1], other) for _, other in losses[1:]):
            raise LossCaptureError(
                f"The training loss is {batch_loss.item():.6g}, and {len(losses)} different calls have that "
                f"value:\n{_listing([call for call, _ in losses])}\nAccepted is exactly one. {_REMEDY}"
            )
        return losses[0][1]


def _is_independent(bent: Sequence[Tensor], edges: Sequence[GradientEdge]) -> bool:
    """Return whether slopes depend on no call's values."""
    found = torch.autograd.grad(bent, edges, allow_unused=True, retain_graph=True)
    return not any(part is not None and bool(part.any()) for part in found)


def _lost_weight() -> dict[str, Tensor]:
    """Return the weight of the call of ``F.l1_loss`` that is on the stack, as a keyword.

    Torch (2.13 still) does not hand it to function modes, under which the loss would come out unweighted.
    """
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not functional.l1_loss.__code__:
        frame = frame.f_back  # type: ignore[assignment]
    weight = None if frame is None else frame.f_locals.get("weight")
    return {} if weight is None else {"weight": weight}


def _listing(calls: Sequence[LossCall]) -> str:
    """Return the calls, one a line."""
    lines = [f"  {i}. {call.describe()}" for i, call in enumerate(calls[:_LISTED], start=1)]
    if len(calls) > _LISTED:
        lines.append(f"  and {len(calls) - _LISTED} more")
    return "\n".join(lines)


def _refuse_no_calls(batch_loss: Tensor) -> NoReturn:
    """Refuse a loss in which no loss function was seen.

    Raises:
        LossCaptureError: saying what is accepted.
    """
    reason = (
        f"The training loss is {batch_loss.item():.6g}, but no loss function was seen that depends on the "
        "parameters."
    )
    raise LossCaptureError(
        f"{reason} Accepted is one call of {supported_losses()}. A loss written out by hand, or computed "
        "inside a function under `torch.compile`, cannot be seen (compile the network and not its loss). "
        f"{_REMEDY}",
        reason,
    )


def _refuse_calls(calls: Sequence[LossCall], batch_loss: Tensor) -> NoReturn:
    """Refuse a loss that is not made up by the calls that were seen.

    Raises:
        LossCaptureError: listing them.
    """
    reason = (
        f"The training loss is {batch_loss.item():.6g}, and no single call of a loss function, nor a sum of "
        "several, makes it up"
    )
    names = dict.fromkeys(loss_name(call.function) for call in calls)
    raise LossCaptureError(
        f"{reason}. Seen:\n{_listing(calls)}\nA second term that depends on the outputs, or a function of "
        f"the loss such as a root, has this effect. Accepted are sums of calls of {supported_losses()}, with "
        f"positive factors. {_REMEDY}",
        f"{reason} (seen: {', '.join(names)}).",
    )


def _check_request(batch_loss: Tensor, batch_size: int) -> None:
    """Refuse what can be no training loss of a batch.

    Raises:
        LossCaptureError: if the loss is not one number.
        ValueError: if the batch size is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"Got batch_size={batch_size}; accepted are positive integers.")
    if batch_loss.numel() != 1:
        raise LossCaptureError(
            f"Got a training loss of shape {tuple(batch_loss.shape)}; accepted is a single number. {_REMEDY}"
        )


def _check_finite(batch_loss: Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        NonFiniteError: naming the value.
    """
    if not bool(torch.isfinite(batch_loss).all()):
        _refuse_value(batch_loss)


def _refuse_value(batch_loss: Tensor) -> NoReturn:
    """Refuse a loss that is not finite.

    Raises:
        NonFiniteError: naming the value.
    """
    raise NonFiniteError(
        f"The training loss is {batch_loss.item()}. Accepted are finite losses: look at the learning "
        "rate, the inputs and the targets of this batch."
    )


@contextlib.contextmanager
def _explained(call: LossCall, batch_loss: Tensor) -> Iterator[None]:
    """Let errors about one call name the loss that it is part of.

    Raises:
        LossCaptureError: in place of another.
    """
    try:
        yield
    except LossCaptureError as error:
        raise LossCaptureError(
            f"The training loss is {batch_loss.item():.6g}, and this call is part of it:\n"
            f"{_listing([call])}\n{error} {_REMEDY}",
            f"The training loss is made of {loss_name(call.function)}. {error.reason}",
        ) from error
