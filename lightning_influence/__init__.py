"""Influence of training data on the predictions of models trained with Lightning."""

from lightning_influence.api.dynamics import training_dynamics
from lightning_influence.api.module import InfluenceModule
from lightning_influence.api.trainer import (
    InfluenceTrainer,
    forget,
    influence,
    relabel,
    self_influence,
    suspects,
)
from lightning_influence.collecting.callback import InfluenceCallback
from lightning_influence.curvature.training_record import register_optimizer
from lightning_influence.edits.parameter_edit import ParameterEdit
from lightning_influence.edits.rules import register_rule
from lightning_influence.methods.method import register_method
from lightning_influence.model.layers.layer import register_layer
from lightning_influence.model.losses.registry import register_loss
from lightning_influence.results.attributions import Attributions
from lightning_influence.results.averages import average_attributions
from lightning_influence.results.diagnostics import Diagnostics
from lightning_influence.results.dynamics import TrainingDynamics
from lightning_influence.results.ranking import Labels
from lightning_influence.results.self_influence import SelfInfluence
from lightning_influence.results.suspects import Suspects
from lightning_influence.support.errors import InfluenceError, InfluenceWarning

__all__ = [
    "Attributions",
    "Diagnostics",
    "InfluenceCallback",
    "InfluenceError",
    "InfluenceModule",
    "InfluenceTrainer",
    "InfluenceWarning",
    "Labels",
    "ParameterEdit",
    "SelfInfluence",
    "Suspects",
    "TrainingDynamics",
    "average_attributions",
    "forget",
    "influence",
    "register_layer",
    "register_loss",
    "register_method",
    "register_optimizer",
    "register_rule",
    "relabel",
    "self_influence",
    "suspects",
    "training_dynamics",
]
