"""A gradient store: what scores need of every training example, in a folder on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from lightning_influence.methods.kept_coordinates import KeptCoordinates
from lightning_influence.methods.scoring_passes import Sink, refuse_non_finite
from lightning_influence.results.diagnostics import Diagnostics
from lightning_influence.results.self_influence import SelfInfluence
from lightning_influence.support.fields import read_tensor
from lightning_influence.support.mapped_rows import PRECISIONS, open_rows, remove_other_rows, verify_rows
from lightning_influence.support.storage import PathLike, load_object, save_tensors

# Chosen by hand: bytes of rows that are converted at once.
_READ_BYTES = 2**25
_FILE = "store.safetensors"


@dataclass(frozen=True, kw_only=True)
class StoreFacts:
    """What was stored, of which model and which data; JSON values.

    Attributes:
        method: name of the closed form.
        damping_origin: where its damping comes from.
        layers: names or patterns of the layers that were asked for, None for all.
        parameters_covered: share of the trainable parameters in the layers of the store.
        fingerprint: of the parameters.
        weights_key: digest of parameters and buffers.
        rows: name of the file of rows.
        digest: of its content.
        dtype: precision of its numbers.
        weight: sum of the loss weights of the examples.
        size: length of the dataset, None if it is not known.
        told: what :attr:`GradientStore.told` says.
    """

    method: str
    damping_origin: str
    layers: list[str] | None
    parameters_covered: float
    fingerprint: dict[str, list[float]]
    weights_key: str
    rows: str
    digest: str
    dtype: str
    weight: float
    size: int | None
    told: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, repr=False)
class GradientStore:
    """A few numbers of every training example, from which new queries are answered without their data.

    Made by :meth:`lightning_influence.InfluenceModule.build_store`, asked with ``ask_store``.

    Attributes:
        path: the folder.
        kept: which numbers of a gradient are kept.
        indices: dataset indices of the training examples, in the order of the rows, ``(N,)``.
        scales: what each row is to be multiplied by, ``(N,)``.
        squares: ``g^T (H + lambda)^{-1} g`` of each example, of all coordinates, ``(N,)``.
        rows: the numbers, on disk, ``(N, k)``.
        facts: of which model and data.
    """

    path: Path
    kept: KeptCoordinates
    indices: Tensor
    scales: Tensor
    squares: Tensor
    rows: Tensor
    facts: StoreFacts

    KIND: ClassVar[str] = "gradient store"

    @property
    def num_examples(self) -> int:
        """``N``."""
        return len(self.indices)

    @property
    def size(self) -> int | None:
        """Length of the dataset, None if it is not known."""
        return self.facts.size

    @property
    def bytes_per_example(self) -> int:
        """What a training example takes on disk."""
        each = sum(part.element_size() for part in (self.indices, self.scales, self.squares))
        return self.rows.shape[1] * self.rows.element_size() + each

    @property
    def told(self) -> dict[str, Any]:
        """How good the store is: how many ``numbers``, of how many ``candidates`` and ``coordinates``.

        ``energy_kept`` is the share of ``sum_n g_n^T (H + lambda)^{-1} g_n`` that the kept numbers have;
        ``relative_error`` and ``rank_correlation`` compare the scores of ``pairs`` of different training
        examples with exact ones (None where there was nothing to compare).
        """
        return dict(self.facts.told)

    def score(self, numbers: Tensor, sink: Sink, most: int) -> None:
        """Hand the scores of all training examples to a sink.

        Args:
            numbers: of the queries, ``(Q, k)``.
            sink: where scores go.
            most: how many examples at a time.
        """
        step = max(1, min(most, _READ_BYTES // (self.rows.shape[1] * numbers.element_size())))
        for start in range(0, self.num_examples, step):
            part = slice(start, start + step)
            rows, scales = (x[part].to(numbers.device, numbers.dtype) for x in (self.rows, self.scales))
            scores = (numbers @ rows.mT) * scales
            refuse_non_finite(scores, self.indices[part])
            sink.update(scores, self.indices[part])

    def self_influence(self) -> SelfInfluence:
        """Influence of every training example on its own loss: exact, as it was computed while building.

        Returns:
            One score a training example.
        """
        order = self.indices.argsort()
        weight = self.facts.weight / self.num_examples
        scores = self.squares[order] / (self.num_examples * weight**2)
        return SelfInfluence(
            train_indices=self.indices[order], scores=scores, diagnostics=self._diagnostics()
        )

    def _diagnostics(self) -> Diagnostics:
        return Diagnostics(
            method=self.facts.method,
            damping=self.kept.inverse.damping,
            damping_origin=self.facts.damping_origin,
            layers=self.kept.inverse.layout.numels,
            parameters_covered=self.facts.parameters_covered,
            extra={"store": self.told},
        )

    @classmethod
    def save(
        cls, path: Path, kept: KeptCoordinates, tensors: Mapping[str, Tensor], facts: StoreFacts
    ) -> GradientStore:
        """Complete a folder that has the rows, in place of what it held.

        Args:
            path: the folder.
            kept: which numbers of a gradient are kept.
            tensors: ``indices``, ``scales`` and ``squares``.
            facts: all else.

        Returns:
            The store, opened.
        """
        state = {**kept.state_dict(), **tensors}
        stored = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in state.items() if name not in stored}
        metadata = {"kind": cls.KIND, "facts": json.dumps(vars(facts)), **others}
        save_tensors(path / _FILE, stored, metadata)
        remove_other_rows(path, facts.rows)
        return cls.load(path)

    @classmethod
    def load(cls, path: PathLike, *, verify: bool = False) -> GradientStore:
        """Open a store; its rows stay on disk.

        Args:
            path: the folder.
            verify: whether to compare the rows with their digest as well, which reads all of them. Their
                number, and everything else, is always verified.

        Returns:
            The store.

        Raises:
            FileNotFoundError: if there is none.
            CorruptFileError: if a file is truncated, altered or missing.
        """
        folder = Path(path).expanduser()

        def build(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> GradientStore:
            facts = StoreFacts(**json.loads(metadata["facts"]))
            kept = KeptCoordinates.from_state_dict({**tensors, **metadata})
            indices = read_tensor(tensors, "indices", ndim=1)
            scales, squares = (read_tensor(tensors, name, indices.shape) for name in ("scales", "squares"))
            rows = open_rows(folder, facts.rows, (len(indices), kept.numbers), PRECISIONS[facts.dtype])
            return cls(folder, kept, indices, scales, squares, rows, facts)

        store = load_object(folder / _FILE, cls.KIND, build)
        if verify:
            verify_rows(folder / store.facts.rows, store.facts.digest)
        return store

    def __repr__(self) -> str:
        count, numbers = self.rows.shape
        return (
            f"GradientStore({str(self.path)!r}, N={count}, numbers={numbers}, method={self.facts.method!r})"
        )
