"""Which function pulls the output gradients of which operation back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.model.uses.calls import Slot, Use, tensors_of
from lightning_influence.model.uses.parts import Part

#: Gradients of a call's arguments by name, or by slot where an argument is a list of tensors; None if the
#: call is of a form that the function does not serve.
Pull = Callable[["ExampleCall"], Mapping[str, Part] | Mapping[Slot, Part] | None]


@dataclass(frozen=True)
class Operation:
    """A registered kind of operation.

    Attributes:
        pull: its closed form.
        arguments: the names of its arguments, in their order.
        reads_inputs: whether the closed form needs the values of the tensors of the batch.
        is_closed_form: False for one that differentiates example by example itself.
    """

    pull: Pull
    arguments: tuple[str, ...]
    reads_inputs: bool = True
    is_closed_form: bool = True

    @property
    def has_alternative(self) -> bool:
        """Whether the operation can be differentiated example by example instead."""
        return self.reads_inputs and self.is_closed_form


_OPERATIONS: dict[Any, Operation] = {}


def register_operation(
    *functions: Callable[..., Any],
    arguments: Sequence[str],
    reads_inputs: bool = True,
    is_closed_form: bool = True,
) -> Callable[[Pull], Pull]:
    """Function decorator: pull gradients back through these torch functions by the decorated closed form.

    The decorated function takes an :class:`ExampleCall` and returns the gradients of those arguments that the
    call names as sources, or None where it does not serve the call, which is then pulled back by automatic
    differentiation, example by example.

    Args:
        *functions: what a ``TorchFunctionMode`` sees called, as ``torch.conv2d`` or ``torch.Tensor.matmul``.
        arguments: the names of their arguments, in the order of positional ones.
        reads_inputs: False if the form needs no values of the batch, which are then not kept.
        is_closed_form: False if the function differentiates the operation example by example itself.

    Returns:
        The decorator; it returns the function unchanged.
    """

    def decorate(pull: Pull) -> Pull:
        for function in functions:
            _OPERATIONS[function] = Operation(pull, tuple(arguments), reads_inputs, is_closed_form)
        return pull

    return decorate


def find_operation(function: Callable[..., Any]) -> Operation | None:
    """Return what is registered for a torch function, or None."""
    try:
        return _OPERATIONS.get(function)
    except TypeError:  # not hashable
        return None


def supported_operations() -> list[str]:
    """Return the names of the registered functions, sorted."""
    return sorted({str(getattr(function, "__name__", function)) for function in _OPERATIONS})


@dataclass(frozen=True)
class ExampleCall:
    """A use of parameters as a closed form sees it: arguments by name, the batch's tensors split by examples.

    Attributes:
        use: the use.
        operation: what is registered for it.
        gradients: of each output, ``(K, B, ...)`` split by examples; None for an output without any.
        num_examples: ``B``.
    """

    use: Use
    operation: Operation
    gradients: list[Tensor | None]
    num_examples: int

    def slot(self, name: str) -> Slot:
        """Return where an argument stands in the call."""
        position = self.operation.arguments.index(name)
        return (0, position) if position < len(self.use.call.args) else (1, name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument as it was passed."""
        position = self.operation.arguments.index(name)
        return self.use.call.get(position, name, default)[1]

    def is_source(self, name: str) -> bool:
        """Return whether an argument is a parameter, or made of parameters, whose gradients are wanted."""
        return self.slot(name) in self.use.sources

    def sources(self) -> set[str]:
        """Return the names of all arguments that are sources."""
        return {name for name in self.operation.arguments if self.is_source(name)}

    def has_place(self, name: str) -> bool:
        """Return whether an argument holds examples."""
        return self.slot(name) in self.use.places

    def examples(self, name: str, *, fill: bool = False) -> Tensor:
        """Return a tensor of the batch split by examples, ``(B, ...)``; see :meth:`Place.split`."""
        slot = self.slot(name)
        return self.use.places[slot].split(tensors_of(self.use.call)[slot], self.num_examples, fill=fill)

    def present(self, name: str) -> Tensor | None:
        """Return which rows of :meth:`examples` are there and do not fill up, ``(B, R)``; None if all are.

        Args:
            name: of a tensor whose last dimension is no position.
        """
        slot = self.slot(name)
        place, tensor = self.use.places[slot], tensors_of(self.use.call)[slot]
        if place.owners is None or place.dim is None:
            return None
        ones = torch.ones((), device=tensor.device).expand(tensor.shape[:-1])
        return place.split(ones, self.num_examples).flatten(1)

    def gradient(self) -> Tensor:
        """Return the gradient of the only output, ``(K, B, ...)``."""
        gradient = self.gradients[0]
        assert gradient is not None
        return gradient
