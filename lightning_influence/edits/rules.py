"""Selection rules: which parameters of each layer an edit may change.

A layer has ``C = G * D_out`` output channels, each a row of ``D_in`` parameters (weights, then the bias if it
is trained). A rule looks at scores of channels or of parameters and returns a mask: boolean, of the layer's
matrix shape ``(G, D_out, D_in)``. The rules by channel, with their controls "lowest" and "exclusive", are
those of Lyu, Jang, Ryu & Yang (2023); "gain" is a rule of this library.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, Literal, TypeVar, get_args

import numpy as np
import torch
from rich.jupyter import JupyterMixin
from rich.table import Table
from torch import Tensor

from lightning_influence.model.layers.plan import Layout
from lightning_influence.support.arguments import is_number

Source = Literal["outputs", "gradients", "gain"]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class RuleScores:
    """What rules look at, for the examples that an edit is about.

    Attributes:
        shapes: ``(G, D_out, D_in)`` of each layer.
        outputs: by layer ``(C,)``, the absolute mean over examples and positions of each channel's
            pre-activation.
        gradients: by layer ``(C,)``, the absolute mean of the gradient of the edited loss in it.
        gain: by layer ``(G, D_out, D_in)``, how much each parameter alone lowers the squared residual.
    """

    shapes: Mapping[str, Shape]
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    gain: Mapping[str, Tensor] = field(default_factory=dict)

    def by_layer(self, source: Source | None) -> Mapping[str, Tensor]:
        """Return the scores of one kind; nothing for a rule that looks at none."""
        scores: Mapping[str, Tensor] = {} if source is None else getattr(self, source)
        return scores


class SelectionRule(ABC):
    """Chooses parameters layer by layer; register it with :func:`register_rule`.

    Example:
        >>> class Biases(SelectionRule):
        ...     source = "outputs"
        ...     def mask(self, scores, shape, ratio, generator):
        ...         chosen = torch.zeros(shape, dtype=torch.bool)
        ...         strongest = scores.argsort(descending=True)[: count_budget(shape, ratio)]
        ...         chosen.view(-1, shape[-1])[strongest.cpu(), -1] = True
        ...         return chosen
    """

    name: ClassVar[str] = "unnamed"
    #: Which scores the rule needs; None if it looks at none.
    source: ClassVar[Source | None] = None

    @abstractmethod
    def mask(self, scores: Tensor | None, shape: Shape, ratio: float, generator: torch.Generator) -> Tensor:
        """Choose parameters of one layer.

        Args:
            scores: the layer's scores of :attr:`source`: ``(C,)`` for channels, ``(G, D_out, D_in)`` for
                parameters; None without a source.
            shape: ``(G, D_out, D_in)``.
            ratio: largest share of the layer's parameters, in (0, 1]; :func:`count_budget` says how many
                that is.
            generator: source of randomness, on the CPU.

        Returns:
            Boolean, of the layer's shape.
        """


@dataclass(frozen=True, eq=False, repr=False)
class Selection(JupyterMixin):
    """Masks of the selected parameters, layer by layer.

    Attributes:
        masks: by layer boolean, ``(G, D_out, D_in)``: rows are output channels, the last column the bias if
            the layer has a trained one.
        rule: the rule's name.
        ratio: what was asked for.
    """

    masks: dict[str, Tensor]
    rule: str
    ratio: float

    @property
    def count(self) -> int:
        """Number of selected parameters."""
        return sum(int(mask.sum()) for mask in self.masks.values())

    @property
    def numel(self) -> int:
        """Number of parameters to choose from."""
        return sum(mask.numel() for mask in self.masks.values())

    def flat(self) -> Tensor:
        """Return the mask over the flat vector of all editable parameters, ``(P,)``."""
        shapes = {name: (mask.shape[0], mask.shape[1], mask.shape[2]) for name, mask in self.masks.items()}
        return Layout(shapes).join(self.masks)

    def __rich__(self) -> Table:
        table = Table(title=f"{self.count:,} of {self.numel:,} parameters by {self.rule!r}")
        for column in ("layer", "channels", "parameters", "share"):
            table.add_column(column, justify="left" if column == "layer" else "right")
        for name, mask in self.masks.items():
            rows = mask.flatten(0, 1)
            channels = f"{int(rows.any(1).sum())} of {len(rows)}"
            table.add_row(name, channels, f"{int(mask.sum()):,}", f"{float(mask.float().mean()):.1%}")
        return table

    def __repr__(self) -> str:
        return f"Selection(rule={self.rule!r}, ratio={self.ratio:g}, {self.count} of {self.numel} parameters)"


def select(rule: SelectionRule, scores: RuleScores, ratio: float, seed: int = 0) -> Selection:
    """Apply a rule to every layer.

    Args:
        rule: the rule.
        scores: those of the kind that the rule needs.
        ratio: share of each layer's parameters, in (0, 1].
        seed: of the rule's random choices.

    Returns:
        The masks.

    Raises:
        TypeError: if the rule returns something else than a boolean mask.
        ValueError: if the ratio is outside (0, 1], a mask has another shape or selects more than the ratio
            allows, or nothing is selected.
    """
    check_ratio(ratio)
    check_source(rule, rule.name)
    generator = torch.Generator().manual_seed(seed)
    by_layer = scores.by_layer(rule.source)
    masks = {}
    for name, shape in scores.shapes.items():
        mask = _read_mask(rule.mask(by_layer.get(name), shape, ratio, generator), rule.name, shape)
        _check_share(mask, rule.name, name, ratio)
        masks[name] = mask
    if not any(bool(mask.any()) for mask in masks.values()):
        raise ValueError(f"Rule {rule.name!r} selects no parameter in any layer; nothing could be edited.")
    return Selection(masks, rule.name, ratio)


def _read_mask(mask: Any, rule: str, shape: Shape) -> Tensor:
    """Return what a rule returned as a boolean tensor on the CPU.

    Raises:
        TypeError: if it is no boolean tensor or array.
        ValueError: if its shape is not the layer's.
    """
    accepted = f"accepted is a boolean tensor of shape {shape}, True at the parameters that may change"
    if isinstance(mask, np.ndarray):
        mask = torch.as_tensor(mask)
    if not isinstance(mask, Tensor):
        raise TypeError(f"Rule {rule!r} returned {type(mask).__name__}; {accepted}.")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"Rule {rule!r} returned {mask.dtype}; {accepted}. Compare scores with a level to get one."
        )
    if mask.shape != shape:
        raise ValueError(f"Rule {rule!r} returned a mask of shape {tuple(mask.shape)}; {accepted}.")
    return mask.cpu()


def _check_share(mask: Tensor, rule: str, layer: str, ratio: float) -> None:
    """Refuse a mask of more parameters than the ratio stands for, rounded up.

    Raises:
        ValueError: with both numbers.
    """
    # A rule of the user's may round up where the built-in ones round to the nearest number.
    count, most = int(mask.sum()), max(1, math.ceil(ratio * mask.numel()))
    if count > most:
        raise ValueError(
            f"Rule {rule!r} selects {count:,} of the {mask.numel():,} parameters of layer {layer!r}; "
            f"ratio={ratio:g} allows {most:,}. Pass a larger ratio= (up to 1.0), or select fewer in mask()."
        )


def check_ratio(ratio: object) -> None:
    """Refuse a ratio outside (0, 1].

    Raises:
        ValueError: saying what was got.
    """
    if not is_number(ratio) or not 0 < ratio <= 1:
        raise ValueError(
            f"Got ratio={ratio!r}; accepted is a share of each layer's parameters in (0, 1], such as 0.05."
        )


def count_budget(shape: Shape, ratio: float) -> int:
    """Count the parameters of a layer that a ratio stands for: the nearest number, and at least one.

    The ratio counts as the decimal that it is written as, so that the number depends neither on the order in
    which floats are multiplied nor on their rounding; of two that are equally near the even one is taken.

    Args:
        shape: ``(G, D_out, D_in)``.
        ratio: in (0, 1].

    Returns:
        The number.

    Example:
        >>> count_budget((3, 6, 5), 0.05), count_budget((1, 2, 2), 0.05)
        (4, 1)
    """
    return max(1, round(Fraction(str(float(ratio))) * math.prod(shape)))


def spend_on_rows(order: Tensor, shape: Shape, count: int) -> Tensor:
    """Take whole rows in an order until ``count`` parameters are spent.

    The last row is taken in part if need be, from its end, so that its bias comes first.

    Args:
        order: channels, the first to take first, ``(C',)``.
        shape: ``(G, D_out, D_in)``.
        count: how many parameters.

    Returns:
        Boolean, of that shape, with ``min(count, C' * D_in)`` entries set.

    Example:
        >>> spend_on_rows(torch.tensor([2, 0, 1]), (1, 3, 2), 3).int()
        tensor([[[0, 1],
                 [0, 0],
                 [1, 1]]], dtype=torch.int32)
    """
    width = shape[-1]
    rows = torch.zeros(shape[0] * shape[1], width, dtype=torch.bool)
    whole, rest = divmod(count, width)
    rows[order[:whole].cpu()] = True
    if rest and whole < len(order):
        rows[int(order[whole]), width - rest :] = True
    return rows.view(shape)


_RULES: dict[str, type[SelectionRule]] = {}
_Rule = TypeVar("_Rule", bound=type[SelectionRule])


def register_rule(name: str) -> Callable[[_Rule], _Rule]:
    """Class decorator: make a rule available under a name.

    Args:
        name: what users pass as ``rule=``; the class is called without arguments.

    Returns:
        The decorator; it returns the class with its ``name`` set.

    Raises:
        TypeError: if there is no name, or what is decorated is no rule.
        ValueError: if the rule needs scores that there are not.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"Got register_rule({name!r}); accepted is the name that users pass as rule=: "
            f"@register_rule('my_rule')."
        )

    def decorate(rule: _Rule) -> _Rule:
        if not (isinstance(rule, type) and issubclass(rule, SelectionRule)):
            raise TypeError(
                f"Got {rule!r} to register as rule {name!r}; accepted is a subclass of SelectionRule with a "
                "method mask(scores, shape, ratio, generator)."
            )
        check_source(rule, name)
        rule.name = name
        _RULES[name] = rule
        return rule

    return decorate


def check_source(rule: SelectionRule | type[SelectionRule], name: str) -> None:
    """Refuse a rule that needs scores of an unknown kind.

    Raises:
        ValueError: saying what it asks for.
    """
    known = get_args(Source)
    if rule.source is not None and rule.source not in known:
        raise ValueError(
            f"Rule {name!r} has source={rule.source!r}; accepted are {', '.join(map(repr, known))} or None."
        )


def find_rule(rule: str | SelectionRule) -> SelectionRule:
    """Return a rule by name, or the rule itself.

    Raises:
        ValueError: listing the registered names, or the kinds of scores if it needs others.
    """
    if isinstance(rule, SelectionRule):
        check_source(rule, rule.name)
        return rule
    if not isinstance(rule, str) or rule not in _RULES:
        names = ", ".join(repr(name) for name in rule_names())
        raise ValueError(f"Got rule={rule!r}; accepted are {names}, or a SelectionRule of your own.")
    return _RULES[rule]()


def rule_names() -> list[str]:
    """Return the registered names, sorted."""
    return sorted(_RULES)


class _Highest(SelectionRule):
    """The rule that generalized influence was published with (Lyu et al. 2023)."""

    def mask(self, scores: Tensor | None, shape: Shape, ratio: float, generator: torch.Generator) -> Tensor:
        """Return the rows with the highest scores; of equal ones the first."""
        assert scores is not None
        order = scores.argsort(descending=True, stable=True)
        return spend_on_rows(order, shape, count_budget(shape, ratio))


@register_rule("highest_outputs")
class HighestOutputs(_Highest):
    """The channels that the examples excite most."""

    source = "outputs"


@register_rule("highest_gradients")
class HighestGradients(_Highest):
    """The channels through which the examples' loss pulls most."""

    source = "gradients"


class _Lowest(SelectionRule):
    """The control that tells whether the highest scores were the right ones (Lyu et al. 2023)."""

    def mask(self, scores: Tensor | None, shape: Shape, ratio: float, generator: torch.Generator) -> Tensor:
        """Return the rows with the lowest scores; of equal ones the first."""
        assert scores is not None
        return spend_on_rows(scores.argsort(stable=True), shape, count_budget(shape, ratio))


@register_rule("lowest_outputs")
class LowestOutputs(_Lowest):
    """The channels that the examples excite least."""

    source = "outputs"


@register_rule("lowest_gradients")
class LowestGradients(_Lowest):
    """The channels through which the examples' loss pulls least."""

    source = "gradients"


class _Exclusive(SelectionRule):
    """The control that tells choice from number (Lyu et al. 2023)."""

    def mask(self, scores: Tensor | None, shape: Shape, ratio: float, generator: torch.Generator) -> Tensor:
        """Return random rows without those that the highest rule touches.

        Where the others do not fill the budget (ratios above about one half), the lowest of the highest
        follow, so that the number of parameters stays comparable.
        """
        assert scores is not None
        count = count_budget(shape, ratio)
        order = scores.argsort(descending=True, stable=True).cpu()
        highest = min(len(order), -(-count // shape[-1]))
        others = order[highest:]
        shuffled = others[torch.randperm(len(others), generator=generator)]
        return spend_on_rows(torch.cat([shuffled, order[:highest].flip(0)]), shape, count)


@register_rule("exclusive_outputs")
class ExclusiveOutputs(_Exclusive):
    """Random channels outside those that the examples excite most."""

    source = "outputs"


@register_rule("exclusive_gradients")
class ExclusiveGradients(_Exclusive):
    """Random channels outside those through which the examples' loss pulls most."""

    source = "gradients"


@register_rule("gain")
class Gain(SelectionRule):
    r"""The parameters that lower the edit's residual most, each on its own, layer by layer.

    Generalized influence minimises :math:`\|H_{:,S} x - g\|^2 + r \|x\|^2`. With one parameter :math:`i`
    alone the minimum is :math:`\|g\|^2 - (Hg)_i^2 / ((H^2)_{ii} + r)`: the second term is the gain of that
    parameter, the first step of an orthogonal matching pursuit. The rule looks at parameters and not at
    channels, counts the curvature that a change meets, and needs no notion of a channel's activity.

    Relabelling counts the ridge, the damping's square; without it the rule prefers parameters with hardly any
    curvature, which are of little use to a descent. Forgetting goes a long way along one direction and is
    better off with just these: the ridge counts as zero there.
    """

    source = "gain"

    def mask(self, scores: Tensor | None, shape: Shape, ratio: float, generator: torch.Generator) -> Tensor:
        """Return the budget's worth of highest gains; of equal ones the first."""
        assert scores is not None
        order = scores.flatten().argsort(descending=True, stable=True).cpu()
        chosen = torch.zeros(len(order), dtype=torch.bool)
        chosen[order[: count_budget(shape, ratio)]] = True
        return chosen.view(shape)


def compute_gains(hg: Tensor, squared_norms: Tensor, ridge: float = 0.0) -> Tensor:
    """Return ``(Hg)_i^2 / ((H^2)_ii + r)``, zero where a parameter has no curvature and there is no ridge.

    Args:
        hg: ``H g``, ``(P,)``.
        squared_norms: diagonal of ``H^2``: the squared norm of each column of ``H``, ``(P,)``.
        ridge: ``r``.

    Returns:
        ``(P,)``.
    """
    squared_norms = squared_norms + ridge
    tiny = torch.finfo(hg.dtype).tiny
    return torch.where(squared_norms > tiny, hg.square() / squared_norms.clamp_min(tiny), 0.0)


@register_rule("random")
class RandomElements(SelectionRule):
    """Parameters drawn uniformly without replacement, layer by layer."""

    def mask(self, scores: Tensor | None, shape: Shape, ratio: float, generator: torch.Generator) -> Tensor:
        """Return exactly the budget, drawn at random."""
        chosen = torch.zeros(math.prod(shape), dtype=torch.bool)
        chosen[torch.randperm(len(chosen), generator=generator)[: count_budget(shape, ratio)]] = True
        return chosen.view(shape)


@dataclass(frozen=True)
class _Threshold(SelectionRule):
    """Rows by score, as many as reach the level and no more than the ratio allows.

    Attributes:
        level: share of the layer's highest score, in (0, 1].

    Raises:
        ValueError: if the level is outside (0, 1].
    """

    level: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.level, bool) or not 0 < self.level <= 1:
            raise ValueError(f"Got level={self.level!r}; accepted are shares of the highest score in (0, 1].")

    def mask(self, scores: Tensor | None, shape: Shape, ratio: float, generator: torch.Generator) -> Tensor:
        """Return the rows at or above the level, the highest first, within the budget."""
        assert scores is not None
        order = scores.argsort(descending=True, stable=True)
        reaching = int((scores >= self.level * scores.max()).sum())
        return spend_on_rows(order[:reaching], shape, count_budget(shape, ratio))


@register_rule("threshold_outputs")
class ThresholdOutputs(_Threshold):
    """Channels that the examples excite at least ``level`` times as much as the most excited."""

    source = "outputs"


@register_rule("threshold_gradients")
class ThresholdGradients(_Threshold):
    """Channels through which the loss pulls at least ``level`` times as much as through the strongest."""

    source = "gradients"
