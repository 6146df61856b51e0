"""Checks of a captured batch: examples that do not depend on each other, finite losses, their direction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor, nn

from lightning_influence.model.captured import Captured
from lightning_influence.model.layers.gradients import FactoredGradients, LayerGradients
from lightning_influence.model.layers.layer import Layer
from lightning_influence.model.layers.recorder import Recorder
from lightning_influence.model.layers.use_recorder import Slopes
from lightning_influence.model.losses.batch import BatchLoss
from lightning_influence.support.errors import (
    NonFiniteError,
    UnsupportedModelError,
)
from lightning_influence.support.waiting import expect
from lightning_influence.support.whole import is_stand_in, read_own_part, read_whole

# Relative error of a sum of gradients: TF32 and autocast are not exact.
_LIMITS = {torch.float64: 1e-8, torch.float32: 1e-2}


# Chosen by hand: gradients of parameters that processes share are taken so many numbers at a time.
_SHARED_AT_ONCE = 2**24
# Relative difference of one example's gradients that stands for a coupling: where examples trade places it is
# a factor of two or more. Kernels that add in a varying order, and float16 gradients below its smallest
# number, leave differences; those of examples whose gradient is nothing beside the largest one's are let
# pass. Chosen by hand.
_ROW_LIMIT, _ROW_FLOOR = 1e-2, 1e-3

NO_GRAPH = (
    "No covered layer took part in the forward pass with a gradient graph. Accepted are layers and "
    "parameters used outside torch.no_grad(), torch.vmap and outside gradient checkpointing. Layers: {}."
)


def check_independent(captured: Captured) -> None:
    """Check a batch: finite losses, examples that do not depend on each other, and whole gradients.

    Raises:
        NonFiniteError: if a loss is NaN or infinite.
        UnsupportedModelError: if examples are coupled, or a covered weight is used outside its layer.
    """
    values = captured.per_example()
    if not bool(torch.isfinite(values).all()):
        bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
        if isinstance(captured.loss, BatchLoss) and bool(torch.isfinite(captured.loss.batch_loss)):
            raise NonFiniteError(
                f"The loss of the first batch is finite, and those of {len(bad)} of its examples alone are "
                f"not (positions {bad[:5]}), as the mean over half a batch is not in a batch of one. Define "
                "`influence_loss(batch) -> (B,)` on the module, or pass `loss=`."
            )
        raise NonFiniteError(
            f"The loss of {len(bad)} of {captured.num_examples} examples in the first batch is not "
            f"finite (positions {bad[:5]}). Check these examples and the model's weights for NaN or "
            "infinity."
        )
    recorder, factors = captured.recorder, _factors(values)
    outputs = recorder.backward(values, factors, captured.num_examples)
    coupled = _coupled(recorder, values, factors, outputs)
    if coupled is not None:
        raise UnsupportedModelError(
            f"The loss of one example depends on layer {coupled!r} at other examples of the batch. "
            "Accepted are models that treat examples independently in eval mode, with the examples in "
            "the first dimension and in the order of the batch. Put the batch first, move contrastive or "
            "in-batch terms out of the loss with `influence_loss`, or leave this layer out with "
            "`layers=`."
        )
    partial = _partly_seen(captured, values, factors, outputs)
    if partial is not None:
        raise UnsupportedModelError(
            f"The loss depends on the weights of layer {partial!r} in another way than by calling the layer, "
            "so its gradients would be wrong. Accepted are weights that are used by their own layer only: "
            "leave out a layer whose weight is used a second time (as with tied weights, `F.linear(x, "
            "layer.weight.T)`) with `layers=`, and leave penalties on weights out of `influence_loss`."
        )


def _coupled(
    recorder: Recorder, values: Tensor, factors: Tensor, outputs: Mapping[str, Slopes]
) -> str | None:
    """Name a layer whose gradients at row ``b`` are not those of example ``b``'s loss alone.

    The first loss must leave all other rows alone. That does not see other examples trade places, so the
    losses are also weighed, each with a factor of its own, which must come back at the example's own row.

    Args:
        recorder: of the forward pass.
        values: the losses, ``(B,)``.
        factors: what they were weighed with once, ``(B,)``.
        outputs: the output gradients that came of it.

    Returns:
        The first such layer, or None.
    """
    num_examples = len(values)
    if num_examples < 2:
        return None
    for name, grads in recorder.backward(values, _first(values), num_examples).items():
        # What is not finite is refused elsewhere, as such.
        others = [grad[:, 1:] for grad in grads]
        if any(bool(grad.any()) and bool(grad.nan_to_num(0.0, 0.0, 0.0).any()) for grad in others):
            return name
    sizes = {name: [_row_norms(once) for once in slopes] for name, slopes in outputs.items()}
    for powers in _powers(values):
        found = recorder.backward(values, powers * factors, num_examples)
        for name, slopes in found.items():
            for weighed, once, size in zip(slopes, outputs[name], sizes[name], strict=True):
                own = powers.to(weighed.dtype)
                wrong = _row_norms(torch.addcmul(weighed, once, own[:, None, None], value=-1))
                size = size * own
                if bool((wrong > _ROW_LIMIT * size.clamp(min=_ROW_FLOOR * float(size.max()))).any()):
                    return name
    return None


def _first(values: Tensor) -> Tensor:
    """Return the gradient of the first example's value in all of them."""
    seed = torch.zeros_like(values)
    seed[0] = 1.0
    return seed


