"""Per-example gradients of all parameters, from a watched forward pass and any number of backward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_influence.model.uses.calls import Derivation, Slot, Use, Watched, tensors_of
from lightning_influence.model.uses.operations.general import pull_in_loop, pull_mapped
from lightning_influence.model.uses.operations.registry import ExampleCall, find_operation
from lightning_influence.model.uses.parts import Dense, ParameterGradient, Part, Product
from lightning_influence.support.coordinates import is_trainable_kind
from lightning_influence.support.whole import made_whole


@dataclass
class UseGradients:
    """What the uses of a forward pass make of some seeds.

    Attributes:
        gradients: per-example gradients by parameter; parameters that nothing was known to use are missing.
        failed: parameters whose gradients could not be had, with the reason.
    """

    gradients: dict[str, ParameterGradient]
    failed: dict[str, str] = field(default_factory=dict)


def pull_gradients(
    watch: Watched,
    outputs: Tensor,
    seeds: Sequence[Tensor | None],
    *,
    keep_graph: bool = True,
    closed_forms: bool = True,
    only: set[str] | None = None,
) -> UseGradients:
    """Differentiate a tensor of a watched forward pass by every parameter, example by example.

    Args:
        watch: what watched the forward pass.
        outputs: a tensor of it.
        seeds: gradients of scalars in ``outputs``, of its shape; None for a scalar ``outputs``. Each is one
            backward pass.
        keep_graph: whether further backward passes follow.
        closed_forms: False to differentiate each operation one example after the other, for a check.
        only: names of parameters, if not all are wanted.

    Returns:
        The gradients, with ``K = len(seeds)``.
    """
    uses = [use for use in watch.uses if only is None or names_of(watch, use) & only]
    passes = _output_gradients(uses, outputs, seeds, keep_graph)
    return pull_uses(watch, uses, passes, len(seeds), closed_forms=closed_forms)


def pull_uses(
    watch: Watched,
    uses: Sequence[Use],
    passes: Sequence[list[Tensor | None]],
    num_seeds: int,
    *,
    closed_forms: bool = True,
) -> UseGradients:
    """Pull gradients at the outputs of uses back to the parameters, example by example.

    Args:
        watch: what watched the forward pass.
        uses: some of its uses.
        passes: for each, the gradients of its outputs, ``(K, *shape)``; None for an output without any.
        num_seeds: ``K``.
        closed_forms: False to differentiate each operation one example after the other.

    Returns:
        The gradients.
    """
    sums = _Sums(watch, num_seeds)
    for use, gradients in zip(uses, passes, strict=True):
        if all(gradient is None for gradient in gradients):
            continue
        try:
            with made_whole(use.sources.values()):
                sums.add(use, _pull(use, gradients, watch.num_examples, closed_forms))
        except Exception as error:  # an operation may raise anything on a call of its own for each example
            reason = f"{use.call.name}: {error}".splitlines()[0]
            sums.failed.update(dict.fromkeys(names_of(watch, use), reason))
    return sums.finish()


def _output_gradients(
    uses: list[Use], outputs: Tensor, seeds: Sequence[Tensor | None], keep_graph: bool
) -> list[list[Tensor | None]]:
    """Return the gradients ``(K, *shape)`` of each output of each use; None for one without any."""
    edges = edges_of(uses)
    nested = any(len(use.edges) > 1 for use in uses)
    rows: list[Sequence[Tensor | None]] = []
    for number, seed in enumerate(seeds):
        if not edges:
            break
        last = number == len(seeds) - 1
        grads = torch.autograd.grad(
            outputs,
            edges,
            None if seed is None else seed.to(outputs.dtype),
            retain_graph=keep_graph or nested or not last,
            allow_unused=True,
        )
        rows.append(grads)
    return gather_passes(uses, rows)


def edges_of(uses: Sequence[Use]) -> list[GradientEdge]:
    """Return the edges of all outputs of some uses that are differentiable."""
    return [edge for use in uses for edge in use.edges if edge is not None]


def gather_passes(uses: Sequence[Use], rows: Sequence[Sequence[Tensor | None]]) -> list[list[Tensor | None]]:
    """Sort the gradients of some backward passes by use and output.

    Args:
        uses: the uses.
        rows: for each pass the gradients at :func:`edges_of` the uses; the graph is still there.

    Returns:
        For each use the gradients of its outputs, ``(K, *shape)``; None for an output without any.
    """
    stacked = iter([_stack(column) for column in zip(*rows, strict=True)])
    totals = [[None if edge is None else next(stacked) for edge in use.edges] for use in uses]
    pairs = [(use, _without_detours(use, total)) for use, total in zip(uses, totals, strict=True)]
    return [
        [
            None if grad is None else grad.reshape(len(grad), *shape)
            for grad, shape in zip(grads, use.shapes, strict=True)
        ]
        for use, grads in pairs
    ]


def _without_detours(use: Use, totals: list[Tensor | None]) -> list[Tensor | None]:
    """Return gradients at outputs without what comes through another output of the same operation.

    The state of a recurrent cell, for one, is made on the way to its output; the operation's own derivative
    has that way already.
    """
    live = [number for number, total in enumerate(totals) if total is not None]
    result = list(totals)
    for number in live if len(live) > 1 else ():
        others = [other for other in live if other != number]
        edge, edges = use.edges[number], [use.edges[other] for other in others]
        total = totals[number]
        assert edge is not None
        assert total is not None
        for seed, gradient in enumerate(total):
            ways = torch.autograd.grad(edge, edges, gradient, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
            for other, way in zip(others, ways, strict=True):
                found = result[other]
                if way is not None and found is not None:
                    fixed = found.clone()
                    fixed[seed] -= way
                    result[other] = fixed
    return result


def _stack(column: Sequence[Tensor | None]) -> Tensor | None:
    present = next((grad for grad in column if grad is not None), None)
    if present is None:
        return None
    if len(column) == 1:
        return present.detach()[None]
    return torch.stack([torch.zeros_like(present) if grad is None else grad.detach() for grad in column])


def _pull(
    use: Use, gradients: list[Tensor | None], num_examples: int, closed_forms: bool
) -> tuple[dict[Slot, Part], int | None]:
    """Return the gradients of a use's sources, and the example if they are those of one alone.

    Raises:
        ValueError: if the use is of no form whose gradients can be split.
    """
    changed = use.changed_since()
    if changed:
        raise ValueError("an input was changed in place after it was used")
    live = [number for number, gradient in enumerate(gradients) if gradient is not None]
    if any(use.outputs[number] is None for number in live):
        raise ValueError("the examples were mixed or could not be followed")
    example = _only_example(use, live)
    count = num_examples if example is None else 1
    split = [
        None if gradient is None or place is None
        else place.split(full_precision(gradient), num_examples, lead=1) if example is None
        else full_precision(gradient).unsqueeze(1)
        for gradient, place in zip(gradients, use.outputs, strict=True)
    ]  # fmt: skip
    operation = find_operation(use.call.func)
    served = operation is not None and (closed_forms or not operation.has_alternative)
    # Closed forms are those of real numbers.
    served = served and not any(tensor.is_complex() for tensor in tensors_of(use.call).values())
    if operation is not None and served and not use.literals:
        parts = _pull_closed(ExampleCall(use, operation, split, count))
        if parts is not None:
            return parts, example
    if not closed_forms:
        return pull_in_loop(use, split, count), example
    try:
        return pull_mapped(use, split, count), example
    except Exception:  # whatever: no rule to vectorise it
        return pull_in_loop(use, split, count), example


def _pull_closed(call: ExampleCall) -> dict[Slot, Part] | None:
    """Return what an operation's closed form makes of a call; None if it does not serve it."""
    named = call.operation.pull(call)
    if named is None:
        return None
    parts = {call.slot(key) if isinstance(key, str) else key: part for key, part in named.items()}
    sources = call.use.sources
    complete = all(slot in parts and parts[slot].shape == sources[slot].shape for slot in sources)
    return parts if complete else None


