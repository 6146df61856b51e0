"""Recurrent networks step by step, all sequences of a batch together, as the fused functions compute them.

Shapes: ``C`` sequences of at most ``T`` steps, time first; ``H`` hidden units; ``G`` gates, four of an LSTM,
three of a GRU, one of a plain network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

#: Gates of each kind of network.
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@dataclass(frozen=True)
class Stack:
    """Layers of a recurrent network and the sequences that they are called on.

    Attributes:
        kind: of :data:`GATES`.
        inputs: ``(T, C, D)``; zero after a sequence's end.
        present: ``(T, C, 1)``, which steps there are; None if all sequences have ``T``.
        initial: states before the first step, ``(layers * directions, C, H)`` each: of the hidden units, and
            of the cells of an LSTM.
        weights: as the fused function takes them: of each layer and direction ``w_ih, w_hh``, the biases, and
            ``w_hr``.
        has_biases: whether there are any.
        bidirectional: whether each layer has two directions.
        is_projected: whether an LSTM's hidden units are projected, by ``w_hr``, before they are given on.
    """

    kind: str
    inputs: Tensor
    present: Tensor | None
    initial: Sequence[Tensor]
    weights: Sequence[Tensor]
    has_biases: bool
    bidirectional: bool
    is_projected: bool = False

    @property
    def step_size(self) -> int:
        """Return the weights of a layer in one direction."""
        return (4 if self.has_biases else 2) + self.is_projected


@dataclass(frozen=True)
class Projection:
    """The projection of hidden units in one layer and direction.

    Attributes:
        units: what is projected at each step, ``(T, C, H)``; zero where there is none.
        added: zeros that are added to what comes out, ``(T, C, P)``, for the gradients there.
    """

    units: Tensor
    added: Tensor


@dataclass(frozen=True)
class Run:
    """One layer in one direction.

    Attributes:
        first: position of its weights in those of the stack.
        inputs: ``(T, C, D_in)``; zero where there is no step.
        states: hidden units before each step, ``(T, C, H)``; zero where there is none.
        gates: what the inputs add to the gates before they are squashed, ``(T, C, G H)``, in the graph of the
            outputs.
        reset: of a GRU the reset gate, by which the last gate's part of the hidden units is multiplied,
            ``(T, C, H)``; None of others.
        projection: of the hidden units, if there is one.
    """

    first: int
    inputs: Tensor
    states: Tensor
    gates: Tensor
    reset: Tensor | None
    projection: Projection | None = None

    def hidden_gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient at the hidden units' part of the gates for that at the inputs' part."""
        if self.reset is None:
            return gradient
        width = self.reset.shape[-1]
        return torch.cat([gradient[..., :-width], gradient[..., -width:] * self.reset], dim=-1)


def run_stack(stack: Stack) -> tuple[list[Run], list[Tensor]]:
    """Return every layer's run, and the outputs of the fused function: ``(T, C, ...)``, then final states."""
    x, runs = stack.inputs, []
    finals: list[list[Tensor]] = []
    directions = 2 if stack.bidirectional else 1
    with torch.enable_grad():
        for start in range(0, len(stack.weights), directions * stack.step_size):
            outputs = []
            for direction in range(directions):
                run, out, final = _run_layer(stack, x, start + direction * stack.step_size, direction == 1)
                runs.append(run)
                outputs.append(out)
                finals.append(final)
            x = torch.cat(outputs, dim=-1)
            x = x if stack.present is None else x * stack.present
        return runs, [x, *(torch.stack(state) for state in zip(*finals, strict=True))]


def _run_layer(stack: Stack, x: Tensor, first: int, backward: bool) -> tuple[Run, Tensor, list[Tensor]]:
    """Return the run of one layer in one direction, its outputs ``(T, C, H)``, and its final states."""
    w_ih, w_hh, *others = stack.weights[first : first + stack.step_size]
    b_ih, b_hh = others[:2] if stack.has_biases else (None, None)
    w_hr = others[-1] if stack.is_projected else None
    gates = functional.linear(x, w_ih, b_ih)
    gates = gates if gates.requires_grad else gates.requires_grad_()
    number, steps = first // stack.step_size, gates.unbind()  # whose gradients are put together once
    state = [initial[number] for initial in stack.initial]
    outputs, before, resets, units = ([state[0]] * len(steps) for _ in range(4))
    added = None if w_hr is None else x.new_zeros(*x.shape[:2], len(w_hr)).requires_grad_()
    for t in reversed(range(len(steps))) if backward else range(len(steps)):
        before[t] = state[0].detach()
        new, resets[t] = _step(stack.kind, steps[t], functional.linear(state[0], w_hh, b_hh), state)
        if w_hr is not None and added is not None:
            units[t] = new[0].detach()
            new = [functional.linear(new[0], w_hr) + added[t], new[1]]
        if stack.present is not None:
            new = [torch.where(stack.present[t], a, b) for a, b in zip(new, state, strict=True)]
        state, outputs[t] = new, new[0]
    present = 1.0 if stack.present is None else stack.present
    states = torch.stack(before) * present
    reset = torch.stack(resets).detach() if stack.kind == "gru" else None
    projection = None if added is None else Projection(torch.stack(units) * present, added)
    return Run(first, x.detach(), states, gates, reset, projection), torch.stack(outputs), state


def _step(kind: str, gates: Tensor, hidden: Tensor, state: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return the states after a step ``(C, H)``, and a GRU's reset gate.

    Args:
        kind: of the network.
        gates: the inputs' part of the gates, ``(C, G H)``.
        hidden: the hidden units' part.
        state: before the step.
    """
    if kind == "lstm":
        i, f, g, o = (gates + hidden).chunk(4, dim=-1)
        cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return [o.sigmoid() * cell.tanh(), cell], cell
    if kind == "gru":
        size = hidden.shape[-1] // 3
        reset, update = (gates[..., : 2 * size] + hidden[..., : 2 * size]).sigmoid().chunk(2, dim=-1)
        new = (gates[..., 2 * size :] + reset * hidden[..., 2 * size :]).tanh()
        return [new + update * (state[0] - new)], reset
    total = gates + hidden
    out = total.tanh() if kind == "rnn_tanh" else total.relu()
    return [out], out
