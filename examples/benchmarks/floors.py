"""Operations that a stage cannot do without, as multiples of one forward+backward epoch (``6 P N R``).

A map of ``D_in`` (bias included) by ``D_out`` at ``R`` positions costs ``2 D_in D_out R`` operations an
example forward, as much again for the gradient of its input, and as much for that of its weight. Only
multiply-adds in matrix products are counted; what is elementwise, and loading, is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tasks import Task
from torch import Tensor, nn

EIGH = 9.0  # operations of a symmetric eigendecomposition with vectors, in units of n^3 (tridiagonal QR)


@dataclass(frozen=True)
class Shape:
    """A linear map: input size with the bias coordinate, output size, positions per example."""

    d_in: int
    d_out: int
    positions: int


def layer_shapes(model: nn.Module, inputs: Tensor) -> list[Shape]:
    """Shapes of every Linear and Conv2d layer, seen in one forward pass over a few inputs ``(B, ...)``."""
    shapes: list[Shape] = []

    def note(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Linear | nn.Conv2d)
        weight, bias = module.weight, module.bias is not None
        shapes.append(
            Shape(weight[0].numel() + bias, len(weight), output.numel() // (len(inputs) * len(weight)))
        )

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _eigenvalues(shape: Shape) -> float:
    """Rotations and squares of one example's EK-FAC eigenvalues, or of its self-influence."""
    rotate = 2 * shape.positions * (shape.d_in**2 + shape.d_out**2)
    form = 2 * shape.positions * shape.d_in * shape.d_out if shape.positions > 1 else 0
    return rotate + form + 2 * shape.d_in * shape.d_out


def floors(task: Task, model: nn.Module) -> dict[str, float]:
    """Floors of the stages that every EK-FAC shares, in epochs over ``task.train``.

    Args:
        task: gives ``N``, ``Q`` and an input.
        model: whose linear and convolutional layers count.

    Returns:
        ``covariance``, ``eigh``, ``lambda``, ``scores`` (with full-rank queries) and ``self-influence``.
    """
    shapes = layer_shapes(model, task.train.tensors[0][:2])
    examples, queries = len(task.train), len(task.queries)
    epoch = sum(6.0 * s.d_in * s.d_out * s.positions for s in shapes) * examples
    backward = epoch * 2 / 3  # forward, and gradients of layer outputs only
    second = sum(s.positions * (s.d_in**2 + s.d_out**2) for s in shapes) * examples
    eigen = sum(EIGH * (s.d_in**3 + s.d_out**3) for s in shapes)
    squares = sum(map(_eigenvalues, shapes)) * examples
    pairs = sum(2.0 * s.d_in * s.d_out for s in shapes) * examples * queries
    return {
        "covariance": (backward + second) / epoch,
        "eigh": eigen / epoch,
        "lambda": (backward + squares) / epoch,
        "scores": (backward + pairs) / epoch,
        "self-influence": (backward + squares) / epoch,
    }
