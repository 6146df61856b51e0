"""Figures without a display: what they show, which items are images, and what they say without matplotlib."""

import ast
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import lightning_influence
from lightning_influence.results.attributions import Attributions
from lightning_influence.results.diagnostics import Diagnostics
from lightning_influence.results.plots import figure_to_array, histogram, montage, to_image
from lightning_influence.results.ranking import Labels
from lightning_influence.results.self_influence import SelfInfluence
from lightning_influence.results.top_k import StreamingExtremes

SCORES = torch.linspace(-1, 1, 30).view(3, 10)
TRAIN = torch.arange(10) * 3
FACTS = Diagnostics(method="ekfac")


def attributions(**changes):
    values = {"scores": SCORES, "train_indices": TRAIN, "query_indices": torch.tensor([4, 0, 2])}
    return Attributions(**{**values, "diagnostics": FACTS, **changes})


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def test_montage_shows_query_and_both_ends_with_their_images():
    train = torch.arange(30.0).view(30, 1, 1).expand(30, 4, 4)
    figure = montage(attributions(), train, {i: np.full((4, 4), 100 + i) for i in range(5)}, k=2)
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 3 * 5
    assert titles(figure)[:5] == ["query 4", "27\n-0.38", "24\n-0.45", "0\n-1", "3\n-0.93"]
    pixels = [float(axes.images[0].get_array()[0, 0]) for axes in figure.axes[:5]]
    assert pixels == [104, 27, 24, 0, 3]
    assert "strongest proponents" in figure.get_suptitle()
    assert "more queries" not in figure.get_suptitle()


def test_montage_counts_hidden_queries_and_shows_labels_as_they_are():
    images = torch.zeros(30, 3, 4, 4)
    labels = Labels(train={27: "cost $5$"}, query={4: "7 -> 1"})
    figure = montage(attributions(), images, images, k=1, labels=labels, max_queries=1)
    assert titles(figure)[:2] == ["query 4\n7 -> 1", "27\ncost \\$5\\$\n-0.38"]
    assert "(and 2 more queries)" in figure.get_suptitle()
    assert figure_to_array(figure).shape[2] == 4


def test_montage_reads_each_query_from_its_own_loader():
    result = attributions(query_dataloaders=torch.tensor([0, 1, 1]))
    train = torch.zeros(30, 4, 4)
    figure = montage(result, train, [torch.full((5, 4, 4), 1.0), torch.full((5, 4, 4), 2.0)], k=1)
    assert titles(figure)[::3] == ["query 0: 4", "query 1: 0", "query 1: 2"]
    assert [float(axes.images[0].get_array()[0, 0]) for axes in figure.axes[::3]] == [1, 2, 2]


def test_montage_refuses_more_than_is_stored_and_what_is_no_image():
    with pytest.raises(ValueError, match="k=11, but 10 examples"):
        montage(attributions(), {}, {}, k=11)
    rows = torch.zeros(30, 64)
    with pytest.raises(ValueError, match=r"shape \(64,\) is no image; accepted are \(H, W\)"):
        montage(attributions(), rows, rows, k=1)


@pytest.mark.parametrize(
    ("item", "shape"),
    [
        (torch.zeros(5, 6), (5, 6)),
        (torch.zeros(1, 5, 6), (5, 6)),
        (torch.zeros(5, 6, 1), (5, 6)),
        (torch.zeros(3, 5, 6), (5, 6, 3)),
        (torch.zeros(4, 5, 6, requires_grad=True), (5, 6, 4)),
        (np.zeros((5, 6, 3), dtype=np.uint8), (5, 6, 3)),
        ((Image.new("L", (6, 5)), 7), (5, 6)),
        ((torch.zeros(5, 6), 7), (5, 6)),
        ([torch.zeros(1, 5, 6, dtype=torch.bfloat16), torch.tensor(1)], (5, 6)),
        ([[0, 1], [1, 0]], (2, 2)),
    ],
)
def test_images_of_every_layout(item, shape):
    assert to_image(item).shape == shape


def test_normalised_colours_are_scaled_and_others_kept():
    colours = torch.tensor([-2.0, 0.0, 2.0]).view(3, 1, 1).expand(3, 2, 2)
    assert to_image(colours)[0, 0].tolist() == [0.0, 0.5, 1.0]
    unit = torch.tensor([0.25, 0.5, 0.75]).view(3, 1, 1).expand(3, 2, 2)
    assert to_image(unit)[0, 0].tolist() == [0.25, 0.5, 0.75]
    bytes_ = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1).expand(3, 2, 2)
    np.testing.assert_allclose(to_image(bytes_)[0, 0], [0.0, 0.2, 1.0], rtol=1e-6)
    assert to_image(torch.full((3, 2, 2), -1.5)).max() == 0.0


@pytest.mark.parametrize("shape", [(2, 5, 6), (5,), (1, 3, 5, 6)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="is no image"):
        to_image(torch.zeros(shape))


def test_histogram_counts_every_score():
    axes = histogram(attributions(), bins=7).axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == 30
    assert "predicted change of the loss" in axes.get_xlabel()
    axes = histogram(SelfInfluence(scores=SCORES[0], train_indices=TRAIN, diagnostics=FACTS), bins=4).axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == 10


def test_histogram_of_stored_ends_says_so():
    stream = StreamingExtremes(3, 2)
    stream.update(SCORES, TRAIN)
    result = Attributions.from_extremes(stream.result(), query_indices=torch.arange(3), diagnostics=FACTS)
    axes = histogram(result).axes[0]
    assert axes.get_title() == "only the 2 scores at either end of each query's ranking"
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["Strongest proponents", "Strongest opponents"]


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for plot in (lambda: histogram(attributions()), lambda: montage(attributions(), {}, {}, 1)):
        with pytest.raises(ImportError, match=r"pip install 'lightning-influence\[plot\]'"):
            plot()


@pytest.mark.parametrize(
    "module",
    ["results/plots.py", "results/attributions.py", "results/self_influence.py", "results/result.py"],
)
def test_optional_packages_are_imported_only_when_used(module):
    source = (Path(lightning_influence.__file__).parent / module).with_suffix(".py")
    names = set()
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
    assert "__future__" in names
    assert not names & {"matplotlib", "pandas"}
