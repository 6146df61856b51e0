"""Flat vectors over all covered parameters, and their views as one matrix a layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_influence.layers.base import Layer
from lightning_influence.layers.gradients import LayerGradients


class Layout:
    """The order of ``P`` parameters in a flat vector: layer after layer, each matrix row-major.

    Args:
        shapes: ``(G, D_out, D_in)`` of each layer, in order.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int, int]]) -> None:
        self.shapes = dict(shapes)
        self.numels = {name: g * o * i for name, (g, o, i) in self.shapes.items()}
        self.numel = sum(self.numels.values())

    @classmethod
    def of(cls, layers: Mapping[str, Layer]) -> Layout:
        """Return the layout of some covered layers."""
        return cls({name: layer.shape for name, layer in layers.items()})

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views ``(..., G, D_out, D_in)`` of ``flat (..., P)``."""
        parts = torch.split(flat, list(self.numels.values()), dim=-1)
        lead = flat.shape[:-1]
        return {
            name: part.reshape(*lead, *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def join(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Return ``(..., P)`` from one ``(..., G, D_out, D_in)`` a layer."""
        return torch.cat([blocks[name].flatten(-3) for name in self.shapes], dim=-1)

    def expand(self, values: Mapping[str, float], like: Tensor) -> Tensor:
        """Return a vector ``(P,)`` that holds each layer's number at all of its parameters."""
        parts = [like.new_full((self.numels[name],), values[name]) for name in self.shapes]
        return torch.cat(parts)

    def dense(self, gradients: Mapping[str, LayerGradients]) -> Tensor:
        """Return gradients as flat vectors ``(K, B, P)``; a layer without an entry is zero.

        Raises:
            KeyError: if no layer of the layout has an entry.
        """
        present = {name: gradients[name].dense().flatten(2) for name in self.shapes if name in gradients}
        if not present:
            raise KeyError(f"none of the layers {list(self.shapes)} has gradients")
        like = next(iter(present.values()))
        return torch.cat(
            [
                present[name] if name in present else like.new_zeros(*like.shape[:2], numel)
                for name, numel in self.numels.items()
            ],
            dim=-1,
        )

    def dot(self, gradients: Mapping[str, LayerGradients], vectors: Tensor) -> Tensor:
        """Return inner products ``(K, B, V)`` of gradients with flat vectors ``(V, P)``."""
        blocks = self.split(vectors)
        parts = [gradients[name].dot(blocks[name]) for name in self.shapes if name in gradients]
        return torch.stack(parts).sum(dim=0)

    def add_combination(self, out: Tensor, gradients: Mapping[str, LayerGradients], weights: Tensor) -> None:
        """Add to ``out (V, P)`` the sums of gradients with weights ``(K, B, V)``, in place."""
        start = 0
        for name, numel in self.numels.items():
            if name in gradients:
                out[:, start : start + numel] += gradients[name].combine(weights).flatten(1)
            start += numel
