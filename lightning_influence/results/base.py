"""What attributions and self-influence share: their files, checks and looks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from rich.jupyter import JupyterMixin
from torch import Tensor

from lightning_influence.errors import CorruptFileError
from lightning_influence.results.diagnostics import Diagnostics
from lightning_influence.storage import PathLike, check_kind, load_tensors, save_tensors


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Result(JupyterMixin):
    """What attributions and self-influence share: their files, checks and looks."""

    KIND: ClassVar[str]

    train_indices: Tensor
    diagnostics: Diagnostics

    def __post_init__(self) -> None:
        for name, tensor in self._tensors().items():
            tensor = tensor.detach().cpu()
            if tensor.dtype in {torch.float16, torch.bfloat16}:
                tensor = tensor.float()
            sound = tensor.is_floating_point() if name.endswith("scores") else tensor.dtype == torch.long
            if not sound:
                kind = "floating-point" if name.endswith("scores") else "int64"
                raise ValueError(f"{name} must be {kind}, got {tensor.dtype}")
            object.__setattr__(self, name, tensor)
        if self.train_indices.dim() != 1 or not distinct(self.train_indices):
            raise ValueError(
                f"train_indices must be (N,) and distinct, got {tuple(self.train_indices.shape)}"
            )
        if len(self.train_indices) == 0:
            raise ValueError("train_indices is empty; attributions take at least one training example")

    def save(self, path: PathLike) -> Path:
        """Write everything to one safetensors file, atomically.

        Args:
            path: the file, used as it stands; an existing one is replaced.

        Returns:
            The path.
        """
        own = self._tensors()
        more, values = self.diagnostics.to_state()
        more = {f"diagnostics.{name}": tensor for name, tensor in more.items()}
        save_tensors(path, {**own, **more}, {"kind": self.KIND, "diagnostics": values})
        return Path(path).expanduser()

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """Read and verify a file that :meth:`save` wrote.

        Args:
            path: the file.

        Returns:
            An equal object, its tensors on the CPU.

        Raises:
            CorruptFileError: if the file is truncated, altered, of an unknown version or of another kind.
        """
        tensors, metadata = load_tensors(path)
        check_kind(path, metadata, cls.KIND)
        prefix = "diagnostics."
        more = {
            name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)
        }
        try:
            return cls(diagnostics=Diagnostics.from_state(more, metadata["diagnostics"]), **tensors)
        except (TypeError, ValueError, KeyError) as error:
            raise CorruptFileError(f"{str(path)!r} does not hold sound {cls.KIND}: {error}") from error

    def _tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape.

    Raises:
        ValueError: naming both shapes.
    """
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def check_k(k: int, stored: int, how: str) -> None:
    """Refuse to rank more examples than are stored.

    Raises:
        ValueError: naming both numbers.
    """
    if not 1 <= k <= stored:
        raise ValueError(f"k={k}, but {stored} examples per query are stored ({how}); k is 1 to {stored}")


def as_indices(group: Any, every: Tensor) -> Tensor:
    """Read a group of training examples.

    Args:
        group: integers ``(n,)``, or a boolean mask over ``every``.
        every: ``(N,)`` the indices that there are.

    Returns:
        The group's indices ``(n,)``, as they were given.

    Raises:
        ValueError: if it is neither.
    """
    accepted = f"accepted are dataset indices (n,), or a boolean mask of shape ({len(every)},)"
    try:
        found = torch.as_tensor(group).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"Got a group of type {type(group).__name__}; {accepted}.") from error
    if found.dtype == torch.bool and found.shape == every.shape:
        return every[found]
    integers = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if found.ndim != 1 or not (integers or found.numel() == 0):
        raise ValueError(f"Got a group of shape {tuple(found.shape)} and {found.dtype}; {accepted}.")
    return found.long()


def distinct(indices: Tensor) -> bool:
    """Return whether no index comes twice."""
    return not bool((indices.sort().values.diff() == 0).any())


def some(indices: Tensor) -> str:
    """Return the first indices as text, and how many more there are."""
    shown = ", ".join(map(str, indices[:10].tolist()))
    return shown if len(indices) <= 10 else f"{shown} and {len(indices) - 10} more"


def load_pandas() -> Any:
    """Return pandas.

    Raises:
        ImportError: if it is not installed, naming the extra.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_pandas needs pandas: pip install 'lightning-influence[pandas]'") from error
    return pandas
