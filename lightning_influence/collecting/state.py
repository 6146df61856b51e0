"""What a callback keeps: the run it collects from, and what of it goes into checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, get_args

from torch import nn

from lightning_influence.collecting.checks import (
    ENTRIES,
    REMEDY,
    VERSION,
    FitFisher,
    check_state,
    sum_up,
)
from lightning_influence.collecting.moments import Moments
from lightning_influence.collecting.schedule import Schedule
from lightning_influence.collecting.sums import WindowSums
from lightning_influence.curvature.factors import Factors, fingerprint_differs
from lightning_influence.curvature.state import InfluenceState
from lightning_influence.curvature.training_record import TrainingRecord
from lightning_influence.model.layers.plan import LayerPlan, ModuleLoss
from lightning_influence.support.arguments import (
    check_callable,
    check_count,
    check_layers,
    is_count,
    is_number,
    to_plain_number,
)
from lightning_influence.support.errors import CorruptFileError, FactorMismatchError

Dynamics: TypeAlias = bool | Literal["auto"]

# The part of the overhead that dynamics get unasked; factors have the rest. Chosen by hand.
_DYNAMICS_PART = 0.2
_QUERIES = "queries"
_DEFAULT_KEY = "InfluenceCallback"  # of a callback with the default settings


@dataclass
class Settings:
    """What a user asks for, with what it means in :class:`~lightning_influence.InfluenceCallback`.

    Raises:
        TypeError: if ``layers`` is no list of texts, or ``loss`` cannot be called.
        ValueError: if another setting is out of range, saying what was got and what is accepted.
    """

    layers: Sequence[str] | None = None
    fisher: FitFisher = "mixed"
    every_n_steps: int | None = None
    overhead: float = 0.05
    statistics: bool = True
    seed: int = 0
    strict: bool = False
    loss: ModuleLoss | None = None
    dynamics: Dynamics = "auto"

    def __post_init__(self) -> None:
        check_callable("loss", self.loss)
        if isinstance(self.layers, Iterable) and not isinstance(self.layers, str):
            self.layers = list(self.layers)  # it may be passed over once only
        check_layers(self.layers)
        if self.fisher not in get_args(FitFisher):
            accepted = ", ".join(repr(choice) for choice in get_args(FitFisher))
            raise ValueError(f"Got fisher={self.fisher!r}; accepted during fit are {accepted}.")
        for name in ("every_n_steps", "overhead", "seed"):
            setattr(self, name, to_plain_number(getattr(self, name)))
        if self.every_n_steps is not None and not is_count(self.every_n_steps, 1):
            raise ValueError(
                f"Got every_n_steps={self.every_n_steps!r}; accepted are integers of at least 1, or None for "
                "as many batches as overhead pays for."
            )
        check_count("seed", self.seed, 0)
        if not (isinstance(self.dynamics, bool) or self.dynamics == "auto"):
            raise ValueError(f"Got dynamics={self.dynamics!r}; accepted are True, False and 'auto'.")
        if not is_number(self.overhead) or not 0 < self.overhead <= 1:
            raise ValueError(f"Got overhead={self.overhead!r}; accepted are shares of a step in (0, 1].")

    @property
    def dynamics_share(self) -> float | None:
        """Share of the fit's time that dynamics may take; None for whatever they take, where asked for."""
        return _DYNAMICS_PART * self.overhead if self.dynamics == "auto" else None

    @property
    def collecting_share(self) -> float:
        """Share of the training steps' time that factors may take: all but that of unasked dynamics."""
        return self.overhead - (self.dynamics_share or 0.0)