def _row_norms(gradients: Tensor) -> Tensor:
    """Return the norm of each example's gradients ``(G, B, R, D)`` at a layer, ``(B,)``."""
    norms: Tensor = gradients.transpose(0, 1).flatten(1).norm(dim=1)
    return norms


def _powers(values: Tensor) -> Iterator[Tensor]:
    """Factors for the examples, ``(B,)``, powers of two that no two examples have in common.

    A power of two scales every product and sum of a backward pass without a rounding error, in any precision
    and at any depth, so that what comes back differs from what was sent for a reason of the model's only.
    With factors that are none, rounding alone made 1% of a transformer of eight blocks in bfloat16. One
    vector of moderate powers cannot tell many examples apart: each vector yields one octal digit of their
    numbers.

    Yields:
        As many vectors as the number of the last example has octal digits.
    """
    numbers = torch.arange(len(values), device=values.device)
    while True:
        yield torch.exp2((numbers % 8).to(values.dtype))
        numbers = numbers // 8
        if not bool(numbers.any()):
            return


def _factors(values: Tensor) -> Tensor:
    """Return a factor of its own for each example, ``(B,)``, between 1 and 2."""
    return 1 + (torch.arange(len(values), device=values.device, dtype=values.dtype) * 0.618034).frac()


def _partly_seen(
    captured: Captured, values: Tensor, factors: Tensor, outputs: Mapping[str, Slopes]
) -> str | None:
    """Name a layer whose gradients do not make up the gradient of its parameters.

    The losses are weighed, since at the end of training their plain sum has a gradient of zero.

    Args:
        captured: the batch.
        values: its losses, ``(B,)``.
        factors: what they were weighed with, ``(B,)``.
        outputs: the output gradients that came of it.

    Returns:
        The first such layer, or None.
    """
    recorder, B = captured.recorder, captured.num_examples
    gradients = {
        name: recorder.assemble(name, tuple(slope[None] for slope in slopes), B)
        for name, slopes in outputs.items()
    }
    layers = {name: recorder.layers[name] for name in gradients}
    parameters = {name: _parameters(layer) for name, layer in layers.items()}
    differentiate = partial(torch.autograd.grad, values, grad_outputs=factors, retain_graph=True)
    found: dict[str, Sequence[Tensor]] = {}
    for name, layer in layers.items():
        if name not in found:
            run = _find_run(list(layers)[list(layers).index(name) :], parameters)
            flat = [p for other in run for p in parameters[other]]
            grads = iter(differentiate(flat, allow_unused=True, materialize_grads=True))
            found = {other: [next(grads).to_dense() for _ in parameters[other]] for other in run}
        weight, *bias = found[name]  # of sparse embeddings too
        whole = layer.from_parameters(weight, bias[0] if bias else None)
        seen, size = _add_up(gradients[name]), _add_up(gradients[name].absolute()).norm()
        limit = _LIMITS.get(whole.dtype, 5e-2) * size
        hooked = any(p._backward_hooks for p in parameters[name])  # of the user's, which change gradients
        if not hooked and bool((seen - whole.to(seen)).norm() > limit):
            return name
    return None


