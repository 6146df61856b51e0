"""Records layer inputs in a forward pass and output gradients in any number of backward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from lightning_influence.model.layers.gradients import FactoredGradients, LayerGradients
from lightning_influence.model.layers.layer import Layer, ParameterRule
from lightning_influence.model.layers.use_recorder import Slopes, UseRecorder
from lightning_influence.model.uses.calls import find_edge
from lightning_influence.support.errors import UnsupportedModelError

# Unfolded inputs of so many bytes are made at once where they are used once, to be still in the cache then;
# but products want a number of rows.
_PART_BYTES, _PART_EXAMPLES = 2 * 2**20, 64


@dataclass
class _Calls:
    """What one layer saw: an entry a call, in order."""

    inputs: list[Tensor] = field(default_factory=list)
    edges: list[GradientEdge] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)  # of the outputs


class Recorder:
    """Hooks on the covered layers, for the duration of a ``with`` block.

    Forward hooks keep each call's input and the *gradient edge* of its output. Differentiating by the edge is
    right even if an in-place activation overwrites the output tensor afterwards, which differentiating by the
    tensor is not.

    Args:
        layers: the covered layers by name.
        uses: has the layers that are parameters by themselves, and modules whose weights are used without
            calling them; without, the former stay silent.
    """

    def __init__(self, layers: Mapping[str, Layer], uses: UseRecorder | None = None) -> None:
        self.layers, self.uses = dict(layers), uses
        self._modules = {
            name: layer for name, layer in layers.items() if not isinstance(layer.rule, ParameterRule)
        }
        self._handles: list[RemovableHandle] = []
        self._calls: dict[str, _Calls] = {}

    def __enter__(self) -> Self:
        """Register the hooks.

        Returns:
            The recorder itself.
        """
        self._calls = {name: _Calls() for name in self._modules}
        for name, layer in self._modules.items():
            # Before the user's own hooks, which may replace the output that the weights made.
            hook = layer.module.register_forward_hook(self._hook(name), prepend=True, with_kwargs=True)
            self._handles.append(hook)
        if self.uses is not None:
            self.uses.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the hooks; what was recorded stays until :meth:`clear`."""
        if self.uses is not None:
            self.uses.__exit__(kind, error, trace)
            counts = {name: len(calls.edges) for name, calls in self._calls.items()}
            for name in self.uses.close(counts):
                self._calls[name] = _Calls()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def clear(self) -> None:
        """Let go of the recorded tensors and their graph."""
        self._calls = {}
        if self.uses is not None:
            self.uses.clear()

    @property
    def nodes(self) -> set[object]:
        """Autograd nodes of the layers' outputs."""
        edges = [edge for calls in self._calls.values() for edge in calls.edges]
        return {edge.node for edge in (*edges, *(self.uses.activations if self.uses is not None else ()))}

    def positions(self, num_examples: int) -> set[int]:
        """Return how many positions of an example the calls of layers had that begin with the examples."""
        return {
            shape.numel() // (num_examples * self.layers[name].groups * self.layers[name].d_out)
            for name, calls in self._calls.items()
            for shape in calls.shapes
            if shape[:1] == (num_examples,)
        }

    def flat_rows(self, num_examples: int) -> set[int]:
        """Return numbers of rows that layers were called on, of sequences and images only uneven ones."""
        inputs = (x for calls in self._calls.values() for x in calls.inputs)
        return {len(x) for x in inputs if x.ndim == 2 or (x.ndim > 2 and len(x) % num_examples)}

    @property
    def silent(self) -> list[str]:
        """Names of the layers that did not take part in the forward pass."""
        heard = {name for name, calls in self._calls.items() if calls.edges}
        if self.uses is not None:
            heard.update(self.uses.heard)
        return [name for name in self.layers if name not in heard]

    def count_calls(self) -> dict[str, int]:
        """Return how often each layer was called, without layers whose rows were picked by values."""
        called = {name: len(calls.edges) for name, calls in self._calls.items() if calls.edges}
        return called if self.uses is None else called | self.uses.count_calls()

    @property
    def picks(self) -> bool:
        """Whether the step has picked rows by values, as far as uses were watched."""
        return self.uses is not None and self.uses.picks

    @property
    def coincidences(self) -> set[str]:
        """Where several dimensions have the batch's size, as far as uses were watched."""
        return set() if self.uses is None else self.uses.coincidences

    @property
    def follows_modules(self) -> bool:
        """Whether some modules are had from the uses of their weights, not from their calls."""
        heard = self.uses.heard if self.uses is not None else []
        return any(name in self._modules for name in heard)

    def inputs(self, num_examples: int, *, release: bool = False) -> dict[str, Tensor]:
        """Inputs of each layer that was called, but for tables; calls are further positions.

        Args:
            num_examples: ``B``.
            release: let go of what was recorded, layer by layer: it cannot be asked for again.

        Returns:
            ``(G, B, R, D_in)`` by layer.
        """
        self._check_rows(num_examples)
        run, result = slice(0, num_examples), {}
        for name, calls in self._calls.items():
            if calls.edges:
                result[name] = self._inputs_of(name, run, num_examples, release=release)
        for name in self.uses.heard if self.uses is not None else ():
            assert self.uses is not None
            inputs = self.uses.inputs(name)
            if inputs is not None:
                result[name] = inputs
        return {name: result[name] for name in self.layers if name in result}

    def inputs_at(
        self, num_examples: int, choose: Callable[[Layer, int], Tensor | None]
    ) -> dict[str, tuple[Tensor, int]]:
        """Some rows of the inputs of each module that was called, scaled so that their squares stand for all.

        Args:
            num_examples: ``B``.
            choose: returns which positions ``(B, p)`` of ``R`` of a call of a layer to take, None for all.

        Returns:
            By layer, rows ``(G, n, D_in)`` whose second moment is on average that of all, if each position is
            chosen as often as any other, and the number ``R`` of positions over all calls.
        """
        self._check_rows(num_examples)
        result = {}
        for name, layer in self._modules.items():
            calls = self._calls[name]
            parts, total = [], 0
            for x, shape in zip(calls.inputs, calls.shapes, strict=True):
                count = shape.numel() // (num_examples * layer.groups * layer.d_out)
                chosen = choose(layer, count)
                total += count
                if chosen is None:
                    part = layer.inputs(x, num_examples)
                else:
                    scale = (count / chosen.shape[1]) ** 0.5
                    part = layer.inputs_at(x, num_examples, chosen) * scale
                parts.append(part.flatten(1, 2))
            if parts:
                result[name] = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)), total
        return result

    def raw_inputs(self) -> dict[str, Tensor]:
        """Return the input of each layer's first call as the module saw it, in the order of the layers."""
        return {name: calls.inputs[0] for name, calls in self._calls.items() if calls.inputs}

    def backward(
        self, outputs: Tensor, seed: Tensor | None, num_examples: int, *, keep_graph: bool = True
    ) -> dict[str, Slopes]:
        """Output gradients of each layer for one seed.

        Args:
            outputs: a tensor of the recorded forward pass.
            seed: gradient of a scalar in ``outputs``, of its shape; None for a scalar ``outputs``.
            num_examples: ``B``.
            keep_graph: whether further backward passes follow.

        Returns:
            The output gradients by layer; zero for a layer that ``outputs`` does not depend on.
        """
        self._check_rows(num_examples)
        names = [name for name, calls in self._calls.items() if calls.edges]
        edges = [edge for name in names for edge in self._calls[name].edges]
        single = self.uses.edges() if self.uses is not None else []
        seed = None if seed is None else seed.to(outputs.dtype)
        keep = keep_graph or self.uses is not None
        grads: Sequence[Tensor | None] = ()
        if edges or single:
            grads = torch.autograd.grad(
                outputs, [*edges, *single], seed, retain_graph=keep, allow_unused=True
            )
        result: dict[str, Slopes] = {}
        start = 0
        for name in names:
            calls, layer = self._calls[name], self.layers[name]
            parts: list[Tensor | None] = [
                None if grad is None else layer.output_gradients(grad.reshape(shape), num_examples)
                for grad, shape in zip(grads[start : start + len(calls.edges)], calls.shapes, strict=True)
            ]
            start += len(calls.edges)
            result[name] = (self._fill(name, parts, num_examples),)
        if self.uses is not None:
            result |= self.uses.pull(outputs, seed, grads[len(edges) :])
        return {name: result[name] for name in self.layers if name in result}

    def gradients(
        self, outputs: Tensor, seeds: list[Tensor | None], num_examples: int, *, keep_graph: bool = True
    ) -> dict[str, LayerGradients]:
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
        return self.gradient_groups(outputs, [seeds], num_examples, keep_graph=keep_graph)[0]

    def gradient_groups(
        self,
        outputs: Tensor,
        groups: Sequence[Sequence[Tensor | None]],
        num_examples: int,
        *,
        keep_graph: bool = True,
    ) -> list[dict[str, LayerGradients]]:
        """Per-example gradients for several groups of seeds, which have the layers' inputs in common.

        Args:
            outputs: a tensor of the recorded forward pass.
            groups: seeds of one backward pass each, see :meth:`backward`.
            num_examples: ``B``.
            keep_graph: see :meth:`gradients`.

        Returns:
            For each group gradients by layer, ``K`` being its size.
        """
        seeds = [seed for group in groups for seed in group]
        last = len(seeds) - 1
        passes = [
            self.backward(outputs, seed, num_examples, keep_graph=keep_graph or number < last)
            for number, seed in enumerate(seeds)
        ]
        run, result = slice(0, num_examples), [dict[str, LayerGradients]() for _ in groups]
        for name in list(passes[0]):
            columns, slopes = [grads.pop(name) for grads in passes], []
            for group in groups:
                few, columns = zip(*columns[: len(group)], strict=True), columns[len(group) :]
                slopes.append(tuple(c[0][None] if len(c) == 1 else torch.stack(c) for c in few))
            first = self._assemble(name, slopes[0], run, num_examples, release=not keep_graph)
            for gradients, own in zip(result, slopes, strict=True):
                if own is slopes[0]:
                    gradients[name] = first
                elif isinstance(first, FactoredGradients):
                    gradients[name] = replace(first, outputs=own[0])
                else:
                    gradients[name] = self.assemble(name, own, num_examples)
        return result

    def gradient_parts(
        self, outputs: Tensor, seed: Tensor | None, num_examples: int
    ) -> Iterator[dict[str, LayerGradients]]:
        """The gradients of one seed in runs of consecutive examples, for those who use each once.

        Inputs that have to be unfolded, as those of convolutions, are so run by run. The graph is freed.

        Args:
            outputs: a tensor of the recorded forward pass.
            seed: of the backward pass, see :meth:`backward`.
            num_examples: ``B``.

        Yields:
            Gradients by layer, ``K = 1``, of the next examples.
        """
        grads = self.backward(outputs, seed, num_examples, keep_graph=False)
        step = self._examples_at_once(grads, num_examples)
        for start in range(0, num_examples, step):
            run = slice(start, min(start + step, num_examples))
            yield {
                name: self._assemble(
                    name,
                    tuple(slope[None] for slope in slopes),
                    run,
                    num_examples,
                    release=run.stop == num_examples,
                )
                for name, slopes in grads.items()
            }

    def assemble(self, name: str, slopes: Slopes, num_examples: int) -> LayerGradients:
        """Return a layer's gradients from output gradients ``(K, G, B, R, D_out)``, inputs kept."""
        return self._assemble(name, slopes, slice(0, num_examples), num_examples, release=False)

    def _assemble(
        self, name: str, slopes: Slopes, run: slice, num_examples: int, *, release: bool
    ) -> LayerGradients:
        """Return gradients of a run of the examples from output gradients ``(K, G, B, R, D_out)`` of all."""
        if self.uses is not None and name in self.uses.heard:
            gradients = self.uses.assemble(name, slopes)
            return gradients if run == slice(0, num_examples) else gradients.select(run)
        inputs = self._inputs_of(name, run, num_examples, release=release)
        return FactoredGradients(inputs, slopes[0][:, :, run])

    def _examples_at_once(self, grads: Mapping[str, Slopes], num_examples: int) -> int:
        """Return how many examples' inputs to unfold at once: all of them where nothing grows by it."""
        largest = 0
        for name, (grad, *_) in grads.items():
            if not self._calls.get(name, _Calls()).edges:
                continue
            groups, _, positions, _ = grad.shape
            unfolded = groups * positions * self.layers[name].d_in * grad.element_size()
            if unfolded * num_examples > 2 * sum(x.nbytes for x in self._calls[name].inputs):
                largest = max(largest, unfolded)
        return max(_PART_EXAMPLES, _PART_BYTES // largest) if largest else num_examples

    def _inputs_of(self, name: str, run: slice, num_examples: int, *, release: bool) -> Tensor:
        """Return one layer's inputs ``(G, B', R, D_in)`` of a run of the examples, and let go of all."""
        layer, count = self.layers[name], run.stop - run.start
        calls = self._calls[name]
        parts = []
        for x in calls.inputs:
            if count < num_examples:
                rows = len(x) // num_examples  # of one example
                x = x[run.start * rows : run.stop * rows]
            parts.append(layer.inputs(x, count))
        if release:
            calls.inputs.clear()
        return _along_positions(parts)

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            # What is read of tensors here is no operation of the step, and watching it would only cost.
            with torch._C.DisableTorchFunction():
                if not (torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad):
                    return
                if not output.numel():  # an expert that no example was sent to
                    return
                calls = self._calls[name]
                calls.inputs.append((args[0] if args else next(iter(kwargs.values()))).detach())
                calls.edges.append(find_edge(output))
                calls.shapes.append(output.shape)

        return hook

    def _check_rows(self, num_examples: int) -> None:
        """Refuse inputs whose rows are no multiple of the examples.

        Raises:
            UnsupportedModelError: naming the layer.
        """
        for name, calls in self._calls.items():
            for x in calls.inputs:
                if x.shape[0] % num_examples or (x.ndim == 1 and num_examples > 1):
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
