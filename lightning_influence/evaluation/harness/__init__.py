"""Retraining any LightningModule on subsets of its data, in processes of their own.

This stands above :mod:`lightning_influence.evaluation`, which knows no Lightning: a run here is a fresh
module and a fresh Trainer. Small models that a recipe describes train far faster side by side, with
:func:`lightning_influence.evaluation.retrain`.
"""

from lightning_influence.evaluation.harness.pool import retrain_subsets
from lightning_influence.evaluation.harness.retraining import Retraining

__all__ = ["Retraining", "retrain_subsets"]
