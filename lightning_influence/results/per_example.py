"""What results with values for each training example share: their rows, and rankings by one of the values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.results.result import Result
from lightning_influence.results.top_k import Ranked, select_topk
from lightning_influence.support.arguments import check_k


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PerExample(Result):
    """A result that holds values of each training example, ``(N,)`` in the order of ``train_indices``."""

    @property
    def stored(self) -> int:
        """How many examples :meth:`top` can return: all."""
        return len(self.train_indices)

    def find_rows(self, train_indices: Tensor) -> Tensor:
        """Find the places of examples in the tensors of the result.

        Args:
            train_indices: ``(k,)`` dataset indices.

        Returns:
            Their places ``(k,)``.

        Raises:
            ValueError: if an example is unknown.
        """
        order = torch.argsort(self.train_indices)
        places = torch.searchsorted(self.train_indices[order], train_indices).clamp_max(self.stored - 1)
        rows = order[places]
        if not torch.equal(self.train_indices[rows], train_indices):
            raise ValueError("Got an index that train_indices does not hold.")
        return rows

    def _rank(self, values: Tensor, k: int, *, largest: bool) -> Ranked:
        """Return the ``k`` examples at one end of a ranking by values ``(N,)``, as one row.

        Raises:
            ValueError: if there are fewer than ``k`` examples.
        """
        check_k(k, self.stored, "all examples are stored")
        return select_topk(values[None], self.train_indices, k, largest=largest)
