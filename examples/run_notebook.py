"""Run the code of a notebook from beginning to end, as Jupyter would, without Jupyter.

The pictures that it saves are written to the folder.

    python examples/run_notebook.py examples/notebooks/tabular.ipynb [--folder docs/images]
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any


def run(notebook: Path, folder: Path) -> dict[str, Any]:
    """Run all code cells in their order.

    Args:
        notebook: the file.
        folder: where the code runs: its files are written there.

    Returns:
        The names that the notebook defines.
    """
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    names: dict[str, Any] = {"__name__": "__main__"}
    folder.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        for number, cell in enumerate(cells):
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec"), names)
    finally:
        os.chdir(before)
    return names


def main(arguments: list[str] | None = None) -> None:
    """Run a notebook."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs/notebooks"), help="where it writes files")
    options = parser.parse_args(arguments)
    run(options.notebook, options.folder)


if __name__ == "__main__":
    main()
