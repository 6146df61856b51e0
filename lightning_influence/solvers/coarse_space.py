"""The coarse space of two-level EK-FAC: how it is built, enlarged and stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_influence.factors.inverse import BlockInverse, EigenInverse
from lightning_influence.factors.statistics import Eigenbasis
from lightning_influence.factors.versions import check_version
from lightning_influence.layers.dense import DenseGradients
from lightning_influence.layers.factored import FactoredGradients, concatenate
from lightning_influence.layers.gradients import LayerGradients
from lightning_influence.layers.layout import Layout

_VERSION = 1
_PROBE_SEED = 20_240_601


@dataclass(frozen=True)
class CoarseSpace:
    """A coarse space and its products with the Gauss-Newton matrix, for any damping.

    Attributes:
        layout: the order of flat vectors.
        directions: ``Q``, ``(m, P)``, orthonormal rows.
        product: ``G Q``, ``(m, P)``.
        probe_product: ``G`` times the random probes of :func:`probes`, ``(s, P)``; it prices residuals.
        mixing: ``(m, M)``: ``Q = mixing @ P_0^{-1} anchors``.
        anchors: gradients of the ``M`` anchors by layer.
        inverse: ``P_0``.
        examples: number of curvature examples in the products.
        mixtures: random mixtures of an example's curvature columns that stand for all in the products; 0 if
            they are made of all columns, or of training labels.
    """

    layout: Layout
    directions: Tensor
    product: Tensor
    probe_product: Tensor
    mixing: Tensor
    anchors: Mapping[str, LayerGradients]
    inverse: BlockInverse
    examples: int
    mixtures: int = 0

    @property
    def size(self) -> int:
        """``m``."""
        return self.directions.shape[0]

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        anchors = sum(layer.nbytes for layer in self.anchors.values())
        return self.directions.nbytes + self.product.nbytes + self.probe_product.nbytes + anchors

    def to(self, device: torch.device | str) -> CoarseSpace:
        """Return the space on another device; tensors that are there already are shared."""
        state = self.state_dict()
        return CoarseSpace.from_state_dict({
            k: v.to(device) if isinstance(v, Tensor) else v for k, v in state.items()
        })

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives under flat keys; loads with ``weights_only=True``."""
        state: dict[str, Any] = {
            "version": _VERSION,
            "shapes": {name: list(shape) for name, shape in self.layout.shapes.items()},
            "examples": self.examples,
            "mixtures": self.mixtures,
            "damping": self.inverse.damping,
            "directions": self.directions,
            "product": self.product,
            "probe_product": self.probe_product,
            "mixing": self.mixing,
        }
        for name, gradients in self.anchors.items():
            state.update({f"{name}/anchors/{key}": t for key, t in _parts(gradients).items()})
        for name, inverse in self.inverse.layers.items():
            state[f"{name}/eigenvalues"] = inverse.eigenvalues
            if inverse.basis is not None:
                state[f"{name}/q_in"], state[f"{name}/q_out"] = inverse.basis.q_in, inverse.basis.q_out
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> CoarseSpace:
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
        shapes = {name: (int(g), int(o), int(i)) for name, (g, o, i) in state["shapes"].items()}
        layout = Layout(shapes)
        inverses, anchors = {}, {}
        for name in shapes:
            basis = None
            if f"{name}/q_in" in state:
                basis = Eigenbasis(state[f"{name}/q_in"], state[f"{name}/q_out"])
            inverses[name] = EigenInverse(basis, state[f"{name}/eigenvalues"], state["damping"][name])
            gradients = _gradients(state, f"{name}/anchors")
            if gradients is not None:
                anchors[name] = gradients
        return cls(
            layout,
            state["directions"],
            state["product"],
            state["probe_product"],
            state["mixing"],
            anchors,
            BlockInverse(layout, inverses),
            state["examples"],
            state.get("mixtures", 0),
        )


