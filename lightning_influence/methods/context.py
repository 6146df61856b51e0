"""Everything a method works with: passes, data, state, settings, and notes on the answer.

Whether what an earlier call computed is of the data, loss and buffers of this one.

Weights, buffers, layers and number of examples are known before a pass, and are part of what results are kept
under. The rest shows in digests of the training examples and in their mean loss, which passes that score them
see on the way: if they are others, what was kept is computed again, and so is the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

import torch

from lightning_influence.curvature.damping import average_eigenvalues, resolve_damping
from lightning_influence.curvature.factors import Factors
from lightning_influence.curvature.state import InfluenceState
from lightning_influence.methods.gradient_share import measure_gradient_share
from lightning_influence.methods.options import Options
from lightning_influence.model.content import SeenData, same_mean
from lightning_influence.model.layers.gradients import LayerGradients
from lightning_influence.model.layers.layer import parameters_of
from lightning_influence.model.layers.plan import LayerPlan, Layout
from lightning_influence.support.digests import digest_text
from lightning_influence.support.errors import ReadOtherwiseError, UnsupportedModelError
from lightning_influence.support.notes import Notes
from lightning_influence.support.passes import Loader as Loader
from lightning_influence.support.passes import Passes as Passes

_SILENT = "took no part in the training loss, or only in what all examples of a batch share"


class Ownership(Protocol):
    """Who owns which layer, see ``owners``."""

    own: list[str]

    def hand_over(self, gradients: Mapping[str, LayerGradients]) -> list[dict[str, LayerGradients]]:
        """Send gradients to the owners of their layers, and return what this one gets."""
        ...

    def merge(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the numbers of all layers, of which each owner has its own."""
        ...


@dataclass
class Context:
    """Everything a method works with.

    Attributes:
        runner: runs passes.
        plan: the covered layers; shrinks when a pass over the training data shows that some take no part in
            it.
        train: the training examples.
        state: what is kept between calls.
        options: settings of this call.
        device: where passes run.
        dtype: precision of the gradients.
        weights: fingerprint of the model's weights.
        weights_key: a short text that changes with any weight or buffer.
        notes: what was left out or assumed.
        extra: further diagnostics.
        made: whether this call computed something that later calls use again.
        reused: whether it used something that an earlier call computed.
        losses: of all training examples, if a pass of this call has summed them.
        damping: the damping of each layer once it is decided.
        damping_origin: where it comes from.
        owners: of the layers, where each process has the factors of some; None where it has those of all.
    """

    runner: Passes
    plan: LayerPlan
    train: Loader
    state: InfluenceState
    options: Options
    device: torch.device
    dtype: torch.dtype
    weights: dict[str, list[float]] = field(default_factory=dict)
    weights_key: str = ""
    notes: Notes = field(default_factory=Notes)
    extra: dict[str, Any] = field(default_factory=dict)
    made: bool = False
    reused: bool = False
    losses: SeenData | None = None
    damping: dict[str, float] = field(default_factory=dict)
    damping_origin: str = "not used"
    owners: Ownership | None = None

    @property
    def layout(self) -> Layout:
        """The order of flat vectors over the covered layers."""
        return Layout.of(self.plan.layers)

    @property
    def own_layers(self) -> list[str]:
        """Names of the covered layers whose factors this process has: all of them, or those it owns."""
        own = self.plan.layers if self.owners is None else self.owners.own
        return [name for name in self.plan.layers if name in own]

    @property
    def own_layout(self) -> Layout:
        """The order of flat vectors over :attr:`own_layers`."""
        return Layout.of({name: self.plan.layers[name] for name in self.own_layers})

    def resolve_damping(self, factors: Factors, solver: Literal["closed", "full"]) -> dict[str, float]:
        """Decide the damping of each layer, and remember it for the diagnostics."""
        means = None
        if self.owners is not None:
            means = self.owners.merge({name: average_eigenvalues(factors, name) for name in factors.layers})
        self.damping, self.damping_origin = resolve_damping(
            self.options.damping, factors, self.state.record, solver=solver, means=means
        )
        own = self.damping
        if self.owners is not None:
            self.damping = self.owners.merge(own)
        return own

    def run_on_train(self, one_pass: Any, run: Callable[[Any], object] | None = None) -> None:
        """Run a pass over all training examples; layers that took no part in it leave the plan.

        Args:
            one_pass: the pass.
            run: runs it, if it is not run as usual.
        """
        if run is None:
            self.runner.run(one_pass, self.train)
        else:
            run(one_pass)
        silent = one_pass.forward.silent
        heard = torch.tensor([float(name not in silent) for name in self.plan.layers])
        heard = self.runner.all_reduce_sum(heard)
        names = [name for name, count in zip(self.plan.layers, heard.tolist(), strict=True) if not count]
        self.leave_out(names, _SILENT)

    def leave_out(self, names: Sequence[str], why: str) -> None:
        """Take layers out of the plan, and say so, with their shares of parameters and of the gradient.

        Args:
            names: the layers.
            why: the rest of a sentence that begins with their names.

        Raises:
            UnsupportedModelError: if no layer is left.
        """
        if not names:
            return
        left_out = {f"{name}.*": (self.plan.layers[name].numel, why) for name in names}
        layers = {name: layer for name, layer in self.plan.layers.items() if name not in names}
        plan = replace(self.plan, layers=layers, uncovered={**self.plan.uncovered, **left_out})
        share = sum(count for count, _ in left_out.values()) / sum(_all_counts(plan))
        if not layers:
            raise UnsupportedModelError(f"No layer is left to cover: {list(names)} {why}.")
        parameters = parameters_of({name: self.plan.layers[name] for name in names}).values()
        squares = measure_gradient_share(self.runner, self.train, parameters, self.plan.loss)
        known = "" if squares is None else f" and {squares:.1%} of the squared gradient of a training batch"
        self.notes.add(
            f"Layers {list(names)} ({share:.1%} of the trainable parameters{known}) {why}; they are left out."
        )
        if squares is not None:
            known_before = self.extra.get("squared_gradient_left_out", 0.0)
            self.extra["squared_gradient_left_out"] = known_before + squares
        self.plan = plan


