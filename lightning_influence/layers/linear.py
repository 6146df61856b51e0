"""Linear layers: every leading dimension after the examples is a position."""

from torch import Tensor, nn

from lightning_influence.layers.base import LayerRule, split_rows
from lightning_influence.layers.registry import register


@register(nn.Linear)
class LinearRule(LayerRule):
    """``nn.Linear`` on ``(B, ..., D)`` or on rows ``(B * R, D)``."""

    def shape(self, module: nn.Module) -> tuple[int, int, int]:
        """Return ``(1, out_features, in_features)``."""
        assert isinstance(module, nn.Linear)
        return 1, module.out_features, module.in_features

    def inputs(self, module: nn.Module, x: Tensor, num_examples: int) -> Tensor:
        """Return inputs ``(1, B, R, in_features)``."""
        return split_rows(x, num_examples)

    def output_gradients(self, module: nn.Module, grad: Tensor, num_examples: int) -> Tensor:
        """Return output gradients ``(1, B, R, out_features)``."""
        return split_rows(grad, num_examples)
