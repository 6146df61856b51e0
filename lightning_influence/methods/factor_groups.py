"""Factors that exceed the memory budget: fitted by groups of layers, kept in files, read where they are used.

Where a user names a folder, layers whose factors do not fit into the budget together are fitted in groups
that do, each in two passes of its own. What a group gave is written to a file and mapped into memory: of the
bases, covariances and squares of all layers the machine holds what is in use, and drops it where memory is
short. A closed form that exceeds the budget makes its eigenvalues of them, layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from lightning_influence.curvature.factors import Factors
from lightning_influence.methods.context import Context
from lightning_influence.methods.resuming import FactorFolder
from lightning_influence.model.layers.layer import Layer
from lightning_influence.model.layers.plan import LayerPlan

Fit = Callable[[LayerPlan], Factors]


def divide_layers(context: Context) -> list[dict[str, Layer]]:
    """Return the layers in groups whose factors fit into the memory budget; one group without a folder.

    A layer that exceeds the budget alone is a group of its own.
    """
    layers, options = context.plan.layers, context.options
    if options.factors_dir is None:
        return [dict(layers)]
    width = torch.empty((), dtype=context.dtype).element_size()
    groups: list[dict[str, Layer]] = []
    held = 0
    for name, layer in layers.items():
        nbytes = width * _count_numbers(layer)
        if not groups or held + nbytes > options.memory_budget:
            groups.append({})
            held = 0
        groups[-1][name] = layer
        held += nbytes
    return groups


def _count_numbers(layer: Layer) -> int:
    """Return the numbers of a layer's covariances, bases and squares."""
    groups, d_out, d_in = layer.shape
    sides = zip((d_out, d_in), layer.diagonal_sides, strict=True)
    return groups * (d_out * d_in + sum(width if diagonal else 2 * width**2 for width, diagonal in sides))


def fit_in_groups(
    context: Context, groups: list[dict[str, Layer]], folder: FactorFolder, fit: Fit
) -> Factors:
    """Return the factors of all layers, fitted group by group; groups that are finished are read.

    Args:
        context: of the question.
        groups: the layers, from :func:`divide_layers`.
        folder: keeps the groups.
        fit: fits factors of a plan's layers.

    Returns:
        The factors, whose tensors are mapped from files if they are on the CPU.
    """
    parts, seen = [], []
    for layers in groups:
        found = folder.find_group(list(layers))
        if found is None:
            fitted = fit(replace(context.plan, layers=layers, is_part=True))
            assert context.losses is not None
            found = folder.keep_group(list(layers), fitted, context.losses), context.losses
        parts.append(found[0])
        seen.append(found[1])
    # A folder may hold some groups of other data: those that are fitted now tell.
    differs = torch.tensor([float(len({losses.content for losses in seen}) > 1)])
    if folder.restored and float(context.runner.all_reduce_sum(differs)):
        folder.clear()
        folder.restored = False
        return fit_in_groups(context, groups, folder, fit)
    context.losses = seen[-1]
    return replace(parts[0], layers={name: layer for part in parts for name, layer in part.layers.items()})
