"""The certificate of how scores came about."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from torch import Tensor
from typing_extensions import NotRequired, Self

from lightning_influence.support.fields import check_fields

# Entries of a mapping that people are shown; the object has all. Chosen by hand.
_LISTED = 4


class PassFacts(TypedDict):
    """One pass over data: its name, how long it took, how many examples (and batches) it saw."""

    name: str
    seconds: float
    examples: int
    batches: NotRequired[int]


@dataclass(frozen=True, eq=False)
class Diagnostics:
    """How scores were computed; saved with them.

    Attributes:
        method: name of the method.
        measurement: what was measured on the queries, the unit of the scores.
        damping: lambda of each layer.
        damping_origin: where lambda comes from, in words.
        residuals: ``(Q,)`` relative residual ``||v - (H + lambda)x|| / ||v||`` per query, None if not
            computed. Of a model in half precision, whose system is rounded, they are raised by the relative
            error that was measured in float32.
        passes: the passes over data, in order.
        seconds: wall-clock time of the whole call.
        layers: parameter counts of the layers that scores account for.
        parameters_covered: share of the model's trainable parameters in these layers, 0 to 1.
        checkpoint: path of the checkpoint, None for the weights in memory.
        warnings: what was left out or assumed.
        extra: anything else: JSON values, and tensors at the top level.
    """

    method: str
    measurement: str = "loss"
    damping: Mapping[str, float] = field(default_factory=dict)
    damping_origin: str = ""
    residuals: Tensor | None = None
    passes: Sequence[PassFacts] = ()
    seconds: float = 0.0
    layers: Mapping[str, int] = field(default_factory=dict)
    parameters_covered: float = 1.0
    checkpoint: str | None = None
    warnings: Sequence[str] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def facts(self) -> list[tuple[str, str]]:
        """Pairs of name and value for people.

        Returns:
            Everything but the tensors' entries, of which the residuals are summarised.
        """
        count = f"{len(self.layers)} layers, {sum(self.layers.values()):,} parameters"
        facts = [
            ("method", self.method),
            ("measurement", self.measurement),
            ("damping", _damping_text(self.damping, self.damping_origin)),
            ("residual", _residual_text(self.residuals)),
            ("layers", f"{count}, {self.parameters_covered:.1%} of the trainable ones"),
            ("checkpoint", self.checkpoint or "none: the weights in memory"),
            ("seconds", f"{self.seconds:.3g}"),
        ]
        facts += [
            (f"pass {p['name']}", f"{p['seconds']:.3g} s, {p['examples']} examples") for p in self.passes
        ]
        facts += [(name, _extra_text(value)) for name, value in self.extra.items()]
        return facts + [("warning", warning) for warning in self.warnings]

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and the JSON values that :meth:`from_state` makes the diagnostics of again.

        Returns:
            Tensors by name, and the other values.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["extra"] = {k: v for k, v in self.extra.items() if not isinstance(v, Tensor)}
        tensors = {f"extra.{k}": v for k, v in self.extra.items() if isinstance(v, Tensor)}
        if self.residuals is not None:
            tensors["residuals"] = values.pop("residuals")
        return tensors, values

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Self:
        """Make diagnostics of what :meth:`to_state` returned.

        Args:
            tensors: the tensors by name.
            values: the other values.

        Returns:
            Equal diagnostics.

        Raises:
            ValueError: if a value is missing or of a wrong type; names it.
        """
        known = check_fields(cls, values, "diagnostics")
        extra = {k.removeprefix("extra."): v for k, v in tensors.items() if k.startswith("extra.")}
        unknown = [name for name in tensors if name != "residuals" and not name.startswith("extra.")]
        residuals = tensors.get("residuals")
        if unknown:
            raise ValueError(f"diagnostics.{unknown[0]} is a tensor; accepted are residuals and extra.*.")
        if residuals is not None and not residuals.is_floating_point():
            raise ValueError(
                f"diagnostics.residuals are {residuals.dtype}; accepted are floating-point ones."
            )
        return cls(**{**known, "residuals": residuals, "extra": {**known.get("extra", {}), **extra}})


def _damping_text(damping: Mapping[str, float], origin: str) -> str:
    values = sorted(set(damping.values()))
    spread = " to ".join(f"{value:.4g}" for value in (values if len(values) < 2 else [values[0], values[-1]]))
    return f"{spread or 'none'} ({origin})" if origin else spread or "none"


def _residual_text(residuals: Tensor | None) -> str:
    if residuals is None or residuals.numel() == 0:
        return "not computed"
    return f"mean {float(residuals.mean()):.3g}, max {float(residuals.max()):.3g}"


def _extra_text(value: Any) -> str:
    if isinstance(value, Mapping) and len(value) > _LISTED:
        shown = ", ".join(f"{name}: {_extra_text(value[name])}" for name in [*value][:_LISTED])
        return f"{shown}, and {len(value) - _LISTED} more"
    return f"tensor {tuple(value.shape)}" if isinstance(value, Tensor) else str(value)
