"""Passes that fit Kronecker factors: covariances, then squares in their eigenbasis."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_influence.curvature.factors import Factors, LayerStatistics, compute_eigenbasis
from lightning_influence.model.captured import RANDOM, Captured, Fisher
from lightning_influence.model.content import SeenData
from lightning_influence.model.forward import Forward
from lightning_influence.model.gradients import FactoredGradients, LayerGradients, check_finite, compact
from lightning_influence.model.losses.draws import COVARIANCES, SQUARES, ExampleGenerator
from lightning_influence.model.plan import LayerPlan
from lightning_influence.support.waiting import add_later


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
    ) -> None:
        self.factors = Factors(fisher=fisher)
        self.cache: list[dict[str, LayerGradients]] | None = []
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
        add_covariances(self.factors, gradients, captured)
        if self.cache is not None and others is not None:
            check_finite(others)
            kept = {name: _smaller(layer) for name, layer in others.items()}
            size = sum(layer.nbytes for layer in kept.values())
            expected = 0 if self._expected is None or self.cache else size * self._expected / len(indices)
            self._free -= size
            self.cache.append(kept)
            if self._free < 0 or expected > self._free + size:
                self.cache = None

    def finish(self) -> None:
        """Decompose the covariances; if every gradient was kept, measure the squares at once."""
        set_bases(self.factors)
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
    """

    description = "Influence: eigenvalues"

    def __init__(self, plan: LayerPlan, factors: Factors, *, seed: int = 0, draws: int = 1) -> None:
        self.factors = factors
        for layer in factors.layers.values():
            layer.set_basis(layer.basis)
        self.forward = Forward(plan)
        self._draws = Draws(factors.fisher, seed, draws)

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one batch."""
        captured = self.forward(module, batch, len(indices))
        gradients = self._draws.gradients(captured, indices, SQUARES)
        check_finite(gradients)
        add_squares(self.factors, gradients)


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
        add_layers(self.factors, gradients)
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
    ) -> dict[str, FactoredGradients]:
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
    ) -> tuple[dict[str, FactoredGradients], dict[str, FactoredGradients] | None]:
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


def add_covariances(factors: Factors, gradients: dict[str, FactoredGradients], captured: Captured) -> None:
    """Add a batch of curvature gradients to the covariances of ``factors``."""
    add_layers(factors, gradients)
    for name, layer in gradients.items():
        factors.layers[name].add_covariances(layer)
    add_weights(factors, captured)


def add_layers(factors: Factors, gradients: dict[str, FactoredGradients]) -> None:
    """Start empty statistics for layers that have none yet."""
    for name, layer in gradients.items():
        if name not in factors.layers:
            shape = (layer.inputs.shape[0], layer.outputs.shape[-1], layer.inputs.shape[-1])
            factors.layers[name] = LayerStatistics.zeros(
                shape, device=layer.inputs.device, dtype=layer.inputs.dtype
            )


def add_weights(factors: Factors, captured: Captured) -> None:
    """Count a batch's examples and their loss weights."""
    if captured.loss is None:
        factors.fisher = "empirical"
    add_later(factors, "weight_sum", captured.weights.sum())
    factors.weight_examples += captured.num_examples


def add_squares(factors: Factors, gradients: dict[str, Any]) -> None:
    """Add a batch of curvature gradients to the squares of ``factors``."""
    for name, layer in gradients.items():
        factors.layers[name].add_squares(layer)


def set_bases(factors: Factors, dtype: torch.dtype = torch.float64) -> None:
    """Compute every layer's eigenbasis from its covariances."""
    for name, layer in factors.layers.items():
        layer.set_basis(compute_eigenbasis(name, layer, dtype))


def _smaller(gradients: FactoredGradients) -> LayerGradients:
    """Return whichever of the factored and the dense form takes less memory."""
    groups, examples, _, d_in = gradients.inputs.shape
    dense = gradients.outputs.shape[0] * examples * groups * gradients.outputs.shape[-1] * d_in
    return gradients if gradients.nbytes <= dense * gradients.inputs.element_size() else compact(gradients)
