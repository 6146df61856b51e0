"""What half precision makes of gradients: a few examples of the same weights once more, in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.gradients import LayerGradients
from lightning_influence.model.layers.plan import LayerPlan
from lightning_influence.support.batches import map_tensors

HALF = (torch.float16, torch.bfloat16)
# Chosen by hand: examples whose gradients are compared; each may have to be formed.
EXAMPLES = 16


def find_half_precision(plan: LayerPlan) -> torch.dtype | None:
    """Return the half precision that a covered layer's weights are in, None if there is none."""
    dtypes = (layer.rule.weight(layer.module).dtype for layer in plan.layers.values())
    return next((dtype for dtype in dtypes if dtype in HALF), None)


def take_in_float32(
    plan: LayerPlan, module: nn.Module, batch: Any, num_examples: int
) -> Mapping[str, LayerGradients] | None:
    """Take the loss gradients of a batch's first examples with the same weights in float32.

    Args:
        plan: the covered layers.
        module: the user's module, in half precision.
        batch: the batch.
        num_examples: ``B``.

    Returns:
        Gradients by layer of at most :data:`EXAMPLES` examples, ``K = 1``; None if the model does not run in
        float32, as one that converts to a precision itself.
    """
    try:
        with _in_float32(module):
            captured = Forward(plan)(module, map_tensors(batch, _to_float32), num_examples)
            gradients = captured.loss_gradients(keep_graph=False)
    except Exception:  # whatever the user's model may raise; the answer itself does not depend on it
        return None
    return {name: layer.select(slice(0, EXAMPLES)) for name, layer in gradients.items()}


@contextlib.contextmanager
def _in_float32(module: nn.Module) -> Iterator[None]:
    """Hold what is in half precision in float32 for the time of the block; put back to the bit."""
    weights = [(p, p.data) for p in module.parameters() if p.dtype in HALF]
    buffers = [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
        if buffer.dtype in HALF
    ]
    default = torch.get_default_dtype()
    try:
        if default in HALF:
            torch.set_default_dtype(torch.float32)
        for parameter, data in weights:
            parameter.data = data.float()
        for owner, name, buffer in buffers:
            setattr(owner, name, buffer.float())
        yield
    finally:
        torch.set_default_dtype(default)
        for parameter, data in weights:
            parameter.data = data
        for owner, name, buffer in buffers:
            setattr(owner, name, buffer)


def _to_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALF else tensor
