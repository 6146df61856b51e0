"""The code blocks of the documentation run, in their order."""

import re
from pathlib import Path

import pytest

from lightning_influence.edits import rules
from lightning_influence.methods import method
from lightning_influence.model import layers
from lightning_influence.model.losses import registry

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_code_blocks_run(page, monkeypatch, tmp_path):
    for owner, table in ((rules, "_RULES"), (method, "_METHODS"), (layers, "_RULES"), (registry, "_PARSERS")):
        monkeypatch.setattr(owner, table, dict(getattr(owner, table)))  # registrations last for the process
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks
    exec(compile("\n".join(blocks), page, "exec"), {"__name__": "documentation"})
