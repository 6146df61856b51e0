"""A change of few parameters of a module that can be applied, reverted and stored, with the report of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import torch
from rich.console import Group, RenderableType
from rich.jupyter import JupyterMixin
from torch import Tensor, nn
from typing_extensions import Self

from lightning_influence.edits.edit_report import EditReport
from lightning_influence.results.rendering import build_facts_table, render_plain
from lightning_influence.support.arguments import are_distinct, is_count
from lightning_influence.support.coordinates import from_coordinates, to_coordinates
from lightning_influence.support.errors import EditMismatchError, InfluenceWarning, NonFiniteError, add_note
from lightning_influence.support.fields import read_tensor
from lightning_influence.support.storage import PathLike, load_object, save_tensors


@dataclass(frozen=True, eq=False)
class Change:
    """New values of some entries of one parameter.

    Attributes:
        index: positions in the flattened parameter, ``(k,)``.
        before: their values before the edit, ``(k,)``.
        after: their values with it, ``(k,)``.
        shape: of the parameter.

    Raises:
        ValueError: if a position is not in the parameter or comes twice, there is not one value for each, or
            a value is NaN or infinite.
    """

    index: Tensor
    before: Tensor
    after: Tensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        index, count = self.index, math.prod(self.shape)
        if index.ndim != 1 or index.dtype != torch.int64 or not len(index):
            raise ValueError(f"positions of shape {tuple(index.shape)} and {index.dtype}, not int64 (k,)")
        if int(index.min()) < 0 or int(index.max()) >= count or not are_distinct(index):
            raise ValueError(f"positions that are not distinct and from 0 to {count - 1}")
        for name, values in (("before", self.before), ("after", self.after)):
            # One value for all positions would be written to each of them without a word.
            if values.shape != index.shape:
                raise ValueError(f"{name!r} of shape {tuple(values.shape)} for {len(index)} positions")
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"NaN or infinity in {name!r}")
        if self.before.dtype != self.after.dtype:
            raise ValueError(f"'before' of {self.before.dtype} and 'after' of {self.after.dtype}")


class ParameterEdit(JupyterMixin):
    """An edit of a trained module; nothing of the module changes until :meth:`apply`.

    Old and new values are stored as they are, so that applying and reverting are exact to the bit. Applied,
    the module is an ordinary one: it trains, predicts and is saved by a Trainer as any other.

    Args:
        model: the module.
        changes: by parameter name, what changes.
        report: how it was computed and what it does.

    Example:
        >>> import torch
        >>> from lightning.pytorch import LightningModule
        >>> from lightning_influence import InfluenceModule
        >>> class Line(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(2, 3)
        ...     def training_step(self, batch, batch_idx):
        ...         return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])
        >>> batch = (torch.randn(9, 2), torch.arange(9) % 3)
        >>> edit = InfluenceModule(Line()).forget([0, 3], [batch], ratio=0.5, step="theory")
        >>> with edit:
        ...     edit.applied
        True
        >>> edit.applied
        False
    """

    KIND: ClassVar[str] = "parameter edit"

    def __init__(self, model: nn.Module, changes: Mapping[str, Change], report: EditReport) -> None:
        self.model, self.changes, self.report = model, dict(changes), report

    @property
    def applied(self) -> bool:
        """Whether the module has the edited values now."""
        return self._holds("after")

    def apply(self) -> Self:
        """Give the module the edited values.

        Returns:
            The edit.

        Raises:
            EditMismatchError: if the module's weights are not those that the edit was computed for.
        """
        if not self._holds("before"):
            raise EditMismatchError(self._mismatch("applied", "before"))
        self._write("after")
        return self

    def revert(self) -> Self:
        """Give the module the values it had before the edit, to the bit.

        Returns:
            The edit.

        Raises:
            EditMismatchError: if the module does not have the edited values, for instance after training on.
        """
        if not self._holds("after"):
            raise EditMismatchError(self._mismatch("reverted", "after"))
        self._write("before")
        return self

    def __enter__(self) -> Self:
        """Apply the edit.

        Returns:
            The edit.
        """
        return self.apply()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Revert the edit, unless the block did.

        Raises:
            EditMismatchError: if the block changed the weights otherwise; a warning if it raised an error.
        """
        try:
            if not self._holds("before"):
                self.revert()
        except EditMismatchError as mismatch:
            if error is None:
                raise
            add_note(error, str(mismatch))
            warnings.warn(str(mismatch), InfluenceWarning, stacklevel=2)

    def save(self, path: PathLike) -> Path:
        """Write the edit to one safetensors file, atomically; the module is not in it.

        Args:
            path: the file, used as it stands; an existing one is replaced.

        Returns:
            The path.
        """
        tensors: dict[str, Tensor] = {}
        for name, change in self.changes.items():
            for key in ("index", "before", "after"):
                tensors[f"{name}/{key}"] = to_coordinates(getattr(change, key))
        shapes = {name: list(change.shape) for name, change in self.changes.items()}
        save_tensors(path, tensors, {"kind": self.KIND, "shapes": shapes, "report": self.report.to_state()})
        return Path(path).expanduser()

    @classmethod
    def load(cls, path: PathLike, model: nn.Module) -> Self:
        """Read and verify a file that :meth:`save` wrote.

        Args:
            path: the file.
            model: the module to edit: with the weights that the edit was computed for, or with the edited
                ones to revert them.

        Returns:
            The edit, applied if the module has the edited values.

        Raises:
            CorruptFileError: if the file is truncated, altered or of another kind, or does not hold one
                finite value for each position; names the file and the parameter.
            EditMismatchError: if the module has no such parameters.
        """
        changes, report = load_object(path, cls.KIND, _read_edit)
        edit = cls(model, changes, report)
        edit._parameters()
        return edit

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that change.

        Raises:
            EditMismatchError: if the module lacks one, or it has another shape.
        """
        own = dict(self.model.named_parameters())
        for name, change in self.changes.items():
            if name not in own or tuple(own[name].shape) != change.shape:
                got = f"shape {tuple(own[name].shape)}" if name in own else "no such parameter"
                raise EditMismatchError(
                    f"The edit changes {name!r} of shape {change.shape}; the module has {got}. Pass the "
                    "module that the edit was computed for."
                )
        return {name: own[name] for name in self.changes}

    def _holds(self, which: str) -> bool:
        """Return whether the module has the values from before or after the edit."""
        for name, parameter in self._parameters().items():
            change = self.changes[name]
            values = parameter.detach().reshape(-1)[change.index.to(parameter.device)].cpu()
            wanted: Tensor = getattr(change, which)
            if values.dtype != wanted.dtype or not torch.equal(_bits(values), _bits(wanted)):
                return False
        return True

    @torch.no_grad()
    def _write(self, which: str) -> None:
        for name, parameter in self._parameters().items():
            change = self.changes[name]
            flat = parameter.detach().reshape(-1).clone()
            flat[change.index.to(flat.device)] = getattr(change, which).to(flat.device)
            parameter.copy_(flat.view(parameter.shape))

    def _mismatch(self, verb: str, wanted: str) -> str:
        if self._holds("before" if wanted == "after" else "after"):
            state = "not applied" if wanted == "after" else "applied already"
            return f"The edit cannot be {verb}: it is {state}."
        return (
            f"The edit cannot be {verb}: the module's weights differ from those {wanted} the edit. They were "
            "trained, loaded, converted or edited otherwise in the meantime. Load the weights the edit was "
            "computed for, or compute it anew."
        )

    def __rich__(self) -> RenderableType:
        state = "applied" if self.applied else "not applied"
        title = f"Edit to {self.report.kind} {self.report.edited.examples} examples ({state})"
        return Group(
            build_facts_table(self.report.facts(), title), self.report.layer_table(), self.report.loss_table()
        )

    def __str__(self) -> str:
        """Return the tables as text."""
        return render_plain(self)

    def __repr__(self) -> str:
        report = self.report
        return (
            f"ParameterEdit({report.kind!r}, method={report.method!r}, {report.touched:,} of "
            f"{report.numel:,} parameters)"
        )


def _bits(values: Tensor) -> Tensor:
    """Return the values as integers: a comparison that tells signs of zero apart and holds for NaN."""
    return values.contiguous().view(torch.uint8) if values.numel() else values


def _read_edit(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> tuple[dict[str, Change], EditReport]:
    """Make changes and report of what a file holds.

    Returns:
        The changes by parameter name, and the report.

    Raises:
        ValueError: naming the field that is missing or wrong.
    """
    shapes = metadata.get("shapes")
    if not isinstance(shapes, dict):
        raise ValueError(f"shapes are {shapes!r:.40}; accepted is a table of parameters' names and shapes.")
    unknown = tensors.keys() - {f"{name}/{key}" for name in shapes for key in ("index", "before", "after")}
    if unknown:
        raise ValueError(f"{min(unknown)!r} belongs to no parameter; known are {sorted(shapes)}.")
    changes = {name: _read_change(tensors, name, shape) for name, shape in shapes.items()}
    return changes, EditReport.from_state(metadata.get("report", {}))


def _read_change(tensors: Mapping[str, Tensor], name: str, shape: Any) -> Change:
    """Read what changes of one parameter.

    Returns:
        The change.

    Raises:
        ValueError: naming the parameter, and what is missing or wrong.
    """
    if not isinstance(shape, list) or not all(is_count(size, 0) for size in shape):
        raise ValueError(f"the shape of {name!r} is {shape!r:.40}; accepted is a list of integers.")
    index, before, after = (read_tensor(tensors, f"{name}/{key}") for key in ("index", "before", "after"))
    if before.ndim == 2 and before.shape == after.shape == (len(index), 2):  # of complex numbers
        before, after = from_coordinates(before), from_coordinates(after)
    try:
        return Change(index, before, after, tuple(shape))
    except ValueError as error:
        raise ValueError(f"parameter {name!r} has {error}") from error


def changes_between(
    before: Mapping[str, Tensor], after: Mapping[str, Any], masks: Mapping[str, Tensor]
) -> dict[str, Change]:
    """Collect what differs between two sets of values.

    Args:
        before: parameters by name.
        after: the same with the edit.
        masks: by name, the entries that the edit may change.

    Returns:
        The changes by name; without the parameters of which nothing may change.

    Raises:
        NonFiniteError: if a value is NaN or infinite.
    """
    changes = {}
    for name, old in before.items():
        index = masks[name].reshape(-1).nonzero().flatten().cpu()
        if len(index):
            olds, news = (part.detach().reshape(-1).cpu()[index].clone() for part in (old, after[name]))
            if not bool(torch.isfinite(news).all()):
                raise NonFiniteError(
                    f"The edit would make values of {name!r} NaN or infinite. Pass a smaller step=, a larger "
                    "damping=, or a module in a precision with a wider range."
                )
            changes[name] = Change(index, olds, news, tuple(old.shape))
    return changes
