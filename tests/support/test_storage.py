"""One file of tensors and metadata: round trips, atomic writes, and refusal of every altered file."""

import json
import os
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_influence.support import storage
from lightning_influence.support.errors import CorruptFileError
from lightning_influence.support.storage import (
    check_kind,
    load_object,
    load_tensors,
    save_tensors,
    write_atomically,
)

TENSORS = {
    "matrix": torch.arange(6.0).view(2, 3),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 3),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "flags": torch.tensor([True, False]),
    "long": torch.tensor([1, -5]),
}
METADATA = {"text": "é | \n", "none": None, "list": [1, 2.5, True], "nested": {"a": {"b": []}}}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, TENSORS, METADATA)
    return path


def rewrite_header(path, **changes):
    with safe_open(path, framework="pt") as opened:
        header = opened.metadata()
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    header |= changes
    save_file(tensors, path, metadata={key: value for key, value in header.items() if value is not None})


def test_round_trip_keeps_values_shapes_dtypes_and_metadata(file):
    tensors, metadata = load_tensors(file)
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].shape == tensor.shape
        assert torch.equal(tensors[name], tensor)
    assert metadata == METADATA


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=25)
@given(metadata=st.dictionaries(st.text(), json_values, max_size=3))
def test_metadata_round_trips(metadata, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "metadata.safetensors"
    save_tensors(path, {}, metadata)
    assert load_tensors(path) == ({}, metadata)


def test_views_and_tied_tensors_are_stored_as_their_values(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {"base": base, "again": base, "row": base[1], "transposed": base.T}
    tensors["grad"] = base.clone().requires_grad_()
    save_tensors(tmp_path / "a", tensors, {})
    loaded, _ = load_tensors(tmp_path / "a")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert not loaded["grad"].requires_grad


def test_loaded_tensors_do_not_depend_on_the_file(file):
    tensors, _ = load_tensors(file)
    tensors["matrix"].add_(100)
    assert load_tensors(file)[0]["matrix"][0, 0] == 0
    tensors, _ = load_tensors(file)
    file.write_bytes(b"")
    assert torch.equal(tensors["matrix"], TENSORS["matrix"])


def test_no_temporary_files_stay_and_permissions_are_the_usual_ones(file):
    assert os.listdir(file.parent) == [file.name]
    other = file.with_name("other")
    other.touch()
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_a_crash_while_writing_leaves_the_old_content(file, monkeypatch):
    def crash(tensors, filename, metadata):
        filename.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(storage, "save_file", crash)
    with pytest.raises(OSError, match="disk full"):
        save_tensors(file, {"matrix": torch.zeros(1)}, {})
    assert torch.equal(load_tensors(file)[0]["matrix"], TENSORS["matrix"])
    assert os.listdir(file.parent) == [file.name]


def test_atomic_path_makes_parents_and_keeps_links(tmp_path):
    real, link = tmp_path / "deep" / "real.txt", tmp_path / "link.txt"
    with write_atomically(real) as temporary:
        temporary.write_text("one")
        assert not real.exists()
    link.symlink_to(real)
    with write_atomically(link) as temporary:
        temporary.write_text("two")
    assert link.is_symlink()
    assert real.read_text() == "two"


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_every_truncation_and_flipped_byte_is_noticed(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    save_tensors(path, {"x": torch.arange(4.0)}, {"a": 1})
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        altered = bytes(content[:position])
    else:
        content[position] ^= data.draw(st.integers(1, 255))
        altered = bytes(content)
    path.write_bytes(altered)
    try:
        tensors, metadata = load_tensors(path)
    except CorruptFileError:
        return
    # A byte of the header's own white space may change without changing what the file says.
    assert torch.equal(tensors["x"], torch.arange(4.0))
    assert metadata == {"a": 1}


def test_altered_tensor_bytes_are_refused(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(CorruptFileError, match=r"tensor '\w+' in .* was altered: sha256 is"):
        load_tensors(file)


@pytest.mark.parametrize("length", [0, 5, 40, -1])
def test_truncated_files_are_refused(file, length):
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CorruptFileError, match="truncated, altered or not a safetensors file"):
        load_tensors(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": None}, "that this library did not write"),
        ({"version": "2"}, "format version '2', this library reads '1'"),
        ({"metadata": json.dumps({"other": 1})}, "its checksum is wrong"),
        ({"checksum": None}, "its checksum is wrong"),
    ],
)
def test_altered_headers_are_refused(file, changes, message):
    rewrite_header(file, **changes)
    with pytest.raises(CorruptFileError, match=message):
        load_tensors(file)


def test_another_shape_or_set_of_tensors_is_refused(file):
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    save_file({**TENSORS, "matrix": torch.arange(6.0)}, file, metadata=header)
    with pytest.raises(CorruptFileError, match=r"'matrix' .* shape is \[6\], its header says \[2, 3\]"):
        load_tensors(file)
    save_file({"matrix": TENSORS["matrix"]}, file, metadata=header)
    with pytest.raises(CorruptFileError, match=r"holds tensors \['matrix'\], its header lists"):
        load_tensors(file)


def test_missing_files_and_folders_are_not_corrupt(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(FileNotFoundError, match="no file"):
            load_tensors(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"a": {1: 2}}, r"metadata\['a'\] has the key 1; JSON keys are str"),
        ({"a": [torch.zeros(1)]}, r"metadata\['a'\]\[0\] is a Tensor"),
        ({"a": {1, 2}}, r"metadata\['a'\] is a set"),
    ],
)
def test_metadata_that_json_would_change_is_refused(tmp_path, metadata, message):
    with pytest.raises(TypeError, match=message):
        save_tensors(tmp_path / "a", {}, metadata)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.eye(2).to_sparse(), "only dense tensors"),
        (torch.ones(2, dtype=torch.complex128), "dtype .*complex128"),
    ],
)
def test_tensors_that_cannot_be_stored_are_refused(tmp_path, tensor, message):
    with pytest.raises(TypeError, match=message):
        save_tensors(tmp_path / "a", {"x": tensor}, {})
    assert os.listdir(tmp_path) == []


