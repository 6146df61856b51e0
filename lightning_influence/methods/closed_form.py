"""Methods whose inverse is in closed form: identity, diagonal, K-FAC and EK-FAC."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_influence.curvature.factors import Eigenbasis, Factors, LayerStatistics
from lightning_influence.curvature.inverse import BlockInverse, EigenInverse
from lightning_influence.methods.context import Context
from lightning_influence.methods.fitting import count_passes_to_come, fit_diagonal, provide_factors
from lightning_influence.methods.forecast import Forecast
from lightning_influence.methods.method import (
    Gradients,
    Method,
    Queries,
    Solved,
    make_identity,
    register_method,
)
from lightning_influence.methods.options import ClosedFormOptions, Options
from lightning_influence.methods.owners import OwnedQuadratic, OwnedScorer, Owners
from lightning_influence.methods.scorers import PreconditionedScorer
from lightning_influence.methods.scoring_passes import Quadratic
from lightning_influence.methods.weighted_squares import PreconditionedSquares
from lightning_influence.model.layers.bases import Basis
from lightning_influence.model.layers.plan import Layout

# Chosen by hand: error of inner products of gradients, which users take for exact.
_PLAIN = 1e-5


# A layer's eigenvalues as a tensor and what it counts.
MomentsOf = Callable[[LayerStatistics], tuple[Tensor, float]]


class ClosedForm(Method):
    """Shared part: an inverse made in :meth:`prepare` answers everything."""

    inverse: BlockInverse
    in_groups: ClassVar[bool] = True
    options_type: ClassVar[type[Options]] = ClosedFormOptions
    options: ClosedFormOptions

    owners: Owners | None = None

    def begin(self) -> None:
        """Share the layers out, where processes share the parameters: nobody holds factors of all."""
        context, exchange = self.context, self.context.runner.exchange
        if exchange is not None and context.options.factors_dir is None:
            context.owners = self.owners = Owners(context.runner, exchange, context.plan)

    def _invert(self, factors: Factors, moments_of: MomentsOf) -> None:
        """Make the inverse of factors."""
        context = self.context
        self.mean_weight = factors.mean_weight
        damping = context.resolve_damping(factors, "closed")
        budget = context.options.memory_budget
        self.inverse = invert_blocks(context.own_layout, factors, damping, moments_of, budget)

    def solve(self, queries: Queries) -> Solved:
        """Apply the inverse, within the scores where that is cheaper."""
        names = set(queries)
        held = self.options.memory_budget // 4
        scorer = PreconditionedScorer(
            self.inverse, queries, tolerance=self.low_rank_tolerance, consume=True, held_bytes=held
        )
        if scorer.ranks:
            self.context.extra["low_rank"] = dict(scorer.ranks)
        return Solved(scorer if self.owners is None else OwnedScorer(self.owners, scorer, names))

    def forecast(self, told: Forecast, queries: int) -> bool:
        """Add the passes of :meth:`prepare`, and those that score groups of queries."""
        self._forecast_factors(told)
        forecast_scores(self.context, told, queries, compresses=self.compresses)
        return True

    def _forecast_factors(self, told: Forecast) -> None:
        """Add the passes of :meth:`prepare`: those that fit factors."""
        told.add_factors(count_passes_to_come(self.context, told.trial.nbytes))

    @property
    def low_rank_tolerance(self) -> float:
        """Error that low-rank forms may make."""
        return self.options.low_rank_tolerance

    @property
    def compresses(self) -> bool:
        """Whether low-rank forms are allowed."""
        return self.low_rank_tolerance > 0

    def measure_group_size(self, queries: Queries) -> int:
        """Return how many queries fit into half of the memory budget in the form in which they are scored."""
        count = next(iter(queries.values())).num_examples if queries else 0
        scorer = PreconditionedScorer(self.inverse, queries, tolerance=self.low_rank_tolerance, held_bytes=0)
        held = torch.tensor([scorer.nbytes / max(count, 1)], dtype=torch.float64)
        most = float(self.context.runner.all_gather_cat(held).max())  # processes may own layers
        return max(self.group_size(), int(self.options.memory_budget / (2 * max(most, 1.0))))

    def solutions(self, queries: Gradients) -> tuple[Tensor, Tensor | None]:
        """Apply the inverse to the queries' gradients."""
        return self.inverse.apply(self.context.layout.dense(queries)[0]), None

    def quadratic(self) -> Quadratic:
        """Return weighted squares in the eigenbasis, rotated only as far as it matters."""
        squares = PreconditionedSquares(self.inverse, tolerance=self.options.self_influence_tolerance)

        def quadratic(gradients: Gradients) -> Tensor:
            values = squares(gradients)[0]
            if squares.kept:
                self.context.extra["leading_eigenvectors"] = squares.kept
            return values

        return quadratic if self.owners is None else OwnedQuadratic(self.owners, quadratic)


