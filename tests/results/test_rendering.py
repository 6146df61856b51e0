"""Tables show every number and text, in any width, and count what they leave out."""

import re
from collections import Counter

import pytest
import torch
from rich.console import Console

from lightning_influence.results.attributions import Attributions
from lightning_influence.results.diagnostics import Diagnostics
from lightning_influence.results.ranking import Labels, Ranking
from lightning_influence.results.rendering import (
    build_facts_table,
    markdown_table,
    render_plain,
    score_caption,
)
from lightning_influence.results.self_influence import SelfInfluence


def ranking(q=2, k=3, **changes):
    values = {
        "indices": torch.arange(q * k).view(q, k) + 1000,
        "scores": -torch.arange(q * k).view(q, k) / 8 + 0.25,
        "query_indices": torch.arange(q) + 70,
        "title": "Strongest proponents",
        "caption": score_caption("loss"),
    }
    return Ranking(**{**values, **changes})


def squeezed(text):
    return re.sub(r"\s+", "", text)


def test_a_table_holds_indices_scores_sign_and_meaning():
    text = repr(ranking())
    for part in ("Strongest proponents", "70", "71", "1000", "1005", "+0.25", "-0.375", "#3"):
        assert part in text
    assert "positive: the example helps the query" in " ".join(text.split())


def test_queries_beyond_the_limit_are_counted():
    text = repr(ranking(q=12, max_queries=10))
    assert "... and 2 more queries (max_queries=10)." in text
    assert " 79 " in text
    assert " 80 " not in text
    assert "more queries" not in repr(ranking(q=10, max_queries=10))


def test_many_ranks_go_to_further_lines():
    text = repr(ranking(q=1, k=12))
    for part in ("1-5", "6-10", "11-12", "1011"):
        assert part in text
    assert len(re.findall(r"\b70\b", text)) == 1


@pytest.mark.parametrize("width", [24, 40, 200])
def test_nothing_is_cut_in_a_narrow_terminal(width):
    table = ranking(q=2, k=3, labels=Labels(train={1000: "a rather long class name"}))
    letters = Counter(squeezed(render_plain(table, width)).replace("─", ""))
    assert letters == Counter(squeezed(render_plain(table, 1000)).replace("─", ""))
    assert letters["…"] == 0


def test_labels_stand_beside_indices_and_are_not_markup():
    labels = Labels(train={1000: "[red]cat[/red]", 1001: "dog"}, query=["?"] * 70 + ["7 -> 1", "[b]"])
    text = repr(ranking(labels=labels))
    for part in ("[red]cat[/red]", "dog", "7 -> 1", "[b]"):
        assert part in text


def test_labels_take_mappings_sequences_and_tensors():
    labels = Labels(train=torch.tensor([3, 4]), query=[{0: "first"}, ["second"]])
    assert labels.train_text(1) == "4"
    assert labels.train_text(2) == ""
    assert labels.query_text(0, dataloader=0) == "first"
    assert labels.query_text(0, dataloader=1) == "second"
    assert labels.query_text(5, dataloader=1) == ""
    assert Labels().train_text(0) == Labels().query_text(0, 1) == ""


def test_several_loaders_are_told_apart():
    assert "1: 71" in repr(ranking(query_dataloaders=torch.tensor([0, 1])))


def test_rows_hold_every_query_and_rank():
    labels = Labels(train={1000: "cat"}, query={70: "q"})
    table = ranking(q=2, k=2, labels=labels, max_queries=1, query_dataloaders=None)
    assert table.columns() == ["query", "query_label", "rank", "train", "train_label", "score"]
    assert table.rows() == [
        [70, "q", 1, 1000, "cat", 0.25],
        [70, "q", 2, 1001, "", 0.125],
        [71, "", 1, 1002, "", 0.0],
        [71, "", 2, 1003, "", -0.125],
    ]
    assert len(table.rows(1)) == 2
    loaders = ranking(q=1, k=1, query_dataloaders=torch.tensor([4]))
    assert loaders.columns() == ["query", "dataloader", "rank", "train", "score"]
    assert loaders.rows() == [[70, 4, 1, 1000, 0.25]]
    alone = ranking(q=1, k=1, query_indices=None)
    assert alone.columns() == ["rank", "train", "score"]
    assert alone.rows() == [[1, 1000, 0.25]]


def test_markdown_counts_the_rest_and_escapes():
    text = ranking(q=3, k=1, max_queries=2, labels=Labels(train={1000: "a|b\nc"})).markdown()
    assert text.startswith("**Strongest proponents**\n\n| query | rank | train | train_label | score |\n")
    assert "| 70 | 1 | 1000 | a\\|b<br>c | +0.25 |" in text
    assert "... and 1 more queries" in text
    assert "1002" not in text
    assert markdown_table(["a"], []) == "| a |\n| --- |"


def test_notebooks_get_html_and_text():
    bundle = ranking()._repr_mimebundle_((), ())
    assert "1005" in bundle["text/html"]
    assert "1005" in bundle["text/plain"]


def test_facts_are_shown_in_full_and_without_markup():
    long = "word " * 60
    text = render_plain(build_facts_table([("[bold]name[/bold]", long), ("b", "[x]")], "Title"), 50)
    assert squeezed(text).count("word") == 60
    assert "[bold]name[/bold]" in text
    assert "[x]" in text


def attributions(**changes):
    facts = Diagnostics(
        method="ekfac",
        damping={"0": 0.001, "2": 0.004},
        damping_origin="from the run",
        residuals=torch.tensor([0.25, 0.75]),
        passes=[{"name": "train", "seconds": 2.0, "examples": 6}],
        layers={"0": 1000, "2": 234},
        parameters_covered=0.5,
        checkpoint="best.ckpt",
        warnings=["layer [norm] left out"],
        extra={"note": "seed 3", "basis": torch.eye(2)},
    )
    values = {"train_indices": torch.arange(6), "query_indices": torch.arange(2), "diagnostics": facts}
    return Attributions(**{"scores": torch.linspace(-1, 1, 12).view(2, 6), **values, **changes})


def test_the_summary_is_the_certificate():
    text = render_plain(attributions())
    for part in (
        "all scores",
        "ekfac",
        "0.001 to 0.004 (from the run)",
        "mean 0.5, max 0.75",
        "2 layers, 1,234 parameters, 50.0% of the trainable ones",
        "best.ckpt",
        "pass train",
        "2 s, 6 examples",
        "layer [norm] left out",
        "seed 3",
        "tensor (2, 2)",
        "Strongest proponents",
    ):
        assert part in text


def test_the_summary_of_a_bare_diagnosis_says_what_is_missing():
    text = render_plain(attributions(diagnostics=Diagnostics(method="identity")))
    for part in ("not computed", "none: the weights in memory", "damping"):
        assert part in text


def test_self_influence_has_no_query_column():
    result = SelfInfluence(
        scores=torch.tensor([0.5, 0.125]),
        train_indices=torch.tensor([8, 9]),
        diagnostics=Diagnostics(method="ekfac"),
    )
    text = render_plain(result)
    assert "Highest self-influence" in text
    assert "+0.125" in text
    assert "query" not in text


def test_colour_terminals_work_too():
    console = Console(force_terminal=True, width=100, color_system="truecolor")
    with console.capture() as capture:
        console.print(attributions())
    assert "\x1b[" in capture.get()
