"""Loss functions: how they are found in a training step, and what is known of their output curvature."""

from lightning_influence.model.losses import bce as bce
from lightning_influence.model.losses import cross_entropy as cross_entropy
from lightning_influence.model.losses import divergence as divergence
from lightning_influence.model.losses import likelihoods as likelihoods
from lightning_influence.model.losses import mse as mse
from lightning_influence.model.losses import robust as robust
