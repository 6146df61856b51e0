"""Influence of training data on the predictions of models trained with Lightning."""

from lightning_influence.attributions import Attributions, Diagnostics, SelfInfluence
from lightning_influence.callback import InfluenceCallback
from lightning_influence.module import InfluenceModule
from lightning_influence.rendering import Labels
from lightning_influence.trainer import InfluenceTrainer, influence, self_influence

__all__ = [
    "Attributions",
    "Diagnostics",
    "InfluenceCallback",
    "InfluenceModule",
    "InfluenceTrainer",
    "Labels",
    "SelfInfluence",
    "influence",
    "self_influence",
]
