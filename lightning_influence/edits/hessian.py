"""Products with the exact Hessian of one batch's losses, by differentiating twice (Pearlmutter 1994)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_influence.layers import Layer
from lightning_influence.layers.layout import Layout


def hessian_products(value: Tensor, layers: Mapping[str, Layer], vectors: Tensor) -> Tensor:
    """Return ``H V`` for the Hessian of a scalar in the covered parameters.

    Args:
        value: a scalar with its graph.
        layers: the covered layers, in the order of the flat vectors.
        vectors: ``(V, P)``.

    Returns:
        ``(V, P)``; zero for layers that the scalar does not depend on.
    """
    layout = Layout.of(layers)
    parameters = [p for layer in layers.values() for p in _parameters(layer)]
    gradients = torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True)
    products = []
    for vector in vectors:
        split = layout.split(vector)
        parts = [p for name, layer in layers.items() for p in _of(layer, split[name])]
        inner = sum((g * p.to(g)).sum() for g, p in zip(gradients, parts, strict=True))
        if not (isinstance(inner, Tensor) and inner.requires_grad):  # linear in the parameters
            products.append(torch.zeros_like(vector))
            continue
        second = iter(torch.autograd.grad(inner, parameters, retain_graph=True, materialize_grads=True))
        blocks = {}
        for name, layer in layers.items():
            weight = next(second)
            blocks[name] = layer.from_parameters(weight, next(second) if layer.has_bias else None)
        products.append(layout.join(blocks).to(vector))
    return torch.stack(products)


def _parameters(layer: Layer) -> list[Tensor]:
    bias = layer.rule.bias(layer.module) if layer.has_bias else None
    weight = layer.rule.weight(layer.module)
    return [weight] if bias is None else [weight, bias]


def _of(layer: Layer, matrix: Tensor) -> list[Tensor]:
    weight, bias = layer.to_parameters(matrix)
    return [weight] if bias is None else [weight, bias]
