"""Running moments of each training example's loss and margin over the epochs of a run.

An epoch's values are summed in one matrix ``(N, 4)`` (how often the example came, its losses, margins, and
how often it was right), which is all that changes from step to step, and all that processes have to add up.
At the end of an epoch their means enter the moments. Memory is 52 bytes an example.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_influence.support.arguments import is_count
from lightning_influence.support.errors import CorruptFileError

_FLOATS, _COUNTS, _SUMS = 4, 5, 4
_VERSION = 1


@dataclass
class Moments:
    """Moments of every example, and the sums of the epoch that runs.

    Attributes:
        floats: ``(N, 4)`` float32: mean loss, sum of its squared deviations, the same of the margin.
        counts: ``(N, 5)`` int32: epochs seen, epochs in which it was right, times forgotten, first epoch in
            which it was right (-1: none yet), whether it was right the last time (-1: not seen yet).
        sums: ``(N + 1, 4)`` float32 of the epoch that runs; the last row counts what was missed: batches
            without losses, batches without margins, batches seen, and processes that failed.
        epoch: number of the epoch that runs, as the Trainer counts; -1 for none.
        epochs: how many epochs have entered the moments.
        skipped: how many were left out, because watching them would have taken too long.
        missed: batches without losses so far.
        batches: batches seen so far.
        has_margins: whether every batch had margins.
        notes: what is assumed, and why batches were missed.
    """

    floats: Tensor
    counts: Tensor
    sums: Tensor
    epoch: int = -1
    epochs: int = 0
    skipped: int = 0
    missed: int = 0
    batches: int = 0
    has_margins: bool = True
    notes: list[str] = field(default_factory=list)

    @classmethod
    def start(cls, size: int) -> Moments:
        """Return moments of ``size`` examples of which nothing is known."""
        # Whatever torch's defaults are while the fit runs.
        counts = torch.zeros(size, _COUNTS, dtype=torch.int32, device="cpu")
        counts[:, 3:] = -1
        floats = torch.zeros(size, _FLOATS, dtype=torch.float32, device="cpu")
        return cls(floats, counts, torch.zeros(size + 1, _SUMS, dtype=torch.float32, device="cpu"))

    @property
    def size(self) -> int:
        """Number of examples ``N``."""
        return len(self.counts)

    def add(self, indices: Tensor, losses: Tensor, margins: Tensor | None, *, batches: int = 1) -> None:
        """Add batches to the epoch; values that are not finite are not counted.

        Args:
            indices: ``(B,)`` of the examples, on the device of the sums.
            losses: ``(B,)``.
            margins: ``(B,)``, or None.
            batches: how many they are.
        """
        rows = losses.new_zeros(len(losses) + 1, _SUMS, dtype=self.sums.dtype)
        finite = losses.isfinite()
        if margins is not None:
            finite = finite & margins.isfinite()
            rows[:-1, 2] = margins.where(finite, 0.0)
            rows[:-1, 3] = ((margins > 0) & finite).to(rows.dtype)
        else:
            rows[-1, 1] = batches
        rows[:-1, 0] = finite.to(rows.dtype)
        rows[:-1, 1] = losses.where(finite, 0.0)
        rows[-1, 2] = batches
        self.sums.index_add_(0, torch.cat([indices, indices.new_full((1,), self.size)]), rows)

    def miss(self, reason: str) -> None:
        """Count a batch that could not be seen, and keep the reason."""
        self.sums[-1, 0] += 1
        self.note(reason)

    def note(self, text: str | None) -> None:
        """Keep a note, once."""
        if text and text not in self.notes:
            self.notes.append(text)

    def fold(self, sums: Tensor | None = None) -> None:
        """End the epoch: let the means of its sums enter the moments, and begin new sums.

        Args:
            sums: those of all processes, where there are several.
        """
        sums = (self.sums if sums is None else sums).cpu().double()
        self.sums = torch.zeros_like(self.sums)
        self.epoch = -1
        missed, without_margins, batches, _ = sums[-1].tolist()
        self.missed += int(missed)
        self.batches += int(batches)
        self.has_margins &= without_margins == 0
        seen = (sums[:-1, 0] > 0).nonzero()[:, 0]
        if not len(seen):
            return
        count, losses, margins, right = sums[seen].unbind(1)
        counts = self.counts[seen]
        counts[:, 0] += 1
        self.floats[seen] = _welford(self.floats[seen], torch.stack([losses, margins]) / count, counts[:, 0])
        is_right = right > count / 2
        counts[:, 1] += is_right
        counts[:, 2] += (counts[:, 4] == 1) & ~is_right
        counts[:, 3] = torch.where((counts[:, 3] < 0) & is_right, self.epochs + self.skipped, counts[:, 3])
        counts[:, 4] = is_right
        self.counts[seen] = counts
        self.epochs += 1

    def skip(self, why: str) -> None:
        """End an epoch that was not watched, or not to its end: nothing of it enters the moments."""
        self.sums.zero_()
        self.epoch = -1
        self.skipped += 1
        self.note(why)

    def copy(self) -> Moments:
        """Return moments that change independently of these, on the CPU."""
        return Moments.from_state_dict(self.state_dict())

    def state_dict(self, sums: Tensor | None = None) -> dict[str, Any]:
        """Return tensors and primitives, with the sums of all processes in place of one's if given."""
        return {
            "version": _VERSION,
            "floats": self.floats.clone(),
            "counts": self.counts.clone(),
            "sums": (self.sums if sums is None else sums).detach().cpu().clone(),
            "epoch": self.epoch,
            "epochs": self.epochs,
            "skipped": self.skipped,
            "missed": self.missed,
            "batches": self.batches,
            "has_margins": self.has_margins,
            "notes": list(self.notes),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Moments:
        """Return the moments that were saved.

        Raises:
            CorruptFileError: if they do not fit together.
        """
        state = {"skipped": 0, **state}  # before there were any
        _check(state)
        values = {name: state[name] for name in state if name != "version"}
        values |= {name: state[name].clone() for name in ("floats", "counts", "sums")}
        return cls(**{**values, "notes": list(state["notes"])})


def _welford(floats: Tensor, values: Tensor, counts: Tensor) -> Tensor:
    """Return mean and sum of squared deviations after one more value of the loss and one of the margin.

    Args:
        floats: ``(n, 4)`` before.
        values: ``(2, n)``.
        counts: ``(n,)`` with the new value.
    """
    parts = []
    for place, value in enumerate(values):
        mean, squares = floats[:, 2 * place].double(), floats[:, 2 * place + 1].double()
        step = value - mean
        mean = mean + step / counts
        parts += [mean, squares + step * (value - mean)]
    return torch.stack(parts, 1).float()


def _check(state: Mapping[str, Any]) -> None:
    """Refuse a state that does not fit together.

    Raises:
        CorruptFileError: naming the part.
    """
    counts = state.get("counts")
    size = len(counts) if isinstance(counts, Tensor) and counts.ndim else 0
    shapes = {"floats": (size, _FLOATS), "counts": (size, _COUNTS), "sums": (size + 1, _SUMS)}
    for name, shape in shapes.items():
        value, dtype = state.get(name), torch.int32 if name == "counts" else torch.float32
        if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.dtype != dtype:
            raise CorruptFileError(
                f"The training dynamics' {name!r} are no {dtype} tensor of shape {shape}. Save them again."
            )
    numbers = ("epochs", "skipped", "missed", "batches")
    epoch, notes, has_margins = state.get("epoch"), state.get("notes"), state.get("has_margins")
    sound = state.get("version") == _VERSION and all(is_count(state.get(name), 0) for name in numbers)
    sound &= is_count(epoch, -1) and isinstance(has_margins, bool)
    sound &= isinstance(notes, list) and all(isinstance(note, str) for note in notes)
    if not sound or set(state) - {*shapes, *numbers, "epoch", "notes", "has_margins", "version"}:
        raise CorruptFileError("The training dynamics' counts or notes are malformed. Save them again.")
