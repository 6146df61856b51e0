"""Edits of a trained model: forget or relabel training examples by changing few of its parameters."""

from lightning_influence.edits.directions import direction_names, register_direction
from lightning_influence.edits.options import EditOptions
from lightning_influence.edits.parameter_edit import ParameterEdit
from lightning_influence.edits.rules import SelectionRule, register_rule, rule_names

__all__ = [
    "EditOptions",
    "ParameterEdit",
    "SelectionRule",
    "direction_names",
    "register_direction",
    "register_rule",
    "rule_names",
]
