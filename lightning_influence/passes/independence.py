"""Whether an example's loss depends on that example alone, and on weights through their layers alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_influence.errors import NonFiniteError, UnsupportedModelError
from lightning_influence.layers import Recorder
from lightning_influence.layers.base import Layer
from lightning_influence.passes.captured import Captured

# Relative error of a sum of gradients: TF32 and autocast are not exact.
_LIMITS = {torch.float64: 1e-8, torch.float32: 1e-2}


def check_independent(captured: Captured) -> None:
    """Check a batch: finite losses, examples that do not depend on each other, and whole gradients.

    Raises:
        NonFiniteError: if a loss is NaN or infinite.
        UnsupportedModelError: if examples are coupled, or a covered weight is used outside its layer.
    """
    values = captured.per_example()
    if not bool(torch.isfinite(values).all()):
        bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"The loss of {len(bad)} of {captured.num_examples} examples in the first batch is not "
            f"finite (positions {bad[:5]}). Check these examples and the model's weights for NaN or "
            "infinity."
        )
    coupled = _coupled(captured.recorder, values, captured.num_examples)
    if coupled is not None:
        raise UnsupportedModelError(
            f"The loss of one example depends on layer {coupled!r} at other examples of the batch. "
            "Accepted are models that treat examples independently in eval mode, with the examples in "
            "the first dimension and in the order of the batch. Put the batch first, move contrastive or "
            "in-batch terms out of the loss with `influence_loss`, or leave this layer out with "
            "`layers=`."
        )
    partial = _partly_seen(captured, values)
    if partial is not None:
        raise UnsupportedModelError(
            f"The loss depends on the weights of layer {partial!r} in another way than by calling the layer, "
            "so its gradients would be wrong. Accepted are weights that are used by their own layer only: "
            "leave out a layer whose weight is used a second time (as with tied weights, `F.linear(x, "
            "layer.weight.T)`) with `layers=`, and leave penalties on weights out of `influence_loss`."
        )


def _coupled(recorder: Recorder, values: Tensor, num_examples: int) -> str | None:
    """Name a layer whose gradients at row ``b`` are not those of example ``b``'s loss alone.

    The first loss must leave all other rows alone. That does not see other examples trade places, so the
    losses are also weighed, each with a factor of its own, which must come back at the example's own row.

    Returns:
        The first such layer, or None.
    """
    if num_examples < 2:
        return None
    factors = _factors(values)
    for name, grad in recorder.backward(values[0], None, num_examples).items():
        if bool(grad[:, 1:].nan_to_num(0.0, 0.0, 0.0).any()):  # not finite: refused elsewhere, as such
            return name
    plain = recorder.backward(values, torch.ones_like(factors), num_examples)
    weighed = recorder.backward(values, factors, num_examples)
    for name, grad in plain.items():
        expected = grad * factors.to(grad.dtype)[:, None, None]
        if bool((weighed[name] - expected).norm() > 1e-2 * expected.norm()):
            return name
    return None


def _factors(values: Tensor) -> Tensor:
    """Return a factor of its own for each example, ``(B,)``, between 1 and 2."""
    return 1 + (torch.arange(len(values), device=values.device, dtype=values.dtype) * 0.618034).frac()


def _partly_seen(captured: Captured, values: Tensor) -> str | None:
    """Name a layer whose gradients do not make up the gradient of its parameters.

    The losses are weighed, since at the end of training their plain sum has a gradient of zero.

    Returns:
        The first such layer, or None.
    """
    recorder, factors, B = captured.recorder, _factors(values), captured.num_examples
    inputs, outputs = recorder.inputs(B), recorder.backward(values, factors, B)
    layers = {name: recorder.layers[name] for name in outputs}
    parameters = {name: _parameters(layer) for name, layer in layers.items()}
    flat = [p for own in parameters.values() for p in own]
    found = iter(
        torch.autograd.grad(
            values, flat, factors, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    )
    for name, layer in layers.items():
        weight, *bias = [next(found) for _ in parameters[name]]
        whole = layer.from_parameters(weight, bias[0] if bias else None)
        seen = torch.einsum("gbro,gbri->goi", outputs[name], inputs[name])
        size = torch.einsum("gbro,gbri->goi", outputs[name].abs(), inputs[name].abs()).norm()
        limit = _LIMITS.get(weight.dtype, 5e-2) * size
        hooked = any(p._backward_hooks for p in parameters[name])  # of the user's, which change gradients
        if not hooked and bool((seen - whole.to(seen)).norm() > limit):
            return name
    return None


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
    if bool(torch.isfinite(value).all()):
        return
    bad = [name for name, x in recorder.raw_inputs().items() if not bool(torch.isfinite(x).all())]
    weights = [
        name
        for name, layer in layers.items()
        if not all(bool(torch.isfinite(p).all()) for p in layer.module.parameters(recurse=False))
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
