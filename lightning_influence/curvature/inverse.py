"""Closed-form inverses: a spectrum in a Kronecker eigenbasis, plus damping."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_influence.curvature.factors import Eigenbasis, rotate
from lightning_influence.model.layers.gradients import LayerGradients, rotate_matrices
from lightning_influence.model.layers.plan import Layout


@dataclass(frozen=True)
class EigenInverse:
    """``scale (Q (diag(eigenvalues) + damping I) Q^T)^{-1}`` of one layer.

    Attributes:
        basis: ``Q = Q_out (x) Q_in``; None for the identity.
        moments: ``(G, D_out, D_in)``, what the eigenvalues are made of.
        damping: a number that is added to every eigenvalue.
        scale: factor of the inverse.
        unit: None where the moments are the eigenvalues, and what is divided by is held beside them. Else
            eigenvalues are so many times the moments, none negative, and nothing is held beside these.
    """

    basis: Eigenbasis | None
    moments: Tensor
    damping: float
    scale: float = 1.0
    unit: float | None = None

    @property
    def eigenvalues(self) -> Tensor:
        """``(G, D_out, D_in)``, not negative."""
        return self.moments if self.unit is None else self.moments.clamp_min(0) * self.unit

    @property
    def weights(self) -> Tensor:
        """``scale / (eigenvalues + damping)``, ``(G, D_out, D_in)``.

        It is zero where both vanish, up to rounding: a pseudo-inverse. A damping that rounding errors of
        gradients outweigh, in products of two of them, is none.
        """
        return self._held_weights if self.unit is None else self._make_weights()

    @functools.cached_property
    def _held_weights(self) -> Tensor:
        return self._make_weights()

    def _make_weights(self) -> Tensor:
        total = self.eigenvalues + self.damping
        return torch.where(total > self._rounding, self.scale / total, 0.0)

    @functools.cached_property
    def _rounding(self) -> float:
        """The sum of an eigenvalue and the damping that counts as zero."""
        width = sum(self.moments.shape[1:])  # what rounding grows with
        eps, largest = torch.finfo(self.moments.dtype).eps, float(self.eigenvalues.amax()) + self.damping
        return 0.0 if self.damping > eps**2 * width * largest else eps * width * largest

    @property
    def back(self) -> Eigenbasis:
        """The way out of the basis; the identity where there is none."""
        return Eigenbasis() if self.basis is None else self.basis.transposed

    def apply(self, vectors: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the inverse times vectors ``(V, G, D_out, D_in)``.

        Args:
            vectors: the vectors.
            rows: the only rows in which the vectors are not zero, if they are given there alone; the basis
                leaves rows as they are.
        """
        return self._scale(vectors, self.weights if rows is None else self.weights[:, rows])

    def solve(self, gradients: LayerGradients) -> Tensor:
        """Return the inverse times gradients of ``B`` examples and one seed, ``(B, G, D_out, D_in)``.

        Into the basis these are turned in whatever form they have, out of it as matrices.
        """
        rotated = gradients if self.basis is None else rotate(gradients, self.basis)
        return self._leave(rotated.dense()[0] * self.weights)

    def multiply(self, vectors: Tensor) -> Tensor:
        """Return ``Q diag(eigenvalues) Q^T``, without the damping, times vectors ``(V, G, D_out, D_in)``."""
        return self._scale(vectors, self.eigenvalues)

    def quadratic(self, gradients: LayerGradients) -> Tensor:
        """Return ``g^T (.)^{-1} g`` of each gradient, ``(K, B)``, without forming the inverse's action."""
        rotated = gradients if self.basis is None else rotate(gradients, self.basis)
        return rotated.weighted_squares(self.weights)

    def _scale(self, vectors: Tensor, factors: Tensor) -> Tensor:
        """Return vectors multiplied by factors ``(G, D_out, D_in)`` in the basis."""
        if self.basis is None:
            return vectors * factors
        return self._leave(rotate_matrices(vectors, self.basis.inputs, self.basis.outputs) * factors)

    def _leave(self, vectors: Tensor) -> Tensor:
        """Return vectors ``(V, G, D_out, D_in)`` out of the basis."""
        return rotate_matrices(vectors, self.back.inputs, self.back.outputs)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> EigenInverse:
        """Return the inverse on another device or in another precision."""
        basis = None if self.basis is None else self.basis.to(device, dtype)
        return replace(self, basis=basis, moments=self.moments.to(device, dtype))


@dataclass(frozen=True)
class BlockInverse:
    """One closed-form inverse a layer, as an operator on flat vectors.

    Attributes:
        layout: the order of the layers in a flat vector.
        layers: the inverse of each layer.
    """

    layout: Layout
    layers: Mapping[str, EigenInverse]

    @property
    def damping(self) -> dict[str, float]:
        """The damping of each layer."""
        return {name: inverse.damping for name, inverse in self.layers.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives under flat keys; a scale is not kept."""
        state: dict[str, Any] = {
            "shapes": {name: list(shape) for name, shape in self.layout.shapes.items()},
            "damping": self.damping,
        }
        for name, inverse in self.layers.items():
            state[f"{name}/eigenvalues"] = inverse.eigenvalues
            if inverse.basis is not None:
                state |= inverse.basis.tensors(f"{name}/")
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> BlockInverse:
        """Rebuild an inverse from a state that holds :meth:`state_dict`."""
        layout = Layout({name: (int(g), int(o), int(i)) for name, (g, o, i) in state["shapes"].items()})
        layers = {}
        for name in layout.shapes:
            basis = Eigenbasis.from_tensors(state, f"{name}/")
            layers[name] = EigenInverse(basis, state[f"{name}/eigenvalues"], state["damping"][name])
        return cls(layout, layers)

    def scaled(self, factor: float) -> BlockInverse:
        """Return the inverse times a number; the damping it reports stays."""
        layers = {name: replace(layer, scale=layer.scale * factor) for name, layer in self.layers.items()}
        return BlockInverse(self.layout, layers)

    def apply(self, vectors: Tensor) -> Tensor:
        """Return the inverse times flat vectors ``(V, P)``."""
        blocks = self.layout.split(vectors)
        return self.layout.join({name: self.layers[name].apply(block) for name, block in blocks.items()})

    def multiply(self, vectors: Tensor) -> Tensor:
        """Return the ``Q diag(eigenvalues) Q^T``, without damping, times flat vectors ``(V, P)``."""
        blocks = self.layout.split(vectors)
        return self.layout.join({name: self.layers[name].multiply(block) for name, block in blocks.items()})

    def quadratic(self, gradients: Mapping[str, LayerGradients]) -> Tensor:
        """Return ``g^T (.)^{-1} g`` summed over the layers, ``(K, B)``."""
        parts = [
            inverse.quadratic(gradients[name]) for name, inverse in self.layers.items() if name in gradients
        ]
        return torch.stack(parts).sum(dim=0)
