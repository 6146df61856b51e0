"""Whether an example's loss depends on that example alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_influence.errors import NonFiniteError, UnsupportedModelError
from lightning_influence.layers import Recorder
from lightning_influence.layers.base import Layer
from lightning_influence.passes.captured import Captured


def check_independent(captured: Captured) -> None:
    """Check a batch: finite losses, and an example's loss that depends on that example only.

    Raises:
        NonFiniteError: if a loss is NaN or infinite.
        UnsupportedModelError: if examples are coupled.
    """
    values = captured.per_example()
    if not bool(torch.isfinite(values).all()):
        bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"The loss of {len(bad)} of {captured.num_examples} examples in the first batch is not "
            f"finite (positions {bad[:5]}). Check these examples and the model's weights for NaN or "
            "infinity."
        )
    if captured.num_examples < 2:
        return
    coupled = _coupled(captured.recorder, values, captured.num_examples)
    if coupled is not None:
        raise UnsupportedModelError(
            f"The loss of one example depends on layer {coupled!r} at other examples of the batch. "
            "Accepted are models that treat examples independently in eval mode, with the examples in "
            "the first dimension and in the order of the batch. Put the batch first, move contrastive or "
            "in-batch terms out of the loss with `influence_loss`, or leave this layer out with "
            "`layers=`."
        )


def _coupled(recorder: Recorder, values: Tensor, num_examples: int) -> str | None:
    """Name a layer whose gradients at row ``b`` are not those of example ``b``'s loss alone.

    The first loss must leave all other rows alone. That does not see other examples trade places, so the
    losses are also weighed, each with a factor of its own, which must come back at the example's own row.

    Returns:
        The first such layer, or None.
    """
    index = torch.arange(num_examples, device=values.device, dtype=values.dtype)
    factors = 1 + (index * 0.618034).frac()
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
