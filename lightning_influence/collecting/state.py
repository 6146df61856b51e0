"""What a callback keeps: the run it collects from, and what of it goes into checkpoints."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_influence.collecting.schedule import Phase, Schedule
from lightning_influence.collecting.sums import WindowSums
from lightning_influence.curvature.factors import Factors, fingerprint_differs
from lightning_influence.curvature.state import InfluenceState
from lightning_influence.curvature.training_record import Family, TrainingRecord
from lightning_influence.model.plan import LayerPlan, ModuleLoss
from lightning_influence.support.arguments import (
    check_callable,
    check_count,
    check_layers,
    is_count,
    is_number,
    to_plain_number,
)
from lightning_influence.support.errors import CorruptFileError, FactorMismatchError
from lightning_influence.support.storage import check_version

#: What can be collected during a fit: one backward pass a batch.
FitFisher = Literal["mixed", "sampled", "empirical"]

_VERSION = 1
_QUERIES = "queries"
_DEFAULT_KEY = "InfluenceCallback"  # of a callback with the default settings
_ENTRIES = {"collector", "fingerprint", "extra_state"}


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
        if not is_number(self.overhead) or not 0 < self.overhead <= 1:
            raise ValueError(f"Got overhead={self.overhead!r}; accepted are shares of a step in (0, 1].")


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
        schedule = Schedule(overhead=settings.overhead, every_n_steps=settings.every_n_steps)
        return cls(schedule, WindowSums(Factors(fisher=settings.fisher, origin="fit")))

    def state_dict(self, sums: WindowSums | None = None) -> dict[str, Any]:
        """Return tensors and primitives, with other sums in place of this process's if given."""
        return {
            "version": _VERSION,
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
        schedule.overhead, schedule.every_n_steps = settings.overhead, settings.every_n_steps
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
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.run = Run.start(settings)
        self.final: WindowSums | None = None
        self.fingerprint: dict[str, list[float]] = {}
        self.extra_state: dict[str, Any] = {}
        self.restored = False
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
            self._queries = InfluenceState(factors if factors.layers else None, self.record)
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
            self.extra_state = {}
        self.fingerprint = {}
        return why

    def state_dict(
        self, sums: WindowSums | None = None, weights: dict[str, list[float]] | None = None
    ) -> dict[str, Any]:
        """Tensors and primitives, which load with ``weights_only=True``.

        Args:
            sums: what to save in place of this process's own sums.
            weights: the fingerprint to save in place of that of the last fit.

        Returns:
            The state, with a checksum of each of its parts.
        """
        extra = dict(self.extra_state)
        if self._queries is not None:
            extra[_QUERIES] = self._queries.stored_results(self.factors)
        state = {
            "collector": self.run.state_dict(sums or self.final),
            "fingerprint": self.fingerprint if weights is None else weights,
            "extra_state": extra,
        }
        return {**state, "checksums": _sum_up(state)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was saved; the next fit continues it. After an error nothing is kept.

        Raises:
            CorruptFileError: if a part is missing, malformed or altered; the message names it.
            FactorMismatchError: if the state was written by an incompatible version.
        """
        self.reset()
        self.fingerprint, self.extra_state = {}, {}
        self.final = self._queries = None
        self.restored = False
        try:
            _check_state(state)
            run = Run.from_state_dict(state["collector"], self._settings)
            InfluenceState().take_results(state["extra_state"].get(_QUERIES, {}))
        except (CorruptFileError, FactorMismatchError):
            raise
        except Exception as error:  # whatever a part that the checks above do not know may lead to
            raise CorruptFileError(
                f"The callback's saved state cannot be read ({type(error).__name__}: {error}). {_REMEDY}"
            ) from error
        self.run, self.restored = run, True
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
    callbacks = checkpoint.get("callbacks", {})
    saved = [
        key
        for key, state in (callbacks.items() if isinstance(callbacks, Mapping) else ())
        if str(key).startswith(_DEFAULT_KEY) or (isinstance(state, Mapping) and state.keys() >= _ENTRIES)
    ]
    if not saved:
        return None
    kept = Kept(Settings())
    kept.load_state_dict(callbacks[_DEFAULT_KEY if _DEFAULT_KEY in saved else saved[0]])
    return kept.influence_state


_REMEDY = "Save the checkpoint again, or take the callback's entry out of it: factors are then fitted anew."
_Rule = tuple[str, Callable[[Any], bool]]


def _has_numbers(value: Any, count: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == count and all(map(is_number, value))


_NUMBER: _Rule = ("a number", is_number)
_COUNT: _Rule = ("an integer of at least 0", lambda value: is_count(value, 0))
_COUNT_OR_NONE: _Rule = ("an integer of at least 0, or None", lambda v: v is None or is_count(v, 0))
_TEXT: _Rule = ("a text", lambda value: isinstance(value, str))
_TEXTS: _Rule = ("a list of texts", lambda v: isinstance(v, list) and all(isinstance(n, str) for n in v))
_MAPPING: _Rule = ("a mapping", lambda value: isinstance(value, Mapping))
_MAPPING_OR_NONE: _Rule = ("a mapping, or None", lambda v: v is None or isinstance(v, Mapping))
_TWO: _Rule = ("two numbers", lambda value: _has_numbers(value, 2))
_THREE: _Rule = ("three numbers", lambda value: _has_numbers(value, 3))
_TRUTH: _Rule = ("True or False", lambda value: isinstance(value, bool))


def _one_of(choices: Any) -> _Rule:
    accepted = get_args(choices)
    return f"one of {list(accepted)}", lambda value: isinstance(value, str) and value in accepted


_COSTS = {"covariances": _NUMBER, "squares": _NUMBER, "basis": _NUMBER}
_SCHEDULE: dict[str, _Rule] = {
    "overhead": _NUMBER,
    "every_n_steps": _COUNT_OR_NONE,
    "horizon": _COUNT_OR_NONE,
    "costs": _MAPPING_OR_NONE,
    **dict.fromkeys(("steps", "start", "end", "phase_start", "phase_end", "planned", "taken"), _COUNT),
    "spent": _NUMBER,
    "phase": _one_of(Phase),
    "with_basis": _TRUTH,
}
_RECORD: dict[str, _Rule] = {
    "family": _one_of(Family),
    "reason": _TEXT,
    "steps": _COUNT,
    "loss_scale": _NUMBER,
    "layers": _MAPPING,
}
_FACTORS: dict[str, _Rule] = {
    "layers": _TEXTS,
    "fisher": _one_of(FitFisher),
    "weight_sum": _NUMBER,
    "weight_examples": _NUMBER,
    "origin": _TEXT,
    "fingerprint": _MAPPING,
}
_COLLECTOR: dict[str, _Rule] = {
    "schedule": _MAPPING,
    "generations": _MAPPING,
    "record": _MAPPING,
    "collected": _COUNT,
    "scale": _NUMBER,
    "noise": _THREE,
}


def _check_state(state: Any) -> None:
    """Check every part of a callback's state that is read, and its checksums.

    Raises:
        CorruptFileError: naming the first part that is missing, malformed or altered.
        FactorMismatchError: if it was written by an incompatible version.
    """
    _check_entries(state, dict.fromkeys(sorted(_ENTRIES), _MAPPING), "")
    collector = state["collector"]
    check_version(
        collector,
        _VERSION,
        subject="The callback's state has",
        remedy="Resume without it, or train with the version that wrote it.",
    )
    _check_entries(collector, _COLLECTOR, "collector")
    _check_entries(collector["schedule"], _SCHEDULE, "collector/schedule")
    if collector["schedule"]["costs"] is not None:
        _check_entries(collector["schedule"]["costs"], dict(_COSTS), "collector/schedule/costs", exact=True)
    _check_entries(collector["record"], _RECORD, "collector/record", exact=True)
    layers, numbers = (
        collector["record"]["layers"],
        dict.fromkeys(("rate", "weight_decay", "metric"), _NUMBER),
    )
    for name, layer in layers.items():
        _check_entries(layer, numbers, f"collector/record/layers/{name}", exact=True)
    generations = collector["generations"]
    _check_entries(generations, {"current": _MAPPING, "previous": _MAPPING_OR_NONE}, "collector/generations")
    for part in ("current", "previous"):
        if generations[part] is not None:
            _check_factors(generations[part], f"collector/generations/{part}")
    _check_entries(state["fingerprint"], dict.fromkeys(state["fingerprint"], _TWO), "fingerprint")
    if "checksums" in state:
        _check_sums(state)


def _check_entries(part: Any, rules: Mapping[str, _Rule], where: str, *, exact: bool = False) -> None:
    """Check the entries of one mapping.

    Raises:
        CorruptFileError: naming the entry, what was got and what is accepted.
    """
    if not isinstance(part, Mapping):
        _refuse(where or "the state itself", part, "a mapping")
    for name, (accepted, is_accepted) in rules.items():
        place = f"{where}/{name}".lstrip("/")
        if name not in part:
            raise CorruptFileError(f"The callback's saved state has no {place!r}. {_REMEDY}")
        if not is_accepted(part[name]):
            _refuse(place, part[name], accepted)
    for name in set(part) - set(rules) if exact else ():
        raise CorruptFileError(f"The callback's saved state has an unknown entry '{where}/{name}'. {_REMEDY}")


def _check_factors(part: Any, where: str) -> None:
    """Check types and shapes of one window's sums.

    Raises:
        CorruptFileError: naming the entry, what was got and what is accepted.
    """
    _check_entries(part, _FACTORS, where)
    for name in part["layers"]:
        _check_entries(part, {f"{name}/counts": _THREE}, where)
        shapes = {}
        for side in ("inputs", "outputs"):
            value = part.get(f"{name}/{side}")
            square = isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] == value.shape[2]
            if value is None or not square or not value.is_floating_point():
                _refuse(f"{where}/{name}/{side}", value, "a floating-point tensor (groups, d, d)")
            shapes[side] = tuple(value.shape)
        (groups, d_in, _), (_, d_out, _) = shapes["inputs"], shapes["outputs"]
        expected = {"outputs": (groups, d_out, d_out), "q_in": shapes["inputs"], "q_out": shapes["outputs"]}
        for key, shape in {**expected, "squares": (groups, d_out, d_in)}.items():
            value = part.get(f"{name}/{key}")
            if value is not None and (not isinstance(value, Tensor) or tuple(value.shape) != shape):
                _refuse(f"{where}/{name}/{key}", value, f"a tensor of shape {shape}")


def _refuse(place: str, value: Any, accepted: str) -> None:
    """Refuse a part of a saved state.

    Raises:
        CorruptFileError: always.
    """
    got = f"a tensor of shape {tuple(value.shape)} and {value.dtype}" if isinstance(value, Tensor) else None
    raise CorruptFileError(
        f"In the callback's saved state, {place!r} is {got or repr(value)[:80]}; accepted is {accepted}. "
        f"{_REMEDY}"
    )


def _sum_up(state: Mapping[str, Any]) -> dict[str, int]:
    """Return a checksum (CRC-32, which sees every flipped bit) of each tensor, and of each entry's rest."""
    sums: dict[str, int] = {}
    for place, value in _walk(state, ""):
        if isinstance(value, Tensor):
            if value.layout == torch.strided:
                content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                sums[place] = zlib.crc32(content, zlib.crc32(f"{value.dtype}{tuple(value.shape)}".encode()))
        else:
            entry = place.partition("/")[0]
            sums[entry] = zlib.crc32(f"{place}={value!r};".encode(), sums.get(entry, 0))
    return sums


def _walk(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yield all tensors and primitives of a nested state with their places, in the order of their names."""
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _walk(value[key], f"{place}/{key}".lstrip("/"))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _walk(item, f"{place}/{number}")
    else:
        yield place, value


def _check_sums(state: Mapping[str, Any]) -> None:
    """Compare the checksums that were saved with those of the content.

    Raises:
        CorruptFileError: naming the first part that differs.
    """
    _check_entries(state, {"checksums": _MAPPING}, "")
    found = _sum_up({name: state[name] for name in state if name != "checksums"})
    saved = state["checksums"]
    for place in sorted({*found, *map(str, saved)}):
        if found.get(place) != saved.get(place):
            raise CorruptFileError(
                f"In the callback's saved state, {place!r} was altered after it was saved: its checksum is "
                f"{found.get(place)}, the saved one is {saved.get(place)!r}. {_REMEDY}"
            )
