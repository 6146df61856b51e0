"""The spectrum of a model's curvature over its training data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from lightning_influence.curvature.minibatches import measure_example_variance
from lightning_influence.curvature.operators import (
    CurvatureOperator,
    GaussNewtonOperator,
    HessianOperator,
    WeightPass,
)
from lightning_influence.curvature.spectrum import Spectrum, measure_spectrum
from lightning_influence.methods.context import Context, note_estimate
from lightning_influence.support.arguments import check_choice, check_count

CurvatureName = Literal["ggn", "hessian"]
# Chosen by hand: leading eigenvectors that the variance of examples is measured along; the first limit steps.
_DIRECTIONS = 4


@dataclass(frozen=True)
class SpectrumSettings:
    """How closely to look at a spectrum.

    Attributes:
        curvature: ``"ggn"`` or ``"hessian"``.
        probes: random vectors in a block.
        steps: passes that build the Krylov space; fewer if the memory budget asks for it.
        eigenvalues: how many of the largest to report.
        minibatches: single examples to measure ``kappa`` with, 0 to leave it out; where only the user's own
            batches can be drawn, so many of these.
        memory_budget: bytes for the Krylov space.
        seed: of random vectors and examples.

    Raises:
        ValueError: if one is out of range.
    """

    curvature: CurvatureName = "ggn"
    probes: int = 8
    steps: int = 8
    eigenvalues: int = 8
    minibatches: int = 0
    memory_budget: int = 2**30
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("curvature", self.curvature, get_args(CurvatureName))
        least = {"probes": 2, "steps": 1, "eigenvalues": 1, "minibatches": 0, "memory_budget": 1, "seed": 0}
        for name, lowest in least.items():
            check_count(name, getattr(self, name), lowest)


def run_spectrum(context: Context, settings: SpectrumSettings) -> Spectrum:
    """Measure the spectrum of the context's training data.

    Args:
        context: runs the passes.
        settings: which curvature, and how closely.

    Returns:
        The spectrum.
    """
    weights = WeightPass(context.plan)
    context.run_on_train(weights)  # layers that take no part have no spectrum
    mean_weight = weights.result(context.runner.all_reduce_sum)
    operator: CurvatureOperator
    make = HessianOperator if settings.curvature == "hessian" else GaussNewtonOperator
    operator = make(context, mean_weight=mean_weight)
    spectrum = measure_spectrum(
        operator.product,
        operator.numel,
        probes=settings.probes,
        steps=_affordable(context, settings, operator.numel),
        eigenvalues=settings.eigenvalues,
        seed=settings.seed,
        curvature=settings.curvature,
        dtype=context.dtype,
        device=context.device,
    )
    note_estimate(context, operator.estimated)
    spectrum = replace(spectrum, passes=spectrum.passes + 1)
    if not settings.minibatches:
        return spectrum
    if operator.num_examples < 2 or not spectrum.trace.value > 0:
        context.notes.add(
            "The variance of examples was left out: it needs at least 2 examples and a curvature of positive "
            f"trace, and there are {operator.num_examples} and {spectrum.trace.value:.3g}."
        )
        return spectrum
    kappa = measure_example_variance(
        operator,
        spectrum.ritz.vectors(_DIRECTIONS),
        spectrum.trace.value,
        minibatches=settings.minibatches,
        seed=settings.seed,
    )
    return replace(spectrum, example_variance=kappa, passes=spectrum.passes + 1)


def _affordable(context: Context, settings: SpectrumSettings, numel: int) -> int:
    """Return how many steps fit: each keeps a block of vectors and of products."""
    width = torch.empty((), dtype=context.dtype).element_size()
    most = max(1, settings.memory_budget // (2 * settings.probes * numel * width) - 1)
    if most < settings.steps:
        context.notes.add(
            f"The Krylov space was kept to {most} of {settings.steps} steps of {settings.probes} vectors, "
            f"which is what fits into the memory budget of {settings.memory_budget:,} bytes. Raise "
            "`memory_budget`, or ask for fewer `probes`, for more exact eigenvalues."
        )
    return min(most, settings.steps)
