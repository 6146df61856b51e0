"""Rows of numbers in a file of their own, written one batch after another and read through the page cache.

Each row is divided by its largest number, so that half precision holds rows of any size equally well.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lightning_influence.support.errors import CorruptFileError
from lightning_influence.support.storage import write_atomically

#: What rows can be stored in.
PRECISIONS = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
# Chosen by hand: bytes that are read at once to be verified.
_READ = 2**24
_PREFIX, _SUFFIX = "rows-", ".bin"


class RowWriter:
    """Writes rows to an open file.

    Args:
        name: of the file once it is finished.
        file: the file.
        dtype: precision of the stored numbers.
    """

    def __init__(self, name: str, file: BinaryIO, dtype: torch.dtype) -> None:
        self.name, self._file, self._dtype = name, file, dtype
        self._hash = hashlib.sha256()

    @property
    def digest(self) -> str:
        """Of all that was written."""
        return self._hash.hexdigest()

    def add(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Write rows ``(B, k)``.

        Returns:
            The scale of each row, ``(B,)``, and the rows as they will be read, ``(B, k)``, both on the CPU.
        """
        rows = rows.detach().cpu()
        scales = rows.abs().amax(dim=1)
        scales = torch.where(scales > 0, scales, torch.ones_like(scales))
        packed = (rows / scales[:, None]).to(self._dtype).contiguous()
        content = packed.view(torch.uint8).numpy().data
        self._file.write(content)
        self._hash.update(content)
        return scales, packed.to(rows.dtype) * scales[:, None]


@contextmanager
def write_rows(folder: Path, dtype: torch.dtype) -> Iterator[RowWriter]:
    """Yield a writer of rows to a new file in a folder; after an error there is no such file.

    Raises:
        OSError: if the file cannot be written, for instance to a full disk.
    """
    name = f"{_PREFIX}{uuid.uuid4().hex}{_SUFFIX}"
    with write_atomically(folder / name) as temporary, temporary.open("wb") as file:
        yield RowWriter(name, file, dtype)


def remove_other_rows(folder: Path, name: str) -> None:
    """Remove files of rows that are not the named one: of what it takes the place of."""
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        if path.name != name:
            with suppress(OSError):  # who reads one on Windows keeps it
                path.unlink()


def open_rows(folder: Path, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Map a file of rows into memory; it is read where the tensor is.

    Args:
        folder: where the file is.
        name: its name.
        shape: ``(N, k)``.
        dtype: precision of the stored numbers.

    Returns:
        ``(N, k)``, each row divided by its scale. What is written to it does not change the file.

    Raises:
        CorruptFileError: if there is no such file, or it has another size.
    """
    path = folder / name
    expected = shape[0] * shape[1] * torch.empty((), dtype=dtype).element_size()
    found = path.stat().st_size if name == os.path.basename(name) and path.is_file() else None
    if found != expected:
        got = "is missing" if found is None else f"has {found} bytes"
        raise CorruptFileError(
            f"{str(path)!r} {got}, expected are {expected} bytes; build the store again, or copy all files "
            "of its folder."
        )
    return torch.from_file(str(path), shared=False, size=shape[0] * shape[1], dtype=dtype).view(shape)


def verify_rows(path: Path, digest: str) -> None:
    """Compare a file of rows with its digest.

    Raises:
        CorruptFileError: if it was altered.
    """
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_READ):
            found.update(part)
    if found.hexdigest() != digest:
        raise CorruptFileError(f"{str(path)!r} was altered since it was written; build the store again.")