def _find_run(names: Sequence[str], parameters: Mapping[str, Sequence[Tensor]]) -> list[str]:
    """Return the first names, of parameters that may be differentiated at once.

    All of them; but where processes share the parameters, none should hold gradients of all.
    """
    run, count = [names[0]], 0
    for name in names[1:]:
        count += sum(p.numel() for p in parameters[name] if is_stand_in(p))
        if count > _SHARED_AT_ONCE:
            break
        run.append(name)
    return run


def _add_up(gradients: LayerGradients) -> Tensor:
    """Return the sum of some gradients over the examples, ``(G, D_out, D_in)``, for one seed."""
    if isinstance(gradients, FactoredGradients) and not gradients.inputs.shape[2]:
        return gradients.like.new_zeros(gradients.shape)  # a layer that was called on nothing
    return gradients.combine(gradients.like.new_ones(1, gradients.num_examples, 1))[0]


def _parameters(layer: Layer) -> list[Tensor]:
    """Return the weight, and the bias if it is trained."""
    weight, bias = layer.rule.weight(layer.module), layer.rule.bias(layer.module)
    return [weight, bias] if layer.has_bias and bias is not None else [weight]


def check_loss(value: Tensor, recorder: Recorder, layers: Mapping[str, Layer]) -> None:
    """Refuse a batch's loss that is not finite, and say where that began.

    Args:
        value: the loss.
        recorder: what the layers saw.
        layers: the covered layers.

    Raises:
        NonFiniteError: naming the first layer whose parameters or inputs are not finite.
    """

    def refuse() -> NoReturn:
        bad = [name for name, x in recorder.raw_inputs().items() if not bool(torch.isfinite(x).all())]
        weights = [
            name
            for name, layer in layers.items()
            if not all(bool(torch.isfinite(p).all()) for p in _own_parts(layer.module))
        ]
        where = (
            f"the inputs of layer {bad[0]!r} are the first that are not finite"
            if bad
            else "the inputs of all layers are finite, so it comes from the last one, the targets or the loss"
        )
        raise NonFiniteError(
            f"The training loss is {value.item()}: {where}"
            + (f"; the weights of {weights} are not finite" if weights else "")
            + ". Nothing of this batch was stored. Look for NaN or infinity in the data, or train with a "
            "smaller learning rate."
        )

    expect(torch.isfinite(value.detach()).all(), refuse)


def _own_parts(module: nn.Module) -> Iterator[Tensor]:
    """Yield a module's own parameters, of sharded ones what this process holds."""
    for parameter in module.parameters(recurse=False):
        yield read_whole(parameter) if is_stand_in(parameter) else read_own_part(parameter.detach())


def add_up_gradients(
    recorder: Recorder, slopes: Mapping[str, Slopes], num_examples: int
) -> dict[str, Slopes]:
    """Return a batch's gradient in each layer's weights, ``(G, D_out, D_in)``, of those in its outputs."""
    parts = {name: tuple(slope[None] for slope in own) for name, own in slopes.items()}
    return {name: (_add_up(recorder.assemble(name, own, num_examples)),) for name, own in parts.items()}
