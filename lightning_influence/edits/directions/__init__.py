"""Directions of an edit: generalized influence and its baselines, one file each."""

from lightning_influence.edits.directions import freeze as freeze
from lightning_influence.edits.directions import generalized as generalized
from lightning_influence.edits.directions import influence as influence
from lightning_influence.edits.directions import projected as projected
from lightning_influence.edits.directions import second_order as second_order
from lightning_influence.edits.directions.base import (
    Direction,
    Problem,
    direction_names,
    find_direction,
    register_direction,
)

__all__ = ["Direction", "Problem", "direction_names", "find_direction", "register_direction"]
