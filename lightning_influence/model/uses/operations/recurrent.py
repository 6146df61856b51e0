"""Recurrent networks, packed or padded, and their cells: steps taken again for all examples together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.model.uses.calls import Slot, outputs_of
from lightning_influence.model.uses.operations.general import pull_in_loop
from lightning_influence.model.uses.operations.registry import ExampleCall, register_operation
from lightning_influence.model.uses.parts import Dense, Part, Product, bias_part
from lightning_influence.model.uses.places import Place, from_owners
from lightning_influence.model.uses.recurrent_steps import GATES, Stack, run_stack


@register_operation(
    torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell,
    arguments=("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh"),
)  # fmt: skip
def pull_cell(call: ExampleCall) -> Mapping[Slot, Part]:
    """Pull back one step of a recurrent network: a network of one layer, called on sequences of one step.

    Args:
        call: of ``lstm_cell(input, hx, w_ih, w_hh, b_ih, b_hh)``.

    Returns:
        Gradients of the weights by slot.
    """
    step = _read_step(call)
    if step is not None:
        return _pull_steps(call, step)
    return pull_in_loop(call.use, call.gradients, call.num_examples)


@register_operation(
    torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu,
    arguments=(
        "data", "batch_sizes", "hx", "weights", "has_biases", "layers", "dropout", "train", "bidirectional",
    ),
    is_closed_form=False,
)  # fmt: skip
def pull_recurrent(call: ExampleCall) -> Mapping[Slot, Part] | None:
    """Pull back a recurrent network.

    The gradients of a weight are products, step by step, of those at the gates with what the weight was
    multiplied by. The gates' are had by taking the steps again for all examples together. Where that does not
    serve (dropout between layers), each example's own sequence is run again.

    Args:
        call: of ``lstm(data, batch_sizes, hx, weights, has_biases, layers, dropout, train, bidirectional)``
            on packed sequences, or ``lstm(input, hx, weights, has_biases, ..., batch_first)`` on padded ones.

    Returns:
        Gradients of the weights by slot.
    """
    args = call.use.call.args
    packed = isinstance(args[1], Tensor) and args[0].ndim == 2
    sequences = _read(call, packed)
    if sequences is not None:
        return _pull_steps(call, sequences)
    return _pull_packed(call) if packed else pull_in_loop(call.use, call.gradients, call.num_examples)


@dataclass(frozen=True)
class _Sequences:
    """The sequences of a call.

    Attributes:
        stack: the network on them.
        place: where the examples stand among the sequences, in dimension 1.
        slots: of the weights among the arguments.
        rows: step and sequence of each row, of packed ones.
        batch_first: whether the outputs of padded ones have the sequences before the steps.
        is_cell: whether the call is of a cell, which returns states alone and has no dimension of steps.
    """

    stack: Stack
    place: Place
    slots: Sequence[Slot]
    rows: tuple[Tensor, Tensor] | None = None
    batch_first: bool = False
    is_cell: bool = False

    def returned(self, outputs: list[Tensor]) -> list[Tensor]:
        """Return what the call returns, of the outputs of the stack."""
        return [state[0] for state in outputs[1:]] if self.is_cell else outputs

    def order(self, gradient: Tensor) -> Tensor:
        """Return gradients at the outputs ``(K, *shape)`` as ``(K, T, C, ...)``, as they are of a cell."""
        if self.is_cell:
            return gradient
        if self.rows is None:
            return gradient.transpose(1, 2) if self.batch_first else gradient
        steps, count = self.stack.inputs.shape[:2]
        whole = gradient.new_zeros(len(gradient), steps, count, gradient.shape[-1])
        whole[:, self.rows[0], self.rows[1]] = gradient
        return whole

    def split(self, tensor: Tensor, num_examples: int, lead: int = 0) -> Tensor:
        """Return ``(*lead, T, C, D)`` as ``(*lead, B, R, D)``: an example's positions are its steps."""
        return self.place.split(tensor, num_examples, lead=lead).flatten(lead + 1, lead + 2)


