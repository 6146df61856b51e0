"""Files of named tensors and JSON metadata, written atomically and verified when read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_influence.support.errors import CorruptFileError, FactorMismatchError

if sys.platform != "win32":
    import fcntl

FORMAT = "lightning-influence"
VERSION = "1"

PathLike: TypeAlias = str | os.PathLike[str]
Loaded = TypeVar("Loaded")


@contextmanager
def write_atomically(path: PathLike) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` when the block ends without an error.

    Until then a reader of ``path`` sees the old content, and after an error it still does. Missing parent
    directories are made. A symbolic link stays one: the file it points to is replaced. The new file has the
    permissions that the process gives to new files. A leading ``~`` is the home directory.

    The temporary path lies in a hidden folder beside the file, which also takes up what the writing library
    leaves lying about. The next writer of the same path removes the folders of writers that were killed (not
    on Windows, where it cannot tell them from living ones).

    Args:
        path: the file to write.

    Yields:
        The temporary path to write to.

    Raises:
        OSError: if the file cannot be written, for instance to a full disk; names ``path``.
    """
    target = Path(os.path.realpath(os.path.expanduser(path)))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        with make_folder(target) as folder:
            temporary = folder / "content"
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            # A writer may have made its own, private file under this name.
            temporary.chmod(mode)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
    except OSError as error:
        if error.filename is not None and target.name not in str(error.filename):
            raise  # about another file, which it names
        if error.errno is None:
            raise OSError(f"{str(target)!r} could not be written: {error}") from error
        raise OSError(error.errno, error.strerror, str(target)) from error


@contextmanager
def make_folder(target: Path) -> Iterator[Path]:
    """Make a locked folder beside a file, and remove it in the end."""
    folder = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    while True:
        folder.mkdir()
        handle = _lock(folder)
        # Another writer may have removed the folder in the moment before it was locked.
        if handle is not None or sys.platform == "win32":
            break
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _remove_abandoned(target: Path) -> None:
    """Remove temporary folders beside a file whose writers are dead: the system has released their locks."""
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{32}}\.tmp")
    for entry in os.scandir(target.parent):
        if not name.fullmatch(entry.name):
            continue
        with suppress(OSError):
            handle = _lock(Path(entry.path), wait=False)
            if handle is not None:
                # Versions before wrote to a file of this name.
                shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)
                os.close(handle)


def _lock(path: Path, *, wait: bool = True) -> int | None:
    """Lock a path for as long as this process lives.

    Args:
        path: a folder or a file.
        wait: whether to wait for a lock that another process has.

    Returns:
        What the lock hangs on, to be closed; None where there is none, or ``path`` is gone.
    """
    if sys.platform == "win32":
        return None
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # in use, or a file system without locks, where nothing is removed either
        if not wait:
            os.close(handle)
            return None
    if not path.exists():
        os.close(handle)
        return None
    return handle


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
        OSError: if the file cannot be written, for instance to a full disk; names it.

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
        except SafetensorError as error:
            failure = _to_os_error(error)
            raise failure from error


def load_tensors(path: PathLike, *, mapped: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and verify a file written by :func:`save_tensors`.

    Args:
        path: the file.
        mapped: whether tensors are mapped from the file, in place of copies: memory holds what is in use of
            them. What is written to them does not change the file, which may be replaced but not altered.

    Returns:
        The tensors, on the CPU and independent of the file unless they are mapped, and the metadata.

    Raises:
        FileNotFoundError: if there is no such file.
        CorruptFileError: if the file is truncated, altered, of an unknown version or not of this format.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {path!r}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            expected, metadata = _read_header(path, file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if not mapped:  # the reader maps the file
                tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    except (SafetensorError, AttributeError, KeyError, TypeError) as error:
        raise CorruptFileError(
            f"{os.fspath(path)!r} cannot be read: {error}. It is truncated, altered or not a "
            "safetensors file; save it again."
        ) from error
    _verify(path, tensors, expected)
    return tensors, metadata


def load_object(
    path: PathLike, kind: str, build: Callable[[dict[str, Tensor], dict[str, Any]], Loaded]
) -> Loaded:
    """Read and verify a file, and make an object of what it holds.

    A file may be sound to the last bit and yet hold nonsense, which may fail anywhere in ``build``: whatever
    comes of it is one error that names the file.

    Args:
        path: the file.
        kind: the ``"kind"`` entry of its metadata.
        build: makes the object of the tensors and the metadata; its errors name the field, what was got and
            what is accepted.

    Returns:
        What ``build`` returned.

    Raises:
        FileNotFoundError: if there is no such file.
        CorruptFileError: if the file is damaged, holds something else, or holds nonsense.
        MemoryError: if it does not fit into memory.
    """
    tensors, metadata = load_tensors(path)
    check_kind(path, metadata, kind)
    try:
        return build(tensors, metadata)
    except MemoryError:
        raise
    except Exception as error:
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise CorruptFileError(f"{os.fspath(path)!r} does not hold sound {kind}: {what}") from error


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


def _to_os_error(error: SafetensorError) -> OSError:
    """Return the system's error behind one of the library's, which gives its number in words alone.

    Before safetensors 0.6, the words are another form of the same.
    """
    code = re.search(r"(?:os error |Os \{ code: )(\d+)", str(error))
    return OSError(str(error)) if code is None else OSError(int(code[1]), os.strerror(int(code[1])))


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


def _read_header(path: PathLike, header: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
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
    return _parse(where, "tensors", header["tensors"]), _parse(where, "metadata", header["metadata"])


def _parse(where: str, name: str, text: str) -> dict[str, Any]:
    """Read one entry of the header.

    Returns:
        The JSON object that it holds.

    Raises:
        CorruptFileError: if it is something else.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(
            f"the entry {name!r} in the header of {where} is {text[:40]!r}, which is no readable JSON "
            f"({type(error).__name__}); save the file again."
        ) from error
    if not isinstance(found, dict):
        raise CorruptFileError(
            f"the entry {name!r} in the header of {where} is a {type(found).__name__}, accepted is a JSON "
            "object; save the file again."
        )
    return found


def _verify(path: PathLike, tensors: Mapping[str, Tensor], expected: Mapping[str, Any]) -> None:
    where = repr(os.fspath(path))
    if tensors.keys() != expected.keys():
        raise CorruptFileError(
            f"{where} holds tensors {sorted(tensors)}, its header lists {sorted(expected)}; save it again."
        )
    for name, tensor in tensors.items():
        got, listed = _describe(tensor), expected[name]
        if not isinstance(listed, dict) or listed.keys() != got.keys():
            raise CorruptFileError(
                f"the header of {where} says {str(listed)[:40]!r} of tensor {name!r}, accepted are its "
                f"{', '.join(got)}; save the file again."
            )
        for key, value in listed.items():
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
