"""Calls of torch functions as data: their tensors by slot, and the records that a forward pass leaves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_influence.model.uses.places import Place

#: Where an argument stands in a call: ``(0, i)`` positional, ``(1, name)`` by keyword, then indices in lists.
Slot = tuple[Any, ...]

_INPLACE_POSITION = {  # of the flag `inplace` in functions that take it by position
    "relu": 1, "relu6": 1, "selu": 1, "silu": 1, "mish": 1, "hardswish": 1, "hardsigmoid": 1,
    "leaky_relu": 2, "elu": 2, "celu": 2, "dropout": 3, "alpha_dropout": 3, "feature_alpha_dropout": 3,
    "dropout1d": 3, "dropout2d": 3, "dropout3d": 3, "hardtanh": 3, "threshold": 3, "rrelu": 4,
}  # fmt: skip
_AUGMENTED = {
    "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__", "__iand__",
    "__ior__", "__ixor__", "__setitem__",
}  # fmt: skip
#: Functions that add one tensor to another, or take it away.
ADDITIONS = {
    "add",
    "sub",
    "__add__",
    "__radd__",
    "__iadd__",
    "__sub__",
    "__isub__",
    "__rsub__",
    "add_",
    "sub_",
}


@dataclass(frozen=True)
class Call:
    """One call of a torch function.

    Attributes:
        func: the function.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @functools.cached_property
    def name(self) -> str:
        """The function's name."""
        return str(getattr(self.func, "__name__", self.func))

    def replace(self, values: Mapping[Slot, Any]) -> Call:
        """Return the call with other values in some slots."""
        if not values:
            return self
        return Call(self.func, _replace(self.args, (0,), values), _replace(self.kwargs, (1,), values))

    def run(self) -> Any:
        """Return the result of the call."""
        return self.func(*self.args, **self.kwargs)

    def get(self, position: int, name: str, default: Any = None) -> tuple[Slot, Any]:
        """Return the slot and value of an argument that may be positional or a keyword."""
        if position < len(self.args):
            return (0, position), self.args[position]
        return (1, name), self.kwargs.get(name, default)

    def changed(self) -> Tensor | None:
        """Return the tensor that the call changes in place, as far as its name and flags tell."""
        name, args = self.name, self.args
        if "out" in self.kwargs and isinstance(self.kwargs["out"], Tensor):
            return self.kwargs["out"]
        first = args[0] if args else next(iter(self.kwargs.values()), None)
        if not isinstance(first, Tensor):
            return None
        position = _INPLACE_POSITION.get(name)
        flagged = position is not None and len(args) > position and args[position] is True
        if flagged or self.kwargs.get("inplace") is True or name in _AUGMENTED:
            return first
        if name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
            return first
        return None


@dataclass
class Use:
    """An operation that mixes parameters, or tensors made of them, with the batch.

    Attributes:
        call: the call; tensors of the batch are detached.
        sources: slots of parameters and of tensors made of parameters alone.
        places: where the examples stand in the other tensors that have any, by slot.
        literals: numbers among the arguments that counted examples -> what they are for one example.
        edges: of each output; None for one that is not differentiable.
        outputs: where the examples stand in each output; None where they are not known.
        shapes: of the outputs.
        versions: version counters of the tensors when the operation ran, by slot.
        inplace: whether the operation changed its first tensor.
        memo: what pulling back keeps for further seeds of the same use.
    """

    call: Call
    sources: dict[Slot, Tensor]
    places: dict[Slot, Place]
    literals: dict[Slot, int]
    edges: list[GradientEdge | None]
    outputs: list[Place | None]
    shapes: list[torch.Size]
    versions: dict[Slot, int] = field(default_factory=dict)
    inplace: bool = False
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def is_of_examples(self) -> bool:
        """Whether the output is no number, such as a loss, that all examples share."""
        return any(map(len, self.shapes))

    def make_zeros(self) -> list[Tensor | None]:
        """Return gradients of zero at the outputs, none where these belong to no example, as a loss.

        In a batch of one a number belongs to the example, also one that penalties on weights were added to:
        what these do with a weight is none of the ways in which it maps.
        """
        like = next(iter(self.sources.values()))
        shown = zip(self.edges, self.outputs, self.shapes, strict=True)
        return [
            None if edge is None or place is None or not shape else like.new_zeros(1, *shape)
            for edge, place, shape in shown
        ]

    def changed_since(self) -> list[Slot]:
        """Return the slots of tensors that were changed in place after the operation."""
        tensors = tensors_of(self.call)
        return [slot for slot, version in self.versions.items() if tensors[slot]._version != version]

    def keep(self, slot: Slot, value: Tensor) -> None:
        """Hold another tensor, equal in value, in a slot."""
        self.call = self.call.replace({slot: value})
        self.versions[slot] = value._version


