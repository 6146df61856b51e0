"""Retraining any LightningModule on subsets of its data, in processes of their own.

A run here is a fresh module and a fresh Trainer; the rest of :mod:`lightning_influence.evaluation` takes what
retraining measured as tensors, wherever it was trained.
"""

from lightning_influence.evaluation.harness.pool import retrain_subsets
from lightning_influence.evaluation.harness.retraining import Retraining

__all__ = ["Retraining", "retrain_subsets"]
