"""Few numbers of a gradient whose inner products are nearly those of a closed form.

``g_q^T (Lambda + lambda)^{-1} g_n`` is the inner product of *whitened coordinates*, those of the eigenbasis
over the roots of their eigenvalues. Of random gradients with mean squares ``Lambda`` the score has the
variance ``sum (Lambda / (Lambda + lambda))^2``, so the coordinates with the largest share
``Lambda / (Lambda + lambda)``, over all layers alike, are the ones to keep. Coordinates of an example depend
on each other, which a Kronecker eigenbasis does not see: the leading principal directions of several times as
many coordinates, of training examples, had less error with as many numbers than these coordinates alone, than
random projections of all coordinates and than those of the same candidates
(``examples/benchmarks/store.py`` measures the first two).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_influence.curvature.eigenbases import find_eigenvectors
from lightning_influence.curvature.factors import rotate
from lightning_influence.curvature.inverse import BlockInverse, EigenInverse
from lightning_influence.model.layers.gradients import FactoredGradients, LayerGradients

# Chosen by hand: bytes of gradient matrices of one layer that are formed at once.
_FORMED_BYTES = 2**25


@dataclass(frozen=True)
class KeptCoordinates:
    """Which numbers of a gradient are kept.

    Attributes:
        inverse: the closed form.
        kept: by layer the places of the coordinates in its ``(G, D_out, D_in)``, ascending; ``C`` in all.
        directions: orthonormal columns that the ``C`` coordinates are projected on, ``(C, k)``; None to keep
            the coordinates themselves.
    """

    inverse: BlockInverse
    kept: Mapping[str, Tensor]
    directions: Tensor | None = None

    @property
    def candidates(self) -> int:
        """``C``."""
        return sum(map(len, self.kept.values()))

    @property
    def numbers(self) -> int:
        """``k``, how many numbers a gradient has."""
        return self.candidates if self.directions is None else self.directions.shape[1]

    def take(self, gradients: Mapping[str, LayerGradients]) -> tuple[Tensor, Tensor]:
        """Return the numbers of gradients of ``B`` examples and one seed.

        Args:
            gradients: by layer; zero in layers that are missing.

        Returns:
            The numbers ``(B, k)``, and the whole ``g^T (.)^{-1} g`` of each gradient, ``(B,)``.
        """
        like = next(iter(gradients.values()))
        squares = like.like.new_zeros(like.num_examples)
        parts = []
        for name, places in self.kept.items():
            if name not in gradients:
                parts.append(squares.new_zeros(len(squares), len(places)))
                continue
            found = [_whiten(self.inverse.layers[name], few, places) for few in _split(gradients[name])]
            parts.append(torch.cat([numbers for numbers, _ in found]))
            squares = squares + torch.cat([whole for _, whole in found])
        joined = torch.cat(parts, dim=1)
        return (joined if self.directions is None else joined @ self.directions), squares

    def narrow(self, sample: Tensor, count: int) -> KeptCoordinates:
        """Keep the leading principal directions of the coordinates.

        Args:
            sample: the coordinates of some examples, ``(n, C)``.
            count: how many directions to keep at most; there are no more than examples.

        Returns:
            The same with directions.
        """
        return replace(self, directions=_find_directions(sample, count))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> KeptCoordinates:
        """Return the same on another device or in another precision."""
        layers = {name: layer.to(device, dtype) for name, layer in self.inverse.layers.items()}
        kept = {name: places.to(device) for name, places in self.kept.items()}
        directions = None if self.directions is None else self.directions.to(device, dtype)
        return KeptCoordinates(BlockInverse(self.inverse.layout, layers), kept, directions)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives under flat keys."""
        state = self.inverse.state_dict() | {f"{name}/kept": places for name, places in self.kept.items()}
        return state if self.directions is None else state | {"directions": self.directions}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> KeptCoordinates:
        """Rebuild it from a state that holds :meth:`state_dict`."""
        inverse = BlockInverse.from_state_dict(state)
        kept = {name: state[f"{name}/kept"] for name in inverse.layout.shapes}
        return cls(inverse, kept, state.get("directions"))


def choose_coordinates(inverse: BlockInverse, count: int) -> KeptCoordinates:
    """Keep the coordinates with the largest share of signal, ``Lambda / (Lambda + lambda)``.

    Args:
        inverse: the closed form.
        count: how many, over all layers; there may be fewer.

    Returns:
        All of these coordinates, without directions.
    """
    shares = {name: (x.eigenvalues * x.weights).flatten() for name, x in inverse.layers.items()}
    joined = torch.cat(list(shares.values()))
    found = joined.topk(min(count, len(joined))).indices.sort().values
    kept, start = {}, 0
    for name, own in shares.items():
        kept[name] = found[(found >= start) & (found < start + len(own))] - start
        start += len(own)
    return KeptCoordinates(inverse, kept)


def _whiten(inverse: EigenInverse, gradients: LayerGradients, places: Tensor) -> tuple[Tensor, Tensor]:
    """Return some whitened coordinates of one layer's gradients, ``(B, k)``, and their squared norms."""
    rotated = gradients if inverse.basis is None else rotate(gradients, inverse.basis)
    roots = inverse.weights.sqrt().flatten()[places]
    if isinstance(rotated, FactoredGradients) and rotated.inputs.shape[2] == 1:
        _, d_out, d_in = rotated.shape
        groups, rows, columns = places // (d_out * d_in), places // d_in % d_out, places % d_in
        inputs, outputs = rotated.inputs[:, :, 0].transpose(0, 1), rotated.outputs[0, :, :, 0].transpose(0, 1)
        numbers = inputs[:, groups, columns] * outputs[:, groups, rows]
        return numbers * roots, rotated.weighted_squares(inverse.weights)[0]
    flat = rotated.dense()[0].flatten(1)
    return flat[:, places] * roots, flat.square() @ inverse.weights.flatten()


def _split(gradients: LayerGradients) -> Iterator[LayerGradients]:
    """Yield gradients so few at a time that their matrices take little memory."""
    groups, d_out, d_in = gradients.shape
    step = max(1, _FORMED_BYTES // (groups * d_out * d_in * gradients.like.element_size()))
    for start in range(0, gradients.num_examples, step):
        yield gradients.select(slice(start, start + step))


def _find_directions(sample: Tensor, count: int) -> Tensor:
    """Return leading right singular vectors of rows ``(n, C)`` in columns: ``count``, or ``n`` if less."""
    rows, columns = sample.shape
    if columns <= rows:
        vectors = find_eigenvectors((sample.mT @ sample)[None], rows)[0]
        return vectors[:, -count:].flip(1).to(sample)
    left = find_eigenvectors((sample @ sample.mT)[None], columns)[0][:, -count:].flip(1)
    # The products with vectors of small eigenvalues are short, and not orthogonal up to rounding.
    directions: Tensor = torch.linalg.qr(sample.mT.to(left) @ left).Q
    return directions.to(sample)
