"""The zoo's cases asked through the public entry points, and what the oracle answers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import oracle
import torch
from models import CASES, Case, lightning_module, loader
from torch import Tensor

from lightning_influence import InfluenceModule
from lightning_influence.support.errors import InfluenceWarning

# float64 rounding, amplified by the condition of the damped systems.
CLOSE: dict[str, float] = {"rtol": 1e-6, "atol": 1e-10}
DAMPING = 0.05
EXACTLY: dict[str, Any] = {"low_rank_tolerance": 0.0, "fisher": "exact"}
CONVERGED: dict[str, Any] = {**EXACTLY, "method": "auto", "tolerance": 1e-11, "max_steps": 60}


class Asked:
    """One case with its module; every call is quiet about uncovered norms."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.module = InfluenceModule(lightning_module(case))

    def scores(self, batch: int = 5, query_batch: int = 2, queries: Any = None, **options: Any) -> Any:
        train = loader(self.case, batch, shuffle=True)
        asked = loader(self.case, query_batch, queries=True) if queries is None else queries
        with quiet():
            return self.module.scores(train, asked, **{"damping": DAMPING, **options})

    def self_influence(self, batch: int = 5, **options: Any) -> Any:
        with quiet():
            return self.module.self_influence(loader(self.case, batch), **{"damping": DAMPING, **options})

    def ihvp(self, **options: Any) -> Any:
        with quiet():
            return self.module.ihvp(
                loader(self.case, 5), loader(self.case, 2, queries=True), **{"damping": DAMPING, **options}
            )

    def curvature(self, method: str, fisher: str = "exact") -> Tensor:
        """H of a method (P, P); EK-FAC's in the basis that was used, which is not always unique.

        Training labels stand in for labels drawn from the model, so they get its unit:
        outer products of gradients before the division by wbar are divided by wbar once.
        """
        scale = self.case.loss.normaliser(self.case.y) if fisher == "empirical" else 1.0
        return scale * self._curvature(method, fisher)

    def _curvature(self, method: str, fisher: str) -> Tensor:
        problem = _problem(self.case)
        if method in {"exact", "auto"}:
            return (oracle.ggn if fisher == "exact" else oracle.fisher_empirical)(*problem)
        if method == "hessian":
            return _absolute(oracle.hessian(*problem))
        if method == "block_ggn":
            make = oracle.ggn if fisher == "exact" else oracle.fisher_empirical
            return oracle.keep_blocks(make(*problem), self.case.model, self.case.layers)
        if method == "diagonal":
            make = oracle.ggn if fisher == "exact" else oracle.fisher_empirical
            return torch.diag(torch.diag(make(*problem)))
        bases = {}
        for name in self.case.layers:
            basis = self.module.state.factors.layers[f"model.{name}"].basis
            bases[name] = (basis.q_in, basis.q_out)
        factors = oracle.layer_factors(*problem, fisher, bases=bases)
        blocks = [
            factors[name].kfac() if method == "kfac" else factors[name].ekfac() for name in self.case.layers
        ]
        return oracle.block_diagonal(blocks)

    def expected(
        self, method: str, damping: Any = DAMPING, fisher: str = "exact", measurement: str = "loss"
    ) -> Tensor:
        """The oracle's scores (Q, N)."""
        train, queries = gradients(self.case.name), gradients(self.case.name, measurement)
        if method == "identity":
            return queries @ train.T / len(train)
        if isinstance(damping, dict):
            named = {name: damping[f"model.{name}"] for name in self.case.layers}
            damping = oracle.damping_vector(named, self.case.model, self.case.layers)
        return oracle.influence(self.curvature(method, fisher), damping, queries, train)


def _absolute(matrix: Tensor) -> Tensor:
    """|H|, the square root of H^2: by singular values, which for a symmetric H are |eigenvalues|."""
    _, sizes, right = torch.linalg.svd(matrix)
    return right.T @ torch.diag(sizes) @ right


def _problem(case: Case) -> tuple[Any, ...]:
    return case.model, case.loss, case.x, case.y, case.layers


@cache
def gradients(name: str, measurement: str | None = None) -> Tensor:
    """Of the training losses (N, P), or of a measurement of the queries (Q, P)."""
    case = CASES[name]
    if measurement is None:
        return oracle.flatten(oracle.per_example_gradients(*_problem(case)))
    wbar = case.loss.normaliser(case.y)
    return oracle.flatten(
        oracle.measurement_gradients(
            case.model, case.loss, case.query_x, case.query_y, case.layers, measurement, wbar
        )
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InfluenceWarning)
        yield
