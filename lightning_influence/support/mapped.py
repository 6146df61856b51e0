"""Matrices that live in a file while they are filled, so that they may be larger than memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_influence.support.storage import PathLike, make_folder, write_atomically

_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


@contextmanager
def map_matrix(
    path: PathLike, shape: tuple[int, ...], dtype: torch.dtype, *, is_kept: bool = True
) -> Iterator[Tensor]:
    """Yield zeros that live in a memory-mapped ``.npy`` file, which gets its name when the block ends.

    The room on the disk is taken at once, since a mapped file that runs into a full disk kills the process.
    After an error nothing is left of the file. The tensor can be used after the block: what is written to it
    goes to the file.

    Args:
        path: the file; :func:`numpy.load` reads it, with ``mmap_mode="r"`` without loading it.
        shape: of the matrix.
        dtype: float32 or float64.
        is_kept: whether the file is to stay. If not, it has no name after the block and its room is free
            once nobody uses the tensor.

    Yields:
        The matrix.

    Raises:
        OSError: if the file cannot be written, for instance to a full disk; names ``path``.
    """
    if is_kept:
        with write_atomically(path) as temporary:
            yield from _fill(temporary, shape, dtype)
        return
    target = Path(os.path.realpath(os.path.expanduser(path)))
    target.parent.mkdir(parents=True, exist_ok=True)
    with make_folder(target) as folder:
        yield from _fill(folder / "content", shape, dtype)


def _fill(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    matrix = np.lib.format.open_memmap(path, mode="w+", dtype=_DTYPES[dtype], shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    yield torch.from_numpy(matrix)
    matrix.flush()
