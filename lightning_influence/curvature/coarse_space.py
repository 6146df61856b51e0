"""The coarse space of two-level EK-FAC: how it is built, enlarged and stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_influence.curvature.inverse import BlockInverse
from lightning_influence.linalg.orthonormal import orthonormalise
from lightning_influence.model.layers.gradients import (
    DenseGradients,
    FactoredGradients,
    LayerGradients,
    concatenate,
)
from lightning_influence.model.layers.plan import Layout
from lightning_influence.model.layers.table_gradients import TableGradients
from lightning_influence.support.storage import check_version

_VERSION = 1
_PROBE_SEED = 20_240_601


@dataclass(frozen=True)
class CoarseSpace:
    """A coarse space and its products with the Gauss-Newton matrix, for any damping.

    Attributes:
        layout: the order of flat vectors.
        directions: ``Q``, ``(m, P)``, orthonormal rows.
        product: ``G Q``, ``(m, P)``.
        probe_product: ``G`` times the random probes of :func:`draw_probes`, ``(s, P)``; it prices residuals.
        mixing: ``(m, M)``: ``Q = mixing @ P_0^{-1} anchors``.
        anchors: gradients of the ``M`` anchors by layer, for scores in factored form; of a layer whose
            gradients are no single product, :func:`join_scored` leaves none.
        inverse: ``P_0``.
        examples: number of curvature examples in the products.
        mixtures: random mixtures of an example's curvature columns that stand for all in the products; 0 if
            they are made of all columns, or of training labels.
        limit: most anchors that there was room for when the space was last grown; 0 if nobody tells.
        tolerance: relative residual that held-out gradients were to reach then.
        solves: whether most of them did, so that it was grown no further.
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
    limit: int = 0
    tolerance: float = math.inf
    solves: bool = False

    def __repr__(self) -> str:
        """Return its size; the tensors would fill the screen."""
        size, numel = self.directions.shape
        return f"{type(self).__name__}({size} directions of {numel:,}, {self.examples:,} curvature examples)"

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
            **self.inverse.state_dict(),
            "examples": self.examples,
            "mixtures": self.mixtures,
            "limit": self.limit,
            "tolerance": self.tolerance,
            "solves": self.solves,
            "directions": self.directions,
            "product": self.product,
            "probe_product": self.probe_product,
            "mixing": self.mixing,
        }
        for name, gradients in self.anchors.items():
            state.update({f"{name}/anchors/{key}": t for key, t in _parts(gradients).items()})
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
        inverse, anchors = BlockInverse.from_state_dict(state), {}
        for name in inverse.layout.shapes:
            gradients = _gradients(state, f"{name}/anchors")
            if gradients is not None:
                anchors[name] = gradients
        return cls(
            inverse.layout,
            state["directions"],
            state["product"],
            state["probe_product"],
            state["mixing"],
            anchors,
            inverse,
            state["examples"],
            **{key: state[key] for key in ("mixtures", "limit", "tolerance", "solves") if key in state},
        )


def _parts(gradients: LayerGradients) -> dict[str, Tensor]:
    if isinstance(gradients, TableGradients):
        products = {f"products/{key}": tensor for key, tensor in _parts(gradients.products).items()}
        return {"rows": gradients.rows, "values": gradients.values, **products}
    if isinstance(gradients, FactoredGradients):
        return {"inputs": gradients.inputs, "outputs": gradients.outputs}
    return {"matrices": gradients.dense()}


def _gradients(state: Mapping[str, Any], prefix: str) -> LayerGradients | None:
    if f"{prefix}/matrices" in state:
        return DenseGradients(state[f"{prefix}/matrices"])
    if f"{prefix}/rows" in state:
        products = _gradients(state, f"{prefix}/products")
        assert isinstance(products, FactoredGradients)
        return TableGradients(state[f"{prefix}/rows"], state[f"{prefix}/values"], products)
    if f"{prefix}/inputs" in state:
        return FactoredGradients(state[f"{prefix}/inputs"], state[f"{prefix}/outputs"])
    return None


def build_directions(
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
    basis, mixing, _ = orthonormalise(precondition(layout, inverse, anchors))
    return basis, mixing


def precondition(layout: Layout, inverse: BlockInverse, gradients: Mapping[str, LayerGradients]) -> Tensor:
    """Return ``P^{-1}`` times gradients with ``K = 1``, ``(B, P)``, made layer by layer."""
    first = next(iter(gradients.values()))
    result, start = first.like.new_zeros(first.num_examples, layout.numel), 0
    for name, numel in layout.numels.items():
        if name in gradients:
            solved = inverse.layers[name].apply(gradients[name].dense()[0])
            result[:, start : start + numel] = solved.flatten(1)
        start += numel
    return result


def join_scored(parts: Sequence[Mapping[str, LayerGradients]]) -> dict[str, LayerGradients]:
    """Join gradients of several groups of examples, but keep only those that are scored in factored form.

    Args:
        parts: by layer; a layer without an entry is zero.

    Returns:
        By layer that has an entry anywhere: factored gradients, or dense ones of no example.
    """
    result: dict[str, LayerGradients] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        layers = [part[name] for part in parts if name in part]
        single = all(isinstance(layer, FactoredGradients) and layer.inputs.shape[2] == 1 for layer in layers)
        if len(layers) == len(parts) and single:
            result[name] = concatenate(layers)
        else:  # a copy, not a view that holds what is let go
            like = layers[0].like
            result[name] = DenseGradients(like.new_zeros(layers[0].num_seeds, 0, *layers[0].shape))
    return result


def extend_space(
    space: CoarseSpace,
    vectors: Tensor,
    anchors: Mapping[str, LayerGradients],
    product: Callable[[Tensor], Tensor],
) -> CoarseSpace:
    """A larger coarse space, with products computed for what is new only.

    Args:
        space: the space so far.
        vectors: ``P_0^{-1}`` times further anchors, ``(k, P)``; overwritten.
        anchors: their gradients as in the space.
        product: maps vectors ``(V, P)`` to ``G V``, over the same curvature examples as in ``space``.

    Returns:
        The space that all anchors span.
    """
    count = len(vectors)
    # The shares say what was taken out along the old directions, so that the mixing stays exact.
    fresh, mixing, shares = orthonormalise(vectors, [space.directions])
    old = -shares @ space.mixing
    top = torch.cat([space.mixing, space.mixing.new_zeros(len(space.mixing), count)], dim=1)
    bottom = torch.cat([old, mixing], dim=1)
    return replace(
        space,
        directions=torch.cat([space.directions, fresh]),
        product=torch.cat([space.product, product(fresh)]),
        mixing=torch.cat([top, bottom]),
        anchors=join_scored([space.anchors, anchors]),
    )


def draw_probes(count: int, numel: int, like: Tensor) -> Tensor:
    """Return random signs ``(count, numel)``, the same at every call: ``E[(w^T r)^2] = ||r||^2``."""
    return draw_signs(count, numel).to(like.device, like.dtype)


def draw_signs(count: int, numel: int) -> Tensor:
    """Return the signs of :func:`draw_probes` in a byte each.

    They are drawn on the CPU: a coarse space that was built on one kind of device may be used on another.
    """
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    return torch.randint(0, 2, (count, numel), generator=generator, dtype=torch.int8).mul_(2).sub_(1)
