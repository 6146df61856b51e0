"""Refuses gradients that are not finite before anything is made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_influence.model.layers.gradients import LayerGradients
from lightning_influence.support.errors import NonFiniteError
from lightning_influence.support.waiting import read_later


def check_finite(gradients: Mapping[str, LayerGradients]) -> None:
    """Refuse NaN and infinite gradients.

    Args:
        gradients: gradients by layer name.

    Raises:
        NonFiniteError: naming the layers whose inputs or output gradients are not finite.
    """
    check_finite_tensors({
        name: [tensor for tensor in layer.tensors if tensor.is_floating_point()]
        for name, layer in gradients.items()
    })


def check_finite_tensors(tensors: Mapping[str, Sequence[Tensor]]) -> None:
    """Refuse NaN and infinity in what gradients are made of.

    Args:
        tensors: inputs and output gradients by layer name.

    Raises:
        NonFiniteError: as :func:`check_finite`.
    """
    if not tensors:
        return
    sums = [tensor.sum() for own in tensors.values() for tensor in own]
    if sums[0].is_cpu and bool(torch.isfinite(torch.stack(sums).sum())):
        return  # what is left may be sums that overflow
    finite = torch.stack([
        torch.stack([torch.isfinite(tensor).all() for tensor in own]).all() for own in tensors.values()
    ])
    names = list(tensors)

    def take(found: Tensor) -> None:
        bad = [name for name, is_finite in zip(names, found.tolist(), strict=True) if not is_finite]
        if bad:
            raise NonFiniteError(
                f"Non-finite inputs or gradients in layers {bad}; nothing was stored. Check the weights and "
                "the batch for NaN or infinity, or train with a smaller learning rate."
            )

    read_later(finite, take)
