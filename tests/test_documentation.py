"""The code blocks of the documentation and of README run, in their order, and README stays short."""

import importlib.util
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from lightning_influence import Attributions
from lightning_influence.curvature import training_record
from lightning_influence.edits import directions, rules
from lightning_influence.methods import method
from lightning_influence.model.layers import layer as layers
from lightning_influence.model.losses import registry
from lightning_influence.model.uses.operations import registry as operations

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
WITH_CODE = [page for page in PAGES if not page.startswith("api/")]  # what is made of docstrings
WORDS_OF_README = 900


def read_code(path):
    """The Python blocks of a page as one text, with the snippets that they include."""
    blocks = re.findall(r"^( *)```python\n(.*?)^\1```$", path.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    code = "\n".join(textwrap.dedent(block) for _, block in blocks)
    return re.sub(
        r"^--8<--\n(.+)\n--8<--$", lambda found: (DOCS / found[1]).read_text("utf-8"), code, flags=re.M
    )


def run_page(path, monkeypatch, folder):
    for owner, table in (
        (rules, "_RULES"),
        (method, "_METHODS"),
        (layers, "_RULES"),
        (registry, "_PARSERS"),
        (directions, "_DIRECTIONS"),
        (operations, "_OPERATIONS"),
        (training_record, "_RULES"),
    ):
        monkeypatch.setattr(owner, table, dict(getattr(owner, table)))  # registrations last for the process
    monkeypatch.chdir(folder)
    names = {"__name__": "documentation"}
    exec(compile(read_code(path), path.name, "exec"), names)
    return names


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE)
def test_code_blocks_run(page, monkeypatch, tmp_path):
    code = read_code(DOCS / page)
    assert code
    for reference in {"kronfluence"}:  # what only the test extra's command installs
        if f"import {reference}" in code or f"from {reference}" in code:
            pytest.importorskip(reference, reason=f"{reference} is not installed")
    run_page(DOCS / page, monkeypatch, tmp_path)


def test_code_of_readme_runs_as_it_stands(monkeypatch, tmp_path, capsys):
    names = run_page(ROOT / "README.md", monkeypatch, tmp_path)
    assert "Strongest proponents" in capsys.readouterr().out
    attributions = names["attributions"]
    assert isinstance(attributions, Attributions)
    assert attributions.scores.shape == (197, 1600)
    assert attributions.diagnostics.parameters_covered == 1.0
    # Who helps most is of the query's class as a rule; one in ten would be by chance.
    helpers = names["labels"][:1600][attributions.top(1).indices[:, 0]]
    assert (helpers == names["labels"][1600:]).float().mean() > 0.5
    # It logs as any Trainer does, and finds the files where it says.
    file = Path(names["trainer"].log_dir) / "influence" / "attributions.safetensors"
    torch.testing.assert_close(Attributions.load(tmp_path / file).scores, attributions.scores)


def test_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.split()) <= WORDS_OF_README
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_every_page_can_be_reached():
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text("utf-8")))
    assert listed == set(PAGES)


def load_example(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_picture_of_readme_is_drawn(tmp_path, monkeypatch):
    picture = load_example("picture", monkeypatch)
    drawn = picture.draw(tmp_path / "new" / "picture.png", epochs=1)
    assert drawn.scores.shape == (picture.QUERIES, 1617)
    assert (tmp_path / "new" / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert picture.DEFAULT.read_bytes().startswith(b"\x89PNG")


def test_curves_are_drawn_from_a_log(tmp_path, monkeypatch):
    curves = load_example("curves", monkeypatch)
    figure = curves.draw(curves.train(tmp_path, epochs=3))
    panels = {axes.get_title(): len(axes.lines[0].get_xdata()) for axes in figure.axes}
    assert set(panels) == {f"influence/{name}" for name in curves.CURVES}
    assert panels["influence/grad_norm"] > 1
    assert curves.DEFAULT.read_bytes().startswith(b"\x89PNG")
