"""Fused recurrent networks: each example's own sequence, one after the other, packed or padded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_influence.model.uses.calls import Slot, outputs_of
from lightning_influence.model.uses.operations.general import pull_in_loop
from lightning_influence.model.uses.operations.registry import ExampleCall, register_operation
from lightning_influence.model.uses.parts import Dense, Part
from lightning_influence.model.uses.places import Place


@register_operation(
    torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell,
    arguments=("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh"), is_closed_form=False,
)  # fmt: skip
def pull_cell(call: ExampleCall) -> Mapping[Slot, Part]:
    """Pull back one step of a recurrent network.

    Args:
        call: of ``lstm_cell(input, hx, w_ih, w_hh, b_ih, b_hh)``.

    Returns:
        Gradients of the weights by slot.
    """
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

    Args:
        call: of ``lstm(data, batch_sizes, hx, weights, has_biases, layers, dropout, train, bidirectional)``
            on packed sequences, or ``lstm(input, hx, weights, has_biases, ..., batch_first)`` on padded ones.

    Returns:
        Gradients of the weights by slot.
    """
    use, args = call.use, call.use.call.args
    place = use.places.get((0, 0))
    if not (isinstance(args[1], Tensor) and args[0].ndim == 2):
        return pull_in_loop(use, call.gradients, call.num_examples)
    if place is None or place.dim != 0 or len(args) != 9:
        return None
    if any(slot[:2] != (0, 3) for slot in use.sources):
        return None
    data, hx, owners = args[0], args[2], place.owner_vector(call.num_examples)
    order = owners[: int(args[1][0])]
    gradients = _in_data_order(call, place)
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


def _in_data_order(call: ExampleCall, place: Place) -> list[Tensor | None]:
    """Return the outputs' gradients ``(K, *shape)`` as the operation made them, not split by examples."""
    result: list[Tensor | None] = []
    for gradient, out, shape in zip(call.gradients, call.use.outputs, call.use.shapes, strict=True):
        if gradient is None:
            result.append(None)
            continue
        assert out is not None
        assert out.dim is not None
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
