"""What a question is going to take, told before its first pass by a trial of a few batches.

The trial times gradients as the model has them. What methods do with these beside are products of matrices:
their operations are counted, at the speed that a product of matrices has on this machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_influence.model.finite import check_finite
from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.gradients import FactoredGradients, LayerGradients
from lightning_influence.model.layers.layer import Layer, ParameterRule
from lightning_influence.model.layers.plan import LayerPlan

# Width of the matrices whose product is timed, and how much slower those of passes are, which are not square.
_WIDTH, _THIN = 1024, 1.5
# Operations of an eigendecomposition of width D over D^3, as measured on widths of 1,000 to 5,000.
_DECOMPOSITION = 20
#: Rank that answers are taken to have when room is made for them: what they have in wide layers, or less.
ANSWER_RANK = 32
# Chosen by hand: multiply-adds of a forward pass over the training data from which on it is long. A core of a
# CPU takes some ten seconds for a plain epoch of so many.
_LONG, _LONG_ON_DEVICE = 2e10, 2e12


class TrialPass:
    """Times the loss gradients of a few batches, and sees what they are made of.

    Args:
        plan: the covered layers.

    Attributes:
        seconds: an example's gradient, of the fastest batch: the first one is looked at closely.
        columns: of an example's output curvature; 0 where that is not known.
        nbytes: memory that an example's gradients take.
        positions: of an example in each layer; 1 where gradients are no products.
    """

    description = "Influence: trial"

    def __init__(self, plan: LayerPlan) -> None:
        self.forward = Forward(plan)
        self.seconds, self.columns, self.nbytes = math.inf, 0, 0.0
        self.positions: dict[str, int] = {}

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Time one batch."""
        start = time.perf_counter()
        captured = self.forward(module, batch, len(indices))
        gradients = captured.loss_gradients(keep_graph=False)
        check_finite(gradients)
        _wait(gradients)
        self.seconds = min(self.seconds, (time.perf_counter() - start) / len(indices))
        if captured.loss is not None:
            self.columns = max(self.columns, captured.loss.num_columns)
        nbytes = sum(_count_bytes(layer) for layer in gradients.values()) / len(indices)
        self.nbytes = max(self.nbytes, nbytes)
        for name, layer in gradients.items():
            self.positions[name] = 1
            if isinstance(layer, FactoredGradients):
                self.positions[name] = layer.inputs.shape[2]


def run_trial(runner: Any, plan: LayerPlan, train: Any, batches: int) -> TrialPass:
    """Return the trial after about so many batches of the training examples; a process may have had none."""
    trial = TrialPass(plan)
    runner.run(trial, train.parts(batches * -(-train.num_examples // len(train)))[0])
    return trial


def _count_bytes(gradients: LayerGradients) -> int:
    """Return the memory that gradients take in the smaller of their forms."""
    whole = gradients.num_examples * math.prod(gradients.shape) * gradients.like.element_size()
    return min(gradients.nbytes, whole)


def _wait(gradients: Mapping[str, LayerGradients]) -> None:
    """Wait until a device has computed them."""
    for layer in gradients.values():
        float(layer.like.flatten()[:1].sum())


def measure_speed(like: Tensor) -> float:
    """Return the operations a second of products of matrices, as precise and on the device of a tensor."""
    matrix = torch.ones(_WIDTH, _WIDTH, device=like.device, dtype=like.dtype)
    best = math.inf
    for _ in range(3):  # the first one pays for what is set up
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 2 * _WIDTH**3 / (best * _THIN)


@dataclass
class Forecast:
    """Passes and seconds that are to come, added up.

    Args:
        trial: after it has run.
        layers: the covered layers by name.
        examples: of the training data, on this process.
        speed: operations a second.

    Attributes:
        passes: names of the passes to come.
        seconds: in all.
        decomposing: how many of these are eigendecompositions.
    """

    trial: TrialPass
    layers: Mapping[str, Layer]
    examples: float
    speed: float
    passes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    decomposing: float = 0.0

    def is_long(self, device: str) -> bool:
        """Return whether passes over the training data are long on a device of this type."""
        called = {k: v for k, v in self.layers.items() if not isinstance(v.rule, ParameterRule)}
        each = sum(math.prod(v.shape) * self.trial.positions.get(k, 1) for k, v in called.items())
        return is_long(each * self.examples, device)

    def add_pass(self, name: str, gradients: float = 1.0, operations: float = 0.0) -> None:
        """Add a pass over the training data.

        Args:
            name: of the pass.
            gradients: how often it takes the time of a gradient.
            operations: of an example, beside.
        """
        self.passes.append(name)
        self.seconds += self.examples * (gradients * self.trial.seconds + operations / self.speed)

    def add_factors(self, count: int) -> None:
        """Add the passes that fit factors, in so many passes, and their eigendecompositions; none if 0."""
        if not count:
            return
        covariances = rotations = decomposition = 0.0
        for name, layer in self.layers.items():
            groups, d_out, d_in = layer.shape
            positions = self.trial.positions.get(name, 1)
            # A side of which only the diagonal is held is neither rotated nor decomposed.
            sides = zip((d_out, d_in), layer.diagonal_sides, strict=True)
            widths = [width for width, is_diagonal in sides if not is_diagonal]
            squares = sum(width**2 for width in widths)
            covariances += 2 * groups * positions * squares
            rotations += 2 * groups * positions * (squares + d_in * d_out)
            decomposition += _DECOMPOSITION * groups * sum(width**3 for width in widths)
        if count == 1:
            self.add_pass("covariances", 1.5, covariances + rotations)
        groups = count // 2  # of layers, each with two passes
        for _ in range(groups):
            self.add_pass("covariances", 1.0, covariances / groups)
            self.add_pass("eigenvalues", 1.0, rotations / groups)
        self.decomposing += decomposition / self.speed
        self.seconds += decomposition / self.speed

    def add_scores(self, queries: int, groups: int) -> None:
        """Add the passes that score queries, in so many groups."""
        operations = 0.0
        for name, layer in self.layers.items():
            count, d_out, d_in = layer.shape
            positions = self.trial.positions.get(name, 1)
            whole = d_out * d_in * (positions + queries / groups)
            operations += 2 * count * min(whole, positions * queries / groups * ANSWER_RANK * (d_out + d_in))
        self.seconds += queries * self.trial.seconds
        for _ in range(groups):
            self.passes.append("query gradients")
            self.add_pass("scores", 1.0, operations)

    def count_query_numbers(self) -> float:
        """Return how many numbers a compressed answer takes."""
        shapes = [layer.shape for layer in self.layers.values()]
        return float(sum(n * min(d_out * d_in, ANSWER_RANK * (d_out + d_in)) for n, d_out, d_in in shapes))

    def describe(self, examples: int) -> str:
        """Return it in a sentence; ``examples`` is how many the training data have."""
        part = format_seconds(self.decomposing)
        part = f", {part} of it eigendecompositions" if self.decomposing > 1 else ""
        took = format_seconds(self.seconds)
        return (
            f"Influence: about {len(self.passes)} passes, roughly {took} in all{part}: a guess from a trial "
            f"of a few of the {examples:,} training examples."
        )


def is_long(operations: float, device: str) -> bool:
    """Return whether so many multiply-adds of a forward pass take long on a device of this type."""
    return operations >= (_LONG if device == "cpu" else _LONG_ON_DEVICE)


def format_seconds(seconds: float) -> str:
    """Return a duration in words of one or two units."""
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
