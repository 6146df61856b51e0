"""Charts of a report as data: the page draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lightning_influence.results.diagnostics import Diagnostics

_BINS = 40
# Chosen by hand: of more numbers an even share is counted, since the picture would not change.
_MOST_VALUES = 2**22
_MOST_BARS = 40

Chart = dict[str, Any]


def build_charts(charts: Sequence[Chart | None]) -> dict[str, Any] | None:
    """A section of charts.

    Args:
        charts: what the other functions returned.

    Returns:
        The section; None without any chart.
    """
    present = [chart for chart in charts if chart is not None]
    if not present:
        return None
    return {"kind": "charts", "id": "charts", "title": "Charts", "charts": present}


def histogram(title: str, axis: str, values: Tensor | None, caption: str = "") -> Chart | None:
    """How numbers are distributed.

    Args:
        title: heading.
        axis: what the numbers are.
        values: any shape.
        caption: what to look for.

    Returns:
        The chart; None without numbers.
    """
    if values is None or not values.numel():
        return None
    flat = values.detach().cpu().flatten()
    stride = -(-flat.numel() // _MOST_VALUES)
    counts, edges = np.histogram(flat[::stride].double().numpy(), bins=_BINS)
    if stride > 1:
        caption = f"{caption} Counted: every {stride}th of {flat.numel():,} numbers.".strip()
    return {
        "kind": "histogram",
        "title": title,
        "axis": axis,
        "caption": caption,
        "edges": edges.tolist(),
        "counts": counts.tolist(),
    }


def bars(title: str, axis: str, values: Mapping[str, float], caption: str = "") -> Chart | None:
    """One bar for each name.

    Args:
        title: heading.
        axis: what the numbers are.
        values: by name; beyond the first forty they are counted.
        caption: what to look for.

    Returns:
        The chart; None without numbers.
    """
    if not values:
        return None
    hidden = len(values) - _MOST_BARS
    if hidden > 0:
        caption = f"{caption} {hidden} more are not drawn.".strip()
    pairs = [[name, float(value)] for name, value in list(values.items())[:_MOST_BARS]]
    return {"kind": "bars", "title": title, "axis": axis, "caption": caption, "bars": pairs}


def residual_chart(diagnostics: Diagnostics) -> Chart | None:
    """The residuals of the queries, or None."""
    return histogram(
        "Residuals of the queries",
        "relative residual (0 is exact)",
        diagnostics.residuals,
        "How exactly the equations behind each query's scores were solved.",
    )


def damping_chart(diagnostics: Diagnostics) -> Chart | None:
    """The damping of each layer, or None where it is the same in all."""
    if len(set(diagnostics.damping.values())) < 2:
        return None
    return bars("Damping by layer", "damping", diagnostics.damping)


def spectrum_charts(spectrum: Any) -> list[Chart]:
    """Density and leading eigenvalues of a curvature.

    Args:
        spectrum: a :class:`~lightning_influence.curvature.spectrum.Spectrum`, or None.

    Returns:
        Two charts, none without a spectrum.

    Raises:
        TypeError: if it is something else.
    """
    if spectrum is None:
        return []
    try:
        points, density, _ = spectrum.density()
        leading = {f"{i}": value.value for i, value in enumerate(spectrum.eigenvalues, start=1)}
        facts = spectrum.facts()
    except AttributeError as error:
        raise TypeError(
            f"Got spectrum of type {type(spectrum).__name__}; accepted is what InfluenceModule.spectrum "
            "returns."
        ) from error
    line: Chart = {
        "kind": "line",
        "title": "Spectral density of the curvature",
        "axis": "eigenvalue",
        "log": True,
        "caption": "Directions in which the loss is flat lie at 0; the few large eigenvalues are what the "
        "model has learned firmly. " + "; ".join(f"{name} {value}" for name, value in facts[:2]) + ".",
        "x": points.tolist(),
        "y": density.clamp_min(0).tolist(),
    }
    largest = bars("Largest eigenvalues", "eigenvalue", leading)
    return [line] if largest is None else [line, largest]
