"""Drives passes by a plain loop over the zoo's cases in float64, and builds the closed forms to compare."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import oracle
import torch
from models import CASES, Case, CaseModule, lightning_module, loader
from torch import Tensor

from lightning_influence.curvature.factors import Factors
from lightning_influence.curvature.inverse import BlockInverse, EigenInverse
from lightning_influence.model.layers.plan import LayerPlan, Layout, find_layers

# float64 rounding over sums of at most a few thousand terms of size one.
TIGHT: dict[str, float] = {"rtol": 1e-9, "atol": 1e-11}


def mute(module: Any) -> Any:
    """In eval mode and without a Trainer to log to, as passes run a module."""
    module.log = lambda *args, **kwargs: None
    return module.eval()


def run(pass_: Any, module: Any, batches: Iterable[Any]) -> Any:
    """What a runner does, without Lightning."""
    start = 0
    for batch in batches:
        size = len(batch[0])
        pass_.step(module, batch, torch.arange(start, start + size), 0)
        start += size
    if hasattr(pass_, "finish"):
        pass_.finish()
    return pass_


@dataclass(frozen=True)
class Setup:
    """One case of the zoo with its module and layers."""

    case: Case
    module: CaseModule
    plan: LayerPlan
    layout: Layout

    @classmethod
    def of(cls, name: str, reduction: Any = None, dtype: torch.dtype = torch.float64) -> Setup:
        case = CASES[name] if reduction is None else CASES[name].with_reduction(reduction)
        module = mute(lightning_module(case, reduction).to(dtype))
        plan = find_layers(module)
        assert tuple(plan.layers) == tuple(f"model.{layer}" for layer in case.layers)
        return cls(case, module, plan, Layout.of(plan.layers))

    def run(self, pass_: Any, batch_size: int = 5, queries: bool = False) -> Any:
        """12 examples in batches of 5, 5 and 2 unless told otherwise."""
        return run(pass_, self.module, loader(self.case, batch_size, queries=queries))

    @property
    def wbar(self) -> float:
        return self.case.loss.normaliser(self.case.y)

    @property
    def problem(self) -> tuple[Any, ...]:
        """The oracle's first arguments."""
        return self.case.model, self.case.loss, self.case.x, self.case.y, self.case.layers

    def ggn(self) -> Tensor:
        return oracle.ggn(*self.problem)

    def gradients(self, queries: bool = False) -> Tensor:
        """Gradients of l_n, (N, P), or of the queries' losses in the training set's unit, (Q, P)."""
        model, loss, x, y, layers = self.problem
        if queries:
            x, y = self.case.query_x, self.case.query_y
        return oracle.flatten(oracle.per_example_gradients(model, loss, x, y, layers, self.wbar))


def closed_form(factors: Factors, layout: Layout, damping: Any, kind: str = "ekfac") -> BlockInverse:
    """EK-FAC's or K-FAC's inverse; `damping` is a number or one for each layer, by name."""
    inverses = {}
    for name, layer in factors.layers.items():
        eigenvalues = layer.second_moment() / factors.mean_weight
        if kind == "kfac":
            q_in, q_out = layer.basis.q_in, layer.basis.q_out
            d_in = torch.diagonal(q_in.mT @ layer.covariance_in() @ q_in, dim1=-2, dim2=-1)
            d_out = torch.diagonal(q_out.mT @ layer.covariance_out() @ q_out, dim1=-2, dim2=-1)
            eigenvalues = d_out[:, :, None] * d_in[:, None, :] / factors.mean_weight
        value = damping[name] if isinstance(damping, dict) else damping
        inverses[name] = EigenInverse(layer.basis, eigenvalues, value)
    return BlockInverse(layout, inverses)
