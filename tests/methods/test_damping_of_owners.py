"""Processes that share layers out give them the damping that one process would."""

from types import SimpleNamespace

import pytest
import torch

from lightning_influence.curvature.factors import Factors, LayerStatistics
from lightning_influence.methods.context import Context


def factors(scales):
    result = Factors(weight_sum=8.0, weight_examples=8.0)
    for name, scale in scales.items():
        layer = LayerStatistics.zeros((1, 2, 3), dtype=torch.float64)
        layer.squares, layer.squares_examples = torch.full((1, 2, 3), 8.0 * scale, dtype=torch.float64), 8.0
        result.layers[name] = layer
    return result


class Owners:
    """Knows the other process's numbers as soon as it is asked for them."""

    def __init__(self, *others):
        self.others = list(others)

    def merge(self, values):
        return values | self.others.pop(0)


def resolve(own, solver, owners=None):
    context = SimpleNamespace(
        options=SimpleNamespace(damping="auto"), state=SimpleNamespace(record=None), owners=owners
    )
    return Context.resolve_damping(context, own, solver), context


@pytest.mark.parametrize("solver", ["closed", "full"])
def test_a_process_knows_the_mean_eigenvalues_of_the_layers_of_others(solver):
    scales = {"narrow": 2.0, "wide": 10.0}
    expected, alone = resolve(factors(scales), solver)
    others = Owners({"wide": 10.0}, {"wide": expected["wide"]})
    own, shared = resolve(factors({"narrow": 2.0}), solver, others)
    assert own == {"narrow": pytest.approx(expected["narrow"])}
    assert shared.damping == pytest.approx(alone.damping)
