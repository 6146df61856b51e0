"""Attributes of Lightning's objects: put back, or asked about."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lightning.pytorch.utilities.combined_loader import CombinedLoader

from lightning_influence.running.host.packages import load_beside
from lightning_influence.support.errors import UnsupportedTrainerError


@contextlib.contextmanager
def preserved(owner: Any, *names: str) -> Iterator[None]:
    """Put the named instance attributes of ``owner`` back on exit, whatever happened to them.

    Raises:
        UnsupportedTrainerError: if ``owner`` has no such attribute.
    """
    missing = [name for name in names if name not in vars(owner)]
    if missing:
        raise UnsupportedTrainerError(
            f"{type(owner).__name__} has no attribute {', '.join(missing)} in this version of Lightning; "
            "install a version that the package's requirements accept (lightning>=2.4,<3)."
        )
    saved = {name: vars(owner)[name] for name in names}
    try:
        yield
    finally:
        vars(owner).update(saved)


TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def wrapped_sampler(sampler: object) -> object | None:
    """Return the user's sampler inside the one that Lightning wraps it in for distributed runs, or None."""
    return getattr(getattr(sampler, "dataset", None), "_sampler", None)


def combine_loaders(loaders: Sequence[Iterable[Any]], trainer: object) -> Any:
    """Return loaders one after another, as Lightning would combine them, but without a warning.

    Lightning 2.6 makes a tree of them in a way that torch 2.13 deprecates, and would warn in every pass.
    """
    combined = load_beside(trainer, "utilities.combined_loader").CombinedLoader
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
        return combined(loaders, "sequential")


def combined_mode(loader: CombinedLoader) -> str:
    """Return how a ``CombinedLoader`` goes through its loaders."""
    return loader._mode


def defines(owner: object, hook: str) -> bool:
    """Return whether a LightningModule or LightningDataModule overrides a hook of its base class."""
    overridden: bool = load_beside(owner, "utilities.model_helpers").is_overridden(hook, owner)
    return overridden
