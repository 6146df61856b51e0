"""Watches a forward pass: which operations use which parameters, and where their examples stand."""

from __future__ import annotations

import dataclasses
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_influence.model.uses.calls import (
    Call,
    Derivation,
    Slot,
    Use,
    find_edge,
    fingerprint,
    outputs_of,
    tensors_of,
)
from lightning_influence.model.uses.following import (
    Followable,
    Followed,
    follow,
    is_data_dependent,
    place_output,
)
from lightning_influence.model.uses.operations.registry import find_operation
from lightning_influence.model.uses.places import Place, whole
from lightning_influence.support.batches import find_tensors, is_list_of_examples, open_part

# Questions that no tensor comes out of: not worth a look.
_QUESTIONS = {
    "size", "dim", "ndimension", "numel", "nelement", "__len__", "stride", "storage_offset", "is_contiguous",
    "is_floating_point", "is_complex", "data_ptr", "element_size", "get_device", "__set__", "__delete__",
    "requires_grad_", "retain_grad", "register_hook", "backward", "item", "tolist", "__bool__", "__int__",
    "__float__", "__index__", "__hash__", "__repr__", "__format__", "has_names", "untyped_storage",
}  # fmt: skip
# What was found out about calls of one form, which model after model and batch after batch repeat.
_FOLLOWED: dict[Any, Followed] = {}
_MOST_FOLLOWED = 20_000
_ROW_PICKS = {"__getitem__", "index_select", "masked_select", "take"}
# By the position of their dimension.
_GATHERS = {"gather": 1, "take_along_dim": 2}
_JOINS = {"stack", "cat", "concat", "concatenate", "vstack"}
# How deeply tensors of a batch may be nested.
_MOST_DEPTH = 6
#: Composite functions of Python that hide their operations: they are watched inside.
COMPOSITES: set[Callable[..., Any]] = {functional.multi_head_attention_forward}


@dataclasses.dataclass(frozen=True)
class _Unknown:
    """Stands for the place of a tensor whose examples are mixed or could not be followed."""

    why: str


@dataclasses.dataclass
class _Seen:
    """A call with what is known of its tensors, by slot."""

    call: Call
    kept: Call
    tensors: dict[Slot, Tensor]
    sources: dict[Slot, Tensor]
    places: dict[Slot, Place]
    unknown: _Unknown | None
    before: dict[Slot, torch.Size]
    key: Any
    changed: Tensor | None
    outputs: list[Tensor] = dataclasses.field(default_factory=list)


