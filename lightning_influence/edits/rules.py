r"""What a selection rule is: something that maps scores of channels or parameters to masks.

Shapes: a layer has ``C = G * D_out`` output channels, each a row of ``D_in`` parameters (weights, then the
bias if it is trained); a mask is boolean of the layer's matrix shape ``(G, D_out, D_in)``.

The channels with the highest scores (Lyu et al. 2023).

The channels with the lowest scores: the control of Lyu et al. 2023.

Random channels other than the highest: the control that tells choice from number (Lyu et al. 2023).

The parameters that lower the edit's residual most, each on its own.

Generalized influence minimises :math:`\|H_{:,S} x - g\|^2 + r \|x\|^2`. With one parameter :math:`i` alone
the minimum is :math:`\|g\|^2 - (Hg)_i^2 / ((H^2)_{ii} + r)`: the second term is the gain of that parameter,
the first step of an orthogonal matching pursuit. It looks at parameters and not at channels, counts the
curvature that a change meets, and needs no notion of a channel's activity. Own rule of this library.

Relabelling counts the ridge, the damping's square; without it the rule prefers parameters with hardly any
curvature, which are of little use to a descent. Forgetting goes a long way along one direction and is better
off with just these: the ridge counts as zero there.

Random parameters, whatever their channel.

Channels whose score reaches a share of the layer's highest.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor

Source = Literal["outputs", "gradients", "gain"]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Evidence:
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

    def scores(self, source: Source) -> Mapping[str, Tensor]:
        """Return the scores of one kind, by layer."""
        scores: Mapping[str, Tensor] = getattr(self, source)
        return scores


class SelectionRule(ABC):
    """Chooses parameters layer by layer; register it with :func:`register_rule`."""

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
            ratio: largest share of the layer's parameters, in (0, 1].
            generator: source of randomness, on the CPU.

        Returns:
            Boolean, of the layer's shape.
        """


def budget(shape: Shape, ratio: float) -> int:
    """Return how many parameters of a layer a ratio stands for: the nearest number, and at least one."""
    return max(1, round(ratio * math.prod(shape)))


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
    def mask(self, scores: Tensor | None, shape: Shape, ratio: float, generator: torch.Generator) -> Tensor:
        """Return the rows with the highest scores; of equal ones the first."""
        assert scores is not None
        order = scores.argsort(descending=True, stable=True)
        return spend_on_rows(order, shape, budget(shape, ratio))


@register_rule("highest_outputs")
class HighestOutputs(_Highest):
    """The channels that the examples excite most."""

    source = "outputs"


@register_rule("highest_gradients")
class HighestGradients(_Highest):
    """The channels through which the examples' loss pulls most."""

    source = "gradients"


class _Lowest(SelectionRule):
    def mask(self, scores: Tensor | None, shape: Shape, ratio: float, generator: torch.Generator) -> Tensor:
        """Return the rows with the lowest scores; of equal ones the first."""
        assert scores is not None
        return spend_on_rows(scores.argsort(stable=True), shape, budget(shape, ratio))


@register_rule("lowest_outputs")
class LowestOutputs(_Lowest):
    """The channels that the examples excite least."""

    source = "outputs"


@register_rule("lowest_gradients")
class LowestGradients(_Lowest):
    """The channels through which the examples' loss pulls least."""

    source = "gradients"


class _Exclusive(SelectionRule):
    def mask(self, scores: Tensor | None, shape: Shape, ratio: float, generator: torch.Generator) -> Tensor:
        """Return random rows without those that the highest rule touches.

        Where the others do not fill the budget (ratios above about one half), the lowest of the highest
        follow, so that the number of parameters stays comparable.
        """
        assert scores is not None
        count = budget(shape, ratio)
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
    """Parameters with the largest gain, layer by layer."""

    source = "gain"

    def mask(self, scores: Tensor | None, shape: Shape, ratio: float, generator: torch.Generator) -> Tensor:
        """Return the budget's worth of highest gains; of equal ones the first."""
        assert scores is not None
        order = scores.flatten().argsort(descending=True, stable=True).cpu()
        chosen = torch.zeros(len(order), dtype=torch.bool)
        chosen[order[: budget(shape, ratio)]] = True
        return chosen.view(shape)


def gains(hg: Tensor, squared_norms: Tensor, ridge: float = 0.0) -> Tensor:
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
        chosen[torch.randperm(len(chosen), generator=generator)[: budget(shape, ratio)]] = True
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
        return spend_on_rows(order[:reaching], shape, budget(shape, ratio))


@register_rule("threshold_outputs")
class ThresholdOutputs(_Threshold):
    """Channels that the examples excite at least ``level`` times as much as the most excited."""

    source = "outputs"


@register_rule("threshold_gradients")
class ThresholdGradients(_Threshold):
    """Channels through which the loss pulls at least ``level`` times as much as through the strongest."""

    source = "gradients"
