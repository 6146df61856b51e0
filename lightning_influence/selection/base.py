"""What a selection rule is: something that maps scores of channels or parameters to masks.

Shapes: a layer has ``C = G * D_out`` output channels, each a row of ``D_in`` parameters (weights, then the
bias if it is trained); a mask is boolean of the layer's matrix shape ``(G, D_out, D_in)``.
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