class Watch(TorchFunctionMode):
    """Follows a batch and parameters through a forward pass, for the duration of a ``with`` block.

    Attributes:
        uses: what was recorded.
        picks: whether rows were picked by values, so that those of another batch may be others.
        coincidences: tensors of the batch, and calls, in which several dimensions have the batch's size, each
            with these dimensions: of a tensor of the batch one is enough. Where the examples stand is a guess
            then, which holds for other batches with the same.
        eps: relative rounding error of the lowest precision that took part: a norm may run in float32 in a
            model of float64.

    Args:
        parameters: the parameters to watch, by name.
        batch: tensors in any nesting of lists, tuples, mappings and objects; those with a dimension of ``B``
            hold the examples in it, the first one if it is of that size.
        num_examples: ``B``.
        places: where the examples stand in tensors of the batch of other forms, by tensor; None for one that
            holds none.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        batch: Any,
        num_examples: int,
        places: Mapping[Tensor, Place | None] | None = None,
    ) -> None:
        super().__init__()
        self.num_examples = num_examples
        self.parameters = dict(parameters)
        self.uses: list[Use] = []
        self.picks = False
        self.eps = max((torch.finfo(p.dtype).eps for p in self.parameters.values()), default=0.0)
        self.coincidences: set[str] = set()
        self._precisions: set[torch.dtype] = set()
        self._sources = {id(p): p for p in self.parameters.values()}
        self._names = {id(p): name for name, p in self.parameters.items()}
        self._states: dict[int, tuple[weakref.ref[Tensor], Place | _Unknown | Derivation]] = {}
        self._guesses: dict[int, weakref.ref[Tensor]] = {}
        self._inputs: dict[int, list[tuple[Use, Slot]]] = {}  # recorded inputs by storage
        for tensor, place in find_examples(batch, num_examples, places or {}):
            self._mark(tensor, place)
            self._guesses[id(tensor)] = weakref.ref(tensor)
        for number, tensor in enumerate(find_tensors(batch)) if num_examples > 1 else ():
            dims, held = _dims_of(tensor.shape, num_examples), self.place_of(tensor)
            if dims:
                own = None if held is None else held.dim
                self.coincidences.add(f"tensor {number} of {tensor.ndim} {dims} read as {own}")

    def add_example(self, batch: Any, number: int) -> None:
        """Take all tensors of a batch of one, in any nesting, for those of one of the examples."""
        for tensor in find_tensors(batch):
            self._mark(tensor, whole(number))

    def clear(self) -> None:
        """Let go of the recorded tensors and their graph."""
        self.uses, self._states, self._inputs, self._guesses = [], {}, {}, {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the function, and note what it did to parameters and examples.

        Returns:
            Its result.
        """
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _QUESTIONS:
            return func(*args, **kwargs)
        if func in COMPOSITES:
            with self:
                return _without_dispatch(func)(*args, **kwargs)
        if name == "__get__":
            result = func(*args, **kwargs)
            return self._note(Call(func, args, kwargs), result) if isinstance(result, Tensor) else result
        return self._note(Call(func, args, kwargs))

    def place_of(self, tensor: Tensor) -> Place | None:
        """Return where the examples stand in a tensor of the forward pass, or None if that is not known."""
        state = self._state(tensor)
        return state if isinstance(state, Place) else None

    def source_of(self, tensor: Tensor) -> str | Derivation | None:
        """Return the name of a parameter, how a tensor was made of parameters, or None for any other."""
        if id(tensor) in self._names:
            return self._names[id(tensor)]
        state = self._state(tensor)
        return state if isinstance(state, Derivation) else None

    def _note(self, call: Call, result: Any = None) -> Any:
        """Run the call unless its result is given, and note it; other modes see the call alone.

        Returns:
            The result.
        """
        with torch._C.DisableTorchFunction():
            seen = self._prepare(call)
        if result is None:
            result = call.run()
        if seen is not None:
            with torch._C.DisableTorchFunction():
                self._complete(seen, result)
        return result

    def _prepare(self, call: Call) -> _Seen | None:
        """Return what is known of a call's tensors before it runs; None if it is of no interest."""
        seen = self._sort(call)
        if not (seen.sources or seen.places or seen.unknown):
            return None
        changed = seen.changed
        if changed is not None:
            self._protect(changed)
            if seen.sources and seen.places and torch.is_grad_enabled():
                before = changed.detach().clone()
                seen.kept = call.replace({slot: before for slot, t in seen.tensors.items() if t is changed})
        return seen

    def _complete(self, seen: _Seen, result: Any) -> None:
        """Note what a call has made."""
        changed = seen.changed
        seen.outputs = outputs_of(result) or ([changed] if changed is not None else [])
        old = () if changed is not None else seen.tensors.values()
        if all(any(output is t for t in old) for output in seen.outputs):
            return
        try:
            if seen.places or seen.unknown:
                self._note_batch(seen)
            else:
                self._note_derived(seen)
        except Exception as error:  # watching changes nothing: it is said where it matters
            for output in seen.outputs:
                self._mark(output, _Unknown(f"{seen.call.name}: {error}"))

    def _sort(self, call: Call) -> _Seen:
        """Return a call with parameters, the batch's tensors and others among its arguments told apart."""
        tensors = tensors_of(call)
        sources: dict[Slot, Tensor] = {}
        places: dict[Slot, Place] = {}
        unknown: _Unknown | None = None
        for slot, tensor in tensors.items():
            state = self._state(tensor)
            if id(tensor) in self._sources or isinstance(state, Derivation):
                sources[slot] = tensor
            elif isinstance(state, Place):
                places[slot] = state
            elif isinstance(state, _Unknown) and tensor.requires_grad:
                unknown = state  # what is not differentiable is a constant, whatever it was made of
        before = {slot: tensor.shape for slot, tensor in tensors.items()}
        key, changed = _find_key(call, places, sources), call.changed()
        return _Seen(call, call, tensors, sources, places, unknown, before, key, changed)

    def _note_batch(self, seen: _Seen) -> None:
        """Note an operation that examples take part in, and its use of parameters if there are any."""
        call, outputs, sources = seen.call, seen.outputs, seen.sources
        self._note_coincidence(seen)
        followed = Followed([None] * len(outputs)) if seen.unknown else self._follow(seen)
        self.picks |= _picks_rows(seen, followed)
        for output, place in zip(outputs, followed.outputs, strict=True):
            why = _Unknown(f"{call.name} mixes the examples, or they could not be followed through it")
            self._mark(output, place or seen.unknown or why)
            if output.requires_grad and output.dtype not in self._precisions:
                self._precisions.add(output.dtype)
                self.eps = max(self.eps, _eps(output))
        is_use = any(output.requires_grad and output.numel() for output in outputs)
        if sources and torch.is_grad_enabled() and is_use:
            edges = [find_edge(output) if output.requires_grad else None for output in outputs]
            kept, shapes = _detach(seen.kept, sources), [output.shape for output in outputs]
            found, literals = list(followed.outputs), followed.literals
            self._record(
                Use(
                    kept,
                    sources,
                    seen.places,
                    literals,
                    edges,
                    found,
                    shapes,
                    inplace=seen.changed is not None,
                )
            )

    def _note_coincidence(self, seen: _Seen) -> None:
        """Note a call if one of its tensors has several dimensions of the batch's size."""
        count = self.num_examples
        shapes = [*seen.before.values(), *(output.shape for output in seen.outputs)]
        if count > 1 and any(shape.count(count) > 1 for shape in shapes):
            self.coincidences.add(f"{seen.call.name} {sorted({_dims_of(shape, count) for shape in shapes})}")

    def _follow(self, seen: _Seen) -> Followed:
        """Return where the examples are in the outputs of a call, as before if there was one like it."""
        fixed = frozenset(slot for slot, t in seen.sources.items() if id(t) in self._sources)
        doubtful = frozenset(slot for slot in seen.places if self._is_guess(seen.tensors[slot]))
        shapes = [output.shape for output in seen.outputs]  # which values may decide, as of `nonzero`
        key = None if seen.key is None else (self.num_examples, fixed, doubtful, *shapes, seen.key)
        followed = None if key is None else _FOLLOWED.get(key)
        if followed is None:
            followed = follow(
                Followable(seen.call, seen.places, seen.before, shapes, self.num_examples, fixed, doubtful)
            )
            if key is not None:
                if len(_FOLLOWED) >= _MOST_FOLLOWED:
                    _FOLLOWED.clear()
                _FOLLOWED[key] = followed
        self._accept(seen, followed)
        return followed

    def _accept(self, seen: _Seen, followed: Followed) -> None:
        """Take note of tensors that turned out to hold examples, or to hold none."""
        for slot, place in followed.promoted.items():
            if slot in seen.sources:
                if self._promote(seen.tensors[slot], place):
                    del seen.sources[slot]
                    seen.places[slot] = place
            else:
                self._mark(seen.tensors[slot], place)
                seen.places[slot] = place
        for slot in followed.dropped:
            self._states.pop(id(seen.tensors[slot]), None)
            seen.places.pop(slot, None)

    def _note_derived(self, seen: _Seen) -> None:
        """Note tensors that were made of parameters alone."""
        if not torch.is_grad_enabled():
            return
        shapes = [output.shape for output in seen.outputs]
        for number, output in enumerate(seen.outputs):
            if output.requires_grad and id(output) not in self._sources:
                edge, sources = get_gradient_edge(output), dict(seen.sources)
                if (
                    seen.changed is not None
                ):  # it was made of what its former value was made of, not of itself
                    before = self._state(output)
                    sources = {slot: t for slot, t in sources.items() if t is not output}
                    if isinstance(before, Derivation):
                        sources |= {("before", *slot): t for slot, t in before.sources.items()}
                self._mark(output, Derivation(seen.call, sources, edge, number, shapes))

    def _promote(self, tensor: Tensor, place: Place) -> bool:
        """Make a tensor that was taken for one of parameters alone one of the batch: its making was a use.

        Returns:
            Whether that explains it.
        """
        made = self._state(tensor)
        if not isinstance(made, Derivation):
            return False
        tensors = tensors_of(made.call)
        fixed = frozenset(slot for slot, t in tensors.items() if id(t) in self._sources)
        before = {slot: t.shape for slot, t in tensors.items()}
        op = Followable(made.call, {}, before, made.shapes, self.num_examples, fixed)
        for followed in place_output(op, made.number, place):
            sources, places = dict(made.sources), {}
            derived = [slot for slot in followed.promoted if slot in sources]
            if not all(self._promote(tensors[slot], followed.promoted[slot]) for slot in derived):
                continue
            for slot, held in followed.promoted.items():
                sources.pop(slot, None)
                places[slot] = held
                self._mark(tensors[slot], held)
            self._mark(tensor, place)
            if sources:
                edges = [made.edge if number == made.number else None for number in range(len(made.shapes))]
                outputs = [place if number == made.number else None for number in range(len(made.shapes))]
                kept = _detach(made.call, sources)
                self._record(Use(kept, sources, places, followed.literals, edges, outputs, made.shapes))
            return True
        return False

    def _record(self, use: Use) -> None:
        self.uses.append(use)
        for slot, tensor in tensors_of(use.call).items():
            if slot not in use.sources:
                use.versions[slot] = tensor._version
                self._inputs.setdefault(tensor.untyped_storage()._cdata, []).append((use, slot))

    def _protect(self, tensor: Tensor) -> None:
        """Copy recorded inputs that share their memory with a tensor that is about to change."""
        for use, slot in self._inputs.pop(tensor.untyped_storage()._cdata, ()):
            held = tensors_of(use.call)[slot]
            if held._version == use.versions[slot]:  # otherwise it is too late, and is found out later
                use.keep(slot, held.clone())

    def _mark(self, tensor: Tensor, state: Place | _Unknown | Derivation) -> None:
        self._states[id(tensor)] = (weakref.ref(tensor), state)

    def _state(self, tensor: Tensor) -> Place | _Unknown | Derivation | None:
        found = self._states.get(id(tensor))
        if found is None or found[0]() is not tensor:
            return None
        return found[1]

    def _is_guess(self, tensor: Tensor) -> bool:
        found = self._guesses.get(id(tensor))
        return found is not None and found() is tensor


