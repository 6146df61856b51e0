"""Loss functions: how they are found in a training step, and what is known of their output curvature.

A loss of your own is one class and one registered parser; see :func:`register_loss`.
"""

from lightning_influence.model.losses import bce as bce
from lightning_influence.model.losses import cross_entropy as cross_entropy
from lightning_influence.model.losses import divergence as divergence
from lightning_influence.model.losses import likelihoods as likelihoods
from lightning_influence.model.losses import mse as mse
from lightning_influence.model.losses import robust as robust
from lightning_influence.model.losses.elementwise import ElementwiseLoss
from lightning_influence.model.losses.loss import OutputLoss
from lightning_influence.model.losses.registry import register_loss

__all__ = ["ElementwiseLoss", "OutputLoss", "register_loss"]
