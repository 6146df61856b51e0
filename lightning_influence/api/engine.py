"""The engine behind every way to ask: it orders the passes and puts their answers together."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_influence.curvature.factors import fingerprint
from lightning_influence.curvature.spectrum import Spectrum
from lightning_influence.curvature.state import InfluenceState
from lightning_influence.methods.answers import Answer, By, find_parts, tell_rounding
from lightning_influence.methods.context import Context, answer_or_retry, check_same_data, compute_digest
from lightning_influence.methods.forecast import Forecast, measure_speed, run_trial
from lightning_influence.methods.gathering import Gathered
from lightning_influence.methods.groups import GroupLabels, Groups, check_labels, read_groups
from lightning_influence.methods.method import Method, find_method, read_options
from lightning_influence.methods.options import Options, list_names
from lightning_influence.methods.queries import Aggregate, Queries, read_queries
from lightning_influence.methods.score_parts import ScoreParts
from lightning_influence.methods.scores_file import check_file, check_new, map_scores
from lightning_influence.methods.scoring_passes import ScorePass, SelfInfluencePass
from lightning_influence.methods.spectrum import SpectrumSettings, run_spectrum
from lightning_influence.model.captured import WeightedCount
from lightning_influence.model.content import SeenData
from lightning_influence.model.layers.plan import LayerPlan, ModuleLoss, find_layers
from lightning_influence.model.mean_loss import LossPass
from lightning_influence.model.measurements import Measurement, ResolvedMeasurement, resolve_measurement
from lightning_influence.model.unnamed.loss_parameters import find_covered
from lightning_influence.model.verified import forget_measurement, read_told
from lightning_influence.results.attributions import Attributions
from lightning_influence.results.diagnostics import Diagnostics, PassFacts
from lightning_influence.results.self_influence import SelfInfluence
from lightning_influence.running.loaders import IndexedLoader
from lightning_influence.running.reading import prepare, prepare_train
from lightning_influence.running.runner import Runner
from lightning_influence.support.arguments import (
    check_callable,
    check_choice,
    check_layers,
    is_count,
    to_plain_number,
)
from lightning_influence.support.digests import digest_tensors
from lightning_influence.support.notes import say
from lightning_influence.support.storage import PathLike

# How many parameters a note names.
_NAMED = 4
# Chosen by hand: queries that tell how much memory one takes, and batches how long all of them do.
_TRIED = 4
# Chosen by hand: batches of the training data from which on a call begins with a trial of a few of them.
_LONG = 100


@dataclass(frozen=True)
class Question:
    """What is asked of the engine.

    Attributes:
        method: name of a registered method.
        measurement: what is measured on queries.
        top_k: keep only this many of the strongest at either end; None for all scores.
        layers: names or patterns of the layers to cover.
        options: of the method, from :func:`~..methods.method.read_options`, or what all methods share.
        loss: a callable ``(module, batch)`` in place of the training loss; None for the module's own.
        aggregate: ``"mean"`` asks about the mean of all queries, labels about the mean of each group.
        train_groups: labels of the training examples, whose scores are summed by group; None for single ones.
        by: what to tell parts of the scores apart by as well; None for the scores alone.
        scores_file: a new file that the scores live in; None for memory.

    Raises:
        ValueError: if a setting is out of range, saying what was got and what is accepted.
        TypeError: if ``layers`` is no list of texts, ``aggregate`` are no labels, or the measurement is of a
            wrong type.
    """

    method: str = "auto"
    measurement: Measurement | None = None
    top_k: int | None = None
    layers: Sequence[str] | None = None
    options: Options = field(default_factory=Options)
    loss: ModuleLoss | None = None
    aggregate: Aggregate | None = None
    train_groups: GroupLabels | None = None
    by: By | None = None
    scores_file: PathLike | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.options, find_method(self.method).options_type):
            shared = {name: getattr(self.options, name) for name in list_names(type(self.options))}
            object.__setattr__(self, "options", read_options(self.method, shared))
        top_k = to_plain_number(self.top_k)
        object.__setattr__(self, "top_k", top_k)
        if top_k is not None and not is_count(top_k, 1):
            raise ValueError(f"Got top_k={top_k!r}; accepted are positive integers, or None for all scores.")
        check_layers(self.layers)
        check_callable("loss", self.loss)
        if isinstance(self.aggregate, str):
            check_choice("aggregate", self.aggregate, ("mean",))
        elif self.aggregate is not None:
            check_labels("aggregate", self.aggregate)
        if self.train_groups is not None:
            check_labels("train_groups", self.train_groups)
        if self.by is not None:
            check_choice("by", self.by, get_args(By))
        if top_k is not None and (self.by is not None or self.train_groups is not None):
            name = "train_groups" if self.by is None else f"by={self.by!r}"
            raise ValueError(
                f"Got top_k={top_k} with {name}, which needs all scores; omit top_k, and rank the answer "
                "with top() and bottom()."
            )
        if self.scores_file is not None:
            check_file(self.scores_file, top_k=top_k, by=self.by, train_groups=self.train_groups)
        if (
            self.measurement is not None and self.measurement != "hook"
        ):  # whether there is a hook is known with the module only
            resolve_measurement(self.measurement, None)


class Engine:
    """Answers questions about one module.

    Args:
        runner: an entered runner on the module.
        state: what earlier questions or the fit left; updated in place.
        question: what is asked.
        checkpoint: path of the weights, for the diagnostics.
    """

    def __init__(
        self, runner: Runner, state: InfluenceState, question: Question, *, checkpoint: str | None = None
    ) -> None:
        self._start = time.perf_counter()
        self._runner, self._state, self._question = runner, state, question
        self._checkpoint = checkpoint
        self._notes = runner.notes
        self._parts: ScoreParts | None = None  # that scores are asked in

    def attribute(self, train: Any, queries: Any) -> Attributions:
        """Scores of every training example for every query.

        Args:
            train: the training examples: a loader, or ready-made batches.
            queries: the queries: loaders, or ready-made batches.

        Returns:
            The attributions.
        """
        check_new(self._runner, self._question.scores_file)
        train_loader = prepare_train(train)
        asked = self._read_queries(queries)
        return answer_or_retry(self._state, lambda: self._attribute_all(train_loader, asked))

    def _attribute_all(self, train: IndexedLoader, queries: Queries) -> Attributions:
        columns, count = self._read_train_groups(train), queries.count
        method = self._prepare(train, (count, train.num_examples if columns is None else len(columns.names)))
        queries.describe(method.context)
        path, shape = self._question.scores_file, (count, train.num_examples)
        context, asked = method.context, self._question
        with map_scores(self._runner, path, shape, context.dtype) as matrix:
            answer = Answer(context, count, asked.top_k, parts=self._parts, groups=columns, matrix=matrix)
            rows = method.group_size() if method.in_groups else count
            measure_rows = method.measure_group_size if method.compresses else None
            for group in queries.in_groups(context, rows, measure_rows):
                self._attribute_group(method, group, queries.measured, answer)
                del group  # before the next one is read
            if path is not None:
                context.extra["scores_file"] = os.path.realpath(os.path.expanduser(path))
            return self._finish(method, queries, answer)

    def _finish(self, method: Method, queries: Queries, answer: Answer) -> Attributions:
        """Return the answer to all queries, with its certificate."""
        found, residuals = answer.take(several=queries.are_of_several_loaders)
        if queries.groups is not None:
            found |= {"query_names": queries.groups.names, "query_counts": queries.groups.counts}
        facts = self._diagnostics(method, queries.measured.name, residuals)
        return Attributions(diagnostics=facts, **found)

    def _read_queries(self, given: Any) -> Queries:
        """Return the queries, read; with a measurement of the user's, after a look at a first batch."""
        measured = resolve_measurement(self._question.measurement, self._runner.module)
        return read_queries(self._runner, measured, prepare(given), self._question.aggregate)

    def _read_train_groups(self, train: IndexedLoader) -> Groups | None:
        """Return the groups of training examples whose scores are summed, None for single examples."""
        labels = self._question.train_groups
        if labels is None:
            return None
        self._runner.agree(train)
        return read_groups("train_groups", labels, [train])

    def _attribute_group(
        self, method: Method, asked: Gathered, measured: ResolvedMeasurement, answer: Answer
    ) -> None:
        """Find the scores of some queries, in one pass; their gradients are let go."""
        context = method.context
        solved = method.solve(asked.gradients)
        asked = replace(asked, gradients={})  # methods let go of what the scores do not need
        sink = answer.begin(len(asked.indices))
        scoring = ScorePass(
            context.plan, solved.scorer, sink, most_examples=answer.count_examples(), parts=answer.parts
        )
        context.run_on_train(scoring)
        check_same_data(context, scoring.losses)
        residuals = tell_rounding(context, scoring.rounding, solved.residuals)
        answer.end(asked, self._scale(scoring.losses, measured.is_loss), residuals)

    def self_influence(self, train: Any) -> SelfInfluence:
        """Influence of every training example on its own loss, in one pass.

        Args:
            train: the training examples: a loader, or ready-made batches.

        Returns:
            The scores by dataset index.
        """
        train_loader = prepare_train(train)
        return answer_or_retry(self._state, lambda: self._find_self_influence(train_loader))

    def _find_self_influence(self, train: IndexedLoader) -> SelfInfluence:
        method = self._prepare(train, itself=True)
        one_pass = SelfInfluencePass(method.context.plan, method.quadratic())
        method.context.run_on_train(one_pass)
        check_same_data(method.context, one_pass.losses)
        found = method.refine(one_pass.gather(self._runner.all_gather_cat, method.context.dtype))
        residuals = tell_rounding(method.context, one_pass.rounding, found.residuals)
        return SelfInfluence(
            train_indices=found.indices,
            scores=found.values * self._scale(one_pass.losses, True),
            diagnostics=self._diagnostics(method, "loss", residuals),
        )

    def ihvp(self, train: Any, queries: Any) -> tuple[dict[str, Tensor], Diagnostics]:
        """Inverse-Hessian-vector products of the queries' gradients.

        Args:
            train: the training examples, which the curvature is an average over.
            queries: the queries: loaders, or ready-made batches.

        Returns:
            ``(H + lambda I)^{-1} g_q`` by parameter name, each of shape ``(Q, *parameter.shape)``, and the
            certificate, with the number of queries by group in ``extra["query_counts"]`` if they were
            aggregated.
        """
        asked = self._read_queries(queries)
        measured = asked.measured
        method = self._prepare_alone(train)
        asked.describe(method.context)
        if asked.groups is not None:
            counts = asked.groups.counts.tolist()
            method.context.extra["query_counts"] = dict(zip(asked.groups.names, counts, strict=True))
        plan = method.context.plan
        solutions, residuals = method.solutions(asked.gather(method.context).gradients)
        if measured.is_loss:
            solutions = solutions / method.mean_weight
        names = {id(p): name for name, p in self._runner.module.named_parameters()}
        result = {}
        for name, block in method.context.layout.split(solutions).items():
            layer = plan.layers[name]
            weight, bias = layer.to_parameters(block)
            result[names[id(layer.rule.weight(layer.module))]] = weight
            if bias is not None:
                result[names[id(layer.rule.bias(layer.module))]] = bias
        return result, self._diagnostics(method, measured.name, residuals)

    def spectrum(self, train: Any, settings: SpectrumSettings) -> Spectrum:
        """Measure the spectrum of the curvature; the question's method plays no part.

        Args:
            train: the training examples, which the curvature is an average over.
            settings: which curvature, and how closely.

        Returns:
            The spectrum.
        """
        return run_spectrum(self._context(prepare_train(train)), settings)

    def prepare(self, train: Any) -> None:
        """Run the passes that do not depend on queries; what they give is kept in the state."""
        self._prepare_alone(train)

    def _prepare_alone(self, train: Any) -> Method:
        """Return the prepared method where no pass over the training data follows that checks its state."""
        loader = prepare_train(train)

        def prepared() -> Method:
            method = self._prepare(loader)
            if method.context.made or method.context.reused:
                check_same_data(method.context, method.context.losses or self._losses(method, loader))
            return method

        return answer_or_retry(self._state, prepared)

    def _losses(self, method: Method, loader: IndexedLoader) -> SeenData:
        """Return the losses of the training examples, from a pass of their own."""
        one_pass = LossPass(method.context.plan)
        self._runner.run(one_pass, loader)
        return one_pass.losses

    def _prepare(
        self, train: IndexedLoader, shape: tuple[int, int] | None = None, *, itself: bool = False
    ) -> Method:
        """Return the method, after its query-independent passes.

        Args:
            train: the training examples.
            shape: of the scores that are asked for, ``(Q, N)``.
            itself: whether only the influence of training examples on themselves is asked for.

        Returns:
            The method.
        """
        method = find_method(self._question.method)(self._context(train))
        if shape is not None and self._question.by is not None:
            self._parts = find_parts(method.context, self._question.by, shape)
        method.note_unused()
        if shape is not None:
            self._forecast(method, train, shape[0])
        if itself:
            method.prepare_self()
        elif shape is not None:
            method.prepare_to_solve(shape[0])
        else:
            method.prepare()
        return method.answering

    def _forecast(self, method: Method, train: IndexedLoader, queries: int) -> None:
        """Tell what many passes are going to take, if somebody looks on and the method knows.

        Args:
            method: before its first pass.
            train: the training examples.
            queries: how many there are.
        """
        runner, context = self._runner, method.context
        looks = runner.all_reduce_sum(torch.tensor([float(runner.shows_progress)]))
        if not float(looks) or len(train) < _LONG or runner.expected is not None:
            return
        trial = run_trial(runner, context.plan, train, _TRIED)
        trial.seconds = float(runner.all_gather_cat(torch.tensor([trial.seconds], dtype=torch.float64)).min())
        told = Forecast(
            trial,
            context.plan.layers,
            train.num_examples / runner.world_size,
            measure_speed(torch.empty((), device=context.device, dtype=context.dtype)),
        )
        if method.forecast(told, queries):
            runner.expected = len(runner.records) + len(told.passes)
            context.extra["forecast"] = {"passes": len(told.passes), "seconds": told.seconds}
            say(told.describe(train.num_examples))

    def _context(self, train: IndexedLoader) -> Context:
        """Return everything a method works with: find the layers, and say what is not covered."""
        module = self._runner.module
        self._runner.agree(train)
        plan = self._plan(module)
        uncovered = plan.describe_uncovered()
        if uncovered is not None:
            self._notes.add(uncovered)
        hooked = [name for name, layer in plan.layers.items() if layer.has_gradient_hooks]
        if hooked:
            self._notes.add(
                f"Hooks of the module's own change the gradients of the parameters of {hooked} in training. "
                "Influence is of the gradients before these hooks: leave these layers out with layers= where "
                "that is not what is asked."
            )
        dtype = next(iter(plan.layers.values())).dtype
        weights = fingerprint(module)
        return Context(
            self._runner,
            plan,
            train,
            self._state,
            self._question.options,
            self._runner.device,
            torch.float64 if dtype == torch.float64 else torch.float32,
            weights=weights,
            weights_key=digest_tensors(
                dict(itertools.chain(module.named_parameters(), module.named_buffers()))
            ),
            notes=self._notes,
        )

    def _plan(self, module: Any) -> LayerPlan:
        """Return the covered layers, with what earlier calls found in order about the same model's loss.

        A loss of the call is looked at anew in each: functions that are told by nothing may differ in sign.
        """
        plan = find_layers(module, self._question.layers)
        if self._question.loss is not None:
            return replace(plan, loss=self._question.loss)
        shapes = {name: layer.shape for name, layer in plan.layers.items()}
        model = compute_digest(type(module).__module__, type(module).__qualname__, shapes)
        verified, slow = (kept.setdefault(model, set()) for kept in (self._state.verified, self._state.slow))
        plan = replace(plan, verified=verified, slow=slow)
        forget_measurement(plan.verified)
        self._notes.recall(read_told(plan.verified))
        return plan

    def _scale(self, seen: WeightedCount, of_loss: bool) -> float:
        """Return ``1 / N`` over the losses' mean weight, which a loss measurement is divided by as well."""
        count = WeightedCount(seen.examples, seen.weight)
        count.reduce(self._runner.all_reduce_sum)
        return 1.0 / (count.examples * count.mean_weight ** (2 if of_loss else 1))

    def _diagnostics(self, method: Method, measurement: str, residuals: Tensor | None) -> Diagnostics:
        """Return the certificate that goes with an answer."""
        context = method.context
        used = find_covered(context.plan.verified) if method.whole_gauss_newton else []
        if used:
            names = ", ".join(map(repr, used[:_NAMED])) + (" and more" if len(used) > _NAMED else "")
            context.notes.inform(
                f"The loss uses {names} beside the outputs of modules. Second derivatives that mix them with "
                "outputs are no part of the Gauss-Newton matrix; method='hessian' has them."
            )
        passes: list[PassFacts] = [
            {"name": r.name, "seconds": r.seconds, "examples": r.examples, "batches": r.batches}
            for r in self._runner.records
        ]
        return Diagnostics(
            method=method.name,
            measurement=measurement,
            damping=context.damping,
            damping_origin=context.damping_origin,
            residuals=None if residuals is None else residuals.detach().float().cpu(),
            passes=passes,
            seconds=time.perf_counter() - self._start,
            layers={name: layer.numel for name, layer in context.plan.layers.items()},
            parameters_covered=context.plan.coverage,
            checkpoint=self._checkpoint,
            warnings=list(context.notes.messages),
            extra=dict(context.extra),
        )