def _picks_rows(seen: _Seen, followed: Followed) -> bool:
    """Return whether a call picks rows, and not one entry of each row, as a label's.

    Rows may be picked in Python as well, and joined again.
    """
    if seen.call.name in _JOINS:
        return any(place.owners is not None for place in seen.places.values())
    if seen.call.name in _GATHERS:
        place, (_, dim) = seen.places.get((0, 0)), seen.call.get(_GATHERS[seen.call.name], "dim")
        return (
            place is not None
            and place.dim is not None
            and dim in {place.dim, place.dim - len(seen.before[0, 0])}
        )
    if seen.call.name not in _ROW_PICKS or not is_data_dependent(seen.call):
        return False
    same = followed.outputs == [seen.places.get((0, 0))]
    return not same or not isinstance(seen.call.get(1, "index")[1], tuple)


def _eps(tensor: Tensor) -> float:
    """Return the relative rounding error of operations on a tensor as they are run now."""
    kind = tensor.device.type
    if kind == "cuda" and tensor.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return float(2.0**-10)
    return torch.finfo(tensor.dtype).eps


def _find_key(call: Call, places: dict[Slot, Place], sources: dict[Slot, Tensor]) -> Any:
    """Return what the examples' way through a call depends on, or None if that cannot be compared."""
    if not places or is_data_dependent(call):
        return None
    try:
        arguments = fingerprint(call.args), fingerprint(call.kwargs)
        key = (call.func, arguments, tuple(places.items()), tuple(sources))
        hash(key)
    except TypeError:
        return None
    return key


