"""Attributions in real loggers, in stand-ins for services, in files, and with loggers that fail."""

import csv
import warnings
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_influence.results.attributions import Attributions
from lightning_influence.results.diagnostics import Diagnostics
from lightning_influence.results.loggers import Media, log_attributions, log_media, summary_metrics
from lightning_influence.results.ranking import Labels
from lightning_influence.results.self_influence import SelfInfluence
from lightning_influence.results.top_k import StreamingExtremes
from lightning_influence.support.errors import InfluenceWarning

SCORES = torch.linspace(-1, 1, 21).view(3, 7)
TRAIN = torch.arange(7) * 10
LABELS = Labels(train={60: "cat"})


@pytest.fixture(autouse=True)
def _no_other_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", InfluenceWarning)
        yield


def facts(**changes):
    values = {
        "method": "ekfac",
        "damping": {"0": 1.0, "2": 3.0},
        "residuals": torch.tensor([0.125, 0.25, 0.75]),
        "seconds": 2.5,
        "passes": [
            {"name": "Influence: query gradients", "seconds": 0.5, "examples": 3},
            {"name": "Influence: self-influence", "seconds": 1.0, "examples": 4},
            {"name": "Influence: self-influence", "seconds": 0.25, "examples": 3},
        ],
        "parameters_covered": 0.5,
    }
    return Diagnostics(**{**values, **changes})


def attributions():
    return Attributions(
        scores=SCORES, train_indices=TRAIN, query_indices=torch.tensor([4, 0, 2]), diagnostics=facts()
    )


def stored_ends(k=2):
    stream = StreamingExtremes(3, k)
    stream.update(SCORES, TRAIN)
    return Attributions.from_extremes(stream.result(), query_indices=torch.arange(3), diagnostics=facts())


def self_influence():
    return SelfInfluence(scores=SCORES[2], train_indices=TRAIN, diagnostics=facts(residuals=None))


def figure():
    picture = Figure(figsize=(1, 2), dpi=20)
    picture.subplots().plot([0, 1])
    return picture


class PlainLogger(Logger):
    """A logger with metrics alone."""

    name, version = "plain", 0

    def __init__(self):
        self.metrics = []

    def log_hyperparams(self, params):
        raise AssertionError("not asked for")

    def log_metrics(self, metrics, step=None):
        self.metrics.append((metrics, step))


class TableLogger(PlainLogger):
    """A logger of the user's with its own tables."""


class BrokenLogger(PlainLogger):
    def log_metrics(self, metrics, step=None):
        raise ConnectionError("no route to host")


def test_the_summary_is_made_of_floats():
    metrics = summary_metrics(attributions())
    assert all(type(value) is float for value in metrics.values())
    want = {
        "train_examples": 7,
        "queries": 3,
        "seconds": 2.5,
        "seconds_query_gradients": 0.5,
        "seconds_self_influence": 1.25,
        "parameters_covered": 0.5,
        "damping_mean": 2.0,
        "residual_mean": 0.375,
        "residual_max": 0.75,
        "score_max": 1.0,
        "score_min": -1.0,
    }
    assert {key: metrics[key] for key in want} == want
    # Quantiles of 21 evenly spaced float32 numbers: exact but for their rounding.
    quantiles = [metrics[f"score_q{q}"] for q in ("05", "25", "50", "75", "95")]
    np.testing.assert_allclose(quantiles, [-0.9, -0.5, 0.0, 0.5, 0.9], atol=1e-6)


def test_the_summary_leaves_out_what_is_not_known():
    metrics = summary_metrics(stored_ends())
    assert (metrics["score_max"], metrics["score_min"]) == (1.0, -1.0)
    assert not any(key.startswith("score_q") for key in metrics)
    metrics = summary_metrics(self_influence())
    assert metrics.keys().isdisjoint({"queries", "residual_mean", "residual_max"})
    bare = SelfInfluence(scores=SCORES[0], train_indices=TRAIN, diagnostics=Diagnostics(method="identity"))
    assert "damping_mean" not in summary_metrics(bare)


