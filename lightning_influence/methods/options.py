"""Settings of one call, checked before anything runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_influence.curvature.blocks import Blocks
from lightning_influence.passes.captured import Fisher
from lightning_influence.solvers.definite import NegativeCurvature

Damping = float | Literal["auto", "heuristic"]


@dataclass(frozen=True)
class Options:
    """Settings of one call, with what they mean in :func:`~lightning_influence.trainer.influence`.

    Raises:
        ValueError: if one is out of range, saying what was got and what is accepted.
    """

    damping: Damping = "auto"
    fisher: Fisher | None = None
    memory_budget: int = 2**30
    tolerance: float = 0.2
    max_steps: int = 3
    low_rank_tolerance: float = 1e-3
    curvature_examples: int = 4096
    max_parameters: int = 8192
    seed: int = 0
    blocks: Blocks = "layer"
    negative_curvature: NegativeCurvature = "absolute"

    @property
    def fitted_fisher(self) -> Fisher:
        """What factors that have to be fitted are made of."""
        return self.fisher or "sampled"

    def __post_init__(self) -> None:
        damping = self.damping
        if damping not in {"auto", "heuristic"} and not _is_number(damping, math.inf):
            raise ValueError(
                f"Got damping={damping!r}; accepted are 'auto', 'heuristic' or a finite number of at least 0."
            )
        if self.fisher is not None and self.fisher not in get_args(Fisher):
            names = ", ".join(repr(name) for name in get_args(Fisher))
            raise ValueError(f"Got fisher={self.fisher!r}; accepted are {names}.")
        for name, accepted in {"blocks": Blocks, "negative_curvature": NegativeCurvature}.items():
            if getattr(self, name) not in get_args(accepted):
                names = ", ".join(repr(value) for value in get_args(accepted))
                raise ValueError(f"Got {name}={getattr(self, name)!r}; accepted are {names}.")
        least = {"memory_budget": 1, "max_steps": 0, "curvature_examples": 1, "max_parameters": 1, "seed": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value < 2**62:
                raise ValueError(f"Got {name}={value!r}; accepted are integers of at least {lowest}.")
        for name, limit in {"tolerance": math.inf, "low_rank_tolerance": 1.0}.items():
            value = getattr(self, name)
            if not _is_number(value, limit):
                below = "finite numbers" if math.isinf(limit) else f"numbers below {limit:g}"
                raise ValueError(f"Got {name}={value!r}; accepted are {below} of at least 0.")


def _is_number(value: object, limit: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < limit
