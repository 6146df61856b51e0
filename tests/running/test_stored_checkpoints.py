"""Checkpoints whose bits flipped on disk are refused, however torch would read them."""

import random

import pytest
import torch
from influence_models import Net
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_influence.running.host.checkpoints import ExplainingCheckpointIO, read_checkpoint
from lightning_influence.support.errors import CorruptFileError, InfluenceError


@pytest.fixture
def path(tmp_path):
    torch.save(
        {"state_dict": Net().state_dict(), "epoch": 3, "extra": torch.arange(50.0)}, tmp_path / "a.ckpt"
    )
    return tmp_path / "a.ckpt"


def read_as_a_trainer_does(path):
    return ExplainingCheckpointIO(TorchCheckpointIO()).load_checkpoint(path)


def are_equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(are_equal(a[key], b[key]) for key in a)
    return a == b


@pytest.mark.parametrize("read", [read_checkpoint, read_as_a_trainer_does])
def test_no_flipped_bit_passes_silently(path, read):
    sound, content, draw = read(path), path.read_bytes(), random.Random(0)
    messages = []
    for _ in range(400):
        flipped = bytearray(content)
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            found = read(path)
        except InfluenceError as error:
            messages.append(str(error))
        else:  # between the records nothing is said
            assert are_equal(found, sound)
    assert len(messages) > 100
    assert all(str(path) in message for message in messages)


@pytest.mark.parametrize("read", [read_checkpoint, read_as_a_trainer_does])
def test_the_altered_record_is_named(path, read):
    content = path.read_bytes()
    place = content.index(torch.arange(50.0).numpy().tobytes())
    path.write_bytes(content[:place] + b"\x01" + content[place + 1 :])
    with pytest.raises(
        CorruptFileError, match=r"was altered .*: the checksum of its record '\S+/data/\d+' is"
    ):
        read(path)


def test_files_of_the_form_before_archives_are_read(path):
    torch.save({"state_dict": {"a": torch.ones(2)}}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(path)["state_dict"]["a"], torch.ones(2))
