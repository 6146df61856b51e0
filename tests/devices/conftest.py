"""The pretended device, without which these tests have nothing to run on."""

import pytest
from pretended_device import IS_POSSIBLE, pretended_device


def pytest_ignore_collect(collection_path, config):
    """Collect by a command of its own; torch before 2.9 has no backends in Python."""
    wanted = IS_POSSIBLE and "devices" in config.getoption("markexpr")
    return None if wanted else True


@pytest.fixture
def device():
    """The device, which is there for the time of a test."""
    with pretended_device() as there:
        yield there