def _only_example(use: Use, live: list[int]) -> int | None:
    """Return the example that a use belongs to, or None if to all of them.

    Raises:
        ValueError: if its outputs belong to different examples.
    """
    places = [use.outputs[number] for number in live]
    owners = {place.owners for place in places if place is not None and place.dim is None}
    if not owners:
        return None
    if len(owners) > 1 or any(place is None or place.dim is not None for place in places):
        raise ValueError("its outputs belong to different examples")
    (owner,) = owners
    assert owner is not None
    return owner[0]


def full_precision(x: Tensor) -> Tensor:
    """Return ``x`` in float32 if it was of lower precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _Sums:
    """Adds up what uses contribute, to parameters and to the tensors made of them."""

    def __init__(self, watch: Watched, num_seeds: int) -> None:
        self._watch, self._num_seeds = watch, num_seeds
        self._parts: dict[str, list[tuple[Part, int | None]]] = {}
        self._derived: dict[int, tuple[Tensor, Derivation, list[tuple[Part, int | None]]]] = {}
        self.failed: dict[str, str] = {}

    def add(self, use: Use, pulled: tuple[dict[Slot, Part], int | None]) -> None:
        """Add the gradients of a use's sources."""
        parts, example = pulled
        if self._watch.num_examples == 1:
            example = None  # what belongs to the only example belongs to all
        for slot, tensor in use.sources.items():
            source = self._watch.source_of(tensor)
            if isinstance(source, str):
                self._parts.setdefault(source, []).append((parts[slot], example))
            elif source is not None:
                part, name = self._undo_view(parts[slot], tensor)
                if name is not None:
                    self._parts.setdefault(name, []).append((part, example))
                else:
                    entry = self._derived.setdefault(id(tensor), (tensor, source, []))
                    entry[2].append((part, example))

    def finish(self) -> UseGradients:
        """Return the gradients of all parameters, those of derived tensors carried back to them."""
        if self._derived:
            self._carry_back()
        B, K = self._watch.num_examples, self._num_seeds
        gradients = {
            name: ParameterGradient(self._watch.parameters[name].shape, parts, K, B, _like(parts))
            for name, parts in self._parts.items()
            if name not in self.failed
        }
        return UseGradients(gradients, self.failed)

    def _undo_view(self, part: Part, tensor: Tensor) -> tuple[Part, str | None]:
        """Return a transposed parameter's gradients as the parameter's own, which then keep their form."""
        base = tensor._base
        name = None if base is None else self._watch.source_of(base)
        if not isinstance(name, str) or not isinstance(part, Product) or base is None:
            return part, None
        same = base.ndim == 2 and tensor.storage_offset() == base.storage_offset()
        if same and tensor.shape == base.shape[::-1] and tensor.stride() == base.stride()[::-1]:
            return part.swap(), name
        return part, None

    def _carry_back(self) -> None:
        """Pull the gradients of derived tensors back along the graph that made them, all examples at once."""
        B, K = self._watch.num_examples, self._num_seeds
        edges: list[GradientEdge] = []
        grads: list[Tensor] = []
        for tensor, made, parts in self._derived.values():
            whole = ParameterGradient(tensor.shape, parts, K, B, _like(parts)).dense()
            edges.append(made.edge)
            grads.append(whole.flatten(0, 1).to(tensor.dtype))
        parameters = self._watch.parameters
        found = differentiate_batch(edges, list(parameters.values()), grads)
        for name, grad in zip(parameters, found, strict=True):
            if grad is not None:
                values = full_precision(grad).reshape(K, B, *grad.shape[1:])
                self._parts.setdefault(name, []).append((Dense(values), None))


