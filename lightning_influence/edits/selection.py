"""The parameters that were selected, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.jupyter import JupyterMixin
from rich.table import Table
from torch import Tensor

from lightning_influence.edits.rules import Evidence, SelectionRule, Shape, check_source
from lightning_influence.model.plan import Layout
from lightning_influence.support.arguments import is_number


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
        TypeError: if the rule returns something else than a boolean mask.
        ValueError: if the ratio is outside (0, 1], a mask has another shape or selects more than the ratio
            allows, or nothing is selected.
    """
    check_ratio(ratio)
    check_source(rule, rule.name)
    generator = torch.Generator().manual_seed(seed)
    scores = {} if rule.source is None else evidence.scores(rule.source)
    masks = {}
    for name, shape in evidence.shapes.items():
        mask = _as_mask(rule.mask(scores.get(name), shape, ratio, generator), rule.name, shape)
        _check_share(mask, rule.name, name, ratio)
        masks[name] = mask
    if not any(bool(mask.any()) for mask in masks.values()):
        raise ValueError(f"Rule {rule.name!r} selects no parameter in any layer; nothing could be edited.")
    return Selection(masks, rule.name, ratio)


def _as_mask(mask: Any, rule: str, shape: Shape) -> Tensor:
    """Return what a rule returned as a boolean tensor on the CPU.

    Raises:
        TypeError: if it is no boolean tensor or array.
        ValueError: if its shape is not the layer's.
    """
    accepted = f"accepted is a boolean tensor of shape {shape}, True at the parameters that may change"
    if isinstance(mask, np.ndarray):
        mask = torch.as_tensor(mask)
    if not isinstance(mask, Tensor):
        raise TypeError(f"Rule {rule!r} returned {type(mask).__name__}; {accepted}.")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"Rule {rule!r} returned {mask.dtype}; {accepted}. Compare scores with a level to get one."
        )
    if mask.shape != shape:
        raise ValueError(f"Rule {rule!r} returned a mask of shape {tuple(mask.shape)}; {accepted}.")
    return mask.cpu()


def _check_share(mask: Tensor, rule: str, layer: str, ratio: float) -> None:
    """Refuse a mask of more parameters than the ratio stands for, rounded up.

    Raises:
        ValueError: with both numbers.
    """
    count, most = int(mask.sum()), max(1, math.ceil(ratio * mask.numel()))
    if count > most:
        raise ValueError(
            f"Rule {rule!r} selects {count:,} of the {mask.numel():,} parameters of layer {layer!r}; "
            f"ratio={ratio:g} allows {most:,}. Pass a larger ratio= (up to 1.0), or select fewer in mask()."
        )


def check_ratio(ratio: object) -> None:
    """Refuse a ratio outside (0, 1].

    Raises:
        ValueError: saying what was got.
    """
    if not is_number(ratio) or not 0 < ratio <= 1:
        raise ValueError(
            f"Got ratio={ratio!r}; accepted is a share of each layer's parameters in (0, 1], such as 0.05."
        )


def _shape(mask: Tensor) -> tuple[int, int, int]:
    groups, d_out, d_in = mask.shape
    return groups, d_out, d_in
