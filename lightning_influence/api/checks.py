"""Checks of whom and what a call is given: its Trainer, the Trainer's callback, its name in the loggers."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from lightning_influence.collecting.callback import InfluenceCallback
from lightning_influence.running.host.packages import is_lightning


def check_name(name: object) -> None:
    """Refuse a name that cannot be a prefix of keys and a folder, before the work that it is for.

    Raises:
        TypeError: if it is no text.
        ValueError: if it is empty.
    """
    accepted = "accepted is a text: the prefix of what is logged, and the name of the folder of files."
    if not isinstance(name, str):
        raise TypeError(f"Got name={name!r}; {accepted}")
    if not name:
        raise ValueError(f"Got an empty name; {accepted}")


def find_callback(trainer: Trainer) -> InfluenceCallback | None:
    """Return a Trainer's influence callback, the first of several; None if it has none."""
    host: Any = trainer  # its callbacks are declared nowhere
    return next((c for c in host.callbacks if isinstance(c, InfluenceCallback)), None)


def check_trainer(trainer: object) -> None:
    """Refuse what is no Trainer, such as a model in its place.

    Raises:
        TypeError: saying what to pass.
    """
    if is_lightning(trainer, "Trainer"):
        return
    what = "a LightningModule" if is_lightning(trainer, "LightningModule") else type(trainer).__name__
    raise TypeError(
        f"Got {what} as trainer; accepted is a Lightning Trainer, which comes first: "
        "influence(trainer, model, ...), or trainer.influence(model, ...)."
    )
