"""What attributions and self-influence share: their files, checks and looks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.jupyter import JupyterMixin
from torch import Tensor
from typing_extensions import Self

from lightning_influence.results.diagnostics import Diagnostics
from lightning_influence.support.arguments import are_distinct
from lightning_influence.support.fields import check_fields
from lightning_influence.support.storage import PathLike, load_object, save_tensors


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Result(JupyterMixin):
    """What attributions and self-influence share: their files, checks and looks."""

    KIND: ClassVar[str]
    #: Fields that hold floating-point numbers, beside those that end with ``scores``.
    FLOATS: ClassVar[frozenset[str]] = frozenset()

    train_indices: Tensor
    diagnostics: Diagnostics

    def __post_init__(self) -> None:
        for name, tensor in self._tensors().items():
            tensor = tensor.detach().cpu()
            if tensor.dtype in {torch.float16, torch.bfloat16}:
                tensor = tensor.float()
            floats = name.endswith("scores") or name in self.FLOATS
            accepted = (torch.float32, torch.float64) if floats else (torch.int64,)
            if tensor.dtype not in accepted:
                kind = "floating-point" if floats else "int64"
                raise ValueError(f"{name} must be {kind}, got {tensor.dtype}")
            object.__setattr__(self, name, tensor)
        if self.train_indices.dim() != 1 or not are_distinct(self.train_indices):
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
        names = self._names()
        metadata = {"kind": self.KIND, "diagnostics": values, **({"names": names} if names else {})}
        save_tensors(path, {**own, **more}, metadata)
        return Path(path).expanduser()

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """Read and verify a file that :meth:`save` wrote.

        Args:
            path: the file.

        Returns:
            An equal object, its tensors on the CPU.

        Raises:
            FileNotFoundError: if there is no such file.
            CorruptFileError: if the file is truncated, altered, of an unknown version or of another kind, or
                holds what cannot be a result; names the file, the field and what was got.
        """
        return load_object(path, cls.KIND, cls._from_state)

    @classmethod
    def _from_state(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        """Make a result of what a file holds.

        Returns:
            The result.

        Raises:
            ValueError: naming the field that is missing, unknown or of a wrong type.
        """
        prefix = "diagnostics."
        more = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        own = {name: t for name, t in tensors.items() if not name.startswith(prefix)}
        diagnostics = Diagnostics.from_state(more, metadata.get("diagnostics", {}))
        names = metadata.get("names", {})
        if not isinstance(names, dict):
            raise ValueError(f"names are {names!r:.40}; accepted is a table of names and values.")
        return cls(**check_fields(cls, {**own, **names, "diagnostics": diagnostics}, cls.KIND))

    def _names(self) -> dict[str, list[str]]:
        """Return the fields that are texts, without empty ones."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: list(value) for name, value in values.items() if name.endswith("names") and value}

    def _tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def import_pandas() -> Any:
    """Return pandas.

    Raises:
        ImportError: if it is not installed, naming the extra.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_pandas needs pandas: pip install 'lightning-influence[pandas]'") from error
    return pandas
