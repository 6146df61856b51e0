"""Records layer inputs in a forward pass and output gradients in any number of backward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from lightning_influence.errors import NonFiniteError, UnsupportedModelError
from lightning_influence.layers.base import Layer
from lightning_influence.layers.dense import DenseGradients
from lightning_influence.layers.factored import FactoredGradients
from lightning_influence.layers.gradients import LayerGradients


@dataclass
class _Calls:
    """What one layer saw: an entry a call, in order."""

    inputs: list[Tensor] = field(default_factory=list)
    edges: list[GradientEdge] = field(default_factory=list)


class Recorder:
    """Hooks on the covered layers, for the duration of a ``with`` block.

    Forward hooks keep each call's input and the *gradient edge* of its output. Differentiating by the edge is
    right even if an in-place activation overwrites the output tensor afterwards, which differentiating by the
    tensor is not.

    Args:
        layers: the covered layers by name.
    """

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self.layers = dict(layers)
        self._handles: list[RemovableHandle] = []
        self._calls: dict[str, _Calls] = {}

    def __enter__(self) -> Self:
        """Register the hooks.

        Returns:
            The recorder itself.
        """
        self._calls = {name: _Calls() for name in self.layers}
        for name, layer in self.layers.items():
            # Before the user's own hooks, which may replace the output that the weights made.
            hook = layer.module.register_forward_hook(self._hook(name), prepend=True, with_kwargs=True)
            self._handles.append(hook)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the hooks; what was recorded stays until :meth:`clear`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def clear(self) -> None:
        """Let go of the recorded tensors and their graph."""
        self._calls = {}

    @property
    def silent(self) -> list[str]:
        """Names of the layers that did not take part in the forward pass."""
        return [name for name, calls in self._calls.items() if not calls.edges]

    def inputs(self, num_examples: int, *, release: bool = False) -> dict[str, Tensor]:
        """Inputs of each layer that was called; calls are further positions.

        Args:
            num_examples: ``B``.
            release: let go of what was recorded, layer by layer: it cannot be asked for again.

        Returns:
            ``(G, B, R, D_in)`` by layer.
        """
        self._check_rows(num_examples)
        result = {}
        for name, calls in self._calls.items():
            if calls.edges:
                parts = [self.layers[name].inputs(x, num_examples) for x in calls.inputs]
                result[name] = _along_positions(parts)
            if release:
                calls.inputs.clear()
        return result

    def raw_inputs(self) -> dict[str, Tensor]:
        """Return the input of each layer's first call as the module saw it, in the order of the layers."""
        return {name: calls.inputs[0] for name, calls in self._calls.items() if calls.inputs}

    def backward(
        self, outputs: Tensor, seed: Tensor | None, num_examples: int, *, keep_graph: bool = True
    ) -> dict[str, Tensor]:
        """Output gradients ``(G, B, R, D_out)`` of each layer for one seed.

        Args:
            outputs: a tensor of the recorded forward pass.
            seed: gradient of a scalar in ``outputs``, of its shape; None for a scalar ``outputs``.
            num_examples: ``B``.
            keep_graph: whether further backward passes follow.

        Returns:
            The output gradients by layer; zero for a layer that ``outputs`` does not depend on.
        """
        names = [name for name, calls in self._calls.items() if calls.edges]
        edges = [edge for name in names for edge in self._calls[name].edges]
        grads = torch.autograd.grad(
            outputs,
            edges,
            None if seed is None else seed.to(outputs.dtype),
            retain_graph=keep_graph,
            allow_unused=True,
        )
        result, start = {}, 0
        for name in names:
            calls, layer = self._calls[name], self.layers[name]
            parts: list[Tensor | None] = [
                None if grad is None else layer.output_gradients(grad, num_examples)
                for grad in grads[start : start + len(calls.edges)]
            ]
            start += len(calls.edges)
            result[name] = self._fill(name, parts, num_examples)
        return result

    def gradients(
        self, outputs: Tensor, seeds: list[Tensor | None], num_examples: int, *, keep_graph: bool = True
    ) -> dict[str, FactoredGradients]:
        """Per-example gradients of each layer in factored form.

        Args:
            outputs: a tensor of the recorded forward pass.
            seeds: of one backward pass each, see :meth:`backward`.
            num_examples: ``B``.
            keep_graph: whether further backward passes follow; without, the graph is freed on the way,
                and the recorded inputs after it.

        Returns:
            Gradients by layer, ``K = len(seeds)``.
        """
        self._check_rows(num_examples)
        last = len(seeds) - 1
        passes = [
            self.backward(outputs, seed, num_examples, keep_graph=keep_graph or number < last)
            for number, seed in enumerate(seeds)
        ]
        inputs = self.inputs(num_examples, release=not keep_graph)  # the graph is gone
        result = {}
        for name, abar in inputs.items():
            parts = [grads.pop(name) for grads in passes]
            result[name] = FactoredGradients(abar, parts[0][None] if len(parts) == 1 else torch.stack(parts))
        return result

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if not (torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad):
                return
            calls = self._calls[name]
            calls.inputs.append((args[0] if args else next(iter(kwargs.values()))).detach())
            calls.edges.append(get_gradient_edge(output))

        return hook

    def _check_rows(self, num_examples: int) -> None:
        """Refuse inputs whose rows are no multiple of the examples.

        Raises:
            UnsupportedModelError: naming the layer.
        """
        for name, calls in self._calls.items():
            for x in calls.inputs:
                if x.shape[0] % num_examples:
                    raise UnsupportedModelError(
                        f"Layer {name!r} was called with a tensor of shape {tuple(x.shape)} in a batch of "
                        f"{num_examples} examples. Its first dimension must be the examples (or examples "
                        "times positions): move the batch to the front, or leave this layer out with "
                        "`layers=`."
                    )

    def _fill(self, name: str, parts: list[Tensor | None], num_examples: int) -> Tensor:
        """Return zeros for calls that the outputs do not depend on, then all calls along the positions."""
        layer = self.layers[name]
        filled = []
        for x, part in zip(self._calls[name].inputs, parts, strict=True):
            if part is None:
                like = layer.inputs(x, num_examples)
                part = like.new_zeros(*like.shape[:3], layer.d_out)
            filled.append(part)
        return _along_positions(filled)


def _along_positions(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def compact(gradients: FactoredGradients) -> LayerGradients:
    """Return the cheaper form: factored for one position per example, else dense."""
    return gradients if gradients.inputs.shape[2] == 1 else DenseGradients(gradients.dense())


def check_finite(gradients: Mapping[str, LayerGradients]) -> None:
    """Refuse NaN and infinite gradients.

    Args:
        gradients: gradients by layer name.

    Raises:
        NonFiniteError: naming the layers whose inputs or output gradients are not finite.
    """
    sums = [
        torch.stack([tensor.sum() for tensor in _tensors(layer)]).sum(0, keepdim=True)
        for layer in gradients.values()
    ]
    if not sums or bool(torch.isfinite(torch.cat(sums).sum())):  # one wait for the device in all
        return
    bad = [
        name
        for name, layer in gradients.items()
        if not all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(layer))
    ]
    if bad:
        raise NonFiniteError(
            f"Non-finite inputs or gradients in layers {bad}; nothing was stored. Check the weights and the "
            "batch for NaN or infinity, or train with a smaller learning rate."
        )


def _tensors(layer: LayerGradients) -> list[Tensor]:
    return [layer.inputs, layer.outputs] if isinstance(layer, FactoredGradients) else [layer.dense()]