@dataclass
class Derivation:
    """A tensor made of parameters alone.

    Attributes:
        call: the operation that made it.
        sources: slots of parameters and tensors made of them.
        edge: of the tensor.
        number: which of the operation's outputs it is.
        shapes: of the operation's outputs.
    """

    call: Call
    sources: dict[Slot, Tensor]
    edge: GradientEdge
    number: int
    shapes: list[torch.Size] = field(default_factory=list)


class Watched(Protocol):
    """What a watched forward pass leaves, as far as gradients need it.

    Attributes:
        num_examples: ``B``.
        parameters: those that were watched, by name.
        uses: what was recorded.
    """

    num_examples: int
    parameters: dict[str, Tensor]
    uses: list[Use]

    def source_of(self, tensor: Tensor) -> str | Derivation | None:
        """Return the name of a parameter, how a tensor was made of parameters, or None for any other."""
        ...


def find_edge(output: Tensor) -> GradientEdge:
    """Return the edge at which the gradient of an output arrives whatever is done in place afterwards.

    Linear layers compute outputs of more than two dimensions as matrices and return views of these. Writing
    to a view gives the matrix a new place in the graph, in which the view's own node has no part; the node
    that made the matrix stays. A gradient that arrives there has the matrix's shape, with as many entries.
    """
    base = output._base
    whole = base is not None and base.numel() == output.numel() and base.grad_fn is not None
    if base is not None and whole and base.is_contiguous() and output.is_contiguous():
        return get_gradient_edge(base)
    return get_gradient_edge(output)


def tensors_of(call: Call) -> dict[Slot, Tensor]:
    """Return all tensors among the arguments of a call."""
    found: dict[Slot, Tensor] = {}
    for index, value in enumerate(call.args):
        _find(value, (0, index), found)
    for name, value in call.kwargs.items():
        _find(value, (1, name), found)
    return found


def integers_of(call: Call) -> dict[Slot, int]:
    """Return all integers among the arguments of a call."""
    found: dict[Slot, int] = {}
    for index, value in enumerate(call.args):
        _find(value, (0, index), found, int)
    for name, value in call.kwargs.items():
        _find(value, (1, name), found, int)
    return found


def outputs_of(result: Any) -> list[Tensor]:
    """Return all tensors in the result of a call."""
    if isinstance(result, Tensor):
        return [result]
    found: dict[Slot, Tensor] = {}
    _find(result, (), found)
    return list(found.values())


def fingerprint(value: Any) -> Any:
    """Return a hashable stand-in for an argument, in which tensors count by their shape and type.

    Raises:
        TypeError: if the argument is of a kind that has none.
    """
    if isinstance(value, Tensor):
        return ("tensor", value.shape, value.dtype)
    if isinstance(value, (tuple, list)):
        return ("list", *(fingerprint(item) for item in value))
    if isinstance(value, slice):
        return ("slice", fingerprint(value.start), fingerprint(value.stop), fingerprint(value.step))
    if isinstance(value, dict):
        return ("dict", *((key, fingerprint(item)) for key, item in value.items()))
    hash(value)
    return (type(value), value)


def _find(value: Any, slot: Slot, found: dict[Slot, Any], kind: type = Tensor) -> None:
    if isinstance(value, kind):
        if not isinstance(value, bool):
            found[slot] = value
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            _find(item, (*slot, index), found, kind)
    elif isinstance(value, dict):
        for name, item in value.items():
            _find(item, (*slot, name), found, kind)


def _replace(value: Any, slot: Slot, values: Mapping[Slot, Any]) -> Any:
    if slot in values:
        return values[slot]
    if isinstance(value, torch.Size):
        value = tuple(value)
    if isinstance(value, (tuple, list)):
        items = [_replace(item, (*slot, index), values) for index, item in enumerate(value)]
        if isinstance(value, list):
            return items
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, dict):
        return {name: _replace(item, (*slot, name), values) for name, item in value.items()}
    return value
