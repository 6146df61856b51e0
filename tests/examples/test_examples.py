"""The example runs as a user runs it and writes what it says; README's commands are there for CI."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_influence import Attributions

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("digits")
    command = [sys.executable, str(ROOT / "examples" / "digits.py"), "--fast", "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done, output


@pytest.mark.slow
def test_example_prints_tables_within_the_terminal(run):
    text = run[0].stdout
    for part in ("Strongest proponents", "Strongest opponents", "Highest self-influence", "damping"):
        assert part in text
    # Paths may be longer than a terminal is wide; nothing else is.
    assert [line for line in text.splitlines() if len(line) > 80 and str(run[1]) not in line] == []


@pytest.mark.slow
def test_example_shows_progress_of_every_pass(run):
    for name in ("Epoch", "curvature products", "query gradients", "scores", "self-influence"):
        assert re.search(rf"{name} .*\d+/\d+", run[0].stdout), name


@pytest.mark.slow
def test_example_finds_flipped_labels(run):
    found = re.search(r"AUROC of self-influence as a detector of flipped labels: (\d\.\d+)", run[0].stdout)
    assert found is not None
    # 0.998 after all epochs; the few epochs here see most of it.
    assert float(found[1]) > 0.9


@pytest.mark.slow
def test_example_emits_no_warning_of_ours(run):
    ours = [line for line in run[0].stderr.splitlines() if "lightning_influence" in line]
    expected = "The factors from the fit stand for few examples"  # so few epochs do not pay for many
    assert [line for line in ours if expected not in line] == []


@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.slow
def test_example_writes_logs_picture_and_attributions(run, model):
    folder = run[1]
    attributions = Attributions.load(folder / model / "attributions.safetensors")
    assert attributions.scores is not None
    assert attributions.scores.shape == (len(attributions.query_indices), 1617)
    assert attributions.diagnostics.parameters_covered == 1.0
    assert (folder / model / "montage.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(folder / "tensorboard" / model / "version_0")).Reload().Tags()
    assert "influence/montage" in events["images"]
    assert "influence/top/text_summary" in events["tensors"]
    assert {"train_loss", "accuracy", "influence/score_max"} <= set(events["scalars"])
    header = (folder / "csv" / model / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train_loss", "accuracy", "influence/score_max"} <= set(header)


def test_ci_finds_commands_of_readme():
    blocks = re.findall(
        r"<!-- command: (\w+) -->\n```bash\n(.+?)\n```", (ROOT / "README.md").read_text("utf-8")
    )
    assert [name for name, _ in blocks] == ["example", "tests"]
    assert blocks[0][1].endswith("python examples/digits.py")
    assert blocks[1][1].endswith("python -m pytest -n auto")
