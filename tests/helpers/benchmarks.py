"""The modules of examples/benchmarks, which import each other by their bare names."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


def load_benchmark(name):
    """Import one of them; afterwards the import path is as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module(name)