@register_method("identity")
class Identity(ClosedForm):
    """``H = I`` without damping: inner products of gradients (TracIn, Pruthi et al. 2020)."""

    @property
    def low_rank_tolerance(self) -> float:
        """Error that low-rank forms may make: less, as there are no eigenvalues that are estimates."""
        return min(self.options.low_rank_tolerance, _PLAIN)

    def _forecast_factors(self, told: Forecast) -> None:
        """There are none."""

    def prepare(self) -> None:
        """Nothing to fit."""
        self.begin()
        like = torch.empty(0, device=self.context.device, dtype=self.context.dtype)
        self.inverse = make_identity(self.context.own_layout, like)


@register_method("diagonal")
class Diagonal(ClosedForm):
    """The diagonal of the Gauss-Newton matrix (or its estimate from random mixtures)."""

    def _forecast_factors(self, told: Forecast) -> None:
        """Second moments take one pass."""
        told.add_pass("second moments")

    def prepare(self) -> None:
        """Fit second moments in one pass."""
        factors = fit_diagonal(self.context)
        self.begin()
        self._invert(factors, take_eigenvalues)


@register_method("kfac")
class KFAC(ClosedForm):
    """K-FAC (Martens and Grosse 2015; weight sharing as in Eschenhagen et al. 2023, "expand")."""

    def prepare(self) -> None:
        """Use or fit the factors."""
        self.begin()
        self._invert(provide_factors(self.context), multiply_eigenvalues)


@register_method("ekfac")
class EKFAC(ClosedForm):
    """EK-FAC (George et al. 2018; Grosse et al. 2023): second moments in the Kronecker eigenbasis."""

    def prepare(self) -> None:
        """Use or fit the factors."""
        self.begin()
        self._invert(provide_factors(self.context), take_eigenvalues)


def forecast_scores(context: Context, told: Forecast, queries: int, *, compresses: bool) -> None:
    """Add the passes that score groups of queries, whose answers may be compressed."""
    numbers = min(told.count_query_numbers() if compresses else math.inf, context.layout.numel)
    width = torch.empty((), dtype=context.dtype).element_size()
    each = 2 * (width * numbers + (told.trial.nbytes if compresses else 0))
    told.add_scores(queries, math.ceil(queries / max(1, context.options.memory_budget // each)))


def invert_blocks(
    layout: Layout,
    factors: Factors,
    damping: dict[str, float],
    moments_of: MomentsOf,
    memory_budget: float = math.inf,
) -> BlockInverse:
    """The damped inverse of factors.

    Eigenvalues and what answers divide by are held beside the factors, unless the two take more than the
    memory budget: then they are made of the factors, layer by layer, where they are used.

    Args:
        layout: the layers that this process has factors of.
        factors: their statistics.
        damping: of each layer.
        moments_of: how a layer's eigenvalues follow from its statistics: a tensor, and what it counts.
        memory_budget: in bytes.

    Returns:
        One inverse a layer.
    """
    layers = {}
    for name in layout.shapes:
        statistics = factors.layers[name]
        moments, unit = moments_of(statistics)
        made = EigenInverse(statistics.basis, moments, damping[name], unit=unit / factors.mean_weight)
        if 2 * moments.element_size() * layout.numel <= memory_budget:
            made = replace(made, moments=made.eigenvalues, unit=None)
        layers[name] = made
    return BlockInverse(layout, layers)


def take_eigenvalues(statistics: LayerStatistics) -> tuple[Tensor, float]:
    """Return EK-FAC's Lambda, mean squared gradient entries in the basis, as sums and what these count."""
    assert statistics.squares is not None
    return statistics.squares, 1 / statistics.squares_examples if statistics.squares_examples else math.nan


def multiply_eigenvalues(statistics: LayerStatistics) -> tuple[Tensor, float]:
    """Return K-FAC's eigenvalues, products of those of the two covariances, in the statistics' own basis."""
    basis = statistics.basis or Eigenbasis()  # which is stored without a trace
    inputs = _energies(statistics.covariance_in(), basis.inputs)
    outputs = _energies(statistics.covariance_out(), basis.outputs)
    return outputs[:, :, None] * inputs[:, None, :], 1.0


def _energies(covariance: Tensor, basis: Basis | None) -> Tensor:
    """Return the diagonal ``(G, D)`` of a covariance in a basis; of one that is a diagonal, itself."""
    if basis is None:
        return covariance if covariance.ndim == 2 else covariance.diagonal(dim1=1, dim2=2)
    return basis.energies(covariance)