def _read(call: ExampleCall, packed: bool) -> _Sequences | None:
    """Return the sequences of a call, None where steps are not taken again."""
    use, args = call.use, call.use.call.args
    place, like = use.places.get((0, 0)), next(g for g in call.gradients if g is not None)
    if len(args) != 9 or place is None:
        return None
    position, dim = (3, 0) if packed else (2, 0 if args[8] else 1)
    # Where a batch or a call has one example alone, all of it is that one's.
    alone = place.dim is None and call.num_examples == 1
    if place.dim != dim and not alone:
        return None
    hx, weights, has_biases, layers, dropout, train, bidirectional = args[position - 1 : position + 6]
    if any(slot[:2] != (0, position) for slot in use.sources) or (dropout and train and layers > 1):
        return None
    kind, per_layer = use.call.name, 4 if has_biases else 2
    is_projected = weights[1].shape[0] != GATES[kind] * weights[1].shape[1]
    if len(weights) != layers * (per_layer + is_projected) * (2 if bidirectional else 1):
        return None
    data = args[0].detach().to(like.dtype)
    owners = (
        torch.zeros(data.shape[dim], dtype=torch.int64) if alone else place.owner_vector(call.num_examples)
    )
    if packed:
        sizes = args[1].cpu()
        step = torch.arange(len(sizes)).repeat_interleave(sizes)
        column = torch.arange(len(step)) - (sizes.cumsum(0) - sizes)[step]
        if not torch.equal(owners, owners[column]):
            return None
        owners, rows = owners[: int(sizes[0])], (step.to(data.device), column.to(data.device))
        inputs = data.new_zeros(len(sizes), len(owners), data.shape[1])
        inputs[rows] = data
        present = (torch.arange(len(owners)) < sizes[:, None]).unsqueeze(2).to(data.device)
    else:
        inputs, rows, present = data.transpose(0, 1) if dim == 0 else data, None, None
    stack = Stack(
        kind,
        inputs,
        present,
        [state.detach().to(data) for state in ([hx] if isinstance(hx, Tensor) else hx)],
        [weight.detach().to(data) for weight in weights],
        has_biases,
        bidirectional,
        is_projected,
    )
    columns = from_owners(1, owners.tolist(), call.num_examples)
    slots = [(0, position, number) for number in range(len(weights))]
    return _Sequences(stack, columns, slots, rows, batch_first=not packed and dim == 0)


def _read_step(call: ExampleCall) -> _Sequences | None:
    """Return the step of a cell's call, None where it is not taken again."""
    use, args = call.use, call.use.call.args
    place, like = use.places.get((0, 0)), next(g for g in call.gradients if g is not None)
    slots = [(0, position) for position in range(2, len(args)) if isinstance(args[position], Tensor)]
    if len(args) < 4 or len(slots) not in (2, 4) or place is None or args[0].ndim != 2:
        return None
    alone = place.dim is None and call.num_examples == 1
    if not set(use.sources) <= set(slots) or not (place.dim == 0 or alone):
        return None
    data = args[0].detach().to(like.dtype)
    owners = torch.zeros(len(data), dtype=torch.int64) if alone else place.owner_vector(call.num_examples)
    stack = Stack(
        use.call.name.removesuffix("_cell"),
        data[None],
        None,
        [state.detach().to(data)[None] for state in ([args[1]] if isinstance(args[1], Tensor) else args[1])],
        [args[position].detach().to(data) for _, position in slots],
        len(slots) == 4,
        bidirectional=False,
    )
    columns = from_owners(1, owners.tolist(), call.num_examples)
    return _Sequences(stack, columns, slots, is_cell=True)


