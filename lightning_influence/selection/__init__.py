"""Which parameters an edit may change: one file a rule."""

from lightning_influence.selection import exclusive as exclusive
from lightning_influence.selection import gain as gain
from lightning_influence.selection import highest as highest
from lightning_influence.selection import lowest as lowest
from lightning_influence.selection import random_elements as random_elements
from lightning_influence.selection.base import (
    Evidence,
    SelectionRule,
    find_rule,
    register_rule,
    rule_names,
)
from lightning_influence.selection.selected import Selection, select
from lightning_influence.selection.threshold import ThresholdGradients, ThresholdOutputs

__all__ = [
    "Evidence",
    "Selection",
    "SelectionRule",
    "ThresholdGradients",
    "ThresholdOutputs",
    "find_rule",
    "register_rule",
    "rule_names",
    "select",
]
