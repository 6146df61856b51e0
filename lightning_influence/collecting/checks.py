"""Checks of a callback's saved state: every part of it that is read, and a checksum of each."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_influence.curvature.factors import Phase
from lightning_influence.curvature.training_record import Family
from lightning_influence.support.arguments import is_count, is_number
from lightning_influence.support.errors import CorruptFileError
from lightning_influence.support.storage import check_version

#: What can be collected during a fit: one backward pass a batch.
FitFisher = Literal["mixed", "sampled", "empirical"]

#: Of what :func:`check_state` accepts.
VERSION = 1
#: Entries that every saved state has.
ENTRIES = {"collector", "fingerprint", "extra_state"}

REMEDY = "Save the checkpoint again, or take the callback's entry out of it: factors are then fitted anew."
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


_COSTS = dict.fromkeys(("covariances", "squares", "basis", "hooks"), _NUMBER)
_SCHEDULE: dict[str, _Rule] = {
    "overhead": _NUMBER,
    "every_n_steps": _COUNT_OR_NONE,
    "horizon": _COUNT_OR_NONE,
    "costs": _MAPPING_OR_NONE,
    **dict.fromkeys(
        ("steps", "start", "end", "phase_start", "phase_end", "planned", "taken", "batch"), _COUNT
    ),
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


def check_state(state: Any) -> None:
    """Check every part of a callback's state that is read, and its checksums.

    Raises:
        CorruptFileError: naming the first part that is missing, malformed or altered.
        FactorMismatchError: if it was written by an incompatible version.
    """
    _check_entries(state, dict.fromkeys(sorted(ENTRIES), _MAPPING), "")
    collector = state["collector"]
    check_version(
        collector,
        VERSION,
        subject="The callback's state has",
        remedy="Resume without it, or train with the version that wrote it.",
    )
    _check_entries(collector, _COLLECTOR, "collector")
    # What is new in the schedule is 0 where an older version wrote it.
    _check_entries({"batch": 0, **collector["schedule"]}, _SCHEDULE, "collector/schedule")
    costs = collector["schedule"]["costs"]
    if costs is not None:
        _check_entries({"hooks": 0.0, **costs}, _COSTS, "collector/schedule/costs", exact=True)
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
            raise CorruptFileError(f"The callback's saved state has no {place!r}. {REMEDY}")
        if not is_accepted(part[name]):
            _refuse(place, part[name], accepted)
    for name in set(part) - set(rules) if exact else ():
        raise CorruptFileError(f"The callback's saved state has an unknown entry '{where}/{name}'. {REMEDY}")


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
            square = isinstance(value, Tensor) and value.ndim in (2, 3) and value.shape[1] == value.shape[-1]
            if value is None or not square or not value.is_floating_point():
                _refuse(f"{where}/{name}/{side}", value, "a floating-point tensor (groups, d, d)")
            shapes[side] = tuple(value.shape)
        (groups, d_in, *_), (_, d_out, *_) = shapes["inputs"], shapes["outputs"]
        expected = {"outputs": (groups, *shapes["outputs"][1:]), "squares": (groups, d_out, d_in)}
        for side, width in (("in", d_in), ("out", d_out)):
            place, seen = f"{name}/seen_{side}", part.get(f"{name}/seen_{side}")
            is_mask = isinstance(seen, Tensor) and seen.dtype == torch.bool and seen.shape == (width,)
            if not is_mask and seen is not None:
                _refuse(f"{where}/{place}", seen, f"a tensor of {width} truth values")
            count = width if seen is None else int(seen.sum())
            expected[f"q_{side}"] = (groups, count, count)
        for key, shape in expected.items():
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
        f"{REMEDY}"
    )


def sum_up(state: Mapping[str, Any]) -> dict[str, int]:
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
    found = sum_up({name: state[name] for name in state if name != "checksums"})
    saved = state["checksums"]
    for place in sorted({*found, *map(str, saved)}):
        if found.get(place) != saved.get(place):
            raise CorruptFileError(
                f"In the callback's saved state, {place!r} was altered after it was saved: its checksum is "
                f"{found.get(place)}, the saved one is {saved.get(place)!r}. {REMEDY}"
            )