def _pull_steps(call: ExampleCall, sequences: _Sequences) -> Mapping[Slot, Part]:
    """Return the gradients of the weights from those at the gates of every step."""
    use, stack, B = call.use, sequences.stack, call.num_examples
    if "steps" not in use.memo:
        use.memo["steps"] = run_stack(stack)
    runs, outputs = use.memo["steps"]
    returned = zip(sequences.returned(outputs), _in_data_order(call), strict=True)
    live = [
        (output, sequences.order(seed) if number == 0 else seed)
        for number, (output, seed) in enumerate(returned)
        if seed is not None
    ]
    batched = len(live[0][1]) > 1
    projected = [(run, run.projection) for run in runs if run.projection is not None]
    found = torch.autograd.grad(
        [output for output, _ in live],
        [run.gates for run in runs] + [projection.added for _, projection in projected],
        [seed if batched else seed[0] for _, seed in live],
        is_grads_batched=batched,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    present = None if stack.present is None else sequences.split(stack.present, B)[..., 0]
    each = list(found) if batched else [one[None] for one in found]
    parts: dict[Slot, Part] = {}
    for (run, projection), gradient in zip(projected, each[len(runs) :], strict=True):
        slot = sequences.slots[run.first + stack.step_size - 1]
        if slot in use.sources:
            split = sequences.split(gradient, B, lead=1)[:, None]
            units = sequences.split(projection.units, B)[None]
            parts[slot] = Product(units, split, use.sources[slot].shape)
    for run, gradient in zip(runs, each[: len(runs)], strict=True):
        sides = [(run.inputs, gradient), (run.states, run.hidden_gradient(gradient))]
        for number, (inputs, at_gates) in enumerate(sides):
            slots = sequences.slots[run.first + number : run.first + 4 : 2]
            split = sequences.split(at_gates, B, lead=1)[:, None]  # (K, 1, B, R, G H)
            if slots[0] in use.sources:
                shape = use.sources[slots[0]].shape
                parts[slots[0]] = Product(sequences.split(inputs, B)[None], split, shape)
            if stack.has_biases and slots[1] in use.sources:
                parts[slots[1]] = bias_part(split, use.sources[slots[1]].shape, present)
    return parts


def _pull_packed(call: ExampleCall) -> Mapping[Slot, Part] | None:
    """Pull back a call on packed sequences, one example after the other."""
    use, args = call.use, call.use.call.args
    place = use.places.get((0, 0))
    if place is None or place.dim != 0 or len(args) != 9:
        return None
    if any(slot[:2] != (0, 3) for slot in use.sources):
        return None
    data, hx, owners = args[0], args[2], place.owner_vector(call.num_examples)
    order = owners[: int(args[1][0])]
    gradients = _in_data_order(call)
    rows: list[list[tuple[Tensor, ...]]] = []
    with torch.enable_grad():
        for example in range(call.num_examples):
            mine, at = (owners == example).nonzero().flatten(), (order == example).nonzero().flatten()
            leaves = [source.detach().clone().requires_grad_() for source in use.sources.values()]
            weights = list(args[3])
            for slot, leaf in zip(use.sources, leaves, strict=True):
                weights[slot[2]] = leaf
            state = _select(hx, at.to(data.device))
            own = data[mine.to(data.device)].unsqueeze(1)
            outputs = outputs_of(use.call.func(own, state, weights, *args[4:], False))
            seeds = [
                None if gradient is None
                else (gradient[:, mine].unsqueeze(2) if number == 0 else gradient[:, :, at])
                for number, gradient in enumerate(gradients)
            ]  # fmt: skip
            rows.append(_backwards(outputs, leaves, seeds))
    return {
        slot: Dense(torch.stack([torch.stack([seed[at] for seed in row]) for row in rows], dim=1))
        for at, slot in enumerate(use.sources)
    }


def _in_data_order(call: ExampleCall) -> list[Tensor | None]:
    """Return the outputs' gradients ``(K, *shape)`` as the operation made them, not split by examples."""
    result: list[Tensor | None] = []
    for gradient, out, shape in zip(call.gradients, call.use.outputs, call.use.shapes, strict=True):
        if gradient is None:
            result.append(None)
            continue
        assert out is not None
        if out.dim is None:  # all of it is the only example's
            result.append(gradient[:, 0])
            continue
        whole = gradient.new_zeros(len(gradient), *shape)
        owners = out.owner_vector(call.num_examples)
        for example in range(call.num_examples):
            mine = (owners == example).nonzero().flatten()
            part = gradient[:, example].narrow(out.dim + 1, 0, len(mine))
            whole.index_copy_(out.dim + 1, mine.to(whole.device), part)
        result.append(whole)
    return result


def _select(hx: Any, at: Tensor) -> Any:
    return hx[:, at] if isinstance(hx, Tensor) else tuple(state[:, at] for state in hx)


def _backwards(
    outputs: list[Tensor], leaves: list[Tensor], seeds: list[Tensor | None]
) -> list[tuple[Tensor, ...]]:
    live = [(output, seed) for output, seed in zip(outputs, seeds, strict=True) if seed is not None]
    return [
        torch.autograd.grad(
            [output for output, _ in live], leaves, [seed[k] for _, seed in live],
            retain_graph=True, allow_unused=True, materialize_grads=True,
        )
        for k in range(len(live[0][1]))
    ]  # fmt: skip
