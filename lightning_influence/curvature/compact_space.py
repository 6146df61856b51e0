"""A coarse space in little memory: directions of low rank, and what the curvature makes of them by example.

Any subspace gives a valid Galerkin correction, so a direction ``P^{-1} g`` may be cut to a low rank in every
layer, as long as all products are those of what is stored. Beside a direction not its product ``G q`` is
held, which is as large as the model, but ``B_n^T J_n q`` of every curvature example: a few numbers each.

Closed forms leave out what layers have to do with one another, so that a direction's layers are right one by
one and not in relation. Consecutive layers make *stages*, and a direction's part in each stage is a direction
of its own: products with the parts cost what products with the whole do, which is their sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_influence.curvature.inverse import BlockInverse
from lightning_influence.curvature.low_rank_matrices import Matrices, join_matrices, make_matrices
from lightning_influence.model.layers.plan import Layout
from lightning_influence.support.storage import check_version

_VERSION = 1
# Chosen by hand: bytes of rows that are converted to float64 at once.
_GRAM_BYTES = 2**22


@dataclass(frozen=True)
class CurvatureRows:
    """``B^T J V`` of some examples.

    Attributes:
        indices: dataset indices, ascending, ``(N,)``.
        values: ``(N, K, V)``; zero where an example has fewer columns than others.
    """

    indices: Tensor
    values: Tensor

    def find(self, indices: Tensor) -> Tensor:
        """Return the rows of examples ``(B,)``, ``(B, K, V)``."""
        places = torch.searchsorted(self.indices, indices.cpu())
        return self.values[places.to(self.values.device)]

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return self.values.nbytes


@dataclass(frozen=True)
class CompactSpace:
    """Directions of low rank and their curvature rows, for any damping.

    Attributes:
        layout: the order of flat vectors.
        directions: ``Q`` by layer, ``m`` of them: preconditioned gradients, neither orthogonal nor scaled.
            Their parts in the stages, ``m S``, span the space, in the order of the directions.
        probes: ``W`` by layer, ``s`` of them; they price residuals.
        rows: ``B^T J [W, Q]`` of all curvature examples, ``(N, K, s + m S)``.
        normaliser: what sums over the examples are divided by.
        inverse: ``P``, the preconditioner that directions are made with.
        mixtures: as in :class:`~.coarse_space.CoarseSpace`.
        rank: of the directions in a layer, at most.
        limit: as in :class:`~.coarse_space.CoarseSpace`.
        stages: the stage of each layer, from 0; all layers are in one if there are none.
    """

    layout: Layout
    directions: Mapping[str, Matrices]
    probes: Mapping[str, Matrices]
    rows: CurvatureRows
    normaliser: float
    inverse: BlockInverse
    mixtures: int
    rank: int
    limit: int = 0
    stages: Mapping[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return its size; the tensors would fill the screen."""
        return (
            f"{type(self).__name__}({self.size} directions of {self.layout.numel:,} in rank {self.rank}, "
            f"{self.examples:,} curvature examples)"
        )

    @property
    def size(self) -> int:
        """``m``."""
        return next(iter(self.directions.values())).count

    @property
    def num_stages(self) -> int:
        """``S``."""
        return 1 + max(self.stages.values(), default=0)

    def columns(self, name: str) -> slice:
        """Return which of the ``m S`` parts are those of a layer, one a direction."""
        return slice(self.stages.get(name, 0), None, self.num_stages)

    @property
    def examples(self) -> int:
        """Number of curvature examples."""
        return len(self.rows.indices)

    @property
    def num_probes(self) -> int:
        """``s``."""
        return next(iter(self.probes.values())).count

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        vectors = [*self.directions.values(), *self.probes.values()]
        return self.rows.nbytes + sum(part.nbytes for part in vectors)

    def grown(self, directions: Mapping[str, Matrices], rows: CurvatureRows) -> CompactSpace:
        """Return the space with further directions, and their rows ``(N, K, k S)``."""
        joined = {name: join_matrices([part, directions[name]]) for name, part in self.directions.items()}
        both = CurvatureRows(self.rows.indices, torch.cat([self.rows.values, rows.values], dim=2))
        return replace(self, directions=joined, rows=both, limit=0)

    def to(self, device: torch.device | str) -> CompactSpace:
        """Return the space on another device; tensors that are there already are shared."""
        state = self.state_dict()
        indices = state.pop("indices")  # looked up on the CPU
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in state.items()}
        return CompactSpace.from_state_dict({**moved, "indices": indices})

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives under flat keys; loads with ``weights_only=True``."""
        state: dict[str, Any] = {
            "version": _VERSION,
            **self.inverse.state_dict(),
            "indices": self.rows.indices,
            "rows": self.rows.values,
            "normaliser": self.normaliser,
            "mixtures": self.mixtures,
            "rank": self.rank,
            "limit": self.limit,
            "stages": dict(self.stages),
        }
        for kind, vectors in (("directions", self.directions), ("probes", self.probes)):
            for name, part in vectors.items():
                state |= {f"{name}/{kind}/{key}": tensor for key, tensor in part.tensors().items()}
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> CompactSpace:
        """Rebuild a space from :meth:`state_dict`.

        Returns:
            The space, sharing the tensors of the state.

        Raises:
            FactorMismatchError: if the state was written by an incompatible version.
        """
        check_version(
            state,
            _VERSION,
            subject="A stored coarse space has",
            remedy="Build it again with factors='refit'.",
        )
        inverse = BlockInverse.from_state_dict(state)
        found: dict[str, dict[str, Matrices]] = {"directions": {}, "probes": {}}
        for name in inverse.layout.shapes:
            for kind, vectors in found.items():
                prefix = f"{name}/{kind}/"
                vectors[name] = make_matrices({
                    key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
                })
        return cls(
            inverse.layout,
            found["directions"],
            found["probes"],
            CurvatureRows(state["indices"], state["rows"]),
            state["normaliser"],
            inverse,
            state["mixtures"],
            state["rank"],
            state["limit"],
            state.get("stages", {}),
        )


def compute_gram(rows: Tensor, others: Tensor | None = None) -> Tensor:
    """Return ``sum_nk r_nk^T r'_nk`` of rows ``(N, K, V)`` and ``(N, K, W)``, ``(V, W)`` in float64.

    Args:
        rows: of ``N`` examples.
        others: of the same; the rows themselves if None.
    """
    others = rows if others is None else others
    result = rows.new_zeros(rows.shape[2], others.shape[2], dtype=torch.float64)
    step = max(1, _GRAM_BYTES // max(1, 8 * rows.shape[1] * (rows.shape[2] + others.shape[2])))
    for start in range(0, len(rows), step):
        left = rows[start : start + step].flatten(0, 1).double()
        right = left if others is rows else others[start : start + step].flatten(0, 1).double()
        result.addmm_(left.T, right)
    return result
