"""Files of named tensors and JSON metadata, written atomically and verified when read."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_influence.support.errors import CorruptFileError, FactorMismatchError

FORMAT = "lightning-influence"
VERSION = "1"

PathLike: TypeAlias = str | os.PathLike[str]


@contextmanager
def write_atomically(path: PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it when the block ends without an error.

    Until then a reader of ``path`` sees the old content, and after an error it still does. Missing parent
    directories are made. A symbolic link stays one: the file it points to is replaced. The new file has the
    permissions that the process gives to new files. A leading ``~`` is the home directory.

    Args:
        path: the file to write.

    Yields:
        The temporary path to write to.
    """
    target = Path(os.path.realpath(os.path.expanduser(path)))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        # A writer may have made its own, private file under this name.
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and metadata to one file, atomically.

    Args:
        path: the file, used as it stands (no suffix is added) but for a leading ``~``. An existing file is
            replaced.
        tensors: dense tensors of any shape, on any device; they are read back on the CPU.
        metadata: JSON values: None, bool, int, float (infinite and NaN too), str, and lists and dicts (with
            str keys) of them. Tuples come back as lists.

    Raises:
        TypeError: if the metadata holds anything else, or a tensor's dtype or layout cannot be stored.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_tensors(f"{folder}/a.safetensors", {"x": torch.arange(3)}, {"note": "three"})
        ...     load_tensors(f"{folder}/a.safetensors")
        ({'x': tensor([0, 1, 2])}, {'note': 'three'})
    """
    _check_json(metadata, "metadata")
    prepared = _prepare(tensors)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "metadata": json.dumps(metadata),
        "tensors": json.dumps({name: _describe(tensor) for name, tensor in prepared.items()}),
    }
    header["checksum"] = _checksum(header)
    with write_atomically(path) as temporary:
        try:
            save_file(prepared, temporary, metadata=header)
        except KeyError as error:
            raise TypeError(f"a tensor of dtype {error} cannot be stored; convert it first") from error


def load_tensors(path: PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and verify a file written by :func:`save_tensors`.

    Args:
        path: the file.

    Returns:
        The tensors, on the CPU and independent of the file, and the metadata.

    Raises:
        FileNotFoundError: if there is no such file.
        CorruptFileError: if the file is truncated, altered, of an unknown version or not of this format.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {path!r}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            expected = _read_header(path, header)
            # Cloned: the reader maps the file, which may be replaced while the tensors live.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CorruptFileError(
            f"{os.fspath(path)!r} cannot be read: {error}. It is truncated, altered or not a "
            "safetensors file; save it again."
        ) from error
    _verify(path, tensors, expected)
    return tensors, json.loads(header["metadata"])


def check_kind(path: PathLike, metadata: Mapping[str, Any], kind: str) -> None:
    """Refuse a sound file that holds something else than ``kind`` (the ``"kind"`` entry of its metadata).

    Args:
        path: the file, for the message.
        metadata: what :func:`load_tensors` returned.
        kind: what is expected.

    Raises:
        CorruptFileError: if the file holds something else.
    """
    found = metadata.get("kind")
    if found != kind:
        raise CorruptFileError(
            f"{os.fspath(path)!r} holds {found!r}, expected {kind!r}; load it with the class that wrote it."
        )


def _prepare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prepared: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            raise TypeError(
                f"tensor {name!r} is {tensor.layout}; only dense tensors are stored: use to_dense()"
            )
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        # safetensors refuses tensors that share memory, as views and tied tensors do.
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        storages.add(storage.data_ptr())
        prepared[name] = tensor
    return prepared


def _describe(tensor: Tensor) -> dict[str, Any]:
    content = tensor.reshape(-1).view(torch.uint8).numpy().data
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def _checksum(header: Mapping[str, str]) -> str:
    text = json.dumps([header[key] for key in ("format", "version", "metadata", "tensors")])
    return hashlib.sha256(text.encode()).hexdigest()


def _read_header(path: PathLike, header: Mapping[str, str]) -> dict[str, Any]:
    where = repr(os.fspath(path))
    if header.get("format") != FORMAT:
        raise CorruptFileError(
            f"{where} is a safetensors file that this library did not write: it has no {FORMAT!r} header."
        )
    if header.get("version") != VERSION:
        raise CorruptFileError(
            f"{where} has format version {header.get('version')!r}, this library reads {VERSION!r}; "
            "read it with the version of the library that wrote it."
        )
    if not {"metadata", "tensors", "checksum"} <= header.keys() or header["checksum"] != _checksum(header):
        raise CorruptFileError(f"the header of {where} was altered: its checksum is wrong; save it again.")
    expected: dict[str, Any] = json.loads(header["tensors"])
    return expected


def _verify(path: PathLike, tensors: Mapping[str, Tensor], expected: Mapping[str, Any]) -> None:
    where = repr(os.fspath(path))
    if tensors.keys() != expected.keys():
        raise CorruptFileError(
            f"{where} holds tensors {sorted(tensors)}, its header lists {sorted(expected)}; save it again."
        )
    for name, tensor in tensors.items():
        got = _describe(tensor)
        for key, value in expected[name].items():
            if got[key] != value:
                raise CorruptFileError(
                    f"tensor {name!r} in {where} was altered: {key} is {got[key]}, its header says {value}."
                )


def _check_json(value: Any, where: str) -> None:
    if value is None or isinstance(value, bool | int | float | str):
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}; JSON keys are str")
            _check_json(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            _check_json(item, f"{where}[{position}]")
    else:
        raise TypeError(
            f"{where} is a {type(value).__name__}; JSON takes None, bool, int, float, str, list and dict"
        )


def check_version(state: Mapping[str, Any], expected: int, *, subject: str, remedy: str) -> None:
    """Refuse a state that another version of the library wrote.

    Args:
        state: with an entry ``version``.
        expected: the version that is read.
        subject: what the state is, with its verb.
        remedy: what to do.

    Raises:
        FactorMismatchError: if the versions differ.
    """
    if state.get("version") != expected:
        raise FactorMismatchError(
            f"{subject} version {state.get('version')!r}, this library reads version {expected}. {remedy}"
        )
