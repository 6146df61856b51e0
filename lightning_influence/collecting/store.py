"""What a callback has collected and keeps: sums, the weights they belong to, and what queries left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_influence.collecting.collector import Collector, FitFisher
from lightning_influence.collecting.generations import Generations
from lightning_influence.curvature.factors import Factors, fingerprint_differs
from lightning_influence.curvature.state import InfluenceState
from lightning_influence.curvature.training_record import TrainingRecord
from lightning_influence.model.plan import LayerPlan
from lightning_influence.support.errors import FactorMismatchError

_QUERIES = "queries"
_DEFAULT_KEY = "InfluenceCallback"  # of a callback with the default settings


class Store:
    """Everything of a callback that outlives a fit and goes into checkpoints.

    Args:
        fisher: which output gradients to use.
        **settings: the other settings of a :class:`~lightning_influence.collecting.collector.Collector`.

    Attributes:
        collector: sums, schedule and record of the run.
        final: sums over all processes after a fit on several.
        fingerprint: of the weights at the end of the fit.
        extra_state: tensors and primitives that are saved and restored along.
        restored: whether what there is comes from a checkpoint that no fit has continued yet.
    """

    def __init__(self, fisher: FitFisher = "mixed", **settings: Any) -> None:
        self._fisher, self._settings = fisher, settings
        self.collector = self._new_collector()
        self.final: Generations | None = None
        self.fingerprint: dict[str, list[float]] = {}
        self.extra_state: dict[str, Any] = {}
        self.restored = False
        self._kept: InfluenceState | None = None

    @property
    def factors(self) -> Factors:
        """The most recent complete sums, else covariances; without layers if there are none."""
        best = (self.final or self.collector.generations).best
        return replace(best, fingerprint=self.fingerprint, origin="fit")

    @property
    def record(self) -> TrainingRecord | None:
        """What the optimizer did, or None before its first step."""
        return self.collector.record if self.collector.record.steps else None

    @property
    def influence_state(self) -> InfluenceState:
        """What queries start from, and leave for later ones until training goes on."""
        if self._kept is None:
            factors = self.factors
            self._kept = InfluenceState(factors if factors.layers else None, self.record)
            self._kept.take_results(self.extra_state.get(_QUERIES, {}))
        return self._kept

    @influence_state.setter
    def influence_state(self, state: InfluenceState) -> None:
        self._kept = state

    def begin_fit(self) -> None:
        """Forget what belongs to the weights that training now leaves."""
        self._kept = self.final = None
        self.extra_state.pop(_QUERIES, None)

    def end_fit(self, weights: dict[str, list[float]] | None = None) -> None:
        """Let queries start anew, from these weights if something was collected."""
        self._kept = None
        if weights is not None:
            self.fingerprint = weights

    def reset(self) -> None:
        """Begin the sums anew."""
        self.collector = self._new_collector()

    def continue_or_reset(self, module: nn.Module, plan: LayerPlan) -> str | None:
        """Drop what was collected for other layers or weights.

        Args:
            module: the model.
            plan: the covered layers.

        Returns:
            Why it was dropped, None if it was not.
        """
        if not self.collector.schedule.steps:
            return None
        try:
            _check_same_model(self.collector.generations, plan)
            differ = fingerprint_differs(self.fingerprint, module)
            why = f"the weights differ from those at its end, in {differ[:3]}" if differ else ""
        except FactorMismatchError as error:
            why = str(error)
        if why:
            self.reset()
            self.extra_state = {}
        self.fingerprint = {}
        return why or None

    def state_dict(
        self, sums: Generations | None = None, weights: dict[str, list[float]] | None = None
    ) -> dict[str, Any]:
        """Tensors and primitives, which load with ``weights_only=True``.

        Args:
            sums: what to save in place of this process's own sums.
            weights: the fingerprint to save in place of that of the last fit.

        Returns:
            The state.
        """
        extra = dict(self.extra_state)
        if self._kept is not None:
            extra[_QUERIES] = self._kept.stored_results(self.factors)
        return {
            "collector": self.collector.state_dict(sums or self.final),
            "fingerprint": self.fingerprint if weights is None else weights,
            "extra_state": extra,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was saved; the next fit continues it."""
        self.reset()
        self.collector.load_state_dict(state["collector"])
        self.fingerprint = dict(state["fingerprint"])
        self.extra_state = dict(state["extra_state"])
        self.final = self._kept = None
        self.restored = True

    def _new_collector(self) -> Collector:
        return Collector(self._fisher, **self._settings)


def state_from_checkpoint(checkpoint: Mapping[str, Any]) -> InfluenceState | None:
    """Read what an :class:`~lightning_influence.InfluenceCallback` saved, whatever its settings were.

    Args:
        checkpoint: a Lightning checkpoint, loaded.

    Returns:
        The state, None if no such callback saved any; of several callbacks that with the default settings,
        else the first.
    """
    saved = {
        key: state
        for key, state in checkpoint.get("callbacks", {}).items()
        if isinstance(state, dict) and {"collector", "fingerprint", "extra_state"} <= state.keys()
    }
    if not saved:
        return None
    store = Store()
    store.load_state_dict(saved[_DEFAULT_KEY if _DEFAULT_KEY in saved else next(iter(saved))])
    return store.influence_state


def _check_same_model(generations: Generations, plan: LayerPlan) -> None:
    """Refuse sums of other layers.

    Raises:
        FactorMismatchError: listing what differs.
    """
    shapes = {name: layer.shape for name, layer in plan.layers.items()}
    for factors in (generations.current, generations.previous):
        if factors is not None:
            known = {name: shape for name, shape in shapes.items() if name in factors.layers}
            factors.check_fits(known)
