"""Settings of all tests; being here also puts this directory on the import path of subdirectories."""

from pathlib import Path

import pytest
import torch


def pytest_configure(config):
    """Make errors of deprecations in what this project calls; inside other packages they are theirs."""
    config.addinivalue_line("markers", "slow: starts processes, runs an example or a study")
    # Tests run side by side; threads within each would only wait for one another.
    torch.set_num_threads(1)
    ours = ["lightning_influence", *(path.stem for path in Path(__file__).parent.rglob("*.py"))]
    for category in ("FutureWarning", "DeprecationWarning", "PendingDeprecationWarning"):
        config.addinivalue_line("filterwarnings", rf"error::{category}:({'|'.join(ours)})(\.|$)")


@pytest.fixture(autouse=True)
def _reproducible():
    """The same random numbers whatever ran before, without leaving a trace."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
