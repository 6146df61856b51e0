"""K-FAC, EK-FAC, the diagonal and the identity as operators: the lower rungs of the ladder."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.factors.inverse import BlockInverse
from lightning_influence.layers.dense import rotate_matrices


class FactoredOperator:
    """``Q diag(eigenvalues) Q^T`` of each layer, without damping: what a closed-form inverse inverts.

    Args:
        inverse: the closed form; its damping plays no part.
        num_examples: ``N``, which the statistics are an average over.
    """

    def __init__(self, inverse: BlockInverse, num_examples: int) -> None:
        self._inverse = inverse
        self.layout = inverse.layout
        self.num_examples = num_examples

    @property
    def numel(self) -> int:
        """``P``: length of a flat vector."""
        return self.layout.numel

    def product(self, vectors: Tensor) -> Tensor:
        """Return ``H V`` for flat vectors ``V (V, P)``; no pass is needed."""
        result = {}
        for name, block in self.layout.split(vectors).items():
            layer = self._inverse.layers[name].to(vectors.device, vectors.dtype)
            if layer.basis is None:
                result[name] = block * layer.eigenvalues
                continue
            rotated = rotate_matrices(block, layer.basis.q_in, layer.basis.q_out) * layer.eigenvalues
            result[name] = rotate_matrices(rotated, layer.basis.q_in.mT, layer.basis.q_out.mT)
        return self.layout.join(result)

    def batch_product(self, vectors: Tensor, count: int, seed: int) -> Tensor:
        """Return ``H V``: the statistics are there, and no minibatch is drawn."""
        return self.product(vectors)

    def dense(self) -> Tensor:
        """Return ``H``, ``(P, P)``, in float64, for small models."""
        matrix = self.product(torch.eye(self.numel, dtype=torch.float64))
        return (matrix + matrix.T) / 2