def _detach(call: Call, sources: Mapping[Slot, Tensor]) -> Call:
    """Return a call to keep: without the graph of the batch's tensors, and values that nobody reads."""
    operation = find_operation(call.func)
    tensors = {slot: tensor for slot, tensor in tensors_of(call).items() if slot not in sources}
    if operation is not None and not operation.reads_inputs:
        return call.replace({slot: tensor.to("meta") for slot, tensor in tensors.items()})
    return call.replace({slot: tensor.detach() for slot, tensor in tensors.items()})


def find_examples(
    batch: Any, num_examples: int, places: Mapping[Tensor, Place | None]
) -> list[tuple[Tensor, Place]]:
    """Find the tensors of a batch that hold examples.

    Args:
        batch: any nesting of lists, tuples, mappings, dataclasses and other objects.
        num_examples: ``B``.
        places: of tensors whose places are known; None for those of all examples.

    Returns:
        Tensors with their places. A list of ``B`` tensors holds one example each.
    """
    known = {id(tensor): place for tensor, place in places.items()}
    found: list[tuple[Tensor, Place]] = []
    pending = [(batch, 0)]
    while pending:
        value, depth = pending.pop()
        if isinstance(value, Tensor):
            place = known[id(value)] if id(value) in known else _guess(value, num_examples)
            if place is not None:
                found.append((value, place))
        elif is_list_of_examples(value, num_examples):
            for example, entry in enumerate(value):
                found.extend((tensor, whole(example)) for tensor in find_tensors(entry))
        elif depth < _MOST_DEPTH:
            opened = open_part(value)
            pending.extend((item, depth + 1) for item in (opened.parts if opened is not None else ()))
    return found


def _guess(tensor: Tensor, num_examples: int) -> Place | None:
    if num_examples == 1:
        return whole(0)
    dims = _dims_of(tensor.shape, num_examples)
    return Place(dims[0]) if dims else None


def _dims_of(shape: torch.Size, num_examples: int) -> tuple[int, ...]:
    """Return the dimensions that have the batch's size."""
    return tuple(dim for dim, size in enumerate(shape) if size == num_examples)


def _without_dispatch(func: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a Python function of torch that runs its own code under a function mode, too."""
    assert isinstance(func, types.FunctionType)
    scope = dict(func.__globals__)
    scope["has_torch_function"] = lambda tensors: False
    copy = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy
