"""Lightning under both of its names, ``lightning.pytorch`` and ``pytorch_lightning``, whose classes differ.

The two packages hold the same code. A class of one is nevertheless no class of the other, so that
``isinstance`` tells half of the truth; what is asked here is the name of a class and where it was defined.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Iterator
from contextlib import suppress
from types import ModuleType

from lightning.pytorch import Callback

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def make_callback_class() -> type[Callback]:
    """Make the class that a callback for Trainers of both packages derives from.

    Before its version 2.6, a Trainer of ``pytorch_lightning`` accepts objects of its own ``Callback`` alone,
    so that the class then derives from both. The hooks are those of ``lightning.pytorch`` in any case.

    Returns:
        The class, which adds nothing.
    """
    with suppress(ImportError):  # which a package that is not installed raises too
        version = importlib.metadata.version("pytorch-lightning")
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < (2, 6):
            other = importlib.import_module(PACKAGES[1]).Callback
            return type("CallbackOfBoth", (Callback, other), {})
    return Callback


def find_package(thing: object) -> str | None:
    """Name the package that an object's (or a class's) class of Lightning comes from.

    Args:
        thing: an object such as a Trainer or a LightningModule, or a class.

    Returns:
        ``"lightning.pytorch"`` or ``"pytorch_lightning"``; None if it derives from neither.
    """
    return next((package for _, package in _find_classes(thing)), None)


def is_lightning(thing: object, *kinds: str) -> bool:
    """Tell whether an object (or a class) derives from a class of Lightning, whichever package it is of.

    Args:
        thing: the object, or the class.
        *kinds: names of classes, such as ``"LightningModule"``; one of them is enough.

    Returns:
        Whether it does.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> is_lightning(BoringModel, "LightningModule"), is_lightning(BoringModel(), "Trainer", "Callback")
        (True, False)
    """
    return any(cls.__name__ in kinds for cls, _ in _find_classes(thing))


def _find_classes(thing: object) -> Iterator[tuple[type, str]]:
    """Find the classes of Lightning that an object, or a class, derives from, each with its package."""
    for cls in (thing if isinstance(thing, type) else type(thing)).__mro__:
        for package in PACKAGES:
            if cls.__module__ == package or cls.__module__.startswith(f"{package}."):
                yield cls, package


def load_beside(thing: object, path: str = "") -> ModuleType:
    """Import a module of the package that an object comes from.

    Args:
        thing: an object of Lightning.
        path: where in the package, such as ``"trainer.states"``.

    Returns:
        The module.
    """
    package = find_package(thing) or PACKAGES[0]
    return importlib.import_module(f"{package}.{path}" if path else package)


def check_same_package(trainer: object, module: object) -> None:
    """Refuse a Trainer of one package with a module of the other, which the Trainer itself would refuse.

    Raises:
        TypeError: saying what to import.
    """
    theirs, own = find_package(trainer), find_package(module)
    if theirs != own:
        raise TypeError(
            f"Got a Trainer of {theirs} with a module of {own}; accepted are both of one package. Import the "
            f"Trainer from {own}; InfluenceTrainer is one of lightning.pytorch, and any Trainer answers "
            "lightning_influence.influence(trainer, model, ...)."
        )
