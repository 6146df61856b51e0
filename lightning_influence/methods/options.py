"""Options of a method: a dataclass each, read from keyword arguments and checked before anything runs.

:class:`Options` holds what all methods share. A method with options of its own derives a frozen dataclass
from it and names that class when it is registered. Fields whose metadata come from :func:`require_count`,
:func:`require_number` or :func:`require_choice` are checked; fields without take any value.
"""

from __future__ import annotations

import difflib
import functools
import math
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_args

from lightning_influence.model.captured import Fisher
from lightning_influence.support.arguments import (
    check_choice,
    check_count,
    check_number,
    is_number,
    to_plain_number,
)
from lightning_influence.support.storage import PathLike

Damping = float | Literal["auto", "heuristic"]

Check = Callable[[str, object], None]


def require_count(least: int) -> dict[str, Check]:
    """Return the metadata of an option that is an integer of at least ``least``, or None by default."""
    return {"check": functools.partial(check_count, least=least)}


def require_number(*, below: float = math.inf, positive: bool = False) -> dict[str, Check]:
    """Return the metadata of an option that is a number of at least 0, or None by default.

    Args:
        below: the first number that is refused.
        positive: whether 0 is refused.
    """
    return {"check": functools.partial(check_number, below=below, positive=positive)}


def require_choice(accepted: Iterable[str]) -> dict[str, Check]:
    """Return the metadata of an option that is one of several texts, or None by default."""
    return {"check": functools.partial(check_choice, choices=accepted)}


def _check_path(name: str, value: object) -> None:
    """Refuse what is no path.

    Raises:
        TypeError: saying what is accepted.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"Got {name}={value!r}; accepted is the path of a folder, or None.")


@dataclass(frozen=True)
class Options:
    """What all methods share, with what it means in :func:`~lightning_influence.influence`.

    Attributes:
        damping: ``lambda`` in the unit of the mean loss's curvature, or the rule that decides it.
        fisher: which gradients factors and matrices are made of; None for the method's own choice.
        memory_budget: bytes for what a method keeps of its own.
        factors_dir: a folder in which fitting factors keeps what it has finished, part by part and layer by
            layer; the same call goes on from there after it was killed, and a later one reads them. It takes
            a pass more where one pass would have given factors and eigenvalues. None to keep nothing.
        seed: of random draws.
        unused: options of other methods that were given, as ``name=value``; :func:`read_options` fills it in.

    Raises:
        ValueError: if one is out of range, saying what was got and what is accepted.
    """

    damping: Damping = "auto"
    fisher: Fisher | None = field(default=None, metadata=require_choice(get_args(Fisher)))
    memory_budget: int = field(default=2**30, metadata=require_count(1))
    factors_dir: PathLike | None = field(default=None, kw_only=True, metadata={"check": _check_path})
    seed: int = field(default=0, metadata=require_count(0))
    unused: tuple[str, ...] = field(default=(), kw_only=True, compare=False, repr=False)

    @property
    def fitted_fisher(self) -> Fisher:
        """What factors that have to be fitted are made of."""
        return self.fisher or "mixed"

    def __post_init__(self) -> None:
        damping = self.damping
        if damping not in ("auto", "heuristic") and not (is_number(damping) and 0 <= damping < math.inf):
            raise ValueError(
                f"Got damping={reprlib.repr(damping)}; accepted are 'auto', 'heuristic' or a finite number "
                "of at least 0."
            )
        for option in fields(self):
            check: Check | None = option.metadata.get("check")
            value = getattr(self, option.name)
            if check is not None and not (value is None and option.default is None):
                check(option.name, value)


@dataclass(frozen=True)
class ClosedFormOptions(Options):
    """Options of the methods in closed form: ``"identity"``, ``"diagonal"``, ``"kfac"`` and ``"ekfac"``.

    Attributes:
        low_rank_tolerance: largest relative error, in norm, of scores from low-rank forms of the inverse; 0
            for exact ones. The eigenvalues of closed forms are far less exact than the default: one draw an
            example leaves errors of .4 in scores on the large MLP of the benchmarks, where low-rank forms
            take a tenth of the operations.
        self_influence_tolerance: largest root-mean-square relative error of self-influence from rotating
            gradients onto leading eigenvectors only; 0 for the exact form.
    """

    low_rank_tolerance: float = field(default=3e-2, metadata=require_number(below=1.0))
    self_influence_tolerance: float = field(default=1e-2, metadata=require_number(below=1.0))


# Chosen by hand: the curvature's products cost as much as gradients of so many examples, times its columns.
_CURVATURE_EXAMPLES = 4096


@dataclass(frozen=True)
class SpaceOptions(Options):
    """Options of every method that builds a coarse space.

    Attributes:
        curvature_examples: at most so many training examples enter the coarse space's curvature. None for
            4,096, and in ``"auto"`` for 256 a query where few are asked about a large model.
    """

    curvature_examples: int | None = field(default=None, metadata=require_count(1))

    @property
    def most_curvature_examples(self) -> int:
        """At most so many, for many queries."""
        return self.curvature_examples or _CURVATURE_EXAMPLES


def list_names(kind: type[Options]) -> list[str]:
    """Return the names of the options that a user can give."""
    return [option.name for option in fields(kind) if option.name != "unused"]


def parse_options(
    method: str, kind: type[Options], others: Iterable[type[Options]], given: Mapping[str, Any]
) -> Options:
    """Make a method's options of keyword arguments that a user gave.

    Args:
        method: the method's name, for messages.
        kind: its dataclass.
        others: the dataclasses of all methods. An option of theirs is checked, and listed as unused.
        given: values by name. None asks for the default, whichever method is asked.

    Returns:
        The options.

    Raises:
        TypeError: if no method has such an option; names the nearest, and those that this method accepts.
        ValueError: if a value is out of range.
    """
    own = {option.name: option for option in fields(kind) if option.name != "unused"}
    values: dict[str, Any] = {}
    unused = []
    for name, value in given.items():
        value = to_plain_number(value)
        if name in own:
            if value is not None or own[name].default in (None, MISSING):
                values[name] = value
            continue
        foreign = next((other for other in others if name in list_names(other)), None)
        if foreign is None:
            near = difflib.get_close_matches(name, own, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise TypeError(
                f"Got an unknown option {name!r}.{hint} Accepted are {', '.join(own)} with method={method!r}."
            )
        default = next(option.default for option in fields(foreign) if option.name == name)
        if value is not None and value != default:
            foreign(**{name: value})  # refuses what is out of range
            unused.append(f"{name}={value!r}")
    return kind(**values, unused=tuple(unused))
