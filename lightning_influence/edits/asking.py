"""The part of ``InfluenceModule`` that edits: selection, forgetting, relabelling."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_influence.edits.data import SetTargets
from lightning_influence.edits.editor import Editor
from lightning_influence.edits.parameter_edit import ParameterEdit
from lightning_influence.edits.request import EditRequest, Examples, check_targets
from lightning_influence.running.base import Runner
from lightning_influence.running.loop import LoopRunner
from lightning_influence.selection import Selection
from lightning_influence.selection.base import SelectionRule
from lightning_influence.state import InfluenceState


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
        with self._editor(examples, train_dataloaders, None, None, validation, layers, options) as editor:
            return editor.edit()

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
        with self._editor(
            examples, train_dataloaders, new_targets, set_targets, validation, layers, options
        ) as editor:
            return editor.edit()

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
        options = {**options, "rule": rule, "ratio": ratio}
        with self._editor(examples, train_dataloaders, None, None, None, layers, options) as editor:
            return editor.select()

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
        options = {**options, "step": "theory"}
        with self._editor(examples, train_dataloaders, None, None, None, layers, options) as editor:
            return editor.direction()

    @contextlib.contextmanager
    def _editor(
        self,
        examples: Examples,
        train: Any,
        targets: Any,
        set_targets: SetTargets | None,
        validation: Any,
        layers: Sequence[str] | None,
        options: dict[str, Any],
    ) -> Iterator[Editor]:
        """Yield an editor on the borrowed module, once all that can be checked beforehand was."""
        request = EditRequest(examples, targets, set_targets, validation, layers, options)
        data = request.split(train)
        runner: Runner = self._runner()
        with runner:
            yield request.editor(runner, data, self.state.record)