def test_tensorboard_gets_metrics_tables_and_pictures(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run")
    log_attributions([logger], attributions(), step=7, figures={"montage": figure()}, labels=LABELS)
    events = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0, "images": 0})
    events.Reload()
    [scalar] = events.Scalars("influence/residual_max")
    assert (scalar.value, scalar.step) == (0.75, 7)
    assert len(events.Tags()["scalars"]) == len(summary_metrics(attributions()))
    [table] = events.Tensors("influence/top/text_summary")
    text = table.tensor_proto.string_val[0].decode()
    assert table.step == 7
    assert "| 4 | 1 | 60 | cat | -0.4 |" in text
    assert "positive: the example helps the query" in text
    assert (
        "| method | ekfac |"
        in events.Tensors("influence/diagnostics/text_summary")[0].tensor_proto.string_val[0].decode()
    )
    assert "influence/bottom/text_summary" in events.Tags()["tensors"]
    [image] = events.Images("influence/montage")
    assert (image.width, image.height, image.step) == (20, 40, 7)


def test_csv_logger_has_the_metrics_on_disk(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.save()
    log_attributions([logger], self_influence(), step=5, name="self")
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "5"]
    assert float(rows[1]["self/score_max"]) == 1.0
    assert rows[0]["loss"] == "1.0"


def test_other_loggers_get_metrics_and_registered_ones_their_media():
    seen = []

    @log_media.register(TableLogger)
    def _(logger, media):
        seen.append(media)

    plain, table, picture = PlainLogger(), TableLogger(), figure()
    log_attributions(
        [plain, table], attributions(), step=3, name="why", figures={"a": picture}, labels=LABELS
    )
    for logger in (plain, table):
        [(metrics, step)] = logger.metrics
        assert step == 3
        assert metrics == {f"why/{key}": value for key, value in summary_metrics(attributions()).items()}
    [media] = seen
    assert isinstance(media, Media)
    assert (media.name, media.step, media.figures, list(media.files)) == ("why", 3, {"a": picture}, [])
    assert media.rankings["top"].rows()[0] == [4, 1, 60, "cat", pytest.approx(-0.4)]
    assert media.rankings["bottom"].indices[0, 0] == 0
    assert ("method", "ekfac") in media.facts


