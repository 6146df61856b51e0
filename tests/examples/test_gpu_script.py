"""The script for accelerators runs at a tiny size, and its models there have the sizes that it names."""

import json

import pytest
import torch
from benchmarks import load_benchmark

gpu = load_benchmark("gpu")
STAGES = {
    "plain fit",
    "fit with the callback",
    "factors",
    "ekfac scores",
    "aggregated query",
    "self-influence",
}


def run(monkeypatch, tmp_path, *arguments):
    monkeypatch.setattr(gpu, "Analyzer", None)  # the peer alone takes ten times as long
    path = tmp_path / "figures.json"
    monkeypatch.setattr("sys.argv", ["gpu.py", "--tiny", "--json", str(path), *arguments])
    gpu.main()
    return json.loads(path.read_text())


@pytest.mark.slow
def test_every_stage_is_measured(monkeypatch, tmp_path, capsys):
    found = run(monkeypatch, tmp_path, "resnet50", "gpt2")
    assert found["tiny"]
    assert "show that the script runs" in capsys.readouterr().out
    assert [model["model"] for model in found["models"]] == ["resnet50", "gpt2"]
    for model in found["models"]:
        stages = model["stages"]
        assert stages.pop("kronfluence")["left_out"]
        assert STAGES | {"auto"} == stages.keys()
        assert all(stage["seconds"] > 0 and stage["plain_epochs"] > 0 for stage in stages.values())


def test_what_does_not_fit_into_the_time_is_named(monkeypatch, tmp_path):
    found = run(monkeypatch, tmp_path, "gpt2", "--seconds", "0")
    assert all("left_out" in stage for stage in found["models"][0]["stages"].values())


@pytest.mark.parametrize(("name", "millions"), [("resnet18", 11.2), ("resnet50", 23.5), ("gpt2", 162.5)])
def test_models_are_as_large_as_those_they_are_named_for(name, millions):
    with torch.device("meta"):
        parameters = sum(p.numel() for p in gpu.CASES[name].make().parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.2)
