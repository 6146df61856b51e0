"""The editing examples run, print their tables within a terminal, and write what they say."""

import importlib
import logging
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module", autouse=True)
def examples_on_the_path():
    """Examples import their neighbours, set filters and seeds: all of that is undone."""
    level, threads = logging.getLogger("lightning.pytorch").level, torch.get_num_threads()
    sys.path.insert(0, str(EXAMPLES))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        yield
    sys.path.remove(str(EXAMPLES))
    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(level)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forget_class", "change_labels", "repair_backdoor"])
def test_example(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    module = importlib.import_module(name)
    monkeypatch.setattr(module.main.__globals__["console"], "_width", 80)
    rows = module.run(["--quick", "--output", str(tmp_path)])
    text = capsys.readouterr().out
    second = ["second-order IF"] if name == "forget_class" else []
    edits = ["IF", *second, "PIF 5% gain", "FIF 5% gain", "GIF 5% gain"]
    assert list(rows) == ["original", *edits, "retrained"]
    for row in rows:
        assert row in text
        assert {len(measured) for measured in rows.values()} == {1}
    assert [line for line in text.splitlines() if len(line) > 80 and str(tmp_path) not in line] == []
    assert rows["retrained"][0]["kl"] == pytest.approx(0, abs=1e-6)
    original, edited = rows["original"][0], rows["GIF 5% gain"][0]
    if name == "forget_class":
        assert edited["accuracy"] == 0
        assert edited["loss"] > original["loss"]
    else:
        assert edited["loss"] < original["loss"]
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(tmp_path / "tensorboard" / name / "version_0")).Reload().Tags()
    assert "confusion" in events["images"]
    assert "table/text_summary" in events["tensors"]
    assert "GIF_5%_gain/accuracy" in events["scalars"] or "GIF_5__gain/accuracy" in events["scalars"]


def test_two_seeds_make_a_standard_error():
    editing = importlib.import_module("_editing")
    assert editing.cell([1.0], 1) == "1.0"
    assert editing.cell([1.0, 3.0], 1) == "2.0 ± 1.0"


@pytest.mark.slow
def test_study_of_steps(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    study = importlib.import_module("edit_steps")
    monkeypatch.setattr(study, "METHODS", ("fif", "gif"))
    monkeypatch.setattr(study, "MULTIPLES", {"forget_class": (1.0, 200.0), "change_labels": (1.0,)})
    study.main(["--quick"])
    text = capsys.readouterr().out
    words = " ".join(text.split())
    assert "forget_class: % forgotten / % kept (before: 100.0 /" in words
    assert "change_labels: % sevens / % others" in words
    longest = [line for line in text.splitlines() if line.startswith(("│ fif", "│ gif"))]
    assert len(longest) == 4
    assert all(line.split("│")[-2].split("/")[0].strip() == "0.0" for line in longest[:2])
