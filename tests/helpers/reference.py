"""Dense float64 references of edits, from the oracle and linear algebra alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import oracle
import torch
from models import CASES, Case, lightning_module, loader
from torch import Tensor

from lightning_influence import InfluenceModule

EDITED = [1, 4, 9]
EXACTLY: dict[str, Any] = {
    "tolerance": 1e-13,
    "max_steps": 3000,
    "curvature_examples": None,
    "weight_decay": 0.0,
}
# float64 through normal equations, whose condition is the square of the curvature's.
CLOSE: dict[str, float] = {"rtol": 1e-5, "atol": 1e-8}


@dataclass
class Dense:
    """One case of the zoo whose examples `EDITED` are removed or relabelled."""

    case: Case
    decay: float = 0.0

    @classmethod
    def of(cls, name: str, decay: float = 0.0) -> Dense:
        return cls(CASES[name], decay)

    def __post_init__(self) -> None:
        self.edited = torch.zeros(len(self.case.x), dtype=torch.bool)
        self.edited[EDITED] = True
        self.layers = self.case.layers
        self.theta = oracle.flat_parameters(self.case.model, self.layers)

    def part(self, which: Tensor, y: Tensor | None = None) -> tuple[Any, ...]:
        case = self.case
        return case.model, case.loss, case.x[which], (case.y if y is None else y)[which], self.layers

    def weight(self, which: Tensor) -> float:
        return self.case.loss.normaliser(self.case.y[which]) * int(which.sum())

    @property
    def scale(self) -> float:
        return self.weight(self.edited) / self.weight(~self.edited)

    @property
    def share(self) -> float:
        return self.scale / (1 + self.scale)

    def mean_gradient(self, which: Tensor, y: Tensor | None = None) -> Tensor:
        return oracle.flatten(oracle.per_example_gradients(*self.part(which, y))).mean(0)

    @property
    def gradient(self) -> Tensor:
        return self.mean_gradient(self.edited) + self.decay * self.theta

    def curvature(self, which: Tensor, kind: str = "ggn") -> Tensor:
        make = oracle.ggn if kind == "ggn" else oracle.hessian
        H = make(*self.part(which))
        return H + self.decay * torch.eye(len(H), dtype=H.dtype)

    def vector(self, method: str, mask: Tensor, damping: float, kind: str = "ggn") -> Tensor:
        """Each method's definition, with explicit inverses."""
        H, g = self.curvature(~self.edited, kind), self.gradient
        eye = torch.eye(len(H), dtype=H.dtype)
        full = torch.zeros_like(g)
        if method == "gif":
            normal = (H @ H + damping**2 * eye)[mask][:, mask]
            full[mask] = torch.linalg.solve(normal, (H @ g)[mask])
        elif method == "fif":
            full[mask] = torch.linalg.solve((H + damping * eye)[mask][:, mask], g[mask])
        elif method == "pif":
            full[mask] = torch.linalg.solve(H + damping * eye, g)[mask]
        elif method == "if":
            full = torch.linalg.solve(H + damping * eye, g)
        else:
            p, HF = self.share, self.curvature(self.edited, kind)
            H0 = (1 - p) * H + p * HF
            inverse = torch.linalg.inv(H0 + damping * eye)
            first = inverse @ g
            full = first - p / (1 - p) * (first - inverse @ HF @ first)
        return full

    def asked(self) -> InfluenceModule:
        return InfluenceModule(lightning_module(self.case))

    def loader(self, batch: int = 5) -> Any:
        return loader(self.case, batch, shuffle=True)


def flat(changes: dict[str, Tensor], case: Case) -> Tensor:
    """A change by parameter name, "model.*", as the oracle's flat vector."""
    parts = []
    for name in case.layers:
        if f"model.{name}" in changes:  # a parameter by itself
            parts.append(changes[f"model.{name}"].reshape(-1))
            continue
        weight, bias = changes[f"model.{name}.weight"], changes.get(f"model.{name}.bias")
        columns = [weight.flatten(1)] + ([] if bias is None else [bias[:, None]])
        parts.append(torch.cat(columns, dim=1).reshape(-1))
    return torch.cat(parts)


def flat_mask(selection: Any) -> Tensor:
    return torch.cat([mask.reshape(-1) for mask in selection.masks.values()])
