"""Nine published Lightning projects as shipped: the same fits with and without the callback, and answers.

``python examples/benchmarks/projects.py CACHE [project ...]`` makes a virtual environment for each project in
the folder ``CACHE``, or uses the one that is there, and runs ``projects/on_PROJECT.py`` in it. Every row is
one model, trained by the project's own code on a few dozen examples, with no line written for us. The first
run installs some 9 GB and takes half an hour, later ones about ten minutes.

Columns: whether the weights are the same bits with the callback; whether ``influence`` answers; the covered
share of the trainable parameters, and of the queries' squared gradient; the relative error of identity
scores against one backward pass for each example; lines written for us; the seconds of an answer with
``method="auto"`` in epochs of the plain fit (which takes a fraction of a second here).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
TORCH = "torch==2.13.0"  # without a version, pip may take a build for another accelerator
#: What pip installs for each project: optional parts that its first import asks for are named, too.
REQUIREMENTS = {
    "chemprop": ["chemprop>=2.3"],
    "braindecode": ["braindecode>=1.8"],
    "tabular": ["pytorch_tabular>=1.2", "requests"],
    "torchuncertainty": [
        "torch-uncertainty>=0.13", "torchvision", "scikit-learn", "scipy", "timm", "opencv-python-headless",
        "kornia", "h5py",
    ],
    "uqbox": ["lightning-uq-box>=0.2"],
    "forecasting": ["pytorch-forecasting>=1.8"],
    "darts": ["darts[torch]>=0.48"],
    "neuralforecast": ["neuralforecast>=3"],
    "scvi": ["scvi-tools>=1.4"],
}  # fmt: skip
MARK = "RESULT "


def make_environment(cache: Path, project: str) -> Path:
    """Return the Python of a project's environment, which is made if it is not there.

    Raises:
        subprocess.CalledProcessError: if something does not install; pip's output is in the log beside it.
    """
    folder = cache / project
    python = folder / "bin" / "python"
    done = folder / "complete"
    if done.exists():
        return python
    with open(cache / f"{project}.log", "w") as log:
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [
                str(python),
                "-m",
                "pip",
                "install",
                "--prefer-binary",
                TORCH,
                str(ROOT),
                *REQUIREMENTS[project],
            ],
        ):
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    # Compiled operators for another build of torch end the import; without them torchaudio does.
    for library in folder.glob("lib/python*/site-packages/torchaudio/lib/*.so"):
        library.unlink()
    done.touch()
    return python


def run(python: Path, project: str) -> list[dict[str, Any]]:
    """Return the rows of a project."""
    script = Path(__file__).parent / "projects" / f"on_{project}.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(python), "-W", "ignore", str(script)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    rows = [json.loads(line.removeprefix(MARK)) for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode:
        rows.append({"project": project, "model": "", "failed": done.stderr.strip().rpartition("\n")[2]})
    return rows


def show(rows: list[dict[str, Any]]) -> Table:
    """Return the table of all rows."""
    table = Table(
        "project",
        "model",
        "fit unchanged",
        "answers",
        "parameters",
        "squared gradient",
        "error",
        "lines",
        "epochs",
    )
    for row in rows:
        answered = row.get("answered")
        table.add_row(
            row["project"],
            row["model"],
            _word(row.get("unchanged")),
            _word(answered),
            *(f"{row[key]:.1%}" if key in row else "-" for key in ("covered", "gradient_share")),
            f"{row['error']:.1e}" if "error" in row else "-",
            "0" if answered else "-",
            f"{row['epochs']:.1f}" if "epochs" in row else "-",
        )
    return table


def _word(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "no"


def main() -> None:
    """Run the projects and print the table, then reasons and notes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cache", type=Path, help="folder of the environments")
    parser.add_argument("projects", nargs="*", choices=[*REQUIREMENTS, []], help="all by default")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    console, rows = Console(width=150), []
    for project in options.projects or REQUIREMENTS:
        try:
            python = make_environment(options.cache, project)
        except subprocess.CalledProcessError as error:
            rows.append({"project": project, "model": "", "failed": f"does not install: {error}"})
            continue
        rows += run(python, project)
        console.print(f"{project}: done")
    console.print(show(rows))
    for row in rows:
        for key in ("failed", "reason", "identity"):
            if key in row:
                console.print(f"{row['project']}, {row['model']}: {row[key]}", markup=False)
        for note in row.get("notes", ()):
            console.print(f"  {row['project']}, {row['model']} says: {note}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
