"""A batch after its forward pass: its losses, and gradients of every covered layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_influence.model.layers.gradients import LayerGradients
from lightning_influence.model.layers.recorder import Recorder
from lightning_influence.model.losses.draws import balanced_signs, draw_signs
from lightning_influence.model.losses.loss import OutputLoss
from lightning_influence.support.errors import UnsupportedModelError
from lightning_influence.support.waiting import LaterSum

#: Which gradients stand for the output curvature, see :meth:`Captured.curvature_gradients`.
Fisher = Literal["mixed", "sampled", "exact", "empirical"]
#: Those that are drawn at random.
RANDOM: tuple[Fisher, ...] = ("mixed", "sampled")
MAX_COLUMNS = 1024


@dataclass
class Captured:
    """A batch after its forward pass, ready for any number of backward passes.

    Attributes:
        num_examples: ``B``.
        loss: the captured loss, or None if only ``values`` are known.
        values: per-example losses ``(B,)`` from the module's ``influence_loss``, if it has one.
        recorder: the layers' inputs and graph.
    """

    num_examples: int
    loss: OutputLoss | None
    values: Tensor | None
    recorder: Recorder

    @property
    def weights(self) -> Tensor:
        """Weight of each example, ``(B,)``; their mean over the dataset normalises the loss."""
        if self.loss is not None:
            return self.loss.weights().detach()
        assert self.values is not None
        return torch.ones_like(self.values.detach())

    def per_example(self) -> Tensor:
        """Return unnormalised loss of each example, ``(B,)``, differentiable."""
        if self.loss is not None:
            return self.loss.per_example()
        assert self.values is not None
        return self.values

    def total(self) -> Tensor:
        """Return the sum of :meth:`per_example`, differentiable."""
        return self.per_example().sum() if self.loss is None else self.loss.total()

    def second_order(self) -> Tensor:
        """Return :meth:`per_example` where all second derivatives in the parameters count."""
        return self.per_example() if self.loss is None else self.loss.second_order()

    def loss_gradients(self, *, keep_graph: bool = True) -> dict[str, LayerGradients]:
        """Gradients of the per-example losses, before division by the mean weight.

        Args:
            keep_graph: whether further gradients are wanted from this forward pass.

        Returns:
            Gradients by layer, ``K = 1``.
        """
        if self.loss is None:
            return self.gradients_of(self.per_example(), keep_graph=keep_graph)
        outputs, seed = self.loss.seed()
        return self.recorder.gradients(outputs, [seed], self.num_examples, keep_graph=keep_graph)

    def loss_gradient_parts(self) -> Iterator[dict[str, LayerGradients]]:
        """Return :meth:`loss_gradients` in runs of consecutive examples; nothing further can be asked for."""
        if self.loss is None:
            outputs = self.per_example()
            seed = torch.ones_like(outputs)
        else:
            outputs, seed = self.loss.seed()
        return self.recorder.gradient_parts(outputs, seed, self.num_examples)

    def gradients_of(self, values: Tensor, *, keep_graph: bool = True) -> dict[str, LayerGradients]:
        """Return gradients of any per-example values ``(B,)`` computed from this forward pass, ``K = 1``."""
        seeds: list[Tensor | None] = [torch.ones_like(values)]
        return self.recorder.gradients(values, seeds, self.num_examples, keep_graph=keep_graph)

    def curvature_gradients(
        self, fisher: Fisher, generator: torch.Generator | None = None, draws: int = 1
    ) -> dict[str, LayerGradients]:
        """Gradients whose outer products average to the Gauss-Newton matrix or an estimate of it.

        Args:
            fisher: ``"exact"`` for every column of the output curvature; ``"mixed"`` for random mixtures of
                the columns and ``"sampled"`` for labels drawn from the model (both unbiased, mixtures with
                less variance); ``"empirical"`` for the training labels (biased).
            generator: source of the random signs or labels.
            draws: number of mixtures or sampled labels per example.

        Returns:
            Gradients with ``K`` seeds, before division by the square root of the mean weight. A module whose
            outputs are unknown (only ``influence_loss``) has the empirical ones.

        Raises:
            UnsupportedModelError: if ``"exact"`` would take too many backward passes.
        """
        if self.loss is None or fisher == "empirical":
            return self.loss_gradients()
        seeds: list[Tensor | None] = list(self.curvature_seeds(fisher, generator, draws))
        return self.recorder.gradients(self.loss.outputs, seeds, self.num_examples)

    def curvature_outputs(
        self, fisher: Fisher, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return the output gradients ``(G, B, R, D_out)`` of :meth:`curvature_gradients`, for one draw."""
        if self.loss is None:
            outputs = self.per_example()
            seed = torch.ones_like(outputs)
        else:
            outputs, seed = self.loss.outputs, next(self.curvature_seeds(fisher, generator))
        found = self.recorder.backward(outputs, seed, self.num_examples)
        return {name: slopes[0] for name, slopes in found.items()}  # of modules, which have one tensor each

    def curvature_seeds(
        self, fisher: Fisher, generator: torch.Generator | None = None, draws: int = 1
    ) -> Iterator[Tensor]:
        """What the backward passes of :meth:`curvature_gradients` start from, made one at a time.

        Args:
            fisher: as there, of a loss whose outputs are known.
            generator: as there.
            draws: as there.

        Returns:
            The seeds.

        Raises:
            UnsupportedModelError: as there.
        """
        loss = self.loss
        assert loss is not None
        if fisher == "empirical":
            return iter([loss.gradient()])
        if fisher == "mixed":
            return self._mixtures(draws, generator)
        if fisher == "sampled":
            return (loss.sample(generator) / draws**0.5 for _ in range(draws))
        if loss.num_columns > MAX_COLUMNS:
            raise UnsupportedModelError(
                "The exact output curvature takes one backward pass for each of the "
                f"{loss.num_columns:,} outputs of an example (classes times positions); at most "
                f"{MAX_COLUMNS:,} are accepted. Use fisher='mixed', or method='auto' in place of 'exact'."
            )
        return loss.columns()

    def random_gradients(
        self, fisher: Fisher, generators: Sequence[torch.Generator | None], draws: int = 1
    ) -> list[dict[str, LayerGradients]]:
        """Gradients at random seeds, drawn once from each source, on the one set of layer inputs.

        Args:
            fisher: ``"mixed"`` or ``"sampled"``.
            generators: independent sources of signs or labels.
            draws: number of mixtures or labels per example and source.

        Returns:
            For each source gradients with ``K = draws`` seeds whose outer products average to the
            Gauss-Newton matrix over the draws. As many mixtures as there are columns make them exact.
        """
        assert self.loss is not None
        seeds = [list(self.curvature_seeds(fisher, source, draws)) for source in generators]
        return self.recorder.gradient_groups(self.loss.outputs, seeds, self.num_examples)

    def _mixtures(self, count: int, generator: torch.Generator | None) -> Iterator[Tensor]:
        """Return random mixtures of the columns, see :mod:`~lightning_influence.model.losses.draws`."""
        loss = self.loss
        assert loss is not None
        if count == 1:
            weights = draw_signs(loss.ones()[:, None].expand(-1, loss.num_columns), generator)[None]
        else:
            weights = balanced_signs(loss.column_energies(), count, generator)
        return (loss.mix_columns(few) for few in weights)


