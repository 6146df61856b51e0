"""Influence of training data on the predictions of models trained with Lightning."""

from lightning_influence.attributions import Attributions
from lightning_influence.callback import InfluenceCallback
from lightning_influence.editing import forget, relabel
from lightning_influence.edits.parameter_edit import ParameterEdit
from lightning_influence.ensembles import average_attributions
from lightning_influence.errors import InfluenceError, InfluenceWarning
from lightning_influence.module import InfluenceModule
from lightning_influence.results.diagnostics import Diagnostics
from lightning_influence.results.labels import Labels
from lightning_influence.results.self_influence import SelfInfluence
from lightning_influence.trainer import InfluenceTrainer, influence, self_influence

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
