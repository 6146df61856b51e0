"""The examples of the gallery and the notebooks run, on less training, and find what they say."""

import importlib
import json
import logging
import re
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))


@pytest.fixture(autouse=True)
def examples_on_the_path(monkeypatch, tmp_path):
    """Examples import their neighbours, set filters, threads, seeds and levels: all of that is undone."""
    level, threads = logging.getLogger("lightning.pytorch").level, torch.get_num_threads()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # what a seed leaves there is gone afterwards
    with warnings.catch_warnings():
        yield
    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(level)


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_cleaning_finds_wrong_labels_and_mends_them(tmp_path):
    cleaning = importlib.import_module("clean_labels")
    looked_at = (0, 80)
    run = cleaning.clean(0, epochs=12, looked_at=looked_at)
    assert set(run) == {*cleaning.WAYS, "found", "wrong"}
    wrong = run["wrong"][0]
    assert run["found"][0] == 0
    # Of 80 random examples a fifth is wrong.
    assert run["found"][1] > 2 * 80 * wrong / cleaning.TRAINING
    assert len({run[way][0] for way in cleaning.WAYS}) == 1  # nothing looked at: the same model
    assert run["suspects, mended"][1] > run["suspects, mended"][0]
    cleaning.draw([run, run], looked_at).savefig(tmp_path / "cleaning.png")
    assert is_picture(tmp_path / "cleaning.png")


@pytest.mark.slow
def test_sources_are_told_apart_by_one_question(tmp_path):
    choosing = importlib.import_module("choose_data")
    output = tmp_path / "new" / "sources.png"
    predicted, measured = choosing.main(["--seeds", "1", "--epochs", "10", "--output", str(output)])
    assert list(predicted) == list(measured) == list(choosing.SOURCES)
    for changes in (predicted, measured):
        assert changes["upside down"][0] < 0 < changes["clean"][0]
    assert is_picture(output)


@pytest.mark.slow
def test_an_answer_rests_on_sentences_about_the_same_person(tmp_path):
    texts = importlib.import_module("explain_text")
    output = tmp_path / "text.png"
    attributions, sentences, answers = texts.main(["--epochs", "25", "--output", str(output)])
    assert attributions.scores.shape == (texts.RUMOURS, len(sentences))
    assert attributions.diagnostics.parameters_covered == 1.0
    best = attributions.top(1).indices[:, 0].tolist()
    names = [answer.split()[0] for answer in answers]
    same = sum(sentences[index].name == name for index, name in zip(best, names, strict=True))
    assert same >= texts.RUMOURS / 2  # one in 32 would be by chance
    assert is_picture(output)


@pytest.mark.slow
def test_a_project_of_lightning_cli(tmp_path, capsys):
    pytest.importorskip("jsonargparse", reason="jsonargparse is not installed")
    project = importlib.import_module("lightning_cli")
    output = tmp_path / "map.png"
    suspects = project.main(["--trainer.max_epochs", "8", "--output", str(output)])
    assert suspects.stored == 1617
    found = re.search(r"detector of wrong labels: (\d\.\d+)", capsys.readouterr().out)
    assert float(found[1]) > 0.95
    assert is_picture(output)
    assert "influence/grad_norm" in next((tmp_path / "runs").rglob("metrics.csv")).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_from_beginning_to_end(notebook, tmp_path, capsys):
    runner = importlib.import_module("run_notebook")
    names = runner.run(notebook, tmp_path)
    assert is_picture(tmp_path / f"{notebook.stem}.png")
    assert Path.cwd() == tmp_path
    if notebook.stem == "tabular":
        assert names["correlation"] > 0.6
    else:
        assert min(names["agreement"]) > 0.6
        assert "method: auto" in capsys.readouterr().out


def test_there_are_notebooks_without_outputs():
    assert len(NOTEBOOKS) == 2
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text("utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert code
        assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_every_example_is_on_its_page_with_its_picture():
    page = (ROOT / "docs" / "examples.md").read_text("utf-8")
    scripts = [path.name for path in EXAMPLES.glob("*.py") if not path.name.startswith("_")]
    for name in [*scripts, *(path.name for path in NOTEBOOKS)]:
        assert name in page, name
    pictures = re.findall(r"\]\((images/[\w.]+)\)", page)
    assert len(pictures) >= 8
    assert all(is_picture(ROOT / "docs" / picture) for picture in pictures)
