"""Which parameters of a model are covered, by which layers, and why the others are not."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn
from torch.nn.utils import parametrize

from lightning_influence.errors import UnsupportedModelError
from lightning_influence.layers.base import Layer
from lightning_influence.layers.registry import find_rule, supported_types


@dataclass(frozen=True)
class LayerPlan:
    """The layers that are covered, and the trainable parameters that are not.

    Attributes:
        layers: covered layers by name, in the model's order.
        uncovered: name of each uncovered trainable parameter -> (number of entries, reason).
        verified: what passes have found in order, and need not look at again.
    """

    layers: dict[str, Layer]
    uncovered: dict[str, tuple[int, str]]
    verified: set[str] = field(default_factory=set, compare=False, repr=False)

    @property
    def numel(self) -> int:
        """``P``: number of covered parameters."""
        return sum(layer.numel for layer in self.layers.values())

    @property
    def coverage(self) -> float:
        """Share of the trainable parameters that is covered, in [0, 1]."""
        return self.numel / (self.numel + sum(count for count, _ in self.uncovered.values()))

    def describe_uncovered(self, limit: int = 8) -> str | None:
        """Return one sentence naming what is left out and its share of all trainable parameters, or None."""
        if not self.uncovered:
            return None
        named = [f"{name} ({count:,}: {why})" for name, (count, why) in self.uncovered.items()]
        more = f" and {len(named) - limit} more" if len(named) > limit else ""
        return (
            f"{1 - self.coverage:.1%} of the trainable parameters are not covered by influence estimates: "
            f"{', '.join(named[:limit])}{more}. Supported layers: {', '.join(supported_types())}."
        )


def find_layers(model: nn.Module, include: Sequence[str] | None = None) -> LayerPlan:
    """Find the layers of ``model`` that per-example gradients can be had for.

    Args:
        model: any module.
        include: names or shell patterns (``"encoder.*"``) of modules to cover; all supported ones if None.

    Returns:
        The plan, with every trainable parameter either in a layer or listed with a reason.

    Raises:
        UnsupportedModelError: if no layer is left, or a pattern matches no supported layer.
    """
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    layers: dict[str, Layer] = {}
    reasons: dict[int, str] = {}
    for name, module in model.named_modules():
        reason = _refusal(name, module, uses, include)
        if reason is None:
            rule = find_rule(module)
            assert rule is not None
            layers[name] = Layer.of(name, module, rule)
        else:
            # The originals of a parametrized weight live in a child module; its reason is the parent's.
            deep = parametrize.is_parametrized(module)
            for p in module.parameters(recurse=deep):
                reasons.setdefault(id(p), reason)
    _check_patterns(include, layers, model)
    return LayerPlan(layers, _uncovered(model, layers, reasons))


def _refusal(name: str, module: nn.Module, uses: Counter[int], include: Sequence[str] | None) -> str | None:
    """Return why this module is not covered, or None if it is."""
    own = [p for p in module.parameters(recurse=False) if p.requires_grad]
    if parametrize.is_parametrized(module):
        return "parametrized weight"
    rule = find_rule(module)
    if rule is None:
        return f"{type(module).__name__} is not supported"
    if include is not None and not any(fnmatch.fnmatchcase(name, pattern) for pattern in include):
        return "not selected"
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return "its weight is computed, not a parameter"
    if not weight.requires_grad:
        return "its weight is frozen"
    if any(uses[id(p)] > 1 for p in own):
        return "shared with another module"
    return None


def _uncovered(
    model: nn.Module, layers: dict[str, Layer], reasons: dict[int, str]
) -> dict[str, tuple[int, str]]:
    """Return trainable parameters that no layer covers, with the reason."""
    covered = {
        id(p)
        for layer in layers.values()
        for p in (layer.rule.weight(layer.module), layer.rule.bias(layer.module))
        if p is not None
    }
    return {
        name: (p.numel(), reasons.get(id(p), "not supported"))
        for name, p in model.named_parameters()
        if p.requires_grad and id(p) not in covered
    }


def _check_patterns(include: Sequence[str] | None, layers: dict[str, Layer], model: nn.Module) -> None:
    """Refuse an empty plan and patterns that select nothing.

    Raises:
        UnsupportedModelError: naming what could be selected.
    """
    if include is not None and not include:
        raise UnsupportedModelError("layers=[] selects nothing; pass names or patterns, or None for all.")
    for pattern in include or ():
        if not fnmatch.filter(layers, pattern):
            supported = [name for name, module in model.named_modules() if find_rule(module) is not None]
            raise UnsupportedModelError(
                f"layers={pattern!r} selects no supported, trainable layer. Accepted are names or patterns "
                f"of: {supported}."
            )
    if not layers:
        found = sorted({type(m).__name__ for m in model.modules() if list(m.parameters(recurse=False))})
        raise UnsupportedModelError(
            "The model has no trainable layer of a supported kind; its parameters are in: "
            f"{found or 'none'}. Supported layers: {', '.join(supported_types())}. Register a rule for yours "
            "with lightning_influence.layers.register."
        )
