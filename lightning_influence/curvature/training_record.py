"""What the optimizer did during the fit: the part of a training run that decides the damping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_influence.model.layers import Layer

Family = Literal["sgd", "adam", "adamw", "other"]


@dataclass
class LayerRecord:
    """The run as one layer saw it, averaged over its parameters.

    Attributes:
        rate: sum over the steps of learning rate / (1 - momentum); for Adam of the learning rate.
        weight_decay: the last one used.
        metric: mean of ``sqrt(v_hat) + eps`` of Adam at the end; 1 for SGD.
    """

    rate: float = 0.0
    weight_decay: float = 0.0
    metric: float = 1.0


_Parts = list[tuple[LayerRecord, list[tuple[float, Mapping[str, Any]]]]]


@dataclass
class TrainingRecord:
    """What is known of a training run.

    Attributes:
        family: kind of optimizer.
        reason: why the run says nothing about the damping, empty if it does.
        steps: optimizer steps.
        loss_scale: batch loss divided by the mean of the examples' losses: 1 for means, ``B`` for sums.
        layers: one record a covered layer.
    """

    family: Family = "sgd"
    reason: str = ""
    steps: int = 0
    loss_scale: float = 1.0
    layers: dict[str, LayerRecord] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._cache: dict[tuple[int, int, int], _Parts] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without what refers to live optimizers."""
        return {**self.__dict__, "_cache": {}}

    def state_dict(self) -> dict[str, Any]:
        """Return the record as primitives."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """Return the record that was saved."""
        values = dict(state)
        values["layers"] = {name: LayerRecord(**layer) for name, layer in values["layers"].items()}
        return cls(**values)

    def start(self) -> None:
        """Forget the optimizers of an earlier fit; what was summed stays."""
        self._cache = {}

    def add_step(self, optimizer: torch.optim.Optimizer, layers: Mapping[str, Layer]) -> None:
        """Add one step that an optimizer is about to make.

        Args:
            optimizer: an optimizer of torch; its learning rates are those of this step.
            layers: the covered layers.
        """
        family, reason = family_of(optimizer)
        if self.steps and family != self.family:
            family, reason = "other", f"{self.family} and {family} optimizers in one run"
        self.family, self.reason = family, self.reason or reason
        self.steps += 1
        for record, parts in self._groups_of(optimizer, layers):
            rate = decay = 0.0
            for share, group in parts:
                rate += share * effective_rate(group)
                decay += share * group.get("weight_decay", 0.0)
            record.rate, record.weight_decay = record.rate + rate, float(decay)

    def _groups_of(self, optimizer: torch.optim.Optimizer, layers: Mapping[str, Layer]) -> _Parts:
        """Return each layer's record with its parameter groups and their shares; looked up once."""
        key = id(optimizer), len(optimizer.param_groups), len(self.layers)
        if key in self._cache:
            return self._cache[key]
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        found: _Parts = []
        for name, layer in layers.items():
            own = [p for p in _parameters(layer) if id(p) in groups]
            total = sum(p.numel() for p in own)
            if total:
                shares: dict[int, float] = {}
                for p in own:
                    shares[id(groups[id(p)])] = shares.get(id(groups[id(p)]), 0.0) + p.numel() / total
                parts: list[tuple[float, Mapping[str, Any]]]
                parts = [(shares[id(g)], g) for g in optimizer.param_groups if id(g) in shares]
                found.append((self.layers.setdefault(name, LayerRecord()), parts))
        self._cache[(*key[:2], len(self.layers))] = found
        return found

    def read_metric(self, optimizer: torch.optim.Optimizer, layers: Mapping[str, Layer]) -> None:
        """Read Adam's second moments as they are now; no other optimizer has any."""
        if family_of(optimizer)[0] not in {"adam", "adamw"}:
            return
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name, layer in layers.items():
            if name not in self.layers:
                continue
            total = count = 0.0
            for p in _parameters(layer):
                roots = _adam_roots(optimizer.state.get(p, {}), groups.get(id(p)))
                if roots is not None:
                    total, count = total + float(roots.double().sum()), count + p.numel()
            if count:
                self.layers[name].metric = total / count


def family_of(optimizer: torch.optim.Optimizer) -> tuple[Family, str]:
    """Return the kind of an optimizer, and a reason if it is one whose damping is not known."""
    if isinstance(optimizer, torch.optim.AdamW):
        return "adamw", ""
    if isinstance(optimizer, torch.optim.Adam):
        decoupled = any(group.get("decoupled_weight_decay") for group in optimizer.param_groups)
        return ("adamw" if decoupled else "adam"), ""
    if isinstance(optimizer, torch.optim.SGD):
        return "sgd", ""
    return "other", f"the damping of a run with {type(optimizer).__name__} is not known"


def effective_rate(group: Mapping[str, Any]) -> float:
    """Return the step that a gradient ends up having made, per unit of gradient.

    With momentum ``beta`` a gradient acts again in every later step, which sums to ``1 / (1 - beta)`` with or
    without Nesterov's look-ahead, times ``1 - dampening``. Adam averages its gradients, which sums to 1.
    """
    rate, momentum = float(group["lr"]), float(group.get("momentum", 0.0))
    if momentum == 0.0:
        return rate
    if momentum >= 1.0:
        return math.inf
    return rate * (1.0 - float(group.get("dampening", 0.0))) / (1.0 - momentum)


def _parameters(layer: Layer) -> list[Tensor]:
    bias = layer.rule.bias(layer.module) if layer.has_bias else None
    weight = layer.rule.weight(layer.module)
    return [weight] if bias is None else [weight, bias]


def _adam_roots(state: Mapping[str, Any], group: Mapping[str, Any] | None) -> Tensor | None:
    """Return ``sqrt(v_hat) + eps`` of one parameter, None before its first step."""
    moment = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    step = float(state.get("step", 0))
    if moment is None or group is None or step < 1:
        return None
    correction = 1.0 - float(group["betas"][1]) ** step
    roots: Tensor = (moment / correction).sqrt() + float(group["eps"])
    return roots
