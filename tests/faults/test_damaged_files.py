"""Files in which something changed on disk: refused by name, or read as if nothing had."""

import random
from collections import Counter

import pytest
import torch
from saved_files import SAVED, are_equal, plain

from lightning_influence.running.host.checkpoints import read_checkpoint
from lightning_influence.support.errors import CorruptFileError, InfluenceError

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """One file of each kind: its content, and what it holds."""
    folder, found = tmp_path_factory.mktemp("sound"), {}
    for number, (kind, saved) in enumerate(SAVED.items()):
        path = folder / str(number)
        saved.write(path)
        found[kind] = path.read_bytes(), plain(saved.read(path))
    return found


def damage(content, draw):
    """One bit, one byte, or everything after a place."""
    place = draw.randrange(len(content))
    how = draw.choice(["bit", "bit", "bit", "byte", "end"])
    if how == "end":
        return content[:place]
    changed = bytearray(content)
    changed[place] ^= 1 << draw.randrange(8) if how == "bit" else draw.randrange(1, 256)
    return bytes(changed)


@pytest.mark.parametrize("kind", SAVED)
def test_no_damage_passes_silently(kind, sound, tmp_path, pytestconfig, count_cases):
    (content, held), path, draw = sound[kind], tmp_path / "damaged", random.Random(kind)
    outcomes, wrong = Counter({"silent": 0, "raw errors": 0}), []
    for _ in range(pytestconfig.getoption("--damaged-files")):
        path.write_bytes(damage(content, draw))
        try:
            found = plain(SAVED[kind].read(path))
        except InfluenceError as error:
            outcomes["refused"] += 1
            if str(path) not in str(error):
                wrong.append(f"the file is not named: {error}")
        except Exception as error:
            outcomes["raw errors"] += 1
            wrong.append(repr(error)[:200])
        else:  # between the parts of a file nothing is said
            silent = not are_equal(found, held)
            outcomes["silent" if silent else "without effect"] += 1
            wrong += ["read as something else"] * silent
    count_cases(f"damaged files ({kind})", outcomes)
    assert not wrong, f"{len(wrong)} wrong: {wrong[:5]}"
    assert outcomes["refused"] > outcomes["without effect"] / 2


@pytest.mark.parametrize("kind", ["checkpoint", "checkpoint of a Trainer"])
def test_the_altered_record_of_a_checkpoint_is_named(kind, sound, tmp_path):
    content, path = sound[kind][0], tmp_path / "altered"
    path.write_bytes(content)
    weight = read_checkpoint(path)["state_dict"]["net.0.weight"]
    place = content.index(weight.numpy().tobytes())
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(
        CorruptFileError, match=r"was altered .*: the checksum of its record '\S+/data/\d+' is"
    ):
        SAVED[kind].read(path)


def test_files_of_the_form_before_archives_are_read(tmp_path):
    path = tmp_path / "old"
    torch.save({"state_dict": {"a": torch.ones(2)}}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(path)["state_dict"]["a"], torch.ones(2))
