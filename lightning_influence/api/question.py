"""What is asked: checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_influence.methods.method import find_method
from lightning_influence.methods.options import Options
from lightning_influence.model.measurements import Measurement, resolve_measurement
from lightning_influence.support.arguments import check_layers, is_count, to_plain_number


@dataclass(frozen=True)
class Question:
    """What is asked of the engine.

    Attributes:
        method: name of a registered method.
        measurement: what is measured on queries.
        top_k: keep only this many of the strongest at either end; None for all scores.
        layers: names or patterns of the layers to cover.
        options: settings of the method.

    Raises:
        ValueError: if a setting is out of range, saying what was got and what is accepted.
        TypeError: if ``layers`` is no list of texts, or the measurement is of a wrong type.
    """

    method: str = "auto"
    measurement: Measurement | None = None
    top_k: int | None = None
    layers: Sequence[str] | None = None
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        find_method(self.method)
        top_k = to_plain_number(self.top_k)
        object.__setattr__(self, "top_k", top_k)
        if top_k is not None and not is_count(top_k, 1):
            raise ValueError(f"Got top_k={top_k!r}; accepted are positive integers, or None for all scores.")
        check_layers(self.layers)
        if (
            self.measurement is not None and self.measurement != "hook"
        ):  # whether there is a hook is known with the module only
            resolve_measurement(self.measurement, None)
