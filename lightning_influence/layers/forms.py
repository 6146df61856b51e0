"""What is done with a batch's gradients whatever form they have: the cheaper form, and a check."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_influence.errors import NonFiniteError
from lightning_influence.layers.dense import DenseGradients
from lightning_influence.layers.factored import FactoredGradients
from lightning_influence.layers.gradients import LayerGradients


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
