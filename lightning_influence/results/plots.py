"""Pictures of attributions, as matplotlib figures that need no display.

matplotlib is optional: ``pip install 'lightning-influence[plot]'``. The figures are built without ``pyplot``:
no backend is chosen and no window opens; save them with ``figure.savefig(path)`` or show them in a notebook.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_influence.results.attributions import Attributions
from lightning_influence.results.dynamics import TrainingDynamics
from lightning_influence.results.images import to_image
from lightning_influence.results.ranking import Labels, Ranking
from lightning_influence.results.rendering import describe_group
from lightning_influence.results.self_influence import SelfInfluence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Of the frames around training images with the highest and with the lowest scores.
COLOURS = ("tab:blue", "tab:orange")


def montage(
    attributions: Attributions,
    train_images: Any,
    query_images: Any,
    k: int = 5,
    *,
    labels: Labels | None = None,
    max_queries: int = 8,
) -> Figure:
    """Each query's image beside the training images with its highest and its lowest scores.

    Args:
        attributions: what to show.
        train_images: anything indexed by training dataset indices: a dataset, a tensor, a mapping. An item is
            an image ``(H, W)``, ``(C, H, W)`` or ``(H, W, C)`` with 1, 3 or 4 channels, or a tuple that
            starts with one.
        query_images: the same for queries; with several query dataloaders, a sequence with one for each. Not
            looked at where rows are groups of queries, whose names are drawn.
        k: how many training images at either end.
        labels: texts to show beside the indices.
        max_queries: how many queries are shown; the rest is counted in the heading.

    Returns:
        A figure: a row per query; columns: the query, ``k`` highest scores (framed in blue), ``k`` lowest
        scores (framed in orange).

    Raises:
        ValueError: if fewer than ``k`` training examples per query are stored, ``max_queries`` is below 1, or
            an item is no image, or columns are groups of training examples.
        ImportError: if matplotlib is not installed.
    """
    if attributions.train_names:
        raise ValueError(
            "Got scores of groups of training examples, which have no images; omit train_groups."
        )
    labels = labels or Labels()
    ends = [end(k, max_queries=max_queries) for end in (attributions.top, attributions.bottom)]
    shown = min(max_queries, len(attributions.query_indices))
    figure = _new_figure(1.3 * (2 * k + 1), 1.7 * shown + 0.8)
    axes = figure.subplots(shown, 2 * k + 1, squeeze=False)
    for row in range(shown):
        _draw_query(axes[row, 0], attributions, row, query_images, labels)
        for end, ranking in enumerate(ends):
            for rank in range(k):
                _draw_train(
                    axes[row, 1 + end * k + rank], ranking, row, rank, train_images, labels, COLOURS[end]
                )
    hidden = len(attributions.query_indices) - shown
    heading = f"query, {ends[0].title.lower()} (blue), {ends[1].title.lower()} (orange)"
    figure.suptitle(heading + (f" (and {hidden} more queries)" if hidden else ""), fontsize=10)
    return figure


def histogram(attributions: Attributions | SelfInfluence, bins: int = 50) -> Figure:
    """How the scores are distributed, with a logarithmic count.

    Args:
        attributions: what to show: all scores, or the ends of the rankings if only these are stored (the
            title says so).
        bins: number of bins.

    Returns:
        A figure with one histogram.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure = _new_figure(6, 3.5)
    axes = figure.subplots()
    if attributions.scores is not None:
        axes.hist(attributions.scores.flatten().numpy(), bins=bins, color="tab:blue")
        axes.set_title(f"{attributions.scores.numel()} scores", fontsize=10)
    else:
        ends = [attributions.top(attributions.stored), attributions.bottom(attributions.stored)]
        values = [end.scores.flatten().numpy() for end in ends]
        axes.hist(values, bins=bins, label=[end.title for end in ends], stacked=True)
        axes.set_title(
            f"only the {attributions.stored} scores at either end of each query's ranking", fontsize=10
        )
        axes.legend()
    axes.set_yscale("log")
    axes.set_xlabel(f"score: predicted change of the {attributions.diagnostics.measurement} on removal")
    axes.set_ylabel("count")
    return figure


def data_map(dynamics: TrainingDynamics) -> Figure:
    """Mean loss against its spread over the epochs, one dot an example (Swayamdipta et al. 2020).

    Low and left are easy examples; right are those that were ambiguous for a time; high and left those that
    were hard to the end, wrong labels among them.

    Args:
        dynamics: of a fit.

    Returns:
        A figure; where margins are known, the colour is the share of the epochs in which the example was
        right.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure = _new_figure(6, 4.5)
    axes = figure.subplots()
    right = dynamics.epochs_right
    colour = "tab:blue" if right is None else (right / dynamics.epochs_seen).numpy()
    dots = axes.scatter(
        dynamics.loss_spread.numpy(),
        dynamics.loss_mean.numpy(),
        c=colour,
        s=8,
        alpha=0.7,
        cmap=None if right is None else "coolwarm_r",
        vmin=None if right is None else 0,
        vmax=None if right is None else 1,
    )
    if right is not None:
        figure.colorbar(dots, label="share of the epochs in which it was right")
    axes.set_xlabel("spread of the loss over the epochs")
    axes.set_ylabel("mean loss over the epochs")
    axes.set_title(f"{dynamics.stored} training examples, {dynamics.epochs} epochs", fontsize=10)
    return figure


def figure_to_array(figure: Figure) -> NDArray[np.uint8]:
    """A figure's pixels.

    Args:
        figure: any figure.

    Returns:
        ``(H, W, 4)`` red, green, blue and opacity, 0 to 255.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba(), dtype=np.uint8).copy()


def _new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'lightning-influence[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _draw_query(axes: Any, attributions: Attributions, row: int, images: Any, labels: Labels) -> None:
    index, loader = int(attributions.query_indices[row]), None
    if attributions.query_counts is not None:  # a group has no image of its own
        text = describe_group(attributions.query_names[row], int(attributions.query_counts[row]))
        axes.text(0.5, 0.5, text.replace("$", r"\$"), ha="center", va="center", fontsize=7)
        axes.set_axis_off()
        return
    if attributions.query_dataloaders is not None:
        loader = int(attributions.query_dataloaders[row])
        images = images[loader]
    name = f"query {index}" if loader is None else f"query {loader}: {index}"
    _draw(axes, images[index], [name, labels.query_text(index, loader)], "black")


def _draw_train(
    axes: Any, ranking: Ranking, row: int, rank: int, images: Any, labels: Labels, colour: str
) -> None:
    index, score = int(ranking.indices[row, rank]), float(ranking.scores[row, rank])
    _draw(axes, images[index], [str(index), labels.train_text(index), f"{score:+.2g}"], colour)


def _draw(axes: Any, item: Any, lines: list[str], colour: str) -> None:
    image = to_image(item)
    axes.imshow(image, cmap="gray" if image.ndim == 2 else None, interpolation="nearest")
    # A "$" would start a formula.
    axes.set_title("\n".join(line.replace("$", r"\$") for line in lines if line), fontsize=7, color=colour)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(color=colour, linewidth=2)
