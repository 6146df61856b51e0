"""Settings of all tests; being here also puts this directory on the import path of subdirectories."""

from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from parts import find_beside

COUNTS = "counts: "


def pytest_addoption(parser):
    """How far the tests that draw their cases go."""
    parser.addoption("--fuzz-cases", type=int, default=80, help="random questions (80)")
    parser.addoption("--damaged-files", type=int, default=60, help="damaged files of each kind (60)")
    told = "of the tests: the quick part (where no paths, -m or -k choose), the rest of them, or all"
    parser.addoption("--part", choices=["quick", "rest", "all"], help=told)


def pytest_collection_modifyitems(config, items):
    """Keep the quick part of the tests, or what is beside it."""
    part = config.getoption("--part")
    if part == "all":
        return
    beside = find_beside(items)
    config.hook.pytest_deselected(items=[item for item in items if (item in beside) == (part == "quick")])
    items[:] = [item for item in items if (item in beside) != (part == "quick")]


@pytest.fixture
def count_cases(record_property):
    """Takes counts of drawn cases by their outcome, which stand below the tests' results."""

    def count(subject, outcomes):
        record_property(COUNTS + subject, dict(outcomes))

    return count


def pytest_terminal_summary(terminalreporter):
    """Say how many cases were drawn, and what came of them."""
    totals = defaultdict(Counter)
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, counts in report.user_properties:
                if name.startswith(COUNTS):
                    totals[name.removeprefix(COUNTS)].update(counts)
    for subject, counts in sorted(totals.items()):
        outcomes = ", ".join(f"{number} {outcome}" for outcome, number in counts.items())
        terminalreporter.write_line(f"{subject}: {sum(counts.values())} cases, {outcomes}")


def pytest_configure(config):
    """Make errors of deprecations in what this project calls; inside other packages they are theirs."""
    if config.getoption("--part") is None:  # processes of xdist are told what the first one has found
        chosen = config.args_source is pytest.Config.ArgsSource.ARGS
        chosen = chosen or bool(config.option.markexpr or config.option.keyword)
        config.option.part = "all" if chosen else "quick"
    # Tests run side by side; threads within each would only wait for one another.
    torch.set_num_threads(1)
    ours = ["lightning_influence", *(path.stem for path in Path(__file__).parent.rglob("*.py"))]
    for category in ("FutureWarning", "DeprecationWarning", "PendingDeprecationWarning"):
        config.addinivalue_line("filterwarnings", rf"error::{category}:({'|'.join(ours)})(\.|$)")


@pytest.fixture(autouse=True)
def _reproducible(monkeypatch):
    """The same random numbers whatever ran before, without leaving a trace; costs that no clock corrects."""
    monkeypatch.setattr("lightning_influence.collecting.stopwatch.read_clock", lambda: 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
