"""Layers: how per-example gradients factorise, one file a kind of layer."""

from lightning_influence.layers import conv as conv
from lightning_influence.layers import linear as linear
from lightning_influence.layers.base import Layer, LayerRule
from lightning_influence.layers.dense import DenseGradients
from lightning_influence.layers.discovery import LayerPlan, find_layers
from lightning_influence.layers.factored import FactoredGradients
from lightning_influence.layers.gradients import LayerGradients
from lightning_influence.layers.recorder import Recorder
from lightning_influence.layers.registry import find_rule, register, supported_types

__all__ = [
    "DenseGradients",
    "FactoredGradients",
    "Layer",
    "LayerGradients",
    "LayerPlan",
    "LayerRule",
    "Recorder",
    "find_layers",
    "find_rule",
    "register",
    "supported_types",
]
