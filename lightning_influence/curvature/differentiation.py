"""Second derivatives through autograd, for many vectors at once.

The network is differentiated with respect to the covered parameters, as flat vectors in the order of a
:class:`~lightning_influence.model.layers.plan.Layout`. A product with ``V`` vectors is one batched backward
pass (Pearlmutter 1994 for the Hessian; Schraudolph 2002 for the Gauss-Newton matrix) and costs a small
multiple of ``V`` ordinary ones, whatever the number of outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_influence.model.captured import Captured
from lightning_influence.model.layers.layer import Layer
from lightning_influence.model.layers.plan import LayerPlan, Layout
from lightning_influence.support.coordinates import square_norm
from lightning_influence.support.errors import UnsupportedModelError

# Chosen by hand: memory for what flows back at once; a batched pass holds a copy of everything a vector.
_BATCHED_BYTES = 2**28
# Relative difference of a batched pass from a plain one that is not rounding.
_AGREEMENT = {torch.float64: 1e-8, torch.float32: 1e-3}
# How autograd says that an operation has no second derivative.
_NO_DERIVATIVE = ("is not implemented", "once_differentiable", "not differentiable")
_ERROR_NODE = "torch::autograd::Error"


class Parameters:
    """The covered parameters that took part in a forward pass, and flat vectors over them.

    Args:
        plan: the covered layers.
        captured: the forward pass; layers that were silent in it are constants.
    """

    def __init__(self, plan: LayerPlan, captured: Captured) -> None:
        silent = set(captured.recorder.silent)
        self._layout = Layout.of(plan.layers)
        self._heard = [layer for name, layer in plan.layers.items() if name not in silent]
        self.tensors = [p for layer in self._heard for p in _tensors(layer)]
        self.numel = plan.numel

    def split(self, vectors: Tensor) -> list[Tensor]:
        """Return ``vectors (V, P)`` as one tensor ``(V, *parameter.shape)`` for each of :attr:`tensors`."""
        blocks = self._layout.split(vectors)
        result = []
        for layer in self._heard:
            weight, bias = layer.to_parameters(blocks[layer.name])
            result += [weight] if bias is None else [weight, bias]
        return [part.to(p.dtype) for part, p in zip(result, self.tensors, strict=True)]

    def add(self, out: Tensor, parts: Sequence[Tensor]) -> None:
        """Add to ``out (V, P)`` what :meth:`split` would have given as ``parts``, in place."""
        pieces = iter(parts)
        blocks: Mapping[str, Tensor] = {
            layer.name: layer.from_parameters(next(pieces), next(pieces) if layer.has_bias else None)
            for layer in self._heard
        }
        start = 0
        for name, numel in self._layout.numels.items():
            if name in blocks:
                out[:, start : start + numel] += blocks[name].flatten(1).to(out.dtype)
            start += numel


class Batching:
    """Backward passes of many seeds at once, where they are known to be right.

    A batched pass goes wrong without an error where a derivative reads sizes off its tensors: that of
    ``group_norm``'s backward pass does (torch 2.13), with one group and one example. So passes of any
    sizes are held against a plain one, up to the first that has no zero parts. Two seeds would take as many
    passes with that as without a batch.
    """

    def __init__(self) -> None:
        self._is_right: dict[tuple[torch.Size, ...], bool] = {}

    def pull(
        self,
        captured: Captured,
        outputs: Sequence[Tensor | None],
        inputs: Sequence[Tensor],
        seeds: Sequence[Tensor],
    ) -> list[Tensor]:
        """Return vector-Jacobian products; the graph is kept.

        Args:
            captured: the forward pass, whose sizes tell passes apart.
            outputs: tensors of the graph; None or a constant where nothing depends on the inputs.
            inputs: what to differentiate by.
            seeds: ``(V, *shape)`` for each output.

        Returns:
            ``(V, *shape)`` for each input.
        """
        live = [(o, s) for o, s in zip(outputs, seeds, strict=True) if o is not None and o.requires_grad]
        count = len(seeds[0])
        if not live:
            return [x.new_zeros(count, *x.shape) for x in inputs]
        heads, tails = [o for o, _ in live], [s for _, s in live]

        def differentiate(seeds: Sequence[Tensor], batched: bool = False) -> Sequence[Tensor | None]:
            return torch.autograd.grad(
                heads, inputs, seeds, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )

        found: Sequence[Tensor | None] | None = None
        seen = captured.recorder.raw_inputs().values()
        sizes = tuple(tensor.shape for tensor in [*seen, *tails, *inputs])
        is_right = self._is_right.get(sizes)
        if count > 2 and is_right is not False:
            with contextlib.suppress(RuntimeError):  # an operation that cannot be batched
                found = differentiate(tails, batched=True)
            if found is not None and is_right is None:
                mixture = torch.cos(torch.arange(1, count + 1, device=tails[0].device))
                mixed = [torch.tensordot(mixture.to(tail), tail, 1) for tail in tails]
                found = found if _adds_up(found, differentiate(mixed), mixture) else None
            # Where a part is zero, as of a layer without inputs, nothing is shown of it.
            if is_right is None and (found is None or all(x is None or bool(x.any()) for x in found)):
                self._is_right[sizes] = found is not None
        if found is None:
            rows = [differentiate([tail[i] for tail in tails]) for i in range(count)]
            found = [None if parts[0] is None else torch.stack(parts) for parts in zip(*rows, strict=True)]
        return [
            x.new_zeros(count, *x.shape) if grad is None else grad.detach()
            for grad, x in zip(found, inputs, strict=True)
        ]


def add_hessian_products(
    out: Tensor,
    plan: LayerPlan,
    captured: Captured,
    vectors: Tensor,
    coefficients: Tensor | None = None,
    batching: Batching | None = None,
) -> None:
    """Add ``sum_n c_n H_n v`` for the Hessians of the unnormalised per-example losses.

    Args:
        out: ``(V, P)``, changed in place.
        plan: the covered layers.
        captured: a batch, from a forward pass under ``differentiable_twice``.
        vectors: ``(V, P)``.
        coefficients: ``c (B,)``; ones if None.
        batching: what earlier batches have shown of batched passes.

    Raises:
        UnsupportedModelError: if the model has no second derivatives.
    """
    parameters, batching = Parameters(plan, captured), batching or Batching()
    losses = captured.second_order()
    value = losses.sum() if coefficients is None else losses @ coefficients.to(losses)
    with _explained("Hessian"):
        first = torch.autograd.grad(value, parameters.tensors, create_graph=True, allow_unused=True)
        _refuse_once_differentiable(first)
        for part in chunks(len(vectors), parameters, captured):
            products = batching.pull(captured, first, parameters.tensors, parameters.split(vectors[part]))
            parameters.add(out[part], products)


def add_gauss_newton_products(
    out: Tensor,
    plan: LayerPlan,
    captured: Captured,
    vectors: Tensor,
    coefficients: Tensor | None = None,
    batching: Batching | None = None,
) -> None:
    """Add ``sum_n c_n J_n^T H_n J_n v`` for the output Hessians ``H_n`` of the unnormalised losses.

    ``J v`` is the derivative, by ``u``, of the inner product of ``J^T u`` with ``v``.

    Args:
        out: ``(V, P)``, changed in place.
        plan: the covered layers.
        captured: a batch with a known loss, from a forward pass under ``differentiable_twice``.
        vectors: ``(V, P)``.
        coefficients: ``c (B,)``; ones if None.
        batching: what earlier batches have shown of batched passes.

    Raises:
        UnsupportedModelError: if the model has no second derivatives.
    """
    assert captured.loss is not None
    outputs = captured.loss.outputs
    parameters, batching = Parameters(plan, captured), batching or Batching()
    with _explained("Gauss-Newton matrix by products"):
        cotangent = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(
            outputs, parameters.tensors, cotangent, create_graph=True, allow_unused=True
        )
        _refuse_once_differentiable(pulled)
        for part in chunks(len(vectors), parameters, captured):
            tangents = batching.pull(captured, pulled, [cotangent], parameters.split(vectors[part]))[0]
            bent = captured.loss.curvature_products(tangents).to(outputs.dtype)
            if coefficients is not None:
                by_example = bent.reshape(len(bent), captured.num_examples, -1)
                bent = (by_example * coefficients.to(bent)[:, None]).view(bent.shape)
            parameters.add(out[part], batching.pull(captured, [outputs], parameters.tensors, [bent]))


def chunks(count: int, parameters: Parameters, captured: Captured) -> Iterator[slice]:
    """Runs of vectors whose batched backward pass stays within the working memory."""
    activations = sum(x.numel() for x in captured.recorder.raw_inputs().values())
    each = 8 * (parameters.numel + 4 * activations)
    step = max(1, _BATCHED_BYTES // max(1, each))
    for start in range(0, count, step):
        yield slice(start, min(count, start + step))


def _adds_up(products: Sequence[Tensor | None], mixed: Sequence[Tensor | None], mixture: Tensor) -> bool:
    """Return whether products of many vectors agree with that of a mixture of them.

    Args:
        products: ``(V, *shape)`` each.
        mixed: of the mixture, by a plain pass.
        mixture: coefficients ``(V,)``.
    """
    gap = size = 0.0
    for many, one in zip(products, mixed, strict=True):
        if many is None or one is None:
            continue
        gap += square_norm(torch.tensordot(mixture.to(many), many, 1) - one)
        size += square_norm(many)
    limit = _AGREEMENT.get(next((p.dtype.to_real() for p in products if p is not None), torch.float64), 0.1)
    return bool(gap**0.5 <= limit * size**0.5)


def _refuse_once_differentiable(tensors: Sequence[Tensor | None]) -> None:
    """Find backward functions that were declared to have no derivative.

    ``torch.autograd.grad`` raises only if it has to pass through them; beside a path that it needs, it takes
    them for constants, and the product would silently lack terms.

    Raises:
        RuntimeError: if there is one.
    """
    seen: set[object] = set()
    todo = [tensor.grad_fn for tensor in tensors if tensor is not None]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if node.name() == _ERROR_NODE:
            raise RuntimeError("a custom autograd.Function is marked with @once_differentiable")
        seen.add(node)
        todo += [previous for previous, _ in node.next_functions]


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Say what to do when an operation of the model has no second derivative.

    Raises:
        RuntimeError: autograd's own, for any other reason.
        UnsupportedModelError: in place of autograd's error.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not any(sign in text for sign in _NO_DERIVATIVE):
            raise
        raise UnsupportedModelError(
            f"The {what} needs second derivatives, and an operation of the model has none ({text}). Use "
            "what takes first derivatives only (method='auto', 'exact' or 'block_ggn', curvature='ggn', "
            "fisher='mixed' where outputs are many), or write that operation with differentiable ones."
        ) from error


def _tensors(layer: Layer) -> list[Tensor]:
    weight, bias = layer.rule.weight(layer.module), layer.rule.bias(layer.module)
    return [weight, bias] if layer.has_bias and bias is not None else [weight]
