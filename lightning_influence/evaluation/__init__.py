"""Evaluation: retraining and proximal responses as ground truth, and scores measured against it."""

from lightning_influence.evaluation.harness import Retraining, retrain_subsets
from lightning_influence.evaluation.lds import (
    LinearDatamodelingScore,
    linear_datamodeling_score,
    predict_subsets,
    random_subsets,
)
from lightning_influence.evaluation.losses import binary_cross_entropy, cross_entropy, squared_error
from lightning_influence.evaluation.mislabels import mislabel_auroc
from lightning_influence.evaluation.pbrf import Response, proximal_response
from lightning_influence.evaluation.removal import RemovalCurve, leave_one_out, removal_curve, removal_masks

__all__ = [
    "LinearDatamodelingScore",
    "RemovalCurve",
    "Response",
    "Retraining",
    "binary_cross_entropy",
    "cross_entropy",
    "leave_one_out",
    "linear_datamodeling_score",
    "mislabel_auroc",
    "predict_subsets",
    "proximal_response",
    "random_subsets",
    "removal_curve",
    "removal_masks",
    "retrain_subsets",
    "squared_error",
]
