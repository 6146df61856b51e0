"""Finished runs on disk: one verified file each, under the hash of all that decides the result."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_influence.evaluation.fingerprints import content, describe, digest, versions
from lightning_influence.evaluation.harness.retraining import Retraining
from lightning_influence.support.errors import CorruptFileError
from lightning_influence.support.storage import check_kind, load_tensors, save_tensors

_KIND = "retrained values"


class RunStore:
    """The finished runs of one experiment.

    Args:
        folder: where the files are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kept: Tensor, seed: int) -> Path:
        """Return the file of a run on ``kept (N,)``."""
        key = hashlib.sha256(kept.cpu().numpy().tobytes() + f"|{seed}".encode()).hexdigest()[:24]
        return self.folder / f"{key}.safetensors"

    def load(self, kept: Tensor, seed: int) -> Tensor | None:
        """Values ``(Q,)`` of a run, None if it is not there.

        Args:
            kept: boolean, ``(N,)``.
            seed: the run's.

        Returns:
            The values or None.

        Raises:
            CorruptFileError: if the file is damaged.
        """
        path = self.path(kept, seed)
        try:
            tensors, metadata = load_tensors(path)
            check_kind(path, metadata, _KIND)
        except FileNotFoundError:
            return None
        except CorruptFileError as error:
            raise CorruptFileError(f"{error} Delete {str(path)!r}: its run will be repeated.") from error
        return tensors["values"]

    def save(self, kept: Tensor, seed: int, values: Tensor) -> None:
        """Write a run's values atomically: a reader sees the whole file or none."""
        metadata = {"kind": _KIND, "seed": seed, "kept": int(kept.sum())}
        save_tensors(self.path(kept, seed), {"values": values}, metadata)


def fingerprint(retraining: Retraining, data: Any, queries: Any, data_key: str | None) -> str:
    """Hash of what decides a run's result, subset and seed aside.

    Args:
        retraining: the functions: by name and by the source and the values of all they are made of.
        data: the training set, by content.
        queries: the query batches, by content.
        data_key: stands for the content of both if given.

    Returns:
        24 hexadecimal digits.

    Raises:
        TypeError: if the functions or the data are made of what cannot be hashed.
    """
    words = versions()
    for name, function in sorted(retraining.functions().items()):
        words += [name, *describe(function)]
    words.append(str(retraining.measurement) if isinstance(retraining.measurement, str) else "function")
    if data_key is not None:
        return digest([*words, "key", data_key])
    return digest([*words, "train", *_contents(data), "queries", *map(content, queries)])


def _contents(data: Any) -> Iterable[str]:
    if isinstance(data, TensorDataset):
        return [content(tensor) for tensor in data.tensors]
    return (content(data[index]) for index in range(len(data)))
