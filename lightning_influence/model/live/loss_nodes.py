"""Reads a loss call's arguments off the autograd node that it left, without having seen the call.

Fits repeat one step many times. Once a few of them have shown that the batch's loss is the plain value of one
call of a loss function, the node of that function in the graph of a step says as much as the call: it has
saved its outputs and targets for the backward pass. So nothing need watch the step while it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.nn import functional

from lightning_influence.model.losses.calls import LossCall

_LABELLED = frozenset({"NllLossBackward0", "NllLoss2DBackward0"})
# The nodes that may stand for a call; all have saved its two tensors, as `self` and `target`. A softmax is a
# node before, and does not change a loss on logits when it is applied to its logarithms again.
_NODES: dict[Callable[..., Any], frozenset[str]] = {
    functional.cross_entropy: _LABELLED,
    functional.nll_loss: _LABELLED,
    functional.mse_loss: frozenset({"MseLossBackward0"}),
    functional.huber_loss: frozenset({"HuberLossBackward0"}),
    functional.smooth_l1_loss: frozenset({"SmoothL1LossBackward0"}),
    functional.binary_cross_entropy_with_logits: frozenset({"BinaryCrossEntropyWithLogitsBackward0"}),
}
_DIVISION = "DivBackward0"
# Functions before the loss whose names have to stay: logits, their softmax, and how rows were picked.
_DEPTH = 4


@dataclass(frozen=True)
class LossNode:
    """Where the node of a loss call is in the graph of a step.

    Attributes:
        call: the call that was seen, as a template: its two tensors are those of an earlier step.
        names: of the node and of those before it.
        is_divided: whether the batch's loss is divided by a number, as Lightning does where gradients
            accumulate.
    """

    call: LossCall
    names: tuple[str, ...]
    is_divided: bool

    @classmethod
    def find(cls, batch_loss: Tensor, call: LossCall) -> LossNode | None:
        """Find the node of a call whose plain value a batch's loss is.

        Args:
            batch_loss: the loss of the batch, or the same divided by a number.
            call: the call, of two tensors.

        Returns:
            Where it is; None if such a call is not read off its node.
        """
        top: Any = batch_loss.grad_fn
        is_divided = top is not call.node and _name(top) == _DIVISION
        node = _numerator(top) if is_divided else top
        known = _name(node) in _NODES.get(call.function, ())
        if node is not call.node or not known or call.is_packed:
            return None
        saved = [node._saved_self.shape, node._saved_target.shape]
        if saved != [part.shape for part in call.tensors]:  # broadcast, or reshaped for the kernel
            return None
        return cls(replace(call, node=None), _names(node), is_divided)

    def read(self, batch_loss: Tensor, divisor: float) -> LossCall | None:
        """Read the call of another step.

        Args:
            batch_loss: the loss of its batch, which the step has not differentiated yet.
            divisor: what the training loss was divided by to give ``batch_loss``.

        Returns:
            The call on detached tensors; None if the loss of the step is made otherwise.
        """
        node: Any = batch_loss.grad_fn
        if self.is_divided:
            if _name(node) != _DIVISION or float(node._saved_other) != divisor:
                return None
            node = _numerator(node)
        elif divisor != 1:
            return None
        if _names(node) != self.names:
            return None
        try:
            tensors = [node._saved_self.detach(), node._saved_target.detach()]
        except RuntimeError:  # changed in place since, or differentiated: let the step's own pass say so
            return None
        return self.call.with_tensors(tensors, batch_loss.detach() * divisor)


def _name(node: Any) -> str | None:
    return None if node is None else node.name()


def _numerator(node: Any) -> Any:
    """Return what a division divides, None if it is not by a plain number."""
    (numerator, _), (denominator, _) = node.next_functions
    return numerator if denominator is None else None


def _names(node: Any) -> tuple[str, ...]:
    names: list[str] = []
    while node is not None and len(names) < _DEPTH:
        names.append(node.name())
        node = node.next_functions[0][0] if node.next_functions else None
    return tuple(names)
