"""A source of operators over a case of the zoo: the loop runner and the case's own loader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from models import CASES, Case, lightning_module, loader

from lightning_influence.model.layers.plan import LayerPlan, find_layers
from lightning_influence.running.loop_runner import LoopRunner
from lightning_influence.running.reading import prepare_train


@dataclass(frozen=True)
class CaseSource:
    case: Case
    runner: LoopRunner
    plan: LayerPlan
    train: Any

    @classmethod
    def of(cls, name: str, batch_size: int = 5) -> CaseSource:
        case = CASES[name]
        module = lightning_module(case)
        return cls(case, LoopRunner(module), find_layers(module), prepare_train(loader(case, batch_size)))
