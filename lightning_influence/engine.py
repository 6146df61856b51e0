"""The one engine behind every way to ask for influence: it orders the passes and puts their answers together."""

from __future__ import annotations

import time
import warnings as python_warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.attributions import Attributions, Diagnostics, PassFacts, SelfInfluence
from lightning_influence.dataloading import IndexedLoader, prepare, prepare_train
from lightning_influence.errors import InfluenceWarning
from lightning_influence.factors.factors import fingerprint, fingerprint_differs
from lightning_influence.layers import LayerGradients, LayerPlan, find_layers
from lightning_influence.measurements import Measurement, ResolvedMeasurement, resolve_measurement
from lightning_influence.methods import Context, Method, Options, find_method
from lightning_influence.methods.fitting import gather
from lightning_influence.passes.gradients import GradientPass
from lightning_influence.passes.scores import Columns, ScorePass, SelfInfluencePass
from lightning_influence.runner import Runner
from lightning_influence.state import InfluenceState
from lightning_influence.topk import StreamingExtremes


@dataclass(frozen=True)
class Question:
    """What is asked of the engine.

    Attributes:
        method: name of a registered method.
        measurement: what is measured on queries.
        top_k: keep only this many of the strongest at either end; None for all scores.
        layers: names or patterns of the layers to cover.
        options: settings of the method.
    """

    method: str = "auto"
    measurement: Measurement | None = None
    top_k: int | None = None
    layers: Sequence[str] | None = None
    options: Options = Options()

    def check(self) -> None:
        """Refuse bad settings before any pass.

        Raises:
            ValueError: saying what was got and what is accepted.
        """
        find_method(self.method)
        if self.top_k is not None and (isinstance(self.top_k, bool) or self.top_k < 1):
            raise ValueError(f"Got top_k={self.top_k!r}; accepted are positive integers, or None for all scores.")
        damping = self.options.damping
        if isinstance(damping, str) and damping not in {"auto", "heuristic"}:
            raise ValueError(f"Got damping={damping!r}; accepted are 'auto', 'heuristic' or a number.")
        if not isinstance(damping, str) and not (damping >= 0 and damping < float("inf")):
            raise ValueError(f"Got damping={damping!r}; accepted are 'auto', 'heuristic' or a finite number >= 0.")
        if self.options.fisher not in {"sampled", "exact", "empirical"}:
            raise ValueError(
                f"Got fisher={self.options.fisher!r}; accepted are 'sampled', 'exact' and 'empirical'."
            )


