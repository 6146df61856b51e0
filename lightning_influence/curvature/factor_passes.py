"""Passes that fit Kronecker factors: covariances, then squares in their eigenbasis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor

from lightning_influence.curvature.eigenbases import compute_eigenbases
from lightning_influence.curvature.factors import Eigenbasis, Factors, LayerStatistics
from lightning_influence.model.captured import RANDOM, Captured, Fisher
from lightning_influence.model.content import SeenData
from lightning_influence.model.finite import check_finite
from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.gradients import LayerGradients, compact
from lightning_influence.model.layers.layer import Layer
from lightning_influence.model.layers.plan import LayerPlan
from lightning_influence.model.losses.draws import COVARIANCES, SQUARES, ExampleGenerator
from lightning_influence.support.waiting import add_later

#: Sends gradients of a batch away, and returns those of other layers or batches, one mapping a batch.
HandOver = Callable[[Mapping[str, LayerGradients]], Sequence[Mapping[str, LayerGradients]]]


class CovariancePass:
    """Sums ``A`` and ``S`` over a loader; keeps gradients if they fit, so that Lambda needs no pass.

    Where gradients are drawn at random those for Lambda come from a second, independent draw: squares
    measured on the draw that the basis was fitted to are too large along its leading vectors and too small
    elsewhere. The second draw takes one more backward pass, and no forward pass.

    Args:
        plan: the covered layers.
        fisher: which output gradients to use.
        seed: seed of the draws.
        draws: mixtures or sampled labels per example.
        cache_bytes: keep gradients in memory up to this size.
        num_examples: examples that will come, to tell from the first batch whether they will fit.
        hand_over: sends gradients to the processes that own their layers, and returns what this one gets;
            none are kept in memory then. None where every process sums all layers.
    """

    description = "Influence: covariances"

    def __init__(
        self,
        plan: LayerPlan,
        *,
        fisher: Fisher = "mixed",
        seed: int = 0,
        draws: int = 1,
        cache_bytes: int = 2**28,
        num_examples: int | None = None,
        hand_over: HandOver | None = None,
    ) -> None:
        self.factors = Factors(fisher=fisher)
        self.cache: list[dict[str, LayerGradients]] | None = [] if hand_over is None else None
        self._plan, self._hand_over = plan, hand_over
        self.forward = Forward(plan)
        self.losses = SeenData()
        self._draws = Draws(fisher, seed, draws)
        self._free = cache_bytes
        self._expected = num_examples

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one batch."""
        self.losses.read(batch, indices)
        captured = self.forward(module, batch, len(indices))
        self.losses.add(captured)
        gradients, others = self._draws.pair(captured, indices, second=self.cache is not None)
        check_finite(gradients)
        self._add(gradients)
        add_weights(self.factors, captured)
        if self.cache is not None and others is not None:
            check_finite(others)
            kept = {name: _smaller(layer) for name, layer in others.items()}
            size = sum(layer.nbytes for layer in kept.values())
            expected = 0 if self._expected is None or self.cache else size * self._expected / len(indices)
            self._free -= size
            self.cache.append(kept)
            if self._free < 0 or expected > self._free + size:
                self.cache = None

    def help(self) -> None:
        """Take gradients of this process's layers from others, with no batch of its own."""
        self._add({})

    def _add(self, gradients: Mapping[str, LayerGradients]) -> None:
        for part in [gradients] if self._hand_over is None else self._hand_over(gradients):
            add_covariances(self.factors, part, self._plan.layers)

    def finish(self, bases: Mapping[str, Eigenbasis] | None = None) -> None:
        """Take up eigenbases; if every gradient was kept, measure the squares at once.

        Args:
            bases: of the covariances, by layer; None to compute them.
        """
        for name, basis in (compute_eigenbases(self.factors.layers) if bases is None else bases).items():
            self.factors.layers[name].set_basis(basis)
        if self.cache is not None:
            for kept in self.cache:
                add_squares(self.factors, kept)
            self.cache = []


class SquaresPass:
    """Sums squared gradient entries in a basis that is already there.

    Args:
        plan: the covered layers.
        factors: factors whose layers have a basis; their squares are replaced.
        seed: seed of the draws; the same seed gives the second draw of :class:`CovariancePass`.
        draws: mixtures or sampled labels per example.
        hand_over: see :class:`CovariancePass`.
    """

    description = "Influence: eigenvalues"

    def __init__(
        self,
        plan: LayerPlan,
        factors: Factors,
        *,
        seed: int = 0,
        draws: int = 1,
        hand_over: HandOver | None = None,
    ) -> None:
        self.factors, self._hand_over = factors, hand_over
        for layer in factors.layers.values():
            layer.set_basis(layer.basis)
        self.forward = Forward(plan)
        self._draws = Draws(factors.fisher, seed, draws)

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one batch."""
        captured = self.forward(module, batch, len(indices))
        gradients = self._draws.gradients(captured, indices, SQUARES)
        check_finite(gradients)
        self._add(gradients)

    def help(self) -> None:
        """Take gradients of this process's layers from others, with no batch of its own."""
        self._add({})

    def _add(self, gradients: Mapping[str, LayerGradients]) -> None:
        for part in [gradients] if self._hand_over is None else self._hand_over(gradients):
            add_squares(self.factors, part)


