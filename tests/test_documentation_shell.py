"""The commands of the documentation's page about the command line run, one after the other, as they stand."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("jsonargparse", reason="jsonargparse is not installed")

from lightning_influence.__main__ import COMMANDS, main

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "cli.md").read_text("utf-8")


def read_commands():
    """The lines of the blocks marked as shell, of which those that end with a backslash go on in the next."""
    blocks = "".join(re.findall(r"^```shell\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
    return [shlex.split(line) for line in blocks.replace("\\\n", " ").splitlines()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_commands_of_the_page_run(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "train", raising=False)
    for name in ("train.py", "digits.yaml"):
        shutil.copy(DOCS / "setup" / name, name)
    for program, *arguments in read_commands():
        if program == "python":
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            continue
        assert program == "lightning-influence"
        if "--print_config" in arguments:
            capsys.readouterr()
            with pytest.raises(SystemExit, match="0"):
                main(arguments)
            assert yaml.safe_load(capsys.readouterr().out)["top_k"] == 10
            continue
        assert main(arguments) == 0
    monkeypatch.delitem(sys.modules, "train")
    for name in ("influence", "suspects", "forget", "relabel"):
        files = {path.name for path in Path("influence_results", name).iterdir()}
        assert {"config.yaml", "report.html"} < files
    assert "Twenty to look at" in Path("influence_results/suspects/report.html").read_text("utf-8")
    assert "state_dict" in torch.load("influence_results/forget/edited.ckpt", weights_only=True)


def test_every_command_is_in_the_table():
    assert re.findall(r"^\| `([a-z-]+)` \| `", PAGE, re.MULTILINE) == list(COMMANDS)
