"""Scales and shifts of normalisation layers: gradients are elementwise in what was normalised."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn import functional

from lightning_influence.model.uses.operations.registry import ExampleCall, register_operation
from lightning_influence.model.uses.parts import Dense, Part, sum_to


@register_operation(functional.layer_norm, arguments=("input", "normalized_shape", "weight", "bias", "eps"))
def pull_layer_norm(call: ExampleCall) -> Mapping[str, Part] | None:
    """Pull back the affine part of a layer norm.

    Args:
        call: of ``layer_norm(input, normalized_shape, weight, bias, eps)``.

    Returns:
        Sums over positions of the gradients, times the normalised inputs for the weight.
    """
    if not call.has_place("input"):
        return None
    x, shape = call.examples("input", fill=True), tuple(call.get("normalized_shape"))
    return _affine(call, functional.layer_norm(x, shape, None, None, call.get("eps", 1e-5)))


@register_operation(functional.rms_norm, arguments=("input", "normalized_shape", "weight", "eps"))
def pull_rms_norm(call: ExampleCall) -> Mapping[str, Part] | None:
    """Pull back the scale of a root-mean-square norm.

    Args:
        call: of ``rms_norm(input, normalized_shape, weight, eps)``.

    Returns:
        Sums over positions of the gradients times the normalised inputs.
    """
    if not call.has_place("input"):
        return None
    x, shape = call.examples("input", fill=True), tuple(call.get("normalized_shape"))
    return _affine(call, functional.rms_norm(x, shape, None, call.get("eps")))


def _affine(call: ExampleCall, normal: Tensor) -> Mapping[str, Part] | None:
    """Return gradients of a weight and a bias that were broadcast along the first dimensions."""
    gradient = call.gradient()
    parts: dict[str, Part] = {}
    for name in call.sources():
        if name not in ("weight", "bias"):
            return None
        values = gradient * normal if name == "weight" else gradient
        parts[name] = Dense(sum_to(values, call.get(name).shape))
    return parts


@register_operation(
    functional.batch_norm,
    arguments=("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
)
def pull_batch_norm(call: ExampleCall) -> Mapping[str, Part] | None:
    """Pull back the affine part of a batch norm, given what it was normalised by.

    Args:
        call: of ``batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)``.

    Returns:
        Sums over pixels of the gradients, times the normalised inputs for the weight.
    """
    eps = call.get("eps", 1e-5)

    def normalise(x: Tensor) -> Tensor:
        if call.get("training", False):  # without the buffers, which are not to be updated again
            return functional.batch_norm(x, None, None, None, None, True, 0.0, eps)
        return functional.batch_norm(
            x, call.get("running_mean"), call.get("running_var"), None, None, False, 0.0, eps
        )

    return _by_channel(call, normalise)


@register_operation(functional.group_norm, arguments=("input", "num_groups", "weight", "bias", "eps"))
def pull_group_norm(call: ExampleCall) -> Mapping[str, Part] | None:
    """Pull back the affine part of a group norm.

    Args:
        call: of ``group_norm(input, num_groups, weight, bias, eps)``.

    Returns:
        Sums over pixels of the gradients, times the normalised inputs for the weight.
    """
    groups, eps = call.get("num_groups"), call.get("eps", 1e-5)
    return _by_channel(call, lambda x: functional.group_norm(x, groups, None, None, eps))


@register_operation(
    functional.instance_norm,
    arguments=(
        "input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps",
    ),
)  # fmt: skip
def pull_instance_norm(call: ExampleCall) -> Mapping[str, Part] | None:
    """Pull back the affine part of an instance norm.

    Args:
        call: of ``instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, ...)``.

    Returns:
        Sums over pixels of the gradients, times the normalised inputs for the weight.
    """
    own, eps = call.get("use_input_stats", True), call.get("eps", 1e-5)
    mean, var = (None, None) if own else (call.get("running_mean"), call.get("running_var"))
    return _by_channel(call, lambda x: functional.instance_norm(x, mean, var, None, None, own, 0.0, eps))


def _by_channel(call: ExampleCall, normalise: Callable[[Tensor], Tensor]) -> Mapping[str, Part] | None:
    """Return gradients of a weight and a bias of the channels, the dimension after the examples."""
    place = call.use.places.get(call.slot("input"))
    if place is None or place.dim not in (0, None):
        return None
    gradient = call.gradient()  # (K, B, m, C, *spatial)
    parts: dict[str, Part] = {}
    for name in call.sources():
        values = gradient
        if name == "weight":
            normal = normalise(call.get("input").detach())
            values = gradient * place.split(normal, call.num_examples)
        elif name != "bias":
            return None
        if values.ndim < 4:
            return None
        values = values.movedim(3, 2).flatten(3).sum(dim=3)
        parts[name] = Dense(values.reshape(*values.shape[:2], *call.get(name).shape))
    return parts
