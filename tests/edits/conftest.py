"""A trained module that tests of refusals ask edits of, and leave as it was."""

import pytest
import torch
from edit_models import asked, fitted


@pytest.fixture(scope="module")
def source():
    return fitted()


@pytest.fixture
def wrapped(source):
    """A module whose weights and modes have to be the same after the test."""
    before = {name: value.clone() for name, value in source.state_dict().items()}
    yield asked(source)
    assert all(torch.equal(before[name], value) for name, value in source.state_dict().items())
    assert not any(m._forward_hooks for m in source.modules())
