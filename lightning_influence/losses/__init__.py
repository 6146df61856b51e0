"""Loss functions: how they are found in a training step, and what is known of their output curvature."""

from lightning_influence.losses.base import OutputLoss, Reduction
from lightning_influence.losses.bce import BinaryCrossEntropyLoss
from lightning_influence.losses.calls import LossCall
from lightning_influence.losses.capture import LossCapture
from lightning_influence.losses.cross_entropy import CrossEntropyLoss
from lightning_influence.losses.hook import ScaledLoss, check_per_example, per_example_capture
from lightning_influence.losses.mse import SquaredErrorLoss
from lightning_influence.losses.registry import register

__all__ = [
    "BinaryCrossEntropyLoss",
    "CrossEntropyLoss",
    "LossCall",
    "LossCapture",
    "OutputLoss",
    "Reduction",
    "ScaledLoss",
    "SquaredErrorLoss",
    "check_per_example",
    "per_example_capture",
    "register",
]