def test_check_kind_names_both_kinds():
    check_kind("f", {"kind": "factors"}, "factors")
    with pytest.raises(CorruptFileError, match="'f' holds 'factors', expected 'attributions'"):
        check_kind("f", {"kind": "factors"}, "attributions")


def test_errors_about_other_files_stay_as_they_are(file):
    with pytest.raises(FileNotFoundError, match="elsewhere"), write_atomically(file):
        os.stat("/nowhere/elsewhere")


def resign(path, **changes):
    """Write other entries of the header, under a checksum that is right."""
    with safe_open(path, framework="pt") as opened:
        header = {**opened.metadata(), **changes}
    rewrite_header(path, **changes, checksum=storage._checksum(header))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": "{"}, r"entry 'metadata' in the header of .* is '\{', which is no readable JSON"),
        ({"metadata": "[" * 10**5}, "is no readable JSON"),
        ({"metadata": "[]"}, "entry 'metadata' .* is a list, accepted is a JSON object"),
        ({"tensors": "[]"}, "entry 'tensors' .* is a list, accepted is a JSON object"),
        ({"tensors": json.dumps(dict.fromkeys(TENSORS, 3))}, "says '3' of tensor '.*', accepted are its"),
        (
            {"tensors": json.dumps({name: {"zz": 1} for name in TENSORS})},
            "accepted are its shape, dtype, sha",
        ),
    ],
)
def test_headers_that_make_no_sense_are_refused_whatever_their_checksum(file, changes, message):
    resign(file, **changes)
    with pytest.raises(CorruptFileError, match=message):
        load_tensors(file)


def test_whatever_goes_wrong_with_the_content_is_one_error(file):
    def build(tensors, metadata):
        raise metadata["error"]

    save_tensors(file, {}, {"kind": "thing"})
    for error, told in (
        (ValueError("x is 3"), "sound thing: x is 3"),
        (KeyError("x"), "thing: KeyError: 'x'"),
    ):
        with pytest.raises(CorruptFileError, match=told):
            load_object(file, "thing", lambda tensors, metadata, error=error: build({}, {"error": error}))
    with pytest.raises(MemoryError):
        load_object(file, "thing", lambda tensors, metadata: build({}, {"error": MemoryError()}))