def _parts(gradients: LayerGradients) -> dict[str, Tensor]:
    if isinstance(gradients, FactoredGradients):
        return {"inputs": gradients.inputs, "outputs": gradients.outputs}
    return {"matrices": gradients.dense()}


def _gradients(state: Mapping[str, Any], prefix: str) -> LayerGradients | None:
    if f"{prefix}/matrices" in state:
        return DenseGradients(state[f"{prefix}/matrices"])
    if f"{prefix}/inputs" in state:
        return FactoredGradients(state[f"{prefix}/inputs"], state[f"{prefix}/outputs"])
    return None


def directions(
    layout: Layout, inverse: BlockInverse, anchors: Mapping[str, LayerGradients]
) -> tuple[Tensor, Tensor]:
    """Orthonormal basis of the preconditioned anchors.

    Args:
        layout: the order of flat vectors.
        inverse: the preconditioner ``P``.
        anchors: gradients of ``M`` examples, ``K = 1``.

    Returns:
        ``Q (m, P)`` and ``mixing (m, M)`` with ``Q = mixing @ P^{-1} anchors``; ``m < M`` if the anchors are
        dependent.
    """
    vectors = inverse.apply(layout.dense(anchors)[0])
    scale = vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
    vectors = vectors / scale
    # Twice: the conditioning of the Gram matrix costs the first step orthogonality; the second restores it.
    first = _whitening(vectors)
    second = _whitening(first @ vectors)
    mixing = second @ first
    return mixing @ vectors, mixing / scale.T


def extended(
    space: CoarseSpace, anchors: Mapping[str, LayerGradients], product: Callable[[Tensor], Tensor]
) -> CoarseSpace:
    """A larger coarse space, with products computed for what is new only.

    Args:
        space: the space so far.
        anchors: gradients of further anchors.
        product: maps vectors ``(V, P)`` to ``G V``, over the same curvature examples as in ``space``.

    Returns:
        The space that all anchors span.
    """
    vectors = space.inverse.apply(space.layout.dense(anchors)[0])
    scale = vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
    vectors = vectors / scale
    # Rows of ``inside`` say what was taken out along the old directions, so that the mixing stays exact.
    inside = vectors @ space.directions.T
    vectors = vectors - inside @ space.directions
    again = vectors @ space.directions.T
    vectors, inside = vectors - again @ space.directions, inside + again
    first = _whitening(vectors)
    second = _whitening(first @ vectors)
    whitening = second @ first
    fresh = whitening @ vectors
    old = -(whitening @ inside) @ space.mixing
    top = torch.cat([space.mixing, space.mixing.new_zeros(len(space.mixing), len(vectors))], dim=1)
    bottom = torch.cat([old, whitening / scale.T], dim=1)
    joined = {name: concatenate([layer, anchors[name]]) for name, layer in space.anchors.items()}
    return replace(
        space,
        directions=torch.cat([space.directions, fresh]),
        product=torch.cat([space.product, product(fresh)]),
        mixing=torch.cat([top, bottom]),
        anchors=joined,
    )


def _whitening(vectors: Tensor) -> Tensor:
    """Return ``W`` with orthonormal ``W V``, leaving out directions that are numerically dependent."""
    gram = (vectors @ vectors.T).double()
    values, basis = torch.linalg.eigh(gram)
    floor = values.amax() * gram.shape[0] * 4 * torch.finfo(vectors.dtype).eps if len(values) else 0.0
    keep = values > floor
    whitened: Tensor = (basis[:, keep] / values[keep].sqrt()).T.to(vectors.dtype)
    return whitened


def probes(count: int, numel: int, like: Tensor) -> Tensor:
    """Return random signs ``(count, numel)``, the same at every call: ``E[(w^T r)^2] = ||r||^2``."""
    # Drawn on the CPU: a coarse space that was built on one kind of device may be used on another.
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    bits = torch.randint(0, 2, (count, numel), generator=generator, dtype=torch.int8)
    return bits.to(like.device, like.dtype).mul_(2).sub_(1)
