"""Building a gradient store, and asking it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from lightning_influence.api.engine import Engine, Question
from lightning_influence.curvature.factors import fingerprint_differs
from lightning_influence.methods.answers import Answer, tell_rounding
from lightning_influence.methods.closed_form import ClosedForm
from lightning_influence.methods.context import Context, answer_or_retry, check_same_data
from lightning_influence.methods.gradient_store import GradientStore, StoreFacts
from lightning_influence.methods.groups import GroupLabels
from lightning_influence.methods.kept_coordinates import KeptCoordinates, choose_coordinates
from lightning_influence.methods.method import find_method, read_options
from lightning_influence.methods.queries import Aggregate
from lightning_influence.methods.store_passes import CandidatePass, StorePass, compare_scores
from lightning_influence.model.captured import WeightedCount
from lightning_influence.model.layers.plan import ModuleLoss
from lightning_influence.model.measurements import Measurement
from lightning_influence.results.attributions import Attributions
from lightning_influence.running.loaders import IndexedLoader
from lightning_influence.running.loop_runner import LoopRunner
from lightning_influence.running.reading import prepare_train
from lightning_influence.support.arguments import check_choice, check_count
from lightning_influence.support.errors import FactorMismatchError
from lightning_influence.support.mapped_rows import PRECISIONS, write_rows
from lightning_influence.support.storage import PathLike

# Chosen by hand: so many times as many coordinates as numbers are kept are looked at for principal
# directions, as far as a quarter of the memory budget holds a matrix of them.
_CANDIDATES, _MATRICES = 4, 4
# Closed forms whose eigenvalues tell which coordinates matter.
_METHODS = ("ekfac", "kfac", "diagonal")


class KeepsGradients:
    """Gradient stores of the module; mixed into ``InfluenceModule``."""

    def _runner(self) -> LoopRunner:
        raise NotImplementedError

    def _engine(self, runner: LoopRunner, question: Question, *, kind: type[Engine]) -> Engine:
        raise NotImplementedError

    def build_store(
        self,
        train_dataloaders: Any,
        path: PathLike,
        *,
        numbers: int = 4096,
        dtype: torch.dtype = torch.float16,
        method: str = "ekfac",
        layers: Sequence[str] | None = None,
        loss: ModuleLoss | None = None,
        **options: Any,
    ) -> GradientStore:
        """Store a few numbers of every training example, from which :meth:`ask_store` answers queries.

        Takes a pass over the training data beside those that fit factors, and one over at most 8,192 examples
        (with the default ``memory_budget``) where fewer numbers are kept than there are coordinates.

        Args:
            train_dataloaders: the training examples: a loader, or ready-made batches.
            path: a folder; a store that it holds is replaced once the new one is complete.
            numbers: how many to keep of each training example, at most. All coordinates are kept if there
                are no more; scores are then those of ``method``.
            dtype: precision of the stored numbers.
            method: ``"ekfac"``, ``"kfac"`` or ``"diagonal"``: the closed form that scores are to approach.
            layers: names or patterns of the layers to cover.
            loss: a callable in place of the training loss, as in :func:`lightning_influence.influence`.
            **options: options of the method, such as ``damping``.

        Returns:
            The store, opened. ``store.told`` says how much of the energy is kept, and how near the scores of
            some training examples among each other are to exact ones.

        Raises:
            ValueError: if an argument is out of range.
            RuntimeError: on a process of another rank than 0.
            OSError: if a file cannot be written.
        """
        _check_first_process()
        check_choice("method", method, _METHODS)
        check_count("numbers", numbers, 1)
        check_choice("dtype", dtype, PRECISIONS.values())
        question = Question(method, layers=layers, options=read_options(method, options), loss=loss)
        with self._runner() as runner:
            engine = self._engine(runner, question, kind=StoreEngine)
            assert isinstance(engine, StoreEngine)
            return engine.build(train_dataloaders, Path(path).expanduser(), numbers, dtype)

    def ask_store(
        self,
        store: GradientStore,
        query_dataloaders: Any,
        *,
        measurement: Measurement | None = None,
        top_k: int | None = None,
        aggregate: Aggregate | None = None,
        train_groups: GroupLabels | None = None,
        loss: ModuleLoss | None = None,
        memory_budget: int | None = None,
    ) -> Attributions:
        """Attribution scores from a gradient store: a pass over the queries, and none over training data.

        Args:
            store: of this module at these weights.
            query_dataloaders: the queries: loaders, or ready-made batches.
            measurement: what is measured on queries.
            top_k: keep only the strongest at either end; all scores if None.
            aggregate: as in :meth:`InfluenceModule.scores`.
            train_groups: labels of the training examples, whose scores are summed by group.
            loss: the callable that the store was built with in place of the training loss.
            memory_budget: bytes for the gradients of queries.

        Returns:
            The attributions. ``diagnostics.extra["store"]`` is ``store.told``, ``extra["energy_kept"]`` the
            share of each query's ``g^T (H + lambda)^{-1} g`` that the kept numbers have, ``(Q,)``: where it
            is low, so is what the query's scores are worth.

        Raises:
            FactorMismatchError: if the store is of another model, or of other weights.
            TypeError: if it is no store.
        """
        if not isinstance(store, GradientStore):
            raise TypeError(
                f"Got store of type {type(store).__name__}; accepted is a GradientStore, from build_store or "
                "GradientStore.load."
            )
        given = {"memory_budget": memory_budget, "low_rank_tolerance": 0.0}
        options = read_options(store.facts.method, given)
        groups: dict[str, Any] = {"aggregate": aggregate, "train_groups": train_groups}
        layers = store.facts.layers
        question = Question(store.facts.method, measurement, top_k, layers, options, loss, **groups)
        with self._runner() as runner:
            engine = self._engine(runner, question, kind=StoreEngine)
            assert isinstance(engine, StoreEngine)
            return engine.ask(store, query_dataloaders)


class StoreEngine(Engine):
    """Builds and asks gradient stores; one process does it."""

    def build(self, train: Any, path: Path, numbers: int, dtype: torch.dtype) -> GradientStore:
        """Build a store, see :meth:`KeepsGradients.build_store`."""
        loader = prepare_train(train)
        return answer_or_retry(self._state, lambda: self._build(loader, path, numbers, dtype))

    def _build(self, train: IndexedLoader, path: Path, numbers: int, dtype: torch.dtype) -> GradientStore:
        method = self._prepare(train)
        assert isinstance(method, ClosedForm)
        context = method.context
        kept = self._choose(context, method, train, numbers)
        with write_rows(path, dtype) as writer:
            one_pass = StorePass(context.plan, kept, writer, len(train), context.options.memory_budget)
            context.run_on_train(one_pass)
            check_same_data(context, one_pass.losses)
        tell_rounding(context, one_pass.rounding, None)
        some, whole = one_pass.energy
        told = {
            "numbers": kept.numbers,
            "candidates": kept.candidates,
            "coordinates": kept.inverse.layout.numel,
            "energy_kept": some / whole if whole > 0 else None,
            **compare_scores(*one_pass.pairs),
        }
        layers = self._question.layers
        facts = StoreFacts(
            method=method.name,
            damping_origin=context.damping_origin,
            layers=None if layers is None else list(layers),
            parameters_covered=context.plan.coverage,
            fingerprint=context.weights,
            weights_key=context.weights_key,
            rows=writer.name,
            digest=writer.digest,
            dtype=str(dtype).removeprefix("torch."),
            weight=WeightedCount(one_pass.losses.examples, one_pass.losses.weight).normaliser,
            size=train.size,
            told=told,
        )
        return GradientStore.save(path, kept, one_pass.tensors(), facts)

    def _choose(
        self, context: Context, method: ClosedForm, train: IndexedLoader, numbers: int
    ) -> KeptCoordinates:
        """Return what is kept of a gradient; principal directions take a pass over some examples."""
        width = torch.empty((), dtype=context.dtype).element_size()
        most = max(1, int((context.options.memory_budget / (_MATRICES * width)) ** 0.5))
        count = max(numbers, min(_CANDIDATES * numbers, most))
        kept = choose_coordinates(method.inverse, count)
        if kept.candidates <= numbers:
            return kept
        some = train if train.num_examples <= most else train.sample(most, context.options.seed)
        one_pass = CandidatePass(context.plan, kept)
        self._runner.run(one_pass, some)
        return kept.narrow(one_pass.sample, numbers)

    def ask(self, store: GradientStore, queries: Any) -> Attributions:
        """Answer from a store, see :meth:`KeepsGradients.ask_store`."""
        asked = self._read_queries(queries)
        examples = cast(IndexedLoader, store)  # an answer asks for their indices alone
        columns, count, measured = self._read_train_groups(examples), asked.count, asked.measured
        context = self._context(examples)
        _check_same_model(store, context)
        method = find_method(store.facts.method)(context)
        kept = store.kept.to(context.device, context.dtype)
        answer = Answer(context, count, self._question.top_k, groups=columns)
        seen = WeightedCount(store.num_examples, store.facts.weight)
        scale, shares = self._scale(seen, measured.is_loss), []
        asked.describe(context)
        for group in asked.in_groups(context, method.group_size() if method.in_groups else count, None):
            numbers, squares = (found.detach() for found in kept.take(group.gradients))
            store.score(numbers, answer.begin(len(numbers)), answer.count_examples())
            answer.end(replace(group, gradients={}), scale, None)
            shares.append((numbers.square().sum(dim=1) / squares).nan_to_num(1.0).cpu())
        context.extra.update(store=store.told, energy_kept=torch.cat(shares))
        return self._finish(method, asked, answer)


def _check_first_process() -> None:
    """Raise on all processes but the first: a folder is written by one, and reads all training examples."""
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        raise RuntimeError(
            f"Got build_store on the process of rank {dist.get_rank()}; accepted is rank 0 alone, since one "
            "process reads all training examples and writes the folder. Call it under `if "
            "trainer.is_global_zero`, let the others wait at `trainer.strategy.barrier()`, and open the "
            "store there with GradientStore.load."
        )


def _check_same_model(store: GradientStore, context: Context) -> None:
    """Refuse a store of another model, and leave layers out of the plan that it does not have.

    Raises:
        FactorMismatchError: saying what differs.
    """
    facts, layout = store.facts, store.kept.inverse.layout
    differing = fingerprint_differs(facts.fingerprint, context.weights)
    shapes = {name: layer.shape for name, layer in context.plan.layers.items()}
    differing += [name for name, shape in layout.shapes.items() if shapes.get(name) != shape]
    if differing:
        shown = ", ".join(differing[:4]) + (" and more" if len(differing) > 4 else "")
        raise FactorMismatchError(
            f"The gradient store {str(store.path)!r} was built for other weights than the model has now "
            f"(they differ in {shown}). Load the checkpoint it was built at, or build a store for "
            "these weights."
        )
    if facts.weights_key != context.weights_key:
        context.notes.add(
            "The gradient store was built with other buffers, or in another precision, than the model has "
            "now; scores are off as far as these change gradients. Build a store for the model as it is."
        )
    missing = [name for name in context.plan.layers if name not in layout.shapes]
    context.leave_out(missing, "are not in the gradient store")
    context.damping, context.damping_origin = store.kept.inverse.damping, facts.damping_origin
