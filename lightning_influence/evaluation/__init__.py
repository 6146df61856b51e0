"""Evaluation: retraining and proximal responses as ground truth, scores against it, curvature compared."""

from lightning_influence.evaluation.decomposition import Comparison, compare
from lightning_influence.evaluation.lds import (
    LinearDatamodelingScore,
    average_ranks,
    linear_datamodeling_score,
    predict_subsets,
    random_subsets,
    spearman,
)
from lightning_influence.evaluation.losses import binary_cross_entropy, cross_entropy, squared_error
from lightning_influence.evaluation.mislabels import mislabel_auroc
from lightning_influence.evaluation.pbrf import Response, proximal_response
from lightning_influence.evaluation.recipe import Recipe
from lightning_influence.evaluation.removal import RemovalCurve, leave_one_out, removal_curve, removal_masks
from lightning_influence.evaluation.retraining import retrain
from lightning_influence.evaluation.stacked import Member, train_members

__all__ = [
    "Comparison",
    "LinearDatamodelingScore",
    "Member",
    "Recipe",
    "RemovalCurve",
    "Response",
    "average_ranks",
    "binary_cross_entropy",
    "compare",
    "cross_entropy",
    "leave_one_out",
    "linear_datamodeling_score",
    "mislabel_auroc",
    "predict_subsets",
    "proximal_response",
    "random_subsets",
    "removal_curve",
    "removal_masks",
    "retrain",
    "spearman",
    "squared_error",
    "train_members",
]
