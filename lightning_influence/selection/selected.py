"""The parameters that were selected, and how."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.jupyter import JupyterMixin
from rich.table import Table
from torch import Tensor

from lightning_influence.layers.layout import Layout
from lightning_influence.selection.base import Evidence, SelectionRule


@dataclass(frozen=True, eq=False, repr=False)
class Selection(JupyterMixin):
    """Masks of the selected parameters, layer by layer.

    Attributes:
        masks: by layer boolean, ``(G, D_out, D_in)``: rows are output channels, the last column the bias if
            the layer has a trained one.
        rule: the rule's name.
        ratio: what was asked for.
    """

    masks: dict[str, Tensor]
    rule: str
    ratio: float

    @property
    def count(self) -> int:
        """Number of selected parameters."""
        return sum(int(mask.sum()) for mask in self.masks.values())

    @property
    def numel(self) -> int:
        """Number of parameters to choose from."""
        return sum(mask.numel() for mask in self.masks.values())

    def flat(self) -> Tensor:
        """Return the mask over the flat vector of all covered parameters, ``(P,)``."""
        return Layout({name: _shape(mask) for name, mask in self.masks.items()}).join(self.masks)

    def __rich__(self) -> Table:
        table = Table(title=f"{self.count:,} of {self.numel:,} parameters by {self.rule!r}")
        for column in ("layer", "channels", "parameters", "share"):
            table.add_column(column, justify="left" if column == "layer" else "right")
        for name, mask in self.masks.items():
            rows = mask.flatten(0, 1)
            channels = f"{int(rows.any(1).sum())} of {len(rows)}"
            table.add_row(name, channels, f"{int(mask.sum()):,}", f"{float(mask.float().mean()):.1%}")
        return table

    def __repr__(self) -> str:
        return f"Selection(rule={self.rule!r}, ratio={self.ratio:g}, {self.count} of {self.numel} parameters)"


def select(rule: SelectionRule, evidence: Evidence, ratio: float, seed: int = 0) -> Selection:
    """Apply a rule to every layer.

    Args:
        rule: the rule.
        evidence: scores of the kind that the rule needs.
        ratio: share of each layer's parameters, in (0, 1].
        seed: of the rule's random choices.

    Returns:
        The masks.

    Raises:
        ValueError: if the ratio is outside (0, 1].
    """
    check_ratio(ratio)
    generator = torch.Generator().manual_seed(seed)
    scores = {} if rule.source is None else evidence.scores(rule.source)
    masks = {
        name: rule.mask(scores.get(name), shape, ratio, generator) for name, shape in evidence.shapes.items()
    }
    return Selection(masks, rule.name, ratio)


def check_ratio(ratio: object) -> None:
    """Refuse a ratio outside (0, 1].

    Raises:
        ValueError: saying what was got.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise ValueError(
            f"Got ratio={ratio!r}; accepted is a share of each layer's parameters in (0, 1], such as 0.05."
        )


def _shape(mask: Tensor) -> tuple[int, int, int]:
    groups, d_out, d_in = mask.shape
    return groups, d_out, d_in
