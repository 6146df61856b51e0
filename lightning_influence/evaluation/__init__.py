"""Evaluation: retraining as truth, the linear datamodeling score, mislabel detection, curvature compared."""

from lightning_influence.evaluation.decomposition import Comparison, compare
from lightning_influence.evaluation.lds import (
    LinearDatamodelingScore,
    average_ranks,
    linear_datamodeling_score,
    predict_subsets,
    random_subsets,
    spearman,
)
from lightning_influence.evaluation.mislabels import mislabel_auroc
from lightning_influence.evaluation.recipe import Recipe
from lightning_influence.evaluation.retraining import retrain
from lightning_influence.evaluation.stacked import Member, train_members

__all__ = [
    "Comparison",
    "LinearDatamodelingScore",
    "Member",
    "Recipe",
    "average_ranks",
    "compare",
    "linear_datamodeling_score",
    "mislabel_auroc",
    "predict_subsets",
    "random_subsets",
    "retrain",
    "spearman",
    "train_members",
]
