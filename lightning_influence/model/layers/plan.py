"""Which parameters of a model are covered, by which layers, and how flat vectors over them are laid out."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_influence.model.layers.gradients import LayerGradients
from lightning_influence.model.layers.layer import Layer, find_rule, rule_of_parameter, supported_types
from lightning_influence.support.coordinates import count_coordinates, is_trainable_kind
from lightning_influence.support.errors import UnsupportedModelError

ModuleLoss = Callable[[Any, Any], Tensor]
"""A loss ``(module, batch)``: those of the examples ``(B,)``, or that of the batch."""


class Layout:
    """The order of ``P`` parameters in a flat vector: layer after layer, each matrix row-major.

    Args:
        shapes: ``(G, D_out, D_in)`` of each layer, in order.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int, int]]) -> None:
        self.shapes = dict(shapes)
        self.numels = {name: g * o * i for name, (g, o, i) in self.shapes.items()}
        self.numel = sum(self.numels.values())

    @classmethod
    def of(cls, layers: Mapping[str, Layer]) -> Layout:
        """Return the layout of some covered layers."""
        return cls({name: layer.shape for name, layer in layers.items()})

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views ``(..., G, D_out, D_in)`` of ``flat (..., P)``."""
        parts = torch.split(flat, list(self.numels.values()), dim=-1)
        lead = flat.shape[:-1]
        return {
            name: part.reshape(*lead, *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def join(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Return ``(..., P)`` from one ``(..., G, D_out, D_in)`` a layer."""
        return torch.cat([blocks[name].flatten(-3) for name in self.shapes], dim=-1)

    def expand(self, values: Mapping[str, float], like: Tensor) -> Tensor:
        """Return a vector ``(P,)`` that holds each layer's number at all of its parameters."""
        parts = [like.new_full((self.numels[name],), values[name]) for name in self.shapes]
        return torch.cat(parts)

    def dense(self, gradients: Mapping[str, LayerGradients]) -> Tensor:
        """Return gradients as flat vectors ``(K, B, P)``; a layer without an entry is zero.

        Raises:
            KeyError: if no layer of the layout has an entry.
        """
        present = {name: gradients[name].dense().flatten(2) for name in self.shapes if name in gradients}
        if not present:
            raise KeyError(f"none of the layers {list(self.shapes)} has gradients")
        like = next(iter(present.values()))
        return torch.cat(
            [
                present[name] if name in present else like.new_zeros(*like.shape[:2], numel)
                for name, numel in self.numels.items()
            ],
            dim=-1,
        )

    def dot(self, gradients: Mapping[str, LayerGradients], vectors: Tensor) -> Tensor:
        """Return inner products ``(K, B, V)`` of gradients with flat vectors ``(V, P)``."""
        blocks = self.split(vectors)
        parts = [gradients[name].dot(blocks[name]) for name in self.shapes if name in gradients]
        return torch.stack(parts).sum(dim=0)

    def add_combination(self, out: Tensor, gradients: Mapping[str, LayerGradients], weights: Tensor) -> None:
        """Add to ``out (V, P)`` the sums of gradients with weights ``(K, B, V)``, in place."""
        start = 0
        for name, numel in self.numels.items():
            if name in gradients:
                out[:, start : start + numel] += gradients[name].combine(weights).flatten(1)
            start += numel


@dataclass
class LayerPlan:
    """The layers that are covered, and the trainable parameters that are not.

    The layers do not change; what has been verified grows while passes run.

    Attributes:
        layers: covered layers by name, in the model's order.
        uncovered: name of each uncovered trainable parameter -> (number of entries, reason).
        slow: names of those whose gradients take a backward pass for each example, as passes have found.
        verified: what passes have found in order, and need not look at again.
        loss: the loss that the call is about in place of the module's own; None for the module's.
        is_part: whether there are further layers elsewhere, so that a batch need use none of these.
    """

    layers: dict[str, Layer]
    uncovered: dict[str, tuple[int, str]]
    verified: set[str] = field(default_factory=set, compare=False, repr=False)
    slow: set[str] = field(default_factory=set, compare=False, repr=False)
    loss: ModuleLoss | None = field(default=None, compare=False, repr=False)
    is_part: bool = False

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
        kinds = any("not supported" in why for _, why in self.uncovered.values())
        supported = f" Supported layers: {', '.join(supported_types())}." if kinds else ""
        return (
            f"{1 - self.coverage:.1%} of the trainable parameters are not covered by influence estimates: "
            f"{', '.join(named[:limit])}{more}.{supported}"
        )