def test_files_are_written_and_returned(tmp_path):
    folder = tmp_path / "new" / "influence"
    files = log_attributions(
        [], attributions(), step=0, directory=str(folder), figures={"a/b": figure()}, labels=LABELS
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        "a_b.png",
        "attributions.csv",
        "attributions.safetensors",
    ]
    assert sorted(files) == sorted(folder.iterdir())
    assert torch.equal(Attributions.load(folder / "attributions.safetensors").scores, SCORES)
    assert (folder / "a_b.png").read_bytes().startswith(b"\x89PNG")
    with open(folder / "attributions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 5
    assert rows[0] | {"score": ""} == {
        "end": "top", "query": "4", "rank": "1", "train": "60", "train_label": "cat", "score": "",
    }  # fmt: skip
    assert float(rows[0]["score"]) == pytest.approx(-0.4)
    assert rows[15]["end"] == "bottom"


def test_fewer_stored_than_shown_and_self_influence_are_fine(tmp_path):
    files = log_attributions([], stored_ends(1), step=0, directory=tmp_path / "ends")
    assert len(files[1].read_text().splitlines()) == 1 + 2 * 3
    log_attributions([], self_influence(), step=0, directory=tmp_path / "self")
    assert (tmp_path / "self" / "self_influence.safetensors").exists()
    assert (tmp_path / "self" / "self_influence.csv").read_text().splitlines()[0] == "end,rank,train,score"


def test_no_logger_and_no_directory_is_fine():
    assert log_attributions([], attributions(), step=0) == []


def test_a_failing_logger_is_named_and_the_others_are_served(tmp_path):
    good = PlainLogger()
    message = "BrokenLogger could not log the attributions' metrics: ConnectionError: no route to host"
    with pytest.warns(InfluenceWarning, match=message) as record:
        files = log_attributions([BrokenLogger(), good], attributions(), step=0, directory=tmp_path)
    assert len([w for w in record if w.category is InfluenceWarning]) == 1
    assert len(good.metrics) == 1
    assert len(files) == 2


def test_failing_media_are_named_and_metrics_still_logged(tmp_path):
    class Failing(TableLogger):
        pass

    @log_media.register(Failing)
    def _(logger, media):
        raise TypeError("no tables today")

    logger = Failing()
    with pytest.warns(
        InfluenceWarning, match="Failing could not log .* tables and figures: TypeError: no tables"
    ):
        log_attributions([logger], attributions(), step=0)
    assert len(logger.metrics) == 1


def test_files_that_cannot_be_written_are_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    logger = PlainLogger()
    with pytest.warns(InfluenceWarning, match=r"file/attributions\.\w+ could not be written: \w+Error"):
        assert log_attributions([logger], attributions(), step=0, directory=blocked) == []
    assert blocked.read_text() == "in the way"
    assert len(logger.metrics) == 1


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = PlainLogger()
    assert log_attributions([logger], attributions(), step=0, directory=tmp_path) == []
    assert logger.metrics == []
    assert list(tmp_path.iterdir()) == []


def stand_in(base, **attributes):
    """A logger of a service's class that records calls instead of connecting."""
    members = {
        "__init__": lambda self: None,
        "__del__": lambda self: None,
        "log_metrics": Mock(),
        **attributes,
    }
    return type(base.__name__, (base,), members)()


def test_wandb_gets_tables_and_images():
    logger = stand_in(WandbLogger, log_table=Mock(), log_image=Mock())
    log_attributions([logger], attributions(), step=4, figures={"montage": figure()})
    tables = {call.args[0]: call for call in logger.log_table.call_args_list}
    assert set(tables) == {"influence/top", "influence/bottom", "influence/diagnostics"}
    assert ["method", "ekfac"] in tables["influence/diagnostics"].args[2]
    assert tables["influence/top"].args[1] == ["query", "rank", "train", "score"]
    assert len(tables["influence/top"].args[2]) == 3 * 5
    assert tables["influence/top"].kwargs == {"step": 4}
    [call] = logger.log_image.call_args_list
    assert call.args[0] == "influence/montage"
    assert call.args[1][0].shape == (40, 20, 4)
    assert call.args[1][0].dtype == np.uint8
    logger.log_metrics.assert_called_once()


def test_mlflow_gets_tables_figures_and_files(tmp_path):
    client, picture = Mock(), figure()
    logger = stand_in(MLFlowLogger, experiment=client, run_id="r1")
    files = log_attributions(
        [logger], attributions(), step=4, directory=tmp_path, figures={"montage": picture}
    )
    run, table, name = client.log_table.call_args_list[0].args
    assert (run, name) == ("r1", "influence/step_4/top.json")
    assert {key: len(column) for key, column in table.items()} == dict.fromkeys(
        ["query", "rank", "train", "score"], 15
    )
    assert table["train"][0] == 60
    run, exact, name = client.log_dict.call_args_list[0].args
    assert (run, name) == ("r1", "influence/step_4/top.json")
    assert exact == {"columns": list(table), "data": list(map(list, zip(*table.values(), strict=True)))}
    client.log_figure.assert_called_once_with("r1", picture, "influence/step_4/montage.png")
    assert [call.args for call in client.log_artifact.call_args_list] == [
        ("r1", str(file), "influence/step_4") for file in files
    ]


def test_comet_gets_tables_figures_and_files(tmp_path):
    experiment, picture = Mock(), figure()
    logger = stand_in(CometLogger, experiment=experiment)
    files = log_attributions(
        [logger], attributions(), step=4, directory=tmp_path, figures={"montage": picture}
    )
    name, rows, columns = experiment.log_table.call_args_list[0].args
    assert (name, columns) == ("influence/top_4.csv", ["query", "rank", "train", "score"])
    assert len(rows) == 15
    experiment.log_figure.assert_called_once_with("influence/montage", picture, step=4)
    assets = [call.args for call in experiment.log_asset.call_args_list]
    assert assets == [(str(file), f"influence/{file.name}") for file in files]
