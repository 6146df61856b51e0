"""What the optimizer did during the fit: the part of a training run that decides the damping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_influence.model.layers.layer import Layer
from lightning_influence.support.coordinates import to_coordinates
from lightning_influence.support.whole import read_whole

Family = Literal["sgd", "adam", "adamw", "other"]


class OptimizerRule:
    """What the steps of a kind of optimizer tell of the damping that the run applies.

    Derive from it and decorate the class with :func:`register_optimizer`. The defaults are those of an
    optimizer that moves along the gradient: no metric, and weight decay that is added to the gradient.

    Attributes:
        family: which formula of :func:`~.damping.resolve_damping` holds: ``"sgd"``; ``"adam"`` where steps
            are divided by a metric, weight decay included; ``"adamw"`` where weight decay is not divided.
    """

    family: ClassVar[Family] = "sgd"

    def read_rate(self, group: Mapping[str, Any]) -> float:
        """Return the step that a gradient ends up having made, per unit of (preconditioned) gradient.

        Args:
            group: a parameter group, as it is at this step.
        """
        return effective_rate(group)

    def read_weight_decay(self, group: Mapping[str, Any]) -> float:
        """Return the weight decay of a parameter group, per unit of its rate."""
        return float(group.get("weight_decay", 0.0))

    def read_metric(self, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor | None:
        """Return what steps are divided by, entry by entry, of the parameter's shape.

        Args:
            state: the optimizer's state of one parameter; empty before its first step.
            group: the parameter's group.

        Returns:
            The diagonal of the metric; None if there is none, or none yet.
        """
        return None


_RULES: dict[type[torch.optim.Optimizer], OptimizerRule] = {}


def register_optimizer(
    *kinds: type[torch.optim.Optimizer],
) -> Callable[[type[OptimizerRule]], type[OptimizerRule]]:
    """Class decorator: read optimizers of these classes, and of classes derived from them, with this rule.

    Args:
        *kinds: classes of optimizers; the nearest registered base of an optimizer's class counts.

    Returns:
        The decorator; it returns the rule unchanged.
    """

    def decorate(rule: type[OptimizerRule]) -> type[OptimizerRule]:
        _RULES.update(dict.fromkeys(kinds, rule()))
        return rule

    return decorate


def find_optimizer_rule(optimizer: torch.optim.Optimizer) -> OptimizerRule | None:
    """Return the rule of an optimizer's class or its nearest base, None if no rule is registered."""
    return next((_RULES[base] for base in type(optimizer).__mro__ if base in _RULES), None)


@register_optimizer(torch.optim.SGD)
class SGDRule(OptimizerRule):
    """SGD with or without momentum; Nesterov's momentum too."""


@register_optimizer(torch.optim.Adam)
class AdamRule(OptimizerRule):
    """Adam: steps are divided by ``sqrt(v_hat) + eps``, weight decay included (Kingma and Ba 2015)."""

    family: ClassVar[Family] = "adam"

    def read_metric(self, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor | None:
        """Return ``sqrt(v_hat) + eps`` of one parameter, None before its first step."""
        moment = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
        step = float(state.get("step", 0))
        if moment is None or step < 1:
            return None
        correction = 1.0 - float(group["betas"][1]) ** step
        roots: Tensor = (to_coordinates(moment) / correction).sqrt() + float(group["eps"])
        return roots


@register_optimizer(torch.optim.AdamW)
class AdamWRule(AdamRule):
    """AdamW: as Adam, but weight decay is not divided by the metric (Loshchilov and Hutter 2019)."""

    family: ClassVar[Family] = "adamw"


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


# Layers whose parameters lie in the same groups in the same shares, with these: mostly all layers at once.
_Parts = list[tuple[list[LayerRecord], list[tuple[float, Mapping[str, Any]]]]]


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
            optimizer: an optimizer of torch that will not skip the step, as a gradient scaler has it do; its
                learning rates are those of the step.
            layers: the covered layers.
        """
        rule = find_optimizer_rule(optimizer)
        family, reason = _name_family(rule, optimizer)
        if self.steps and family != self.family:
            family, reason = "other", f"{self.family} and {family} optimizers in one run"
        self.family, self.reason = family, self.reason or reason
        self.steps += 1
        if rule is None:  # whatever its groups hold
            return
        for records, parts in self._groups_of(optimizer, layers):
            rate = decay = 0.0
            for share, group in parts:
                rate += share * rule.read_rate(group)
                decay += share * rule.read_weight_decay(group)
            for record in records:
                record.rate, record.weight_decay = record.rate + rate, float(decay)

    def _groups_of(self, optimizer: torch.optim.Optimizer, layers: Mapping[str, Layer]) -> _Parts:
        """Return the layers' records with their parameter groups and the shares of these; looked up once."""
        key = id(optimizer), len(optimizer.param_groups), len(self.layers)
        if key in self._cache:
            return self._cache[key]
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        found: dict[tuple[tuple[float, int], ...], tuple[list[LayerRecord], Any]] = {}
        for name, layer in layers.items():
            own = [p for p in _parameters(layer) if id(p) in groups]
            total = sum(p.numel() for p in own)
            if total:
                shares: dict[int, float] = {}
                for p in own:
                    shares[id(groups[id(p)])] = shares.get(id(groups[id(p)]), 0.0) + p.numel() / total
                parts: list[tuple[float, Mapping[str, Any]]]
                parts = [(shares[id(g)], g) for g in optimizer.param_groups if id(g) in shares]
                alike = tuple((share, id(group)) for share, group in parts)
                records, _ = found.setdefault(alike, ([], parts))
                records.append(self.layers.setdefault(name, LayerRecord()))
        parts_of_all = self._cache[(*key[:2], len(self.layers))] = list(found.values())
        return parts_of_all

    def read_metric(self, optimizer: torch.optim.Optimizer, layers: Mapping[str, Layer]) -> None:
        """Read the metric of the optimizer's steps as it is now, Adam's second moments for one."""
        rule = find_optimizer_rule(optimizer)
        if rule is None:
            return
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name, layer in layers.items():
            if name not in self.layers:
                continue
            total = count = 0.0
            for p in _parameters(layer):
                if id(p) not in groups:
                    continue
                metric = rule.read_metric(optimizer.state.get(p, {}), groups[id(p)])
                if metric is not None:
                    total, count = total + float(read_whole(metric).double().sum()), count + metric.numel()
            if count:
                self.layers[name].metric = total / count


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


def _name_family(rule: OptimizerRule | None, optimizer: torch.optim.Optimizer) -> tuple[Family, str]:
    """Return the family of an optimizer, and why its damping is not known if it is not."""
    if rule is None:
        return "other", f"the damping of a run with {type(optimizer).__name__} is not known"
    if rule.family == "adam" and any(g.get("decoupled_weight_decay") for g in optimizer.param_groups):
        return "adamw", ""
    return rule.family, ""