def find_layers(
    model: nn.Module, include: Sequence[str] | None = None, *, parameters: bool = True
) -> LayerPlan:
    """Find the parameters of ``model`` that per-example gradients can be had for, in blocks.

    Modules that are linear in their weight are one block, named as the module, with their bias. All other
    trainable parameters (of norms, embeddings, recurrent networks, tied and bare ones) are blocks by
    themselves, named as the parameter.

    Args:
        model: any module.
        include: names or shell patterns (``"encoder.*"``) of modules or parameters to cover, and after ``!``
            of those to leave out; all if None.
        parameters: False to cover modules alone.

    Returns:
        The plan, with every trainable parameter either in a layer or listed with a reason.

    Raises:
        UnsupportedModelError: if no layer is left, or a pattern matches none.
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
    if parameters:
        layers = _with_parameters(model, layers, include)
        # Whatever owns a parameter, it would be covered.
        reasons = {id(p): "not selected" for p in model.parameters() if is_trainable_kind(p)}
    _check_patterns(include, layers, model)
    return LayerPlan(layers, _uncovered(model, layers, reasons))


def _with_parameters(
    model: nn.Module, layers: dict[str, Layer], include: Sequence[str] | None
) -> dict[str, Layer]:
    """Return the layers and, as blocks of their own, all other selected parameters, in the model's order."""
    covered = _parameters_of(layers)
    modules = dict(model.named_modules())
    blocks: dict[str, Layer] = {}
    for name, p in model.named_parameters():
        owner, _, attribute = name.rpartition(".")
        if owner in layers and id(p) in covered:
            blocks.setdefault(owner, layers[owner])
        elif (
            p.requires_grad
            and p.numel()
            and is_trainable_kind(p)
            and id(p) not in covered
            and _is_selected((name, owner), include)
        ):
            blocks[name] = Layer.of(name, modules[owner], rule_of_parameter(attribute, p))
    return blocks


def _is_selected(names: Sequence[str], include: Sequence[str] | None) -> bool:
    """Return whether a pattern selects one of the names, and none takes one out again."""
    chosen = [pattern for pattern in include or () if not pattern.startswith("!")]
    dropped = [pattern[1:] for pattern in include or () if pattern.startswith("!")]

    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)

    return (not chosen or matches(chosen)) and not matches(dropped)


def _parameters_of(layers: Mapping[str, Layer]) -> set[int]:
    """Return the identities of the parameters in some layers; a frozen bias counts as its layer's."""
    return {
        id(p)
        for layer in layers.values()
        for p in (layer.rule.weight(layer.module), layer.rule.bias(layer.module))
        if p is not None
    }


def _refusal(name: str, module: nn.Module, uses: Counter[int], include: Sequence[str] | None) -> str | None:
    """Return why this module is not covered, or None if it is."""
    own = [p for p in module.parameters(recurse=False) if p.requires_grad]
    if parametrize.is_parametrized(module):
        return "parametrized weight"
    rule = find_rule(module)
    if rule is None:
        return f"{type(module).__name__} is not supported"
    if not _is_selected((name,), include):
        return "not selected"
    weight: object = rule.weight(module)
    if not isinstance(weight, nn.Parameter):
        return "its weight is computed, not a parameter"
    if not weight.requires_grad:
        return "its weight is frozen"
    if any(p.is_complex() for p in own):
        return "its weight is complex"
    if any(uses[id(p)] > 1 for p in own):
        return "shared with another module"
    return None


def _uncovered(
    model: nn.Module, layers: dict[str, Layer], reasons: dict[int, str]
) -> dict[str, tuple[int, str]]:
    """Return trainable parameters that no layer covers, with the reason."""
    covered = _parameters_of(layers)
    return {
        name: (count_coordinates(p), reasons.get(id(p), "not supported"))
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
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    owners = {name for layer in layers for name in (layer, layer.rpartition(".")[0])}
    supported = [name for name, module in model.named_modules() if find_rule(module) is not None]
    for pattern in include or ():
        among = names if pattern.startswith("!") else owners
        if not fnmatch.filter(among, pattern.removeprefix("!")):
            raise UnsupportedModelError(
                f"layers={pattern!r} selects no supported, trainable layer. Accepted are names or patterns "
                f"of: {supported}."
            )
    if not layers and not any(p.requires_grad for p in model.parameters()):
        raise UnsupportedModelError("The model has no trainable parameter: nothing in it was learned.")
    if not layers:
        found = sorted({type(m).__name__ for m in model.modules() if list(m.parameters(recurse=False))})
        raise UnsupportedModelError(
            "The model has no trainable layer of a supported kind; its parameters are in: "
            f"{found or 'none'}. Supported layers: {', '.join(supported_types())}. Register a rule for yours "
            "with lightning_influence.register_layer."
        )
