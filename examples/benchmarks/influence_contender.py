"""This package under the harness: EK-FAC and two-level EK-FAC through ``InfluenceModule``, factors in a pass of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from contender import Contender, Stage
from tasks import Task, TaskModule, TensorTable
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_influence import InfluenceModule
from lightning_influence.factors.training_record import LayerRecord, TrainingRecord
from lightning_influence.layers import find_layers
from lightning_influence.state import InfluenceState


class EKFAC(Contender):
    """EK-FAC at its default damping, labels drawn once, scores by the cheaper route a layer."""

    name: ClassVar[str] = "ekfac"
    method: ClassVar[str] = "ekfac"
    fisher: ClassVar[str] = "sampled"

    def __init__(self, task: Task, model: TaskModule, scratch: Path) -> None:
        super().__init__(task, model, scratch)
        model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        self.module = self._fresh()
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
        """Relative error of all scores against the route without low-rank forms."""
        exact = self._ask(low_rank_tolerance=0.0)
        assert self._scores is not None
        return float((self._scores - exact).norm() / exact.norm())

    def _fresh(self) -> InfluenceModule:
        """Return the model without factors, but with the record of its training."""
        recipe, steps = self.task.recipe, self.task.recipe.steps(len(self.task.train))
        rate = sum(recipe.rate(k, steps) for k in range(steps)) / (1 - recipe.momentum)
        layers = {name: LayerRecord(rate, recipe.weight_decay) for name in find_layers(self.model).layers}
        record = TrainingRecord(family="sgd", steps=steps, layers=layers)
        return InfluenceModule(self.model, state=InfluenceState(record=record))

    def _factors(self, count: int) -> None:
        self.module = self._fresh()
        self.module.fit_factors(self._loader(self.task.train), fisher=self.fisher)

    def _pairs(self, count: int) -> None:
        self._scores = self._ask()

    def _ask(self, **options: float) -> Tensor:
        answer = self.module.scores(
            self._loader(self.task.train), self._loader(self.task.queries), method=self.method, **options
        )
        self._settings = {"damping": answer.diagnostics.damping_origin}
        self._settings |= {key: str(value) for key, value in answer.diagnostics.extra.items()}
        assert answer.scores is not None
        return answer.scores

    def _self_influence(self, count: int) -> None:
        self.module.self_influence(self._loader(self.task.train), method=self.method)

    def _loader(self, table: TensorTable) -> DataLoader[tuple[Tensor, Tensor]]:
        return self.task.pass_loader(table)


class ExactFisher(EKFAC):
    """EK-FAC from all columns of the output curvature instead of one drawn label."""

    name: ClassVar[str] = "ekfac, all classes"
    fisher: ClassVar[str] = "exact"


class Auto(EKFAC):
    """Two-level EK-FAC with nothing tuned; its coarse space counts as factors."""

    name: ClassVar[str] = "auto"
    method: ClassVar[str] = "auto"

    def stages(self) -> list[Stage]:
        """Factors, coarse space, scores and self-influence by EK-FAC's closed form."""
        whole = (len(self.task.train),)
        return [
            Stage("factors", "factors", self._factors, whole),
            Stage("coarse space", "factors", self._coarse, whole),
            Stage("scores", "scores", self._pairs, whole),
        ]

    def _coarse(self, count: int) -> None:
        self.module.state = replace(self.module.state, coarse=None)
        self.module.prepare(self._loader(self.task.train), method=self.method)
