"""Influence of training data on the predictions of models trained with Lightning."""

from lightning_influence.api.module import InfluenceModule
from lightning_influence.api.trainer import InfluenceTrainer, forget, influence, relabel, self_influence
from lightning_influence.collecting.callback import InfluenceCallback
from lightning_influence.edits.parameter_edit import ParameterEdit
from lightning_influence.results.attributions import Attributions
from lightning_influence.results.averages import average_attributions
from lightning_influence.results.diagnostics import Diagnostics
from lightning_influence.results.ranking import Labels
from lightning_influence.results.self_influence import SelfInfluence
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
    "average_attributions",
    "forget",
    "influence",
    "relabel",
    "self_influence",
]
