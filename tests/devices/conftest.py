"""The pretended device, without which these tests have nothing to run on."""

import pytest
from pretended_device import IS_POSSIBLE, pretended_device

collect_ignore_glob = [] if IS_POSSIBLE else ["test_*.py"]  # torch before 2.9 has no backends in Python


@pytest.fixture
def device():
    """The device, which is there for the time of a test."""
    with pretended_device() as there:
        yield there