@dataclass(frozen=True)
class Asked:
    """The queries of all processes: gradients by layer, dataset indices ``(Q,)`` and loader of each ``(Q,)``."""

    gradients: dict[str, LayerGradients]
    indices: Tensor
    dataloaders: Tensor


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
        question.check()
        self._start = time.perf_counter()
        self._runner, self._state, self._question = runner, state, question
        self._checkpoint = checkpoint
        self._warnings: list[str] = []
        self._context: Context | None = None

    def attribute(self, train: Any, queries: Any) -> Attributions:
        """Scores of every training example for every query.

        Args:
            train: the training examples: a loader, or ready-made batches.
            queries: the queries: loaders, or ready-made batches.

        Returns:
            The attributions.
        """
        measured = resolve_measurement(self._question.measurement, self._runner.module)
        train_loader, query_loaders = prepare_train(train), prepare(queries)
        method = self._prepare(train_loader)
        context = method.context
        asked = self._queries(context.plan, measured, query_loaders)
        solved = method.solve(asked.gradients)
        k = self._question.top_k
        sink = Columns() if k is None else StreamingExtremes(len(asked.indices), k)
        scoring = ScorePass(context.plan, solved.scorer, sink)
        self._runner.run(scoring, train_loader)
        scale = self._scale(scoring, measured.name == "loss")
        diagnostics = self._diagnostics(method, measured.name, solved.residuals)
        several = asked.dataloaders if len(query_loaders) > 1 else None
        return self._answer(sink, scale, asked.indices, several, diagnostics)

    def self_influence(self, train: Any) -> SelfInfluence:
        """Influence of every training example on its own loss, in one pass.

        Args:
            train: the training examples: a loader, or ready-made batches.

        Returns:
            The scores by dataset index.
        """
        train_loader = prepare_train(train)
        method = self._prepare(train_loader)
        one_pass = SelfInfluencePass(method.context.plan, method.quadratic())
        self._runner.run(one_pass, train_loader)
        gather_cat = self._runner.all_gather_cat
        indices, values = gather_cat(torch.cat(one_pass.indices)), gather_cat(torch.cat(one_pass.values))
        order = indices.argsort(stable=True)
        return SelfInfluence(
            train_indices=indices[order],
            scores=values[order] * self._scale(one_pass, True),
            diagnostics=self._diagnostics(method, "loss", None),
        )

    def ihvp(self, train: Any, queries: Any) -> tuple[dict[str, Tensor], Diagnostics]:
        """Inverse-Hessian-vector products of the queries' gradients.

        Args:
            train: the training examples, which the curvature is an average over.
            queries: the queries: loaders, or ready-made batches.

        Returns:
            ``(H + lambda I)^{-1} g_q`` by parameter name, each of shape ``(Q, *parameter.shape)``, and the certificate.
        """
        measured = resolve_measurement(self._question.measurement, self._runner.module)
        method = self._prepare(prepare_train(train))
        plan = method.context.plan
        asked = self._queries(plan, measured, prepare(queries))
        solutions, residuals = method.solutions(asked.gradients)
        result = {}
        for name, block in method.context.layout.split(solutions).items():
            weight, bias = plan.layers[name].to_parameters(block)
            result[f"{name}.weight"] = weight
            if bias is not None:
                result[f"{name}.bias"] = bias
        return result, self._diagnostics(method, measured.name, residuals)

    def prepare(self, train: Any) -> None:
        """Run the passes that do not depend on queries; what they give is kept in the state."""
        self._prepare(prepare_train(train))

    def _prepare(self, train: IndexedLoader) -> Method:
        """Find the layers, check what is stored, and run the method's query-independent passes."""
        module = self._runner.module
        plan = find_layers(module, self._question.layers)
        uncovered = plan.describe_uncovered()
        if uncovered is not None:
            self._warn(uncovered)
        self._check_weights()
        example = next(iter(plan.layers.values())).rule.weight(next(iter(plan.layers.values())).module)
        dtype = example.dtype if example.dtype in (torch.float32, torch.float64) else torch.float32
        context = Context(
            self._runner,
            plan,
            train,
            self._state,
            self._question.options,
            example.device,
            dtype,
            weights_key=_key(module),
            warnings=self._warnings,
        )
        method = find_method(self._question.method)(context)
        method.prepare()
        return method

    def _check_weights(self) -> None:
        """Say so when the factors were finished at other weights."""
        factors = self._state.factors
        if factors is None:
            return
        differing = fingerprint_differs(factors.fingerprint, self._runner.module)
        if differing:
            shown = ", ".join(differing[:4]) + (" and more" if len(differing) > 4 else "")
            self._warn(
                f"The factors were collected at other weights than the model has now (they differ in {shown}). Scores are "
                "less accurate the further the weights have moved; pass the checkpoint that holds the factors as ckpt_path, "
                "or fit factors for these weights with factors='refit'."
            )

    def _queries(
        self, plan: LayerPlan, measured: ResolvedMeasurement, loaders: list[IndexedLoader]
    ) -> Asked:
        """Gradients of all queries, on every process."""
        one_pass = GradientPass(plan, None if measured.name == "loss" else measured)
        self._runner.run(one_pass, loaders)
        join = self._runner.all_gather_cat
        return Asked(gather(self._runner, one_pass.gradients), join(one_pass.indices), join(one_pass.dataloaders))

    def _scale(self, one_pass: ScorePass | SelfInfluencePass, of_loss: bool) -> float:
        """``1 / N`` and the losses' mean weight, which a loss measurement is divided by as well."""
        counts = torch.tensor([float(one_pass.examples), one_pass.weight], dtype=torch.float64)
        examples, weight = self._runner.all_reduce_sum(counts).tolist()
        mean_weight = weight / examples if weight > 0 else 1.0
        return 1.0 / (examples * mean_weight ** (2 if of_loss else 1))

    def _answer(
        self,
        sink: Columns | StreamingExtremes,
        scale: float,
        query_indices: Tensor,
        dataloaders: Tensor | None,
        diagnostics: Diagnostics,
    ) -> Attributions:
        """All scores, or both ends of the rankings, of all processes."""
        if isinstance(sink, Columns):
            scores, indices = sink.result()
            if self._runner.world_size > 1:
                scores = self._runner.all_gather_cat(scores.T.contiguous()).T
                indices = self._runner.all_gather_cat(indices)
                order = indices.argsort(stable=True)
                scores, indices = scores[:, order], indices[order]
            return Attributions(
                scores=scores * scale,
                train_indices=indices,
                query_indices=query_indices,
                query_dataloaders=dataloaders,
                diagnostics=diagnostics,
            )
        extremes = sink.result()
        if self._runner.world_size > 1:
            extremes = extremes.gathered(self._runner.all_gather_cat, self._question.top_k or 1)
        return Attributions.from_extremes(
            extremes.scaled(scale),
            query_indices=query_indices,
            query_dataloaders=dataloaders,
            diagnostics=diagnostics,
        )

    def _diagnostics(self, method: Method, measurement: str, residuals: Tensor | None) -> Diagnostics:
        """The certificate that goes with an answer."""
        context = method.context
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
            warnings=list(context.warnings),
            extra=dict(context.extra),
        )

    def _warn(self, message: str) -> None:
        self._warnings.append(message)
        python_warnings.warn(message, InfluenceWarning, stacklevel=4)


def _key(module: Any) -> str:
    """A short text that changes with the weights."""
    return ";".join(f"{name}:{total:.9g}:{norm:.9g}" for name, (total, norm) in fingerprint(module).items())