def note_unknown_outputs(context: Context) -> None:
    """Say that the Gauss-Newton matrix is the empirical Fisher although nobody asked for it."""
    context.notes.add(
        "The losses of single examples are those of no known loss function, so the Gauss-Newton matrix "
        "is not known; the empirical Fisher of the training labels, which is biased, stands in for it. "
        "The Hessian needs no known loss: method='hessian', or 'cg' with curvature='hessian'."
    )


def note_estimate(context: Context, estimated: bool) -> None:
    """Say so if a Gauss-Newton matrix is an estimate although nobody asked for one: the loss is unknown.

    Args:
        context: takes the note.
        estimated: whether it is one.
    """
    if estimated and (context.options.fisher or "exact") == "exact":
        note_unknown_outputs(context)


def compute_digest(*parts: object) -> str:
    """Return a short text that changes with any of the values."""
    return digest_text(repr(parts))


def _all_counts(plan: LayerPlan) -> Iterable[int]:
    yield plan.numel
    yield from (count for count, _ in plan.uncovered.values())


Answer = TypeVar("Answer")


class OtherDataError(Exception):
    """What is kept between calls was computed for other data."""


def answer_or_retry(state: InfluenceState, answer: Callable[[], Answer]) -> Answer:
    """Return an answer; once more from scratch if it rests on what was computed for other data.

    It is also computed once more where batches have to be read in another way than was begun with.

    Args:
        state: what is kept between calls.
        answer: computes the answer, with :func:`check_same_data` on the way.
    """
    for _ in range(2):  # one retry for either reason
        try:
            return answer()
        except (OtherDataError, ReadOtherwiseError):
            state.forget()
    return answer()


def check_same_data(context: Context, losses: SeenData) -> None:
    """Compare what a pass saw with the data which kept factors and coarse space were made on.

    Args:
        context: of the call, after its method was prepared.
        losses: of all training examples, and their content.

    Raises:
        OtherDataError: if they are others.
    """
    if not (context.made or context.reused):
        return
    state, mean = context.state, losses.mean(context.runner.all_reduce_sum)
    content = losses.identify(context.runner.all_reduce_sum)
    if not context.reused or state.mean_loss is None:
        state.mean_loss, state.content = mean, content
        return
    known = state.content
    if known in (None, content) and same_mean(state.mean_loss, mean, _precision(context)):
        return
    context.notes.add(
        "What an earlier call computed was for other training data, another loss or other buffers (mean "
        f"loss {state.mean_loss:.6g} then, {mean:.6g} now); it is computed again. Where the data are "
        "augmented at random, that is so in every call: switch the augmentation off."
    )
    raise OtherDataError


def _precision(context: Context) -> torch.dtype:
    """Return the precision of the model; gradients of one in half precision are in single precision."""
    return next(iter(context.plan.layers.values())).dtype