@dataclass
class Run:
    """What is known of a training run, through all of its fits and resumptions.

    Attributes:
        schedule: decides which batches are collected.
        sums: what they have added up to.
        record: what the optimizer did.
        collected: number of batches collected.
        scale: sum over them of the factor between batch loss and mean loss.
        noise: decaying sums of the gradient noise, its signal, and the weight of both.
    """

    schedule: Schedule
    sums: WindowSums = field(default_factory=WindowSums)
    record: TrainingRecord = field(default_factory=TrainingRecord)
    collected: int = 0
    scale: float = 0.0
    noise: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])

    @classmethod
    def start(cls, settings: Settings) -> Run:
        """Return a run of which nothing is known yet."""
        schedule = Schedule(overhead=settings.collecting_share, every_n_steps=settings.every_n_steps)
        return cls(schedule, WindowSums(Factors(fisher=settings.fisher, origin="fit")))

    def state_dict(self, sums: WindowSums | None = None) -> dict[str, Any]:
        """Return tensors and primitives, with other sums in place of this process's if given."""
        return {
            "version": VERSION,
            "schedule": self.schedule.state_dict(),
            "generations": (sums or self.sums).state_dict(),
            "record": self.record.state_dict(),
            "collected": self.collected,
            "scale": self.scale,
            "noise": list(self.noise),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], settings: Settings) -> Run:
        """Continue from :meth:`state_dict`; the cadence is that of the settings.

        Returns:
            The run, sharing the tensors of the state.

        Raises:
            FactorMismatchError: if the sums were written by an incompatible version.
        """
        schedule = Schedule.from_state_dict(state["schedule"])
        schedule.overhead, schedule.every_n_steps = settings.collecting_share, settings.every_n_steps
        return cls(
            schedule,
            WindowSums.from_state_dict(state["generations"]),
            TrainingRecord.from_state_dict(state["record"]),
            state["collected"],
            state["scale"],
            list(state["noise"]),
        )


