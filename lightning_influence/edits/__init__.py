"""Edits of a trained model: forget or relabel training examples by changing few of its parameters.

Rules and directions of your own are registered: a rule chooses the parameters that may change, a direction
says how.
"""

from lightning_influence.edits.directions import Problem, direction_names, register_direction
from lightning_influence.edits.parameter_edit import ParameterEdit
from lightning_influence.edits.request import EditOptions
from lightning_influence.edits.rules import SelectionRule, count_budget, register_rule, rule_names
from lightning_influence.linalg.normal_equations import SubsetSolution

__all__ = [
    "EditOptions",
    "ParameterEdit",
    "Problem",
    "SelectionRule",
    "SubsetSolution",
    "count_budget",
    "direction_names",
    "register_direction",
    "register_rule",
    "rule_names",
]
