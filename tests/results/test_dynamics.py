"""Training dynamics and suspects as results: rankings, reasons, files, tables, plots, loggers, pages."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from result_examples import TRAIN, self_influence
from scipy.stats import rankdata

from lightning_influence.results.diagnostics import Diagnostics
from lightning_influence.results.dynamics import TrainingDynamics
from lightning_influence.results.loggers import log_attributions
from lightning_influence.results.plots import data_map
from lightning_influence.results.ranking import Labels
from lightning_influence.results.suspects import Suspects, _ranks, find_suspects
from lightning_influence.support.errors import NonFiniteError

LOSSES = torch.tensor([0.5, 0.1, 4.0, 0.3, 0.2, 0.8, 0.7, 0.4])
MARGINS = torch.tensor([1.0, 3.0, -2.0, 2.0, 2.5, 0.1, 0.2, 1.5])


def dynamics(**changes):
    values = {
        "train_indices": TRAIN,
        "diagnostics": Diagnostics(method="training dynamics", extra={"epochs": 6}, warnings=["a <note>"]),
        "loss_mean": LOSSES,
        "loss_spread": LOSSES / 2,
        "epochs_seen": torch.full((8,), 6),
        "margin_mean": MARGINS,
        "margin_spread": MARGINS.abs() / 2,
        "epochs_right": torch.tensor([5, 6, 0, 6, 6, 2, 4, 5]),
        "forgotten": torch.tensor([1, 0, 0, 0, 0, 2, 1, 0]),
        "first_learned": torch.tensor([1, 0, -1, 0, 0, 3, 2, 1]),
    }
    return TrainingDynamics(**{**values, **changes})


LOSS_ALONE = dict.fromkeys(("margin_mean", "margin_spread", "epochs_right", "forgotten", "first_learned"))


@pytest.mark.parametrize(
    ("by", "index", "value"),
    [("loss", 31, 4.0), ("spread", 31, 2.0), ("margin", 31, 2.0), ("forgotten", 11, 2.0), ("late", 31, 6.0)],
)
def test_the_most_conspicuous_come_first(by, index, value):
    ranking = dynamics().top(1, by=by)
    assert ranking.indices.tolist() == [[index]]
    assert ranking.scores.tolist() == [[value]]
    assert "Score:" in repr(ranking)
    assert dynamics().bottom(8, by=by).scores.flatten().diff().min() >= 0


def test_rankings_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="by='size'"):
        dynamics().top(2, by="size")
    with pytest.raises(ValueError, match="k=9"):
        dynamics().top(9)
    with pytest.raises(ValueError, match="got a part"):
        dynamics(forgotten=None)
    with pytest.raises(NonFiniteError):
        dynamics(loss_mean=LOSSES * float("nan"))
    with pytest.raises(ValueError, match="no labels"):
        dynamics(**LOSS_ALONE).top(2, by="forgotten")


@pytest.mark.parametrize("changes", [{}, LOSS_ALONE])
def test_files_are_read_back(tmp_path, changes):
    for result in (dynamics(**changes), find_suspects(dynamics(**changes), self_influence())):
        again = type(result).load(result.save(tmp_path / "a.safetensors"))
        own, read = result._tensors(), again._tensors()
        assert own.keys() == read.keys()
        assert all(torch.equal(own[name], read[name]) for name in own)
        assert again.diagnostics.warnings == result.diagnostics.warnings


@pytest.mark.parametrize("changes", [{}, LOSS_ALONE])
def test_tables_plots_and_loggers_take_them(tmp_path, changes):
    frame = dynamics(**changes).to_pandas()
    assert len(frame) == 8
    assert ("forgotten" in frame) == (not changes)
    assert isinstance(data_map(dynamics(**changes)), Figure)
    suspects = find_suspects(dynamics(**changes), self_influence())
    table = suspects.to_pandas()
    assert table["train"][0] == 31
    assert list(table["score"]) == sorted(table["score"], reverse=True)
    logger = CSVLogger(tmp_path)
    for result in (dynamics(**changes), suspects):
        files = log_attributions([logger], result, step=1, name="x", directory=tmp_path / "files")
        assert [path.suffix for path in files] == [".safetensors", ".csv"]
    metrics = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "x/score_max" in metrics
    assert metrics.count("\n") == 3, "one line for each result"


def test_suspects_are_ranked_by_a_mean_of_ranks():
    found = find_suspects(dynamics(), self_influence())
    order = torch.argsort(TRAIN)
    ranks = [(rankdata(signal.double().numpy()) - 1) / 7 for signal in (-MARGINS, self_influence().scores)]
    expected = 0.95 * ranks[0] + 0.05 * ranks[1]
    assert torch.equal(found.train_indices, TRAIN[order])
    torch.testing.assert_close(found.scores.double(), torch.tensor(expected)[order], rtol=1e-6, atol=1e-6)
    assert found.top(1).indices.tolist() == [[31]]
    plain = find_suspects(dynamics(**LOSS_ALONE), self_influence())
    ranks[0] = (rankdata(LOSSES.numpy()) - 1) / 7
    expected = torch.tensor(0.95 * ranks[0] + 0.05 * ranks[1])[order]
    torch.testing.assert_close(plain.scores.double(), expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12))
def test_ranks_share_ties(values):
    found = _ranks(torch.tensor(values).float())
    expected = (rankdata(values) - 1) / max(1, len(values) - 1)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_reasons_are_those_of_the_example():
    found = find_suspects(dynamics(), self_influence())
    worst, doubtful, fine = found.reasons(torch.tensor([31, 11, 20]))
    assert worst[0] == "never right in 6 epochs"
    assert worst[1] == "another label preferred by 2 on average"
    assert any(text.startswith("mean loss 4, above 99%") for text in worst)
    assert doubtful == ["right in 2 of 6 epochs only", "forgotten 2 times"]
    assert fine == []
    assert "never right in 6 epochs" in repr(found.top(3, labels=Labels(train={31: "seven"})))
    with pytest.raises(ValueError, match="does not hold"):
        found.reasons(torch.tensor([1]))


def test_only_examples_in_both_are_ranked_and_the_rest_is_said():
    fewer = dynamics()
    kept = {name: tensor[:5] for name, tensor in fewer._tensors().items()}
    found = find_suspects(dynamics(**kept), self_influence())
    assert found.train_indices.tolist() == sorted(TRAIN[:5].tolist())
    assert any("3 examples are in one" in warning for warning in found.diagnostics.warnings)
    with pytest.raises(ValueError, match="no example in common"):
        find_suspects(dynamics(train_indices=TRAIN + 1000), self_influence())


def page(path):
    text = path.read_text()
    return json.loads(text.split('id="data">', 1)[1].split("</script>", 1)[0])


@pytest.mark.parametrize("changes", [{}, LOSS_ALONE])
def test_pages_show_them(tmp_path, changes):
    items = [(f"text {i}", i % 2) for i in range(100)]
    data = page(dynamics(**changes).report(tmp_path / "d.html", items, k=4))
    found = {section["id"]: section for section in data["sections"]}
    assert [row["example"] for row in found["dynamics"]["rows"]][:2] == ["train-31", "train-11"]
    assert len(found["dynamics"]["rows"]) == 4
    points = {key: rest for key, *rest in found["map"]["points"]}
    assert points["train-31"] == [2.0, 4.0, 0 if changes else 2]
    data = page(find_suspects(dynamics(**changes), self_influence()).report(tmp_path / "s.html", items))
    found = {section["id"]: section for section in data["sections"]}
    first = found["suspects"]["rows"][0]
    assert first["example"] == "train-31"
    assert first["reasons"]
    assert Suspects.KIND == "suspects"