class Kept:
    """Everything of a callback that outlives a fit and goes into checkpoints.

    Args:
        settings: of the callback.

    Attributes:
        run: sums, schedule and record of the run.
        final: sums over all processes after a fit on several.
        fingerprint: of the weights at the end of the fit.
        extra_state: tensors and primitives that are saved and restored along.
        restored: whether what there is comes from a checkpoint that no fit has continued yet.
        continued: whether the fit that runs continues what came from a checkpoint.
        dynamics: moments of each training example's loss, None where none were kept.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.run = Run.start(settings)
        self.final: WindowSums | None = None
        self.fingerprint: dict[str, list[float]] = {}
        self.extra_state: dict[str, Any] = {}
        self.restored = self.continued = False
        self.dynamics: Moments | None = None
        self._queries: InfluenceState | None = None

    @property
    def factors(self) -> Factors:
        """The most recent complete sums, else covariances; without layers if there are none."""
        best = (self.final or self.run.sums).best
        return replace(best, fingerprint=self.fingerprint, origin="fit")

    @property
    def record(self) -> TrainingRecord | None:
        """What the optimizer did, or None before its first step."""
        return self.run.record if self.run.record.steps else None

    @property
    def influence_state(self) -> InfluenceState:
        """What queries start from, and leave for later ones until training goes on."""
        if self._queries is None:
            factors = self.factors
            self._queries = InfluenceState(factors if factors.layers else None, self.record, collected=True)
            self._queries.take_results(self.extra_state.get(_QUERIES, {}))
        return self._queries

    @influence_state.setter
    def influence_state(self, state: InfluenceState) -> None:
        self._queries = state

    def begin_fit(self) -> None:
        """Forget what belongs to the weights that training now leaves."""
        self._queries = self.final = None
        self.extra_state.pop(_QUERIES, None)

    def end_fit(self, weights: dict[str, list[float]] | None, final: WindowSums | None) -> None:
        """Let queries start anew.

        Args:
            weights: fingerprint of the weights, None if nothing was collected.
            final: sums over all processes, None if there is one, or if the fit has failed.
        """
        self._queries, self.final = None, final
        if weights is not None:
            self.fingerprint = weights

    def reset(self) -> None:
        """Begin the run anew."""
        self.run = Run.start(self._settings)

    def continue_or_reset(self, module: nn.Module, plan: LayerPlan) -> str | None:
        """Drop what was collected for other layers or weights.

        Args:
            module: the model.
            plan: the covered layers.

        Returns:
            Why it was dropped, None if it was not.
        """
        if not self.run.schedule.steps:
            return None
        shapes = {name: layer.shape for name, layer in plan.layers.items()}
        why = None
        try:
            for factors in (self.run.sums.current, self.run.sums.previous):
                if factors is not None:
                    factors.check_fits({name: shapes[name] for name in shapes if name in factors.layers})
            differ = fingerprint_differs(self.fingerprint, module)
            if differ:
                why = f"the weights differ from those at its end, in {differ[:3]}"
        except FactorMismatchError as error:
            why = str(error)
        if why is not None:
            self.reset()
            self.extra_state, self.dynamics = {}, None
        self.fingerprint = {}
        return why

    def read_dynamics(self) -> Moments | None:
        """Return a copy of the moments in which the epoch that runs counts as over, None without any."""
        if self.dynamics is None:
            return None
        moments = self.dynamics.copy()
        moments.fold()
        return moments if moments.epochs or moments.missed or moments.notes else None

    def state_dict(
        self,
        sums: WindowSums | None = None,
        weights: dict[str, list[float]] | None = None,
        dynamics: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Tensors and primitives, which load with ``weights_only=True``.

        Args:
            sums: what to save in place of this process's own sums.
            weights: the fingerprint to save in place of that of the last fit.
            dynamics: of the moments, as :meth:`Moments.state_dict` returns it; None to save none.

        Returns:
            The state, with a checksum of each of its parts.
        """
        extra = dict(self.extra_state)
        if self._queries is not None:
            extra[_QUERIES] = self._queries.stored_results(self.factors)
        state: dict[str, Any] = {
            "collector": self.run.state_dict(sums or self.final),
            "fingerprint": self.fingerprint if weights is None else weights,
            "extra_state": extra,
        }
        if dynamics is not None:
            state["dynamics"] = dynamics
        return {**state, "checksums": sum_up(state)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was saved; the next fit continues it. After an error nothing is kept.

        Raises:
            CorruptFileError: if a part is missing, malformed or altered; the message names it.
            FactorMismatchError: if the state was written by an incompatible version.
        """
        self.reset()
        self.fingerprint, self.extra_state = {}, {}
        self.final = self._queries = None
        self.restored, self.dynamics = False, None
        try:
            check_state(state)
            run = Run.from_state_dict(state["collector"], self._settings)
            InfluenceState().take_results(state["extra_state"].get(_QUERIES, {}))
            dynamics = state.get("dynamics")
            moments = None if dynamics is None else Moments.from_state_dict(dynamics)
        except (CorruptFileError, FactorMismatchError):
            raise
        except Exception as error:  # whatever a part that the checks above do not know may lead to
            raise CorruptFileError(
                f"The callback's saved state cannot be read ({type(error).__name__}: {error}). {REMEDY}"
            ) from error
        self.run, self.restored, self.dynamics = run, True, moments
        self.fingerprint, self.extra_state = dict(state["fingerprint"]), dict(state["extra_state"])


def read_saved_state(checkpoint: Mapping[str, Any]) -> InfluenceState | None:
    """Read what an :class:`~lightning_influence.InfluenceCallback` saved, whatever its settings were.

    Args:
        checkpoint: a Lightning checkpoint, loaded.

    Returns:
        The state, None if no such callback saved any; of several callbacks that with the default settings,
        else the first.

    Raises:
        CorruptFileError: if a part of it is missing, malformed or altered; the message names it.
        FactorMismatchError: if it was written by an incompatible version.
    """
    kept = _read_kept(checkpoint)
    return None if kept is None else kept.influence_state


def read_saved_dynamics(checkpoint: Mapping[str, Any]) -> Moments | None:
    """Read the moments of losses that an :class:`~lightning_influence.InfluenceCallback` saved.

    Args:
        checkpoint: a Lightning checkpoint, loaded.

    Returns:
        The moments, in which an epoch that was cut short counts as one; None if there are none.

    Raises:
        CorruptFileError: if a part of the state is missing, malformed or altered; the message names it.
        FactorMismatchError: if it was written by an incompatible version.
    """
    kept = _read_kept(checkpoint)
    return None if kept is None else kept.read_dynamics()


def _read_kept(checkpoint: Mapping[str, Any]) -> Kept | None:
    callbacks = checkpoint.get("callbacks", {})
    saved = [
        key
        for key, state in (callbacks.items() if isinstance(callbacks, Mapping) else ())
        if str(key).startswith(_DEFAULT_KEY) or (isinstance(state, Mapping) and state.keys() >= ENTRIES)
    ]
    if not saved:
        return None
    kept = Kept(Settings())
    kept.load_state_dict(callbacks[_DEFAULT_KEY if _DEFAULT_KEY in saved else saved[0]])
    return kept
