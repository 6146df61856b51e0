"""Everything that the library saves and reads again, small: how it is written, read, and compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from callback_models import Classifier, fit, loader
from lightning.pytorch.plugins.io import TorchCheckpointIO
from result_examples import ends, full, self_influence
from torch import Tensor

from lightning_influence import Attributions, InfluenceCallback, InfluenceModule, ParameterEdit, SelfInfluence
from lightning_influence.edits.edit_report import EditReport, LossChange
from lightning_influence.edits.parameter_edit import Change
from lightning_influence.running.host.checkpoints import ExplainingCheckpointIO

EDITED = torch.nn.Linear(2, 3)
REPORT = EditReport(
    kind="forget",
    method="gif",
    rule="top",
    ratio=0.5,
    layers={"": (2, 6)},
    step=[1.0],
    scale=0.1,
    damping=1e-3,
    residual=1e-6,
    solver_steps=7,
    norm=0.2,
    edited=LossChange(1, 0.1, 2.0, 1.5),
    kept=LossChange(9, 0.1, 0.11),
    notes=["a note"],
)


def edit(shift: float = 1.0) -> ParameterEdit:
    index = torch.tensor([4, 1])
    before = EDITED.weight.detach().flatten()[index]
    return ParameterEdit(EDITED, {"weight": Change(index, before, before + shift, (3, 2))}, REPORT)


def write_checkpoint(path: Path) -> None:
    """A checkpoint in the middle of a run, after a question."""
    module, callback = Classifier("adam"), InfluenceCallback(every_n_steps=1)
    host = fit(module, callback, max_epochs=3)
    host.influence(module, loader(), loader(8), method="auto", log=False)
    host.save_checkpoint(path)


def read_checkpoint_state(path: Path) -> Any:
    """The weights, and what the callback had kept."""
    found = InfluenceModule.from_checkpoint(path, Classifier("adam"))
    return found.model.state_dict(), found.state


@dataclass(frozen=True)
class Saved:
    """One kind of file.

    Attributes:
        write: writes one.
        read: reads it as users do.
    """

    write: Callable[[Path], Any]
    read: Callable[[Path], Any]


SAVED = {
    "scores": Saved(lambda path: full().save(path), Attributions.load),
    "ends of rankings": Saved(lambda path: ends().save(path), Attributions.load),
    "self-influence": Saved(lambda path: self_influence().save(path), SelfInfluence.load),
    "edit": Saved(lambda path: edit().save(path), lambda path: ParameterEdit.load(path, EDITED)),
    "checkpoint": Saved(write_checkpoint, read_checkpoint_state),
    "checkpoint of a Trainer": Saved(
        write_checkpoint, lambda path: ExplainingCheckpointIO(TorchCheckpointIO()).load_checkpoint(path)
    ),
}


def plain(value: Any) -> Any:
    """A value as nested tables and lists, for :func:`are_equal`."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, Tensor | str | int | float | None):
        return value
    return plain(vars(value)) if hasattr(value, "__dict__") and not callable(value) else str(value)


def are_equal(a: Any, b: Any) -> bool:
    """Whether two plain values are equal to the last bit."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(are_equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(are_equal, a, b))
    return bool(a == b) or (a != a and b != b)
