"""Finished runs on disk: one verified file each, in a folder that the user's key and the versions name."""

from __future__ import annotations

import hashlib
import os
from importlib import metadata
from pathlib import Path

from torch import Tensor

from lightning_influence.support.errors import CorruptFileError
from lightning_influence.support.fields import read_tensor
from lightning_influence.support.storage import load_object, save_tensors

_KIND = "retrained values"
_PACKAGES = ("torch", "lightning", "numpy", "lightning-influence")


def find_folder(cache_dir: str | os.PathLike[str], cache_key: str, measurement: str | None) -> Path:
    """Name the folder of an experiment's runs.

    A library's new version may train to other values, so the versions count beside the key.

    Args:
        cache_dir: where all experiments are kept.
        cache_key: the user's text that stands for the factories and the data.
        measurement: the measurement's name; None for a function, which the key stands for.

    Returns:
        The folder; it need not exist.
    """
    words = [cache_key, measurement or "function", *(f"{name} {_find_version(name)}" for name in _PACKAGES)]
    return Path(cache_dir).expanduser() / hashlib.sha256("\0".join(words).encode()).hexdigest()[:24]


def _find_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


class RunStore:
    """The finished runs of one experiment.

    Args:
        folder: where the files are.
        cache_key: the user's text, written into every file for people who look at it.
    """

    def __init__(self, folder: Path, cache_key: str) -> None:
        self.folder, self.cache_key = folder, cache_key

    def locate(self, kept: Tensor, seed: int) -> Path:
        """Return the file of a run on ``kept (N,)``, there or not."""
        name = hashlib.sha256(kept.cpu().numpy().tobytes() + f"|{seed}".encode()).hexdigest()[:24]
        return self.folder / f"{name}.safetensors"

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
        path = self.locate(kept, seed)
        try:
            return load_object(path, _KIND, lambda tensors, _: read_tensor(tensors, "values", ndim=1))
        except FileNotFoundError:
            return None
        except CorruptFileError as error:
            raise CorruptFileError(f"{error} Delete {str(path)!r}: its run will be repeated.") from error

    def save(self, kept: Tensor, seed: int, values: Tensor) -> None:
        """Write a run's values atomically: a reader sees the whole file or none."""
        facts = {"kind": _KIND, "cache_key": self.cache_key, "seed": seed, "kept": int(kept.sum())}
        save_tensors(self.locate(kept, seed), {"values": values}, facts)
