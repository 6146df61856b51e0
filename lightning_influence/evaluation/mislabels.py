"""Mislabel detection: do the examples with the largest self-influence include the wrongly labelled ones?"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc


def mislabel_auroc(self_influence: Tensor, flipped: Tensor) -> Tensor:
    """Area under the ROC curve of self-influence as a detector of flipped labels (Koh & Liang 2017).

    Args:
        self_influence: ``tau(n, n)``, shape ``(N,)``; only its order matters.
        flipped: whether the label was flipped, boolean, shape ``(N,)``.

    Returns:
        Probability that a flipped example has more self-influence than another; 0.5 is chance.

    Raises:
        ValueError: if shapes differ, a value is not finite, or all labels are flipped or none.

    Example:
        >>> mislabel_auroc(torch.tensor([0.1, 5.0, 0.3, 0.2]), torch.tensor([False, True, False, True]))
        tensor(0.7500)
    """
    if self_influence.ndim != 1 or self_influence.shape != flipped.shape:
        raise ValueError(
            f"Expected self_influence (N,) and flipped (N,), got {tuple(self_influence.shape)} and "
            f"{tuple(flipped.shape)}."
        )
    if not self_influence.isfinite().all():
        raise ValueError("self_influence must be finite: NaN and infinite values cannot be ordered.")
    flipped = flipped.bool()
    if flipped.all() or not flipped.any():
        raise ValueError(f"Expected some flipped and some correct labels, got {int(flipped.sum())} flipped.")
    # binary_auroc squashes values outside [0, 1], which would tie the largest ones: pass places among the
    # distinct values, in float64, where all of them differ.
    distinct, places = torch.unique(self_influence, return_inverse=True)
    return binary_auroc(places.double() / len(distinct), flipped.int())
