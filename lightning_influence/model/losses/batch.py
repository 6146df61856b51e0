"""A loss of which only the batch's value is known: gradients and curvature by differentiating it.

Let ``L`` be the batch's loss as a function of the outputs ``f_1 .. f_B`` that the last modules made for the
examples. Where it is the mean of losses of single examples, ``B dL/df_n`` is the gradient of the loss of
example ``n`` and ``B d^2 L / df_n^2`` its Hessian; for a sum the factor is 1. What ``L`` holds beside,
penalties on weights, does not depend on the outputs.

The Hessian is taken apart by structure: it may be diagonal, fall into blocks of one position each, or be
whole for an example. Which it is, products with random vectors tell. Its positive part, from an
eigendecomposition of each block, is the curvature: all of it for losses that are convex in the outputs. A
loss that is linear in them piece by piece (pinball losses, absolute errors) has none; the square of its
gradient stands for it then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_influence.model.losses.draws import draw_signs
from lightning_influence.model.losses.loss import OutputLoss, working
from lightning_influence.model.losses.output_rows import OutputRows, keep_apart
from lightning_influence.support.errors import UnsupportedModelError
from lightning_influence.support.notes import Notices

Structure = Literal["elements", "positions", "channels", "example"]
_STRUCTURES: tuple[Structure, ...] = ("elements", "positions", "channels", "example")
# Chosen by hand: an eigendecomposition of a thousand blocks of this width takes about ten seconds on a CPU.
_WIDEST = 512
# Chosen by hand: blocks of a batch beyond this are not held.
_BLOCK_BYTES = 2**30
# A share of negative curvature that rounding does not explain.
_NEGATIVE = 1e-3

_LINEAR = (
    "The training loss is linear in {subject}, piece by piece, so its second derivative is zero. "
    "The squared gradients of the examples stand for its curvature."
)
_ONCE = (
    "The training loss has no second derivatives in torch. The squared gradients of the examples stand for "
    "its curvature."
)
_BESIDE = (
    "The losses of the examples use the weights of layer {name!r} beside the outputs of modules, so their "
    "curvature in these outputs is not all of it. Accepted are losses of what modules return: let a module "
    "use the weights, leave the layer out with `layers=`, or take method='identity' or 'hessian'."
)
_CONCAVE = (
    "The training loss is not convex in {subject}: {share:.1%} of its second derivatives' size is "
    "negative, and is left out of the curvature. Scores keep the loss's own gradients."
)
_LARGE = (
    "The training loss couples {count:,} {entries}, too many for their second derivatives. The "
    "squared gradients of the examples stand for its curvature. Use a loss function that is known by name, "
    "or register yours."
)


@dataclass
class BatchLossTraits:
    """What one batch showed of a loss and holds for all.

    Attributes:
        is_mean: whether the batch's loss is the mean of the examples' losses, not their sum.
        structure: of the Hessian; None before it was looked at.
        has_curvature: whether there is a second derivative; None before it was looked at.
        beside: a layer whose weights the loss also uses beside the outputs that it is a function of, or None.
        subject: what the loss is a function of, for messages.
        entries: what that is made of.
        warn: says each thing once.
    """

    is_mean: bool = True
    structure: Structure | None = None
    has_curvature: bool | None = None
    beside: str | None = None
    subject: str = "the model's outputs"
    entries: str = "outputs of an example"
    warn: Notices = field(default_factory=Notices)


@dataclass(frozen=True, eq=False)
class BatchLoss(OutputLoss):
    """A batch's loss as a function of the last outputs, ``outputs (B, d)``, flattened by example.

    Attributes:
        leaves: what the batch's loss was computed from, in the shapes that the modules gave.
        batch_loss: the loss, with its graph down to the leaves; times ``factor`` it is the examples' sum.
        factor: ``B`` for a mean, 1 for a sum.
        values_of: computes the loss of each example alone, ``(B,)``.
        traits: what is known of the loss from other batches; completed here.
        values: the loss of each example, with its graph down to the parameters, where the user gives them.
        output_rows: the examples' rows in the outputs, of each of which several calls may have made a part.
    """

    leaves: tuple[Tensor, ...]
    batch_loss: Tensor
    factor: float
    values_of: Callable[[], Tensor]
    traits: BatchLossTraits
    values: Tensor | None = None
    output_rows: tuple[OutputRows, ...] = ()

    @classmethod
    def of(
        cls,
        outputs: Sequence[Tensor],
        leaves: Sequence[Tensor],
        batch_loss: Tensor,
        num_examples: int,
        *,
        traits: BatchLossTraits,
        values_of: Callable[[], Tensor],
        values: Tensor | None = None,
        rows: Sequence[OutputRows] | None = None,
    ) -> Self:
        """Describe a batch's loss.

        Args:
            outputs: what the last modules made, attached to the graph of the network.
            leaves: of the same values, which the batch's loss was computed from.
            batch_loss: a scalar.
            num_examples: ``B``, of which each output has a multiple for its rows.
            traits: what is known of the loss.
            values_of: computes the loss of each example alone, ``(B,)``.
            values: the loss of each example, if it has a graph.
            rows: the examples' rows in the outputs; None for those of one call each, the examples in order.

        Returns:
            The loss.

        Raises:
            UnsupportedModelError: if the rows of an output are no multiple of the examples.
        """
        rows = keep_apart([None] * len(outputs)) if rows is None else tuple(rows)
        for own in rows:
            if own.place is not None:
                continue
            output = own.join(outputs)
            if output.dim() == 0 or len(output) % num_examples:
                raise UnsupportedModelError(
                    f"The loss depends on an output of shape {tuple(output.shape)} in a batch of "
                    f"{num_examples} examples. Accepted are outputs whose first dimension is the examples "
                    "(or examples times positions). Pass `loss=` or define `influence_loss(batch) -> (B,)`."
                )
        with torch.enable_grad():
            flat = torch.cat([own.split(outputs, num_examples).flatten(1) for own in rows], 1)
        reduction: Literal["example_mean", "sum"] = "example_mean" if traits.is_mean else "sum"
        factor = float(num_examples) if traits.is_mean else 1.0
        return cls(
            flat,
            flat.detach(),
            num_examples,
            reduction,
            tuple(leaves),
            batch_loss,
            factor,
            values_of,
            traits,
            values,
            rows,
        )

    @property
    def is_function_of_outputs(self) -> bool:
        """Whether the loss can be computed at other outputs: it cannot."""
        return False

    def total(self) -> Tensor:
        """Return the sum of the examples' losses, a scalar with first derivatives in the outputs."""
        if self.values is not None:
            return self.values.sum()
        shift = working(self.outputs) - self.detached
        return working(self.batch_loss.detach()) * self.factor + (self.gradient() * shift).sum()

    def per_example(self) -> Tensor:
        """Return the loss of each example, ``(B,)``, with first and second derivatives in the outputs.

        The values are those of the examples alone, a forward pass for each; :meth:`total` takes none.
        """
        if self.values is not None:
            return self.values
        shift = working(self.outputs) - self.detached
        values = self._values.to(shift.dtype) + (self.gradient() * shift).sum(1)
        if self._blocks is None:
            return values
        rows = self._split(shift)
        return values + torch.einsum("btc,btcd,btd->b", rows, self._blocks, rows) / 2

    @torch.no_grad()
    def batch_value(self) -> Tensor:
        """Return the loss of the batch, a detached scalar."""
        return self.batch_loss.detach()

    def seed(self) -> tuple[Tensor, Tensor]:
        """Return what a backward pass starts from: the values of the user where there are some."""
        if self.values is None:
            return super().seed()
        return self.values, torch.ones_like(self.values)

    def gradient(self) -> Tensor:
        """Return the seed of the training loss, ``(B, d)``."""
        return self._slopes.detach().to(self.detached.dtype) * self.factor

    @property
    def num_columns(self) -> int:
        """``K``: one column for each eigenvector of each block of an example."""
        return self._roots.shape[1] * self._roots.shape[3]

    def columns(self) -> Iterator[Tensor]:
        """The eigenvectors of the Hessian's blocks, times the roots of their eigenvalues, block by block."""
        for t in range(self._roots.shape[1]):
            for k in range(self._roots.shape[3]):
                seed = torch.zeros_like(self._roots[..., 0])
                seed[:, t] = self._roots[:, t, :, k]
                yield self._join(seed)

    def column_energies(self) -> Tensor:
        """Return the eigenvalues, ``(B, K)``."""
        return self._roots.square().sum(2).flatten(1)

    def mix_columns(self, weights: Tensor) -> Tensor:
        """Return the sum of the columns with weights ``(B, K)``."""
        parts = weights.view(self.num_examples, self._roots.shape[1], -1).to(self._roots.dtype)
        return self._join(torch.einsum("btck,btk->btc", self._roots, parts))

    def curvature_products(self, tangents: Tensor) -> Tensor:
        """Return products of the Hessian's positive part with tangents ``(V, B, d)``."""
        rows = torch.stack([self._split(tangent) for tangent in working(tangents)])
        pulled = torch.einsum("btck,vbtc->vbtk", self._roots, rows)
        return torch.stack([
            self._join(part) for part in torch.einsum("btck,vbtk->vbtc", self._roots, pulled)
        ])

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Return one random seed: the sum of the columns with random signs."""
        signs = draw_signs(self.ones()[:, None].expand(-1, self.num_columns), generator)
        return self.mix_columns(signs)

    @property
    def note(self) -> str | None:
        """What stands for the curvature of a loss that has none."""
        return self._describe(_LINEAR) if self.traits.has_curvature is False else None

    def _describe(self, text: str, share: float = 0.0) -> str:
        traits = self.traits
        count = self.outputs.shape[1]
        return text.format(subject=traits.subject, entries=traits.entries, count=count, share=share)

    @cached_property
    def _values(self) -> Tensor:
        values = self.values_of().detach()
        # An example that the loss leaves out has none: alone it is divided by the number of nothing.
        left_out = values.isnan() & ~self.gradient().any(dim=1)
        return values.masked_fill(left_out, 0.0)

    @cached_property
    def _slopes(self) -> Tensor:
        """``dL/df (B, d)``, with its graph."""
        with torch.enable_grad():
            slopes = torch.autograd.grad(
                self.batch_loss, self.leaves, create_graph=True, allow_unused=True, materialize_grads=True
            )
            return self._flatten(slopes)

    def products(self, vectors: Tensor) -> Tensor:
        """Return products of the Hessian of the examples' sum with a vector ``(B, d)``, coupled or not."""
        if not self._slopes.requires_grad or self.traits.has_curvature is False:
            return torch.zeros_like(self.detached)
        try:
            with torch.enable_grad():
                bent = torch.autograd.grad(
                    self._slopes,
                    self.leaves,
                    vectors.to(self._slopes.dtype),
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
        except RuntimeError as error:
            if "is not implemented" not in str(error):
                raise
            self.traits.has_curvature = False
            self.traits.warn(_ONCE)
            return torch.zeros_like(self.detached)
        return self._flatten(bent).detach().to(self.detached.dtype) * self.factor

    @cached_property
    def _blocks(self) -> Tensor | None:
        """Blocks ``(B, T, C, C)`` of the Hessian; None if there is no curvature or too much of it to hold."""
        if self.traits.has_curvature is False:
            return None
        first = self.traits.structure
        for structure in [first, *(s for s in _STRUCTURES if s != first)] if first else _STRUCTURES:
            order = self._order(structure)
            if order is None:
                continue
            blocks = self._blocks_by(order)
            if blocks is not None:
                if not bool(self.gradient().any()):  # ignored examples only, which show nothing
                    return blocks
                self.traits.structure = structure
                if self.traits.has_curvature is None:
                    self.traits.has_curvature = bool(blocks.any())
                    if not self.traits.has_curvature:
                        self.traits.warn(self._describe(_LINEAR))
                        return None
                return blocks
        self.traits.warn(self._describe(_LARGE))
        self.traits.has_curvature = False
        return None

    def _blocks_by(self, order: Tensor) -> Tensor | None:
        """Return the blocks if outputs in one row of ``order (T, C)`` curve with each other only."""
        count, width = self.num_examples, order.shape[1]
        columns = []
        for c in range(width):
            unit = torch.zeros(count, *order.shape, dtype=self.detached.dtype, device=self.detached.device)
            unit[..., c] = 1
            columns.append(self.products(_put(unit, order))[:, order.reshape(-1)].view(unit.shape))
        blocks = torch.stack(columns, 3)
        blocks = (blocks + blocks.mT) / 2
        generator = torch.Generator(device="cpu").manual_seed(0)
        probe = torch.randn(self.outputs.shape, generator=generator).to(self.detached)
        expected = torch.einsum("btcd,btd->btc", blocks, probe[:, order.reshape(-1)].view(unit.shape))
        found = self.products(probe)
        limit = 1e-8 if found.dtype == torch.float64 else 1e-3
        return blocks if (found - _put(expected, order)).norm() <= limit * found.norm() else None

    def _order(self, structure: Structure | None) -> Tensor | None:
        """Return the outputs of an example as ``(T, C)``, by their places; None where that cannot be."""
        count, start, parts = self.num_examples, 0, []
        detached = [leaf.detach() for leaf in self.leaves]
        for own in self.output_rows:
            leaf, shape = own.join(detached), own.split(detached, count).shape[1:]
            numel = math.prod(shape)
            places = torch.arange(start, start + numel, device=leaf.device)
            start += numel
            places = places.view(shape)
            if structure == "elements":
                parts.append(places.reshape(-1, 1))
            elif structure == "positions":
                parts.append(places.reshape(-1, leaf.shape[-1] if leaf.dim() > 1 else 1))
            elif structure == "channels" and leaf.dim() > 2:
                parts.append(places.movedim(1, -1).reshape(-1, leaf.shape[1]))
            elif structure == "example":
                parts.append(places.reshape(1, -1))
            else:
                return None
        if structure == "elements":
            return torch.cat(parts)
        if len({len(part) for part in parts}) > 1:
            return None
        order = torch.cat(parts, 1)
        positions, width = order.shape
        size = count * positions * width**2 * self.detached.element_size()
        return order if width <= _WIDEST and size <= _BLOCK_BYTES else None

    @cached_property
    def _roots(self) -> Tensor:
        """Root of the positive part of each block, ``(B, T, C, K')``; the gradient where there is none."""
        if self.traits.beside is not None:
            raise UnsupportedModelError(_BESIDE.format(name=self.traits.beside))
        if self._blocks is None:
            return self.gradient()[:, None, :, None]
        values, vectors = torch.linalg.eigh(self._blocks)
        size = values.abs().sum()
        share = float(values.clamp_max(0).abs().sum() / size) if bool(size > 0) else 0.0
        if share > _NEGATIVE:
            self.traits.warn(self._describe(_CONCAVE, share), "concave")
        roots: Tensor = vectors * values.clamp_min(0).sqrt()[..., None, :]
        return roots

    @cached_property
    def _places(self) -> Tensor:
        """Places ``(T, C)`` of the outputs in the blocks."""
        order = None if self._blocks is None else self._order(self.traits.structure)
        return (
            torch.arange(self.outputs.shape[1], device=self.outputs.device)[None] if order is None else order
        )

    def _split(self, flat: Tensor) -> Tensor:
        """Return ``(B, d)`` as ``(B, T, C)``."""
        return flat[:, self._places.reshape(-1)].view(len(flat), *self._places.shape)

    def _join(self, rows: Tensor) -> Tensor:
        """Return ``(B, T, C)`` as ``(B, d)``."""
        return _put(rows, self._places)

    def _flatten(self, parts: Sequence[Tensor]) -> Tensor:
        count = self.num_examples
        return torch.cat([own.split(parts, count).reshape(count, -1) for own in self.output_rows], 1)


def _put(rows: Tensor, order: Tensor) -> Tensor:
    """Return ``(B, T, C)`` as ``(B, d)``, each entry at its place ``(T, C)``."""
    flat = rows.new_empty(len(rows), order.numel())
    flat[:, order.reshape(-1)] = rows.flatten(1)
    return flat
