"""What is asked of an edit, checked, whichever way it is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_influence.curvature.training_record import TrainingRecord
from lightning_influence.edits.data import EditData, SetTargets, split
from lightning_influence.edits.editor import Editor
from lightning_influence.edits.options import EditOptions
from lightning_influence.running.reading import prepare_train
from lightning_influence.running.runner import Runner
from lightning_influence.support.arguments import check_layers, parse_options

Examples = Sequence[int] | Tensor


@dataclass(frozen=True)
class EditRequest:
    """One edit as the user asked for it.

    Attributes:
        examples: dataset indices, or a boolean mask over the dataset.
        targets: new targets; None to forget the examples.
        set_targets: how they get into a batch.
        validation: data whose loss is reported as that of the kept examples, and which a search for a
            relabelling minimises in their place.
        layers: names or patterns of the layers that may change.
        options: fields of :class:`~lightning_influence.edits.EditOptions`.

    Raises:
        TypeError: if ``layers`` is no list of texts.
        ValueError: if an option is out of range.
    """

    examples: Examples
    targets: Any = None
    set_targets: SetTargets | None = None
    validation: Any = None
    layers: Sequence[str] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.settings()
        check_layers(self.layers)

    def split(self, train: Any) -> EditData:
        """Return the training examples, split into edited and kept ones."""
        return split(prepare_train(train), self.examples, self.targets, self.set_targets)

    def editor(self, runner: Runner, data: EditData, record: TrainingRecord | None) -> Editor:
        """Return an editor on a module that an entered runner borrows.

        Args:
            runner: the runner.
            data: what :meth:`split` returned.
            record: of the training run, for its weight decay.
        """
        return Editor(
            runner, data, self.settings(), layers=self.layers, record=record, validation=self.validation
        )

    def settings(self) -> EditOptions:
        """Return the options, checked.

        Raises:
            TypeError: if there is no such option.
            ValueError: if one is out of range.
        """
        return parse_options(EditOptions, self.options)


def check_targets(new_targets: Any) -> None:
    """Refuse a relabelling without targets, which would be taken for forgetting.

    Raises:
        ValueError: if there are none.
    """
    if new_targets is None:
        raise ValueError("Got new_targets=None; pass one target for each example, or one for all.")