def differentiate_batch(
    edges: list[GradientEdge], parameters: list[Tensor], grads: list[Tensor]
) -> Sequence[Tensor | None]:
    """Return gradients of the parameters ``(K B, *shape)`` for a batch of gradients at the edges."""
    try:
        return torch.autograd.grad(
            edges, parameters, grads, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    except RuntimeError:  # an operation without a rule to vectorise its backward pass
        rows = [
            torch.autograd.grad(
                edges, parameters, [grad[row] for grad in grads], retain_graph=True, allow_unused=True
            )
            for row in range(len(grads[0]))
        ]
        return [
            None if column[0] is None else torch.stack([each for each in column if each is not None])
            for column in zip(*rows, strict=True)
        ]


def _like(parts: Sequence[tuple[Part, int | None]]) -> Tensor:
    """Return an empty tensor of the precision and device of some parts."""
    part = parts[0][0]
    values = next(v for v in vars(part).values() if isinstance(v, Tensor) and is_trainable_kind(v))
    return values.new_empty(0)


def names_of(watch: Watched, use: Use) -> set[str]:
    """Return the names of the parameters that a use concerns, through whatever was made of them."""
    names: set[str] = set()

    def visit(sources: Mapping[Slot, Tensor]) -> None:
        for tensor in sources.values():
            source = watch.source_of(tensor)
            if isinstance(source, str):
                names.add(source)
            elif source is not None:
                visit(source.sources)

    visit(use.sources)
    return names


def differentiate_rows(
    watch: Watched, outputs: Tensor, rows: Tensor, names: set[str]
) -> dict[str, ParameterGradient]:
    """Differentiate a tensor by a backward pass for each example.

    Args:
        watch: what watched the forward pass.
        outputs: a tensor with its graph, which is kept.
        rows: what each example's pass starts from, ``(B, *outputs.shape)``.
        names: of the parameters.

    Returns:
        Their gradients, ``K = 1``, as they are.
    """
    parameters = {name: p for name, p in watch.parameters.items() if name in names}
    leaves = list(parameters.values())
    try:
        grads = torch.autograd.grad(
            outputs, leaves, rows, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    except RuntimeError:  # an operation without a rule to vectorise its backward pass
        each = [
            torch.autograd.grad(
                outputs, leaves, row, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for row in rows
        ]
        grads = tuple(torch.stack(column) for column in zip(*each, strict=True))
    return {
        name: ParameterGradient(p.shape, [(Dense(full_precision(grad)[None]), None)], 1, len(rows), grad)
        for (name, p), grad in zip(parameters.items(), grads, strict=True)
        if grad is not None
    }