class WeightedCount:
    """How many examples a pass has seen, and how much they weigh in the loss.

    Args:
        examples: their number.
        weight: the sum of their loss weights: as many, but for class weights and ignored positions.

    Attributes:
        examples: their number.
    """

    def __init__(self, examples: int = 0, weight: float = 0.0) -> None:
        self.examples = examples
        self._weight = LaterSum(weight)

    @property
    def weight(self) -> float:
        """The sum of their loss weights."""
        return self._weight.read()

    def add(self, captured: Captured) -> None:
        """Count a batch."""
        self.examples += captured.num_examples
        self._weight.add(captured.weights.sum())

    def reduce(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Count the examples of all processes, given what sums over these."""
        both = all_reduce_sum(torch.tensor([float(self.examples), self.weight], dtype=torch.float64))
        self.examples, self._weight = int(both[0]), LaterSum(float(both[1]))

    @property
    def normaliser(self) -> float:
        """What sums over the examples are to be divided by: their number times their mean weight."""
        return self.weight if self.weight > 0 else float(max(self.examples, 1))

    @property
    def mean_weight(self) -> float:
        """``wbar``; 1 before there are any examples, and where all weights are zero."""
        return self.normaliser / max(self.examples, 1)


class LossSum(WeightedCount):
    """The sum of the losses beside the count, which passes that see them anyway take on the way."""

    def __init__(self) -> None:
        super().__init__()
        self._total = LaterSum()

    @property
    def total(self) -> float:
        """Sum of the examples' unnormalised losses."""
        return self._total.read()

    def add(self, captured: Captured) -> None:
        """Add a batch."""
        super().add(captured)
        with torch.no_grad():  # no graph of its own
            self._total.add(captured.total())

    def mean(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> float:
        """Return the mean loss over the examples of all processes, given what sums over these."""
        both = all_reduce_sum(torch.tensor([self.total, self.examples], dtype=torch.float64))
        return float(both[0] / both[1].clamp_min(1))
