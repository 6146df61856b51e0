"""Settings of all tests; being here also puts this directory on the import path of subdirectories."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible():
    """The same random numbers whatever ran before, without leaving a trace."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
