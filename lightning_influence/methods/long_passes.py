"""What follows from how long passes take: whether ``auto`` corrects at all, and what it says it takes."""

from __future__ import annotations

import math
from dataclasses import fields

import torch

from lightning_influence.curvature.factors import Factors
from lightning_influence.curvature.inverse import BlockInverse
from lightning_influence.methods.closed_form import EKFAC, forecast_scores
from lightning_influence.methods.coarse_building import (
    MOST_ANCHORS,
    MOST_COLUMNS,
    MOST_MIXTURES,
    count_vector_bytes,
)
from lightning_influence.methods.compact_building import count_examples_for_few, is_few, takes_long
from lightning_influence.methods.context import Context
from lightning_influence.methods.fitting import count_passes_to_come
from lightning_influence.methods.forecast import Forecast, run_trial
from lightning_influence.methods.options import ClosedFormOptions, Options, SpaceOptions

# Chosen by hand: what a column of the output curvature takes, in gradients: a backward pass, and products.
_COLUMN = 1.0
_TRIED = 2  # batches that show how many columns the output curvature has


def has_too_many(columns: int) -> bool:
    """Return whether a correction costs more than it is worth where passes are long: EK-FAC answers alone.

    Where the output curvature has too many columns, the Gauss-Newton matrix is estimated from mixtures of
    them, each a backward pass. On a language model of 1.3 M parameters that raised the rank correlation with
    converged scores from .916 to .924, in 113 plain epochs for 3.2 (``examples/benchmarks/peers.py``).

    Args:
        columns: of an example's output curvature.
    """
    return columns > MOST_COLUMNS


def answer_alone(
    context: Context, factors: Factors, inverse: BlockInverse, low_rank_tolerance: float | None
) -> EKFAC | None:
    """Return EK-FAC if it is to answer alone, and say so; a few batches tell, where passes are long.

    Args:
        context: of the question.
        factors: of the model.
        inverse: EK-FAC's.
        low_rank_tolerance: as it was asked for.

    Returns:
        The method, prepared; None where its answers are to be corrected.
    """
    if not takes_long(context):
        return None
    trial = run_trial(context.runner, context.plan, context.train, _TRIED)
    columns = int(context.runner.all_gather_cat(torch.tensor([trial.columns])).max())
    if not has_too_many(columns):
        return None
    context.notes.add(
        "The answer is that of method='ekfac': passes over the training data are long, and the loss has so "
        f"many outputs (more than {MOST_COLUMNS} columns of curvature an example) that a coarse space would "
        "be made of random mixtures of them, in ten to a hundred plain epochs, for scores that are hardly "
        "nearer to those of the whole Gauss-Newton matrix. `curvature_examples=4096` asks for it all the "
        "same, and method='cg' for solved queries."
    )
    context.resolve_damping(factors, "closed")  # for the certificate
    method, options = EKFAC(context), context.options
    given = {option.name: getattr(options, option.name) for option in fields(Options)}
    if low_rank_tolerance is not None:
        given["low_rank_tolerance"] = low_rank_tolerance
    method.options = ClosedFormOptions(**given)
    method.inverse, method.mean_weight = inverse, factors.mean_weight
    return method


def forecast_auto(context: Context, told: Forecast, queries: int, *, asked: bool) -> None:
    """Add the passes that fit factors and build the coarse space, and those of groups of queries.

    Args:
        context: of the question.
        told: what to add them to.
        queries: how many.
        asked: whether the user asks for the correction wherever it may be made.
    """
    options, state = context.options, context.state
    assert isinstance(options, SpaceOptions)
    long = told.is_long(context.device.type)
    known = state.coarse is not None or state.compact is not None
    told.add_factors(count_passes_to_come(context, told.trial.nbytes))
    if not asked and not known and long:
        told.passes.append("trial")
        if has_too_many(told.trial.columns):
            forecast_scores(context, told, queries, compresses=True)
            return
    columns, budget = told.trial.columns or 1, options.memory_budget
    compact = state.compact is not None or budget < count_vector_bytes(context) * 3 * MOST_ANCHORS
    examples, total = options.most_curvature_examples, context.train.num_examples
    few = compact and options.curvature_examples is None and is_few(queries) and long
    if few:
        examples = count_examples_for_few(queries, total)
    sample = min(1.0, examples / total) if few else 1.0  # of the data, for leverages and anchors
    rows = _COLUMN * (columns if columns <= MOST_COLUMNS else MOST_MIXTURES) * min(1.0, examples / total)
    if not known:
        told.add_pass("leverages", sample)
        told.add_pass("anchors", sample)
        told.add_pass("curvature rows", rows)
    each = 8 * told.count_query_numbers() if compact else 2 * count_vector_bytes(context)
    each = 3 * count_vector_bytes(context) if few else each  # formed
    groups = math.ceil(queries / max(1, budget // (2 * each)))
    # The first group's are found in the pass that completes a new space.
    for _ in range(groups - (not known) if compact else 0):
        told.add_pass("curvature rows", rows)
    for _ in range(groups if few else 0):  # that verifies them, of half as many examples
        told.add_pass("curvature rows", rows / 2)
    told.add_scores(queries, groups)
