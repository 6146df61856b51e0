"""What is asked of an edit: its options, checked before anything runs, and the examples it is about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor

from lightning_influence.edits.data import EditData, SetTargets, split
from lightning_influence.edits.directions import find_direction
from lightning_influence.edits.rules import SelectionRule, check_ratio, find_rule
from lightning_influence.running.reading import prepare_train
from lightning_influence.support.arguments import (
    check_choice,
    check_count,
    check_layers,
    check_number,
    is_number,
)

Examples = Sequence[int] | Tensor

Curvature = Literal["ggn", "hessian"]
Solver = Literal["cg", "lissa", "dense"]

# Examples that curvature is taken from: for one step, and for the first of many, which need not be as good.
# Set on the three editing examples (`forget_class.py`, `repair_backdoor.py`, `change_labels.py` in examples/,
# --seeds 10), whose cost they keep at 9 to 10% of retraining's CPU time.
CURVATURE_EXAMPLES, FIRST_EXAMPLES = 256, 64
# Most linearisations of a relabelling. Chosen by hand: it bounds the cost where the descent goes on for long.
LINEARISATIONS = 16


@dataclass(frozen=True)
class EditOptions:
    """Settings of :meth:`~lightning_influence.InfluenceModule.forget` and ``relabel``.

    Attributes:
        rule: which parameters may change: a registered name or a rule of your own.
        ratio: share of each layer's parameters, in (0, 1].
        method: ``"gif"`` (generalized influence function), ``"if"`` (all parameters), ``"fif"`` (the others
            are frozen), ``"pif"`` (``"if"`` cut to the selection) or ``"second_order"`` (Basu et al. 2020).
        step: ``"search"`` for a line search on training losses, ``"theory"`` for the step that influence
            functions prescribe, or a multiple of that. Where ``relabel`` searches, ``validation`` data, if
            there are any, take the place of the kept training examples in what is minimised; a search for
            forgetting looks at the edited examples only.
        damping: what is added to the curvature; ``"auto"`` is 1% of its largest eigenvalue. ``"gif"`` adds
            its square to the normal equations.
        weight_decay: of the training objective; None for that of the recorded run, and for 0 without one and
            in a search for a step that forgets, which would multiply the shrinkage as well.
        curvature: ``"ggn"``, or ``"hessian"``, which may be indefinite and runs a pass for every product.
        solver: ``"cg"``, ``"lissa"`` (the published iteration, for ``"gif"``) or ``"dense"`` (small models).
        tolerance: relative residual at which the solver stops.
        max_steps: most iterations of the solver.
        linearisations: how often the model is linearised at most; 1 is one shot. None for 1, and for 16 where
            ``relabel`` searches for its steps. Those after the first are quasi-Newton steps (L-BFGS) of the
            objective within the selected parameters, and end when three of them lower it by less than 3%. At
            a given step they are that multiple of Newton steps of the training objective after the edit,
            halved until they lower it, and end where they do not. A search for forgetting takes another only
            where the one before does not reach it.
        curvature_examples: how many edited and how many kept examples the curvature is taken from, those
            whose outputs curve most; None for all. ``"auto"`` is 256, and 64 where ``relabel`` goes on from
            its first step. The objective of a relabelling is measured on all edited examples and at least 128
            kept ones, drawn without bias, after value and gradient were measured on all; that the edit lowers
            it is checked on all. The curvature of more than 64 outputs an example is estimated from random
            mixtures of them, unless this is None or the solver ``"dense"``.
        forgotten_loss: loss from which an example counts as forgotten; None for that of outputs of zero, such
            as ``log C`` for ``C`` classes.
        kept_bound: largest rise of the mean loss on kept examples that passes without a warning.
        memory_budget: bytes for curvature gradients kept in memory; beyond, every product runs a pass.
        seed: of random choices.

    Raises:
        ValueError: if one is out of range, saying what was got and what is accepted.
    """

    rule: str | SelectionRule = "gain"
    ratio: float = 0.05
    method: str = "gif"
    step: float | Literal["search", "theory"] = "search"
    damping: float | Literal["auto"] = "auto"
    weight_decay: float | None = None
    curvature: Curvature = "ggn"
    solver: Solver = "cg"
    tolerance: float = 0.02
    max_steps: int = 40
    linearisations: int | None = None
    curvature_examples: int | Literal["auto"] | None = "auto"
    forgotten_loss: float | None = None
    kept_bound: float = 0.1
    memory_budget: int = 2**30
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_choices()
        for name in ("weight_decay", "forgotten_loss", "tolerance", "kept_bound"):
            value, optional = getattr(self, name), name in {"weight_decay", "forgotten_loss"}
            if not (value is None and optional):
                check_number(name, value)
        for name in ("max_steps", "linearisations", "curvature_examples", "memory_budget", "seed"):
            value, least = getattr(self, name), 0 if name in {"seed", "memory_budget"} else 1
            if value is None and name in {"curvature_examples", "linearisations"}:
                continue
            if value == "auto" and name == "curvature_examples":
                continue
            check_count(name, value, least)

    def count_linearisations(self, relabels: bool) -> int:
        """Return how often the model is linearised at most, to relabel or else to forget."""
        if self.linearisations is not None:
            return self.linearisations
        return LINEARISATIONS if relabels and self.step == "search" else 1

    def count_curvature_examples(self, relabels: bool) -> int | None:
        """Return how many edited and kept examples curvature is taken from; None for all."""
        if self.curvature_examples != "auto":
            return self.curvature_examples
        goes_on = relabels and self.step == "search" and self.count_linearisations(relabels) > 1
        return FIRST_EXAMPLES if goes_on else CURVATURE_EXAMPLES

    def _check_choices(self) -> None:
        find_rule(self.rule)
        check_ratio(self.ratio)
        find_direction(self.method)
        if self.step not in ("search", "theory") and not _is_positive(self.step):
            raise ValueError(f"Got step={self.step!r}; accepted are 'search', 'theory' or a positive number.")
        if self.damping != "auto" and not _is_at_least_zero(self.damping):
            raise ValueError(f"Got damping={self.damping!r}; accepted are 'auto' or a number of at least 0.")
        for name, choices in (("curvature", get_args(Curvature)), ("solver", get_args(Solver))):
            check_choice(name, getattr(self, name), choices)
        if self.solver == "lissa" and self.method != "gif":
            raise ValueError(f"Got solver='lissa' with method={self.method!r}; it solves method='gif' only.")


def _is_at_least_zero(value: Any) -> bool:
    return is_number(value) and 0 <= value < math.inf


def _is_positive(value: Any) -> bool:
    return _is_at_least_zero(value) and value > 0


@dataclass(frozen=True)
class EditRequest:
    """One edit as the user asked for it, whichever way it is run.

    Attributes:
        examples: dataset indices, or a boolean mask over the dataset.
        options: settings.
        targets: new targets; None to forget the examples.
        set_targets: how they get into a batch.
        validation: data whose loss is reported as that of the kept examples, and which a search for a
            relabelling minimises in their place.
        layers: names or patterns of the layers that may change.

    Raises:
        TypeError: if ``layers`` is no list of texts.
    """

    examples: Examples
    options: EditOptions = field(default_factory=EditOptions)
    targets: Any = None
    set_targets: SetTargets | None = None
    validation: Any = None
    layers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_layers(self.layers)

    def split(self, train: Any) -> EditData:
        """Return the training examples, split into edited and kept ones."""
        return split(prepare_train(train), self.examples, self.targets, self.set_targets)


def check_targets(new_targets: Any) -> None:
    """Refuse a relabelling without targets, which would be taken for forgetting.

    Raises:
        ValueError: if there are none.
    """
    if new_targets is None:
        raise ValueError("Got new_targets=None; pass one target for each example, or one for all.")