class DiagonalPass:
    """Sums squared gradient entries in the parameters' own basis: the diagonal of the Gauss-Newton matrix.

    Args:
        plan: the covered layers.
        fisher: which output gradients to use.
        seed: seed of the draws.
        draws: mixtures or sampled labels per example.
    """

    description = "Influence: second moments"

    def __init__(self, plan: LayerPlan, *, fisher: Fisher = "mixed", seed: int = 0, draws: int = 1) -> None:
        self.factors = Factors(fisher=fisher)
        self.forward = Forward(plan)
        self._draws = Draws(fisher, seed, draws)

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one batch."""
        captured = self.forward(module, batch, len(indices))
        gradients = self._draws.gradients(captured, indices)
        check_finite(gradients)
        add_layers(self.factors, gradients, captured.recorder.layers)
        add_squares(self.factors, gradients)
        add_weights(self.factors, captured)


class Draws:
    """Reproducible curvature gradients: an example's draw depends on the seed and its dataset index only.

    Args:
        fisher: which output gradients to use.
        seed: seed of the draws.
        draws: mixtures or sampled labels per example.
    """

    def __init__(self, fisher: Fisher, seed: int = 0, draws: int = 1) -> None:
        self.fisher, self.seed, self.draws = fisher, seed, draws

    def gradients(
        self, captured: Captured, indices: Tensor, purpose: int = COVARIANCES
    ) -> dict[str, LayerGradients]:
        """Return gradients of a batch, of the first or the second draw.

        Args:
            captured: the batch.
            indices: dataset indices of its examples, ``(B,)``.
            purpose: which of the draws.
        """
        generator = self._source(captured, indices, purpose)
        return captured.curvature_gradients(self.fisher, generator, self.draws)

    def pair(
        self, captured: Captured, indices: Tensor, *, second: bool
    ) -> tuple[dict[str, LayerGradients], dict[str, LayerGradients] | None]:
        """Return gradients of both draws; the same twice where nothing is drawn.

        Args:
            captured: the batch.
            indices: dataset indices of its examples, ``(B,)``.
            second: whether the second draw is wanted.
        """
        sources = [self._source(captured, indices, purpose) for purpose in (COVARIANCES, SQUARES)]
        if sources[0] is None or not second:
            gradients = captured.curvature_gradients(self.fisher, sources[0], self.draws)
            return gradients, gradients if second else None
        first, others = captured.random_gradients(self.fisher, sources, self.draws)
        return first, others

    def _source(self, captured: Captured, indices: Tensor, purpose: int) -> ExampleGenerator | None:
        drawn = captured.loss is not None and self.fisher in RANDOM
        return ExampleGenerator(self.seed, indices, purpose) if drawn else None


def add_covariances(
    factors: Factors, gradients: Mapping[str, LayerGradients], layers: Mapping[str, Layer]
) -> None:
    """Add a batch of curvature gradients of some layers to the covariances of ``factors``."""
    add_layers(factors, gradients, layers)
    for name, layer in gradients.items():
        factors.layers[name].add_covariances(layer)


def add_layers(
    factors: Factors, gradients: Mapping[str, LayerGradients], layers: Mapping[str, Layer]
) -> None:
    """Start empty statistics for layers that have none yet."""
    for name, layer in gradients.items():
        if name not in factors.layers:
            factors.layers[name] = LayerStatistics.zeros(
                layer.shape, layers[name].diagonal_sides, device=layer.like.device, dtype=layer.like.dtype
            )


def add_weights(factors: Factors, captured: Captured) -> None:
    """Count a batch's examples and their loss weights."""
    if captured.loss is None:
        factors.fisher = "empirical"
    add_later(factors, "weight_sum", captured.weights.sum())
    factors.weight_examples += captured.num_examples


def add_squares(factors: Factors, gradients: Mapping[str, LayerGradients]) -> None:
    """Add a batch of curvature gradients to the squares of ``factors``."""
    for name, layer in gradients.items():
        factors.layers[name].add_squares(layer)


def _smaller(gradients: LayerGradients) -> LayerGradients:
    """Return whichever of the factored and the dense form takes less memory."""
    dense = gradients.num_seeds * gradients.num_examples * prod(gradients.shape)
    return gradients if gradients.nbytes <= dense * gradients.like.element_size() else compact(gradients)
