"""Settings of the callback, checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

from lightning_influence.collecting.collector import FitFisher
from lightning_influence.support.arguments import (
    check_count,
    check_layers,
    is_count,
    is_number,
    to_plain_number,
)


@dataclass
class Settings:
    """What a user asks for, with what it means in :class:`~lightning_influence.InfluenceCallback`.

    Raises:
        TypeError: if ``layers`` is no list of texts.
        ValueError: if another setting is out of range, saying what was got and what is accepted.
    """

    layers: Sequence[str] | None
    fisher: FitFisher
    every_n_steps: int | None
    overhead: float
    seed: int

    def __post_init__(self) -> None:
        if isinstance(self.layers, Iterable) and not isinstance(self.layers, str):
            self.layers = list(self.layers)  # it may be passed over once only
        check_layers(self.layers)
        if self.fisher not in get_args(FitFisher):
            accepted = ", ".join(repr(choice) for choice in get_args(FitFisher))
            raise ValueError(f"Got fisher={self.fisher!r}; accepted during fit are {accepted}.")
        for name in ("every_n_steps", "overhead", "seed"):
            setattr(self, name, to_plain_number(getattr(self, name)))
        self._check_numbers()

    def _check_numbers(self) -> None:
        if self.every_n_steps is not None and not is_count(self.every_n_steps, 1):
            raise ValueError(
                f"Got every_n_steps={self.every_n_steps!r}; accepted are integers of at least 1, or None for "
                "as many batches as overhead pays for."
            )
        check_count("seed", self.seed, 0)
        if not is_number(self.overhead) or not 0 < self.overhead <= 1:
            raise ValueError(f"Got overhead={self.overhead!r}; accepted are shares of a step in (0, 1].")
