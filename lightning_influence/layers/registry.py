"""Which rule serves which class of modules."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lightning_influence.layers.base import LayerRule

_RULES: dict[type[nn.Module], LayerRule] = {}


def register(*module_types: type[nn.Module]) -> Callable[[type[LayerRule]], type[LayerRule]]:
    """Class decorator: serve modules of these types with the decorated rule.

    Args:
        *module_types: classes whose instances the rule can handle; a subclass is served too unless it
            overrides ``forward``.

    Returns:
        The decorator; it returns the rule unchanged.
    """

    def decorate(rule: type[LayerRule]) -> type[LayerRule]:
        for module_type in module_types:
            _RULES[module_type] = rule()
        return rule

    return decorate


def find_rule(module: nn.Module) -> LayerRule | None:
    """Return the rule for this module, or None; with a ``forward`` of its own a subclass may differ."""
    for base in type(module).__mro__:
        if base in _RULES and type(module).forward is base.forward:
            return _RULES[base]
    return None


def supported_types() -> list[str]:
    """Return names of the registered module classes, sorted."""
    return sorted(module_type.__name__ for module_type in _RULES)
