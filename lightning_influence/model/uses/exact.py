"""Per-example gradients of all parameters, checked: closed forms first, then slower exact ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from lightning_influence.model.uses.certificate import Verdict, certify, draw_weights, weigh_losses
from lightning_influence.model.uses.gradients import differentiate_rows, pull_gradients
from lightning_influence.model.uses.parts import ParameterGradient
from lightning_influence.model.uses.watch import Watch
from lightning_influence.support.coordinates import count_coordinates, square_norm


class Way(Enum):
    """How the per-example gradients of a parameter are had."""

    USES = "uses"
    LOOP = "its operations, example by example"
    EXAMPLES = "one backward pass for each example"
    UNUSED = "takes no part"
    LEFT_OUT = "left out"


@dataclass(frozen=True)
class ParameterReport:
    """What is known of one parameter.

    Attributes:
        way: how its gradients are had.
        numel: its number of entries, complex ones counted twice.
        squared_gradient: of the reference gradient.
        reason: why it is not had in the first way; empty if it is.
    """

    way: Way
    numel: int
    squared_gradient: float
    reason: str = ""


@dataclass(frozen=True)
class UseReport:
    """What is covered of a model: every parameter that was to be differentiated, by name."""

    parameters: dict[str, ParameterReport]

    @property
    def left_out(self) -> list[str]:
        """Names of the parameters without per-example gradients."""
        return [name for name, report in self.parameters.items() if report.way is Way.LEFT_OUT]

    @property
    def share(self) -> float:
        """Share of the parameters that is covered, in [0, 1]."""
        return self._share("numel")

    @property
    def gradient_share(self) -> float:
        """Share of the squared gradient that is covered, in [0, 1]."""
        return self._share("squared_gradient")

    def _share(self, field: str) -> float:
        total = sum(getattr(report, field) for report in self.parameters.values())
        missing = sum(getattr(self.parameters[name], field) for name in self.left_out)
        return 1.0 - missing / total if total else 1.0


@dataclass(frozen=True)
class Certified:
    """Per-example gradients that have been checked, with what is known of each parameter.

    Attributes:
        gradients: by parameter; those that take no part, or are left out, are missing.
        report: on every parameter.
    """

    gradients: dict[str, ParameterGradient]
    report: UseReport


def differentiate_losses(watch: Watch, losses: Tensor, *, seed: int = 0) -> Certified:
    """Differentiate each example's loss by every parameter, and check it.

    What does not pass is differentiated again in the next slower way: the operations that use it example by
    example, without closed forms; then the whole model by one backward pass for each example, all at once
    where the operations can be vectorised; what does not pass then either is left out.

    Args:
        watch: what watched the forward pass.
        losses: of the examples, ``(B,)``, with their graph.
        seed: of the certificate's weights.

    Returns:
        The gradients, ``K = 1``.
    """
    weights = draw_weights(watch.num_examples, losses, seed)
    reference = weigh_losses(losses, weights, watch.parameters)
    found = pull_gradients(watch, losses.sum(), [None])
    gradients, reasons = dict(found.gradients), dict(found.failed)
    verdicts = certify(gradients, weights, reference, watch.eps)
    ways = {name: Way.USES for name in watch.parameters}

    def retry(way: Way, others: Mapping[str, ParameterGradient]) -> None:
        for name in _failing(verdicts):
            gradients.pop(name, None)
            if name in others:
                gradients[name] = others[name]
        failing = {name: reference[name] for name in _failing(verdicts)}
        checked = certify(gradients, weights, failing, watch.eps)
        for name, verdict in checked.items():
            reasons.setdefault(name, "the gradients of its uses do not add up to its own")
            verdicts[name], ways[name] = verdict, way

    wrong = set(_failing(verdicts))
    if wrong:
        retry(Way.LOOP, pull_gradients(watch, losses.sum(), [None], closed_forms=False, only=wrong).gradients)
    wrong = set(_failing(verdicts))
    if wrong:
        retry(Way.EXAMPLES, differentiate_examples(watch, losses, wrong))
    for name in _failing(verdicts):
        gradients.pop(name, None)
        ways[name] = Way.LEFT_OUT
    for name in watch.parameters:
        if name not in gradients and reference[name] is None and ways[name] is Way.USES:
            ways[name] = Way.UNUSED
    reports = {
        name: ParameterReport(
            ways[name], count_coordinates(p), _square(reference[name]), reasons.get(name, "")
        )
        for name, p in watch.parameters.items()
    }
    return Certified(gradients, UseReport(reports))


def differentiate_examples(watch: Watch, losses: Tensor, names: set[str]) -> dict[str, ParameterGradient]:
    """Differentiate each example's loss by a backward pass of its own through the whole model.

    Args:
        watch: what watched the forward pass.
        losses: of the examples, ``(B,)``, with their graph.
        names: of the parameters.

    Returns:
        Their gradients, ``K = 1``, as they are.
    """
    return differentiate_rows(watch, losses, torch.eye(len(losses)).to(losses), names)


def _failing(verdicts: Mapping[str, Verdict]) -> list[str]:
    return [name for name, verdict in verdicts.items() if not verdict.passed]


def _square(grad: Tensor | None) -> float:
    return 0.0 if grad is None else square_norm(grad)
