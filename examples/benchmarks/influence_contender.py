"""This package under the harness: EK-FAC and two-level EK-FAC through ``InfluenceModule``.

Factors are fitted in a pass of their own, as for every other method here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from contender import Contender
from large_tasks import fresh_module
from meter import Stage, TensorTable
from tasks import Task, TaskModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_influence import InfluenceModule
from lightning_influence.model.captured import Fisher
from lightning_influence.model.layers.plan import find_layers
from lightning_influence.results.attributions import Attributions

# The exact dense route costs 2 P operations a pair; beyond this many it is compared on fewer queries.
_ERROR_OPERATIONS = 1e12


class EKFAC(Contender):
    """EK-FAC with its defaults: one random mixture an example, scores by the cheaper route a layer."""

    name: ClassVar[str] = "ekfac"
    method: ClassVar[str] = "ekfac"
    fisher: ClassVar[Fisher] = "mixed"
    low_rank_tolerance: ClassVar[float | None] = None

    def __init__(self, task: Task, model: TaskModule, scratch: Path) -> None:
        super().__init__(task, model, scratch)
        model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        self.module = self._fresh()
        self.layers: list[str] | None = None
        self._scores: Tensor | None = None
        self._settings: dict[str, str] = {}

    def settings(self) -> dict[str, str]:
        """Damping and where it comes from, ranks, coarse space."""
        return {"fisher": self.fisher, **self._settings}

    def stages(self) -> list[Stage]:
        """Factors, scores (query gradients included) and self-influence."""
        whole = (len(self.task.train),)
        return [
            Stage("factors", "factors", self._factors, whole),
            Stage("scores", "scores", self._pairs, whole),
            Stage("self-influence", "self-influence", self._self_influence, whole),
        ]

    def scores(self) -> Tensor | None:
        """Scores ``(Q, N)``."""
        return self._scores

    def relative_error(self) -> float | None:
        """Relative error of the first queries' scores against the route without low-rank forms."""
        assert self._scores is not None
        if "low_rank" not in self._settings:
            return None  # the dense route is what ran
        pair = 2.0 * sum(layer.numel for layer in find_layers(self.model).layers.values())
        count = max(1, min(len(self.task.queries), int(_ERROR_OPERATIONS / (pair * len(self.task.train)))))
        # Without further steps: they were not taken either where the low-rank route ran.
        answer = self._answer(count, low_rank_tolerance=0.0, max_steps=0)
        assert answer.scores is not None
        return float((self._scores[:count] - answer.scores).norm() / answer.scores.norm())

    def _fresh(self) -> InfluenceModule:
        """Return the model without factors, but with the record of its training."""
        return fresh_module(self.task, self.model)

    def _factors(self, count: int) -> None:
        self.module = self._fresh()
        self.module.fit_factors(self._loader(self.task.train), fisher=self.fisher, layers=self.layers)

    def _pairs(self, count: int) -> None:
        answer = self._answer(len(self.task.queries))
        self._scores = answer.scores
        self._settings = {"damping": answer.diagnostics.damping_origin}
        self._settings |= {key: str(value) for key, value in answer.diagnostics.extra.items()}

    def _answer(self, queries: int, **options: Any) -> Attributions:
        options = {"low_rank_tolerance": self.low_rank_tolerance, **options}
        return self.module.scores(
            self._loader(self.task.train),
            self._loader(self.task.queries.head(queries)),
            method=self.method,
            layers=self.layers,
            **options,
        )

    def _self_influence(self, count: int) -> None:
        self.module.self_influence(self._loader(self.task.train), method=self.method, layers=self.layers)

    def _loader(self, table: TensorTable) -> DataLoader[tuple[Tensor, Tensor]]:
        return self.task.pass_loader(table)


class LayersEKFAC(EKFAC):
    """EK-FAC of linear and convolutional layers alone: what peers cover."""

    name: ClassVar[str] = "ekfac-layers"

    def __init__(self, task: Task, model: TaskModule, scratch: Path) -> None:
        super().__init__(task, model, scratch)
        kinds = (nn.Linear, nn.Conv2d)
        self.layers = [name for name, layer in model.named_modules() if isinstance(layer, kinds)]


class TightEKFAC(EKFAC):
    """EK-FAC whose scores may be off by a thousandth from low-rank forms."""

    name: ClassVar[str] = "ekfac, 1e-3"
    low_rank_tolerance: ClassVar[float | None] = 1e-3


class KFAC(EKFAC):
    """K-FAC with its defaults."""

    name: ClassVar[str] = "kfac"
    method: ClassVar[str] = "kfac"


class ExactFisher(EKFAC):
    """EK-FAC from all columns of the output curvature instead of one random mixture."""

    name: ClassVar[str] = "ekfac, all classes"
    fisher: ClassVar[Fisher] = "exact"


class Auto(EKFAC):
    """Two-level EK-FAC with nothing tuned; its coarse space counts as factors."""

    name: ClassVar[str] = "auto"
    method: ClassVar[str] = "auto"

    def stages(self) -> list[Stage]:
        """Factors, coarse space and scores; self-influence is EK-FAC's."""
        whole = (len(self.task.train),)
        return [
            Stage("factors", "factors", self._factors, whole),
            Stage("coarse space", "factors", self._coarse, whole),
            Stage("scores", "scores", self._pairs, whole),
        ]

    def _coarse(self, count: int) -> None:
        self.module.state = replace(self.module.state, coarse=None)
        self.module.prepare(self._loader(self.task.train), method=self.method)
