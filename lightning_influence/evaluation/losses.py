"""Per-example losses of outputs and targets: what retraining minimises and measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn

# A loss or a measurement: of outputs and targets of B examples, one value for each, (B,).
ExampleLoss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Per-example cross-entropy, the loss of the benchmark tasks.

    Args:
        outputs: logits, ``(B, C)``.
        targets: class indices, ``(B,)``.

    Returns:
        Losses, ``(B,)``.
    """
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Per-example squared error, the mean over an example's outputs as ``F.mse_loss`` takes it.

    Args:
        outputs: predictions, ``(B, ...)``.
        targets: of the same shape.

    Returns:
        Losses, ``(B,)``.
    """
    _check(outputs, targets)
    return nn.functional.mse_loss(outputs, targets, reduction="none").flatten(1).mean(1)


def binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Per-example binary cross-entropy of logits, the mean over an example's outputs.

    Args:
        outputs: logits, ``(B, ...)``.
        targets: probabilities of the same shape, in the dtype of the outputs.

    Returns:
        Losses, ``(B,)``.
    """
    _check(outputs, targets)
    return (
        nn.functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none").flatten(1).mean(1)
    )


def _check(outputs: Tensor, targets: Tensor) -> None:
    """Refuse shapes that would broadcast, and examples without an output dimension.

    Raises:
        ValueError: saying what was got.
    """
    if outputs.shape != targets.shape or outputs.ndim < 2:
        raise ValueError(
            f"Got outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}; accepted are equal "
            "shapes of at least 2 dimensions, (B, ...): unsqueeze a target of shape (B,)."
        )
