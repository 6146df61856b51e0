"""What selection rules look at, from the gradients of an edit and the curvature."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.edits.passes import GradientSumPass
from lightning_influence.edits.rules import Evidence, Source
from lightning_influence.model.plan import LayerPlan, Layout

PROBES = 16


def random_signs(like: Tensor, seed: int, probes: int = PROBES) -> Tensor:
    """Draw vectors of random signs, whose products with a matrix tell its diagonal (Hutchinson 1990).

    Args:
        like: a vector ``(P,)``.
        seed: of the signs.
        probes: how many; what is estimated from them has a relative error of about ``sqrt(2 / probes)``.

    Returns:
        ``(probes, P)``.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (probes, len(like)), generator=generator).to(like) * 2 - 1


def collect(
    source: Source | None,
    plan: LayerPlan,
    target: GradientSumPass,
    gradient: Tensor,
) -> Evidence:
    """Compute the scores of channels of one kind.

    Args:
        source: the kind; None for none.
        plan: the covered layers.
        target: the pass over the edited examples.
        gradient: ``g``, ``(P,)``.

    Returns:
        The evidence.
    """
    layout = Layout.of(plan.layers)
    if source == "outputs":
        return Evidence(layout.shapes, outputs=_pre_activations(plan, target))
    if source == "gradients":
        zeros = {name: gradient.new_zeros(g * o) for name, (g, o, _) in layout.shapes.items()}
        pulled = {name: sums.flatten().abs() for name, sums in target.channels.items()}
        return Evidence(layout.shapes, gradients={**zeros, **pulled})
    return Evidence(layout.shapes)


def _pre_activations(plan: LayerPlan, target: GradientSumPass) -> dict[str, Tensor]:
    """Return the absolute mean pre-activation of each channel: its row times the mean input."""
    result = {}
    for name, layer in plan.layers.items():
        weight, bias = layer.rule.weight(layer.module).detach(), layer.rule.bias(layer.module)
        matrix = layer.from_parameters(weight, None if bias is None else bias.detach())
        fed = target.inputs.get(name)
        if fed is None:
            result[name] = matrix.new_zeros(layer.groups * layer.d_out)
            continue
        mean = torch.einsum("goi,gi->go", matrix.to(fed), fed / target.examples).flatten()
        frozen = bias is not None and not layer.has_bias
        result[name] = (mean + bias.detach().to(mean) if frozen and bias is not None else mean).abs()
    return result
