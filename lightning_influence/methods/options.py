"""Settings of one call, checked before anything runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_influence.curvature.blocks import Blocks
from lightning_influence.linalg.dense_solve import NegativeCurvature
from lightning_influence.model.captured import Fisher
from lightning_influence.support.arguments import check_choice, check_count, check_number, is_number

Damping = float | Literal["auto", "heuristic"]
Curvature = Literal["ggn", "hessian"]
Preconditioner = Literal["ekfac", "two_level", "none"]


@dataclass(frozen=True)
class Options:
    """Settings of one call, with what they mean in :func:`~lightning_influence.api.trainer.influence`.

    Attributes:
        tolerance: relative residual ``||v - (H + damping) x|| / ||v||`` at which a query is solved. None
            stands for 0.2 with ``"auto"``, which iterates above it and whose coarse space grows until most
            training gradients are below; 1e-3 with ``"cg"`` and ``"minres"``; 0.01 with ``"astra"``; and 0.02
            with ``"lissa"``, which also brings the relative error of the solution below it.
        max_steps: most steps of an iterative method. None stands for 3 (of block Krylov) with ``"auto"``, 100
            with ``"cg"`` and ``"minres"``, 300 with ``"astra"``, and as many as the curvature asks for with
            ``"lissa"``.
        curvature: ``"ggn"``, or the exact ``"hessian"`` for ``"cg"`` and ``"minres"``.
        preconditioner: of ``"cg"`` and ``"minres"``: EK-FAC, EK-FAC with a coarse space, or none.
        batch_size: examples of a minibatch product of ``"lissa"`` and ``"astra"``; None for LiSSA's own
            choice, and for all examples with ASTRA.
        step_size: step of ``"lissa"`` and ``"astra"``; derived from the curvature if None.
        momentum: momentum of ``"astra"``; derived from the curvature if None.
        low_rank_tolerance: largest relative error, in norm, of scores from low-rank forms of the inverse; 0
            for exact ones. None stands for 0.03 with closed forms, whose eigenvalues are far less exact than
            that themselves, and for 1e-3 with ``"auto"``.
        self_influence_tolerance: largest root-mean-square relative error of self-influence in closed form
            from rotating gradients onto leading eigenvectors only; 0 for the exact form.

    Raises:
        ValueError: if one is out of range, saying what was got and what is accepted.
    """

    damping: Damping = "auto"
    fisher: Fisher | None = None
    memory_budget: int = 2**30
    tolerance: float | None = None
    max_steps: int | None = None
    curvature: Curvature = "ggn"
    preconditioner: Preconditioner = "ekfac"
    batch_size: int | None = None
    step_size: float | None = None
    momentum: float | None = None
    low_rank_tolerance: float | None = None
    self_influence_tolerance: float = 1e-2
    curvature_examples: int = 4096
    max_parameters: int = 8192
    seed: int = 0
    blocks: Blocks = "layer"
    negative_curvature: NegativeCurvature = "absolute"

    @property
    def fitted_fisher(self) -> Fisher:
        """What factors that have to be fitted are made of."""
        return self.fisher or "mixed"

    def __post_init__(self) -> None:
        damping = self.damping
        if damping not in ("auto", "heuristic") and not (is_number(damping) and 0 <= damping < math.inf):
            raise ValueError(
                f"Got damping={damping!r}; accepted are 'auto', 'heuristic' or a finite number of at least 0."
            )
        self._check_choices()
        self._check_counts()
        self._check_numbers()

    def _check_choices(self) -> None:
        choices = {
            "fisher": Fisher,
            "curvature": Curvature,
            "preconditioner": Preconditioner,
            "blocks": Blocks,
            "negative_curvature": NegativeCurvature,
        }
        for name, literal in choices.items():
            value = getattr(self, name)
            if not (name == "fisher" and value is None):
                check_choice(name, value, get_args(literal))

    def _check_counts(self) -> None:
        least = {
            "memory_budget": 1,
            "max_steps": 0,
            "curvature_examples": 1,
            "max_parameters": 1,
            "seed": 0,
            "batch_size": 1,
        }
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is None and name in {"max_steps", "batch_size"}:
                continue
            check_count(name, value, lowest)

    def _check_numbers(self) -> None:
        limits = {
            "tolerance": math.inf,
            "low_rank_tolerance": 1.0,
            "self_influence_tolerance": 1.0,
            "step_size": math.inf,
            "momentum": 1.0,
        }
        for name, limit in limits.items():
            value = getattr(self, name)
            if value is None and name != "self_influence_tolerance":
                continue
            check_number(name, value, below=limit, positive=name == "step_size")
