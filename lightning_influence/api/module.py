"""``InfluenceModule``: a trained LightningModule that can be asked for influence, and edited."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lightning.pytorch import LightningModule
from torch import Tensor
from typing_extensions import Self

from lightning_influence.api.engine import Engine, Question
from lightning_influence.api.store import KeepsGradients
from lightning_influence.collecting.state import read_saved_state
from lightning_influence.curvature.factors import Factors, fingerprint, fingerprint_differs
from lightning_influence.curvature.spectrum import Spectrum
from lightning_influence.curvature.state import InfluenceState
from lightning_influence.edits.data import SetTargets
from lightning_influence.edits.editor import compute_edit, predict_change, select_parameters
from lightning_influence.edits.parameter_edit import ParameterEdit
from lightning_influence.edits.request import EditOptions, EditRequest, Examples, check_targets
from lightning_influence.edits.rules import Selection, SelectionRule
from lightning_influence.edits.start import Start, set_out
from lightning_influence.methods.answers import By
from lightning_influence.methods.groups import GroupLabels
from lightning_influence.methods.method import read_options
from lightning_influence.methods.queries import Aggregate
from lightning_influence.methods.spectrum import CurvatureName, SpectrumSettings
from lightning_influence.model.layers.plan import ModuleLoss
from lightning_influence.model.measurements import Measurement
from lightning_influence.results.attributions import Attributions
from lightning_influence.results.diagnostics import Diagnostics
from lightning_influence.results.self_influence import SelfInfluence
from lightning_influence.running.host.checkpoints import load_weights, read_checkpoint
from lightning_influence.running.host.module import unwrap_compiled
from lightning_influence.running.loop_runner import LoopRunner
from lightning_influence.support.arguments import parse_options
from lightning_influence.support.storage import PathLike

Answer = TypeVar("Answer")


class EditsParameters:
    """Edits of the module in :attr:`model`; mixed into ``InfluenceModule``."""

    model: LightningModule
    state: InfluenceState

    def _runner(self) -> LoopRunner:
        raise NotImplementedError

    def forget(
        self,
        examples: Examples,
        train_dataloaders: Any,
        *,
        validation: Any = None,
        layers: Sequence[str] | None = None,
        **options: Any,
    ) -> ParameterEdit:
        """Compute an edit after which the model no longer knows some training examples.

        The default step is looked for until the examples, and 99% of others like them, are predicted no
        better than by outputs of zero, which is what removing a class or a concept means. Single examples
        that others resemble a retrained model would still get right: use ``step="theory"`` for those.

        Args:
            examples: dataset indices of the examples to forget, or a boolean mask over the dataset.
            train_dataloaders: the training examples: a loader, or ready-made batches.
            validation: data whose loss is reported as that of the kept data. Do not pass test data.
            layers: names or patterns of the layers that may change.
            **options: fields of :class:`~lightning_influence.edits.EditOptions`, such as ``rule``, ``ratio``
                and ``method``.

        Returns:
            The edit, not applied.

        Raises:
            ValueError: if there is nothing or everything to forget, or an option is out of range.
            InfluenceError: if the selected parameters cannot serve; the message says what to change.
        """
        settings = parse_options(EditOptions, options)
        request = EditRequest(examples, settings, validation=validation, layers=layers)
        return self._ask(request, train_dataloaders, compute_edit)

    def relabel(
        self,
        examples: Examples,
        new_targets: Any,
        train_dataloaders: Any,
        *,
        set_targets: SetTargets | None = None,
        validation: Any = None,
        layers: Sequence[str] | None = None,
        **options: Any,
    ) -> ParameterEdit:
        """Compute an edit after which the model has learned other targets for some training examples.

        The default step is the one with the lowest loss on the training data with its new targets. Up to 15
        quasi-Newton steps (L-BFGS) within the selected parameters follow, each as much work as one gradient
        of a few hundred examples. They pay where the model is sure of the old targets; ``linearisations=1``
        is one shot without them. The losses of a few kept examples tell how the loss changes from its exact
        value and gradient; the finished edit is checked on all training examples, and shortened, with a note,
        if their loss did not fall.

        Args:
            examples: dataset indices of the examples, or a boolean mask over the dataset.
            new_targets: one target for each of them, in their order, or one for all.
            train_dataloaders: the training examples: a loader, or ready-made batches.
            set_targets: puts targets into a batch: ``(batch, rows, targets) -> batch``, a copy. Not needed
                for batches that are pairs ``(inputs, targets)``.
            validation: data that take the place of the kept examples in what a search for the step
                minimises, and in the report; with a given step they are only reported. Do not pass test data.
            layers: names or patterns of the layers that may change.
            **options: fields of :class:`~lightning_influence.edits.EditOptions`.

        Returns:
            The edit, not applied.

        Raises:
            ValueError: if there is nothing or everything to edit, the targets do not match the examples, or
                an option is out of range.
            InfluenceError: if the selected parameters cannot serve; the message says what to change.
        """
        check_targets(new_targets)
        settings = parse_options(EditOptions, options)
        request = EditRequest(examples, settings, new_targets, set_targets, validation, layers)
        return self._ask(request, train_dataloaders, compute_edit)

    def select_parameters(
        self,
        examples: Examples,
        train_dataloaders: Any,
        *,
        rule: str | SelectionRule = "gain",
        ratio: float = 0.05,
        layers: Sequence[str] | None = None,
        **options: Any,
    ) -> Selection:
        """Select the parameters that an edit about some training examples would change.

        Args:
            examples: dataset indices of the examples, or a boolean mask over the dataset.
            train_dataloaders: the training examples: a loader, or ready-made batches.
            rule: a registered name or a rule of your own.
            ratio: share of each layer's parameters, in (0, 1].
            layers: names or patterns of the layers to choose from.
            **options: fields of :class:`~lightning_influence.edits.EditOptions`.

        Returns:
            Masks by layer.
        """
        settings = parse_options(EditOptions, {**options, "rule": rule, "ratio": ratio})
        request = EditRequest(examples, settings, layers=layers)
        return self._ask(request, train_dataloaders, select_parameters)

    def generalized_influence(
        self,
        examples: Examples,
        train_dataloaders: Any,
        *,
        layers: Sequence[str] | None = None,
        **options: Any,
    ) -> dict[str, Tensor]:
        """Predict how the parameters change when some training examples are removed.

        Args:
            examples: dataset indices of the examples, or a boolean mask over the dataset.
            train_dataloaders: the training examples: a loader, or ready-made batches.
            layers: names or patterns of the layers that may change.
            **options: fields of :class:`~lightning_influence.edits.EditOptions`, such as ``rule``, ``ratio``
                and ``method``; ``step`` is not looked at.

        Returns:
            By parameter name the change of the theoretical step, of the parameter's shape and zero where it
            was not selected. To add it to the parameters is ``forget(..., step="theory")``.
        """
        settings = parse_options(EditOptions, {**options, "step": "theory"})
        request = EditRequest(examples, settings, layers=layers)
        return self._ask(request, train_dataloaders, predict_change)

    def _ask(self, request: EditRequest, train: Any, answer: Callable[[Start], Answer]) -> Answer:
        """Return the answer to a request, once all that can be checked beforehand was."""
        data = request.split(train)
        with self._runner() as runner:
            return answer(set_out(runner, request, data, self.state.record))


class InfluenceModule(EditsParameters, KeepsGradients, LightningModule):
    """A trained module that answers for its training data and can be edited, without a Trainer.

    Factors and coarse space are kept between calls, so that only the first call pays for them. The wrapped
    module is used where it is (its device, its precision) and left as it was.

    Args:
        model: the trained LightningModule. Of another InfluenceModule the wrapped module is taken, and what
            it keeps unless factors or a state are given.
        factors: its factors; fitted on the first call that needs them if None.
        state: everything a callback keeps (factors, training record, coarse space); overrides ``factors``.
        progress: whether passes show a progress bar.

    Raises:
        TypeError: if an argument is of a wrong type.

    Example:
        >>> import torch
        >>> from lightning.pytorch import LightningModule
        >>> class Line(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(2, 1)
        ...     def training_step(self, batch, batch_idx):
        ...         return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])
        >>> batch = (torch.randn(8, 2), torch.randn(8, 1))
        >>> InfluenceModule(Line()).scores([batch], [batch], method="exact", damping=0.1).scores.shape
        torch.Size([8, 8])
    """

    def __init__(
        self,
        model: LightningModule,
        factors: Factors | None = None,
        *,
        state: InfluenceState | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__()
        _check_state(factors, state)
        self._checkpoint: str | None = None
        self._loaded: dict[str, list[float]] = {}
        self._fit_loop: dict[str, Any] | None = None
        if isinstance(model, InfluenceModule):
            self._checkpoint, self._loaded = model._checkpoint, model._loaded
            self._fit_loop = model._fit_loop
            state = model.state if state is None and factors is None else state
            model = model.model
        unwrap_compiled(model)  # refuses what is no module
        self.model = model
        self.state = InfluenceState(factors=factors) if state is None else state
        self._progress = progress

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        model: LightningModule | type[LightningModule],
        *,
        progress: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Load weights, factors and training record from a Lightning checkpoint alone.

        Args:
            path: the checkpoint.
            model: the module's class, or an instance to load the weights into.
            progress: whether passes show a progress bar.
            **kwargs: passed to ``load_from_checkpoint`` of the class.

        Returns:
            The module; without factors in the file they are fitted on first use. Its answers name the
            checkpoint, as long as the weights are those that were loaded.

        Raises:
            CorruptFileError: if the file is truncated or damaged, or no Lightning checkpoint.
            InfluenceError: if the file holds objects that are not unpickled; the message says what to do.
            TypeError: if the model is neither, or there are ``kwargs`` for an instance.
        """
        checkpoint = read_checkpoint(path)
        state = read_saved_state(checkpoint)
        inner = model.model if isinstance(model, InfluenceModule) else model
        loaded = load_weights(inner, path, checkpoint, kwargs)
        module = cls(loaded, state=state, progress=progress)
        module._checkpoint, module._loaded = os.fspath(path), fingerprint(loaded)
        module._fit_loop = checkpoint.get("loops", {}).get("fit_loop")
        return module

    def prepare(
        self,
        train_dataloaders: Any,
        *,
        method: str = "auto",
        layers: Sequence[str] | None = None,
        loss: ModuleLoss | None = None,
        **options: Any,
    ) -> Self:
        """Run the passes that no query is needed for: factors, and for ``"auto"`` the coarse space.

        Args:
            train_dataloaders: the training examples: a loader, or ready-made batches.
            method: name of the method.
            layers: names or patterns of the layers to cover.
            loss: a callable in place of the training loss, as in :func:`lightning_influence.influence`.
            **options: options of the method.

        Returns:
            The module; :attr:`state` holds what was computed.
        """
        question = Question(method, layers=layers, options=read_options(method, options), loss=loss)
        with self._runner() as runner:
            self._engine(runner, question).prepare(train_dataloaders)
        return self

    def fit_factors(
        self,
        train_dataloaders: Any,
        *,
        layers: Sequence[str] | None = None,
        loss: ModuleLoss | None = None,
        **options: Any,
    ) -> Factors:
        """Fit Kronecker factors in a pass of their own; they replace those that are there.

        Args:
            train_dataloaders: the training examples: a loader, or ready-made batches.
            layers: names or patterns of the layers to cover.
            loss: a callable in place of the training loss, as in :func:`lightning_influence.influence`.
            **options: options of the method, such as ``fisher``.

        Returns:
            The factors, which are also in :attr:`state`.

        Raises:
            TypeError: if there is no such option.
        """
        if "method" in options:
            raise TypeError(
                f"Got method={options['method']!r}; fit_factors has no method: its factors serve 'kfac', "
                "'ekfac', 'auto' and all others. Pass the method to scores or self_influence."
            )
        question = Question("ekfac", layers=layers, options=read_options("ekfac", options), loss=loss)
        state = InfluenceState(record=self.state.record)
        with self._runner() as runner:
            self._engine(runner, question, state).prepare(train_dataloaders)
        self.state = state
        assert state.factors is not None
        return state.factors

    def scores(
        self,
        train_dataloaders: Any,
        query_dataloaders: Any,
        *,
        method: str = "auto",
        measurement: Measurement | None = None,
        top_k: int | None = None,
        aggregate: Aggregate | None = None,
        train_groups: GroupLabels | None = None,
        by: By | None = None,
        scores_file: PathLike | None = None,
        layers: Sequence[str] | None = None,
        loss: ModuleLoss | None = None,
        **options: Any,
    ) -> Attributions:
        """Attribution scores, as :func:`lightning_influence.influence` computes them.

        Args:
            train_dataloaders: the training examples: a loader, or ready-made batches.
            query_dataloaders: the queries: loaders, or ready-made batches.
            method: name of the method.
            measurement: what is measured on queries.
            top_k: keep only the strongest at either end; all scores if None.
            aggregate: ``"mean"`` or labels, as in :func:`lightning_influence.influence`.
            train_groups: labels of the training examples, whose scores are summed by group.
            by: parts of the scores to keep as well, as in :func:`lightning_influence.influence`.
            scores_file: a new file for the scores, as in :func:`lightning_influence.influence`.
            layers: names or patterns of the layers to cover.
            loss: a callable in place of the training loss, as in :func:`lightning_influence.influence`.
            **options: options of the method, such as ``damping``.

        Returns:
            The attributions: ``scores[q, n]`` is the predicted change of the measurement on ``q`` when ``n``
            is removed.
        """
        settings = read_options(method, options)
        groups: dict[str, Any] = {"aggregate": aggregate, "train_groups": train_groups, "by": by}
        groups["scores_file"] = scores_file
        question = Question(method, measurement, top_k, layers, settings, loss, **groups)
        with self._runner() as runner:
            return self._engine(runner, question).attribute(train_dataloaders, query_dataloaders)

    def self_influence(
        self,
        train_dataloaders: Any,
        *,
        method: str = "ekfac",
        layers: Sequence[str] | None = None,
        loss: ModuleLoss | None = None,
        **options: Any,
    ) -> SelfInfluence:
        """Influence of every training example on its own loss, in one pass.

        Args:
            train_dataloaders: the training examples: a loader, or ready-made batches.
            method: name of the method.
            layers: names or patterns of the layers to cover.
            loss: a callable in place of the training loss, as in :func:`lightning_influence.influence`.
            **options: options of the method.

        Returns:
            One score a training example.
        """
        question = Question(method, layers=layers, options=read_options(method, options), loss=loss)
        with self._runner() as runner:
            return self._engine(runner, question).self_influence(train_dataloaders)

    def ihvp(
        self,
        train_dataloaders: Any,
        query_dataloaders: Any,
        *,
        method: str = "auto",
        measurement: Measurement | None = None,
        aggregate: Aggregate | None = None,
        layers: Sequence[str] | None = None,
        loss: ModuleLoss | None = None,
        **options: Any,
    ) -> tuple[dict[str, Tensor], Diagnostics]:
        """Inverse-Hessian-vector products ``(H + damping)^{-1} g_q`` of the queries' gradients.

        Args:
            train_dataloaders: the training examples that the curvature is an average over.
            query_dataloaders: the queries: loaders, or ready-made batches.
            method: name of the method.
            measurement: what is measured on queries.
            aggregate: as in :meth:`scores`; rows are then groups, whose numbers of queries are by name in
                the certificate's ``extra["query_counts"]``.
            layers: names or patterns of the layers to cover.
            loss: a callable in place of the training loss, as in :func:`lightning_influence.influence`.
            **options: options of the method.

        Returns:
            By parameter name a tensor of shape ``(Q, *parameter.shape)``, and the certificate with the
            residuals.
        """
        settings = read_options(method, options)
        question = Question(method, measurement, None, layers, settings, loss, aggregate)
        with self._runner() as runner:
            return self._engine(runner, question).ihvp(train_dataloaders, query_dataloaders)

    def spectrum(
        self,
        train_dataloaders: Any,
        curvature: CurvatureName = "ggn",
        *,
        layers: Sequence[str] | None = None,
        loss: ModuleLoss | None = None,
        **settings: Any,
    ) -> Spectrum:
        """Trace, leading eigenvalues, ranks and density of the curvature, with error estimates.

        Args:
            train_dataloaders: the training examples that the curvature is an average over.
            curvature: ``"ggn"`` for the Gauss-Newton matrix, or ``"hessian"``.
            layers: names or patterns of the layers to cover.
            loss: a callable in place of the training loss, as in :func:`lightning_influence.influence`.
            **settings: fields of :class:`~lightning_influence.methods.spectrum.SpectrumSettings`, such as
                ``probes`` and ``steps``: it takes ``steps + 2`` passes over the data.

        Returns:
            The spectrum, which prints as a table.
        """
        with self._runner() as runner:
            chosen = parse_options(SpectrumSettings, {"curvature": curvature, **settings})
            return self._engine(runner, Question(layers=layers, loss=loss)).spectrum(
                train_dataloaders, chosen
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the wrapped module computes."""
        return self.model(*args, **kwargs)

    def _runner(self) -> LoopRunner:
        return LoopRunner(self.model, progress=self._progress, fit_loop=self._fit_loop)

    def _engine(
        self,
        runner: LoopRunner,
        question: Question,
        state: InfluenceState | None = None,
        kind: type[Engine] = Engine,
    ) -> Engine:
        """Return the engine; answers name the checkpoint while the weights are those that it held."""
        changed = self._checkpoint is None or fingerprint_differs(self._loaded, self.model)
        checkpoint = None if changed else self._checkpoint
        return kind(runner, self.state if state is None else state, question, checkpoint=checkpoint)


def _check_state(factors: object, state: object) -> None:
    """Refuse what is neither factors nor a state.

    Raises:
        TypeError: saying what is accepted.
    """
    for name, value, kind in (("factors", factors, Factors), ("state", state, InfluenceState)):
        if value is not None and not isinstance(value, kind):
            raise TypeError(
                f"Got {name} of type {type(value).__name__}; accepted are {kind.__name__}, or None to "
                "compute what is needed (fit_factors does so anew)."
            )
