"""Scores in a file of the user's while they are computed, on one process or several."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from lightning_influence.support.errors import ExistingFileError, InfluenceError
from lightning_influence.support.mapped import map_matrix
from lightning_influence.support.passes import Passes
from lightning_influence.support.storage import PathLike


def check_file(path: object, **others: object) -> None:
    """Refuse what is no path, and what does not go with a file of scores.

    Args:
        path: what was given as the file.
        **others: other settings of the question that have to be None.

    Raises:
        TypeError: if it is no path.
        ValueError: naming the setting.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"Got scores_file={path!r:.80}; accepted is the path of a new file, or None.")
    for name, value in others.items():
        if value is not None:
            raise ValueError(
                f"Got scores_file with {name}, whose answer is no matrix of all scores, or a small one; omit "
                "one of them."
            )


def check_new(runner: Passes, path: PathLike | None) -> None:
    """Refuse a file that exists, on all processes and before any pass.

    Args:
        runner: knows the processes, of which the first writes.
        path: the file, None if none was asked for.

    Raises:
        ExistingFileError: if there is such a file; on other processes than the first an InfluenceError.
        InfluenceError: on Windows, where an open file is not renamed.
    """
    if path is None:
        return
    error: InfluenceError | None = None
    if sys.platform == "win32":
        error = InfluenceError(
            "Got scores_file on Windows, where a mapped file is not renamed. Omit it, and ask about fewer "
            "queries at a time, or keep both ends of the rankings with top_k."
        )
    elif runner.rank == 0 and os.path.lexists(os.path.expanduser(path)):
        error = ExistingFileError(
            f"Got scores_file={os.fspath(path)!r}, which exists and is not overwritten. Pass another path, "
            "or remove the file if it is not needed."
        )
    runner.raise_together(error)


@contextmanager
def map_scores(
    runner: Passes, path: PathLike | None, shape: tuple[int, int], dtype: torch.dtype
) -> Iterator[Tensor | None]:
    """Yield zeros in the file for scores, which has its name after the block; all processes come here.

    Each process fills a file of its own, and the sums that all of them take end up in all: that of the first
    stays, those of others have no name and go with their tensors.

    Args:
        runner: knows the processes.
        path: the file; None for scores in memory, where there is nothing to yield.
        shape: ``(Q, N)``.
        dtype: of the scores.

    Yields:
        The matrix, or None.

    Raises:
        OSError: if the file cannot be written; on other processes an InfluenceError.
    """
    if path is None:
        yield None
        return
    with ExitStack() as stack:
        error: OSError | None = None
        try:
            matrix = stack.enter_context(map_matrix(path, shape, dtype, is_kept=runner.rank == 0))
        except OSError as failure:
            error = failure
        runner.raise_together(error)
        yield matrix
        try:
            stack.close()
        except OSError as failure:
            error = failure
        runner.raise_together(error)
