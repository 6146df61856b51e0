"""Softer and fewer columns for the curvature of each example's outputs.

A classifier that hesitates does so between few classes: most of the trace of an example's output curvature
``B B^T`` lies along its leading eigenvectors, and every column saved is a backward pass saved.

Curvature of the loss on some examples, as a function of flat vectors.

Edits multiply one vector at a time with the curvature, dozens of times at the same weights. The gradients
that make up the Gauss-Newton matrix are therefore kept in memory, where a product costs a few matrix
products and no forward or backward pass; where they do not fit, every product is a pass.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_influence.curvature.differentiation import (
    add_gauss_newton_products,
    add_hessian_products,
    differentiable_twice,
)
from lightning_influence.edits.data import EditData
from lightning_influence.edits.passes import MAX_COLUMNS
from lightning_influence.edits.sampling import Sample
from lightning_influence.model.captured import Captured
from lightning_influence.model.forward import Forward
from lightning_influence.model.gradients import FactoredGradients
from lightning_influence.model.losses.draws import draw_generator
from lightning_influence.model.losses.loss import OutputLoss
from lightning_influence.model.plan import LayerPlan, Layout
from lightning_influence.running.runner import Runner
from lightning_influence.support.errors import NonFiniteError, UnsupportedModelError
from lightning_influence.support.notes import Notes


def softened(loss: OutputLoss, temperature: float) -> OutputLoss:
    """Return the loss with its outputs divided by a temperature, for its curvature.

    The curvature of a classifier's loss vanishes where it is sure, right or wrong: such examples
    then neither pull at a step nor hold it back, and the step is good for a short way only. Softer
    probabilities say how the outputs curve further on. Losses of constant curvature, as squared error, keep
    theirs.

    Args:
        loss: a captured loss.
        temperature: positive; 1 changes nothing.

    Returns:
        A detached copy.
    """
    if not loss.is_function_of_outputs:
        return loss
    return loss.with_outputs(loss.outputs.detach() / temperature)


def leading_columns(columns: Tensor, rows: Tensor, share: float) -> Tensor:
    """Replace a square root of each example's output curvature by its leading part.

    With ``Z_n (K, m)`` the columns of example ``n``, the eigenvectors of ``Z_n Z_n^T`` rotate them into
    orthogonal ones. Each example keeps the fewest that hold the share of its trace, scaled so that the trace
    is as before; what it keeps does not depend on the other examples of its batch.

    Args:
        columns: the columns of all examples, ``(K, B, m)``.
        rows: the examples that count, whose ranks decide how many columns are returned, ``(b,)``.
        share: of the trace, in (0, 1].

    Returns:
        ``(r, B, m)`` with ``r <= K``, zero where an example needs fewer.

    Raises:
        ValueError: if the share is outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"Got share={share!r}; accepted are numbers above 0 and up to 1.")
    count = len(columns)
    if count < 2 or share == 1:
        return columns
    by_example = columns.transpose(0, 1).double()  # (B, K, m)
    values, vectors = torch.linalg.eigh(by_example @ by_example.mT)
    values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
    trace = values.sum(dim=-1, keepdim=True)
    held = values.cumsum(dim=-1) - values  # by the columns before each one
    keep = (held < share * trace) & (values > 0)
    kept = (values * keep).sum(dim=-1, keepdim=True)
    factor = keep * (trace / kept.clamp_min(torch.finfo(values.dtype).tiny)).sqrt()
    rank = max(1, int(keep[rows].sum(dim=-1).max())) if len(rows) else 1
    rotated = (vectors.mT @ by_example) * factor[..., None]
    few: Tensor = rotated[:, :rank].transpose(0, 1).to(columns.dtype)
    return few


DRAWS = 16
MIXED = (
    f"The curvature of outputs, of which an example has more than {MAX_COLUMNS}, was estimated from {DRAWS} "
    "random mixtures. curvature_examples=None or solver='dense' takes it exactly, with a pass for every "
    "product, where the model has second derivatives."
)
Autograd = Literal["never", "many", "always"]
"""Whether products are taken by differentiating twice: where outputs are many, for instance."""


class Curvature:
    """``V -> H V`` of a sum of losses, at the new targets of the examples that have any.

    Args:
        runner: an entered runner on the module.
        plan: the covered layers.
        data: the examples.
        sample: whose losses, and what they are multiplied with.
        exact: the Hessian if True, the Gauss-Newton matrix otherwise.
        memory_budget: most bytes of gradients to keep.
        seed: of random mixtures, which stand in for the columns of more than 64 outputs.
        mixes: whether they may; if not, every product is a pass where there are so many, and exact.
        share: of the trace of each example's output curvature that its columns hold; 1 for all columns.
        temperature: of the outputs whose curvature is taken; 1 for the model's own, and of more than 64
            outputs.
        notes: where to say that there are mixtures.
    """

    def __init__(
        self,
        runner: Runner,
        plan: LayerPlan,
        data: EditData,
        sample: Sample,
        *,
        exact: bool = False,
        memory_budget: int = 2**30,
        seed: int = 0,
        share: float = 1.0,
        temperature: float = 1.0,
        mixes: bool = True,
        notes: Notes | None = None,
    ) -> None:
        self._runner, self._plan, self._data = runner, plan, data
        self._sample, self._notes = sample, notes or Notes()
        self._autograd: Autograd = "never" if mixes else "many"
        self._exact, self._budget, self._seed, self._share = exact, memory_budget, seed, share
        self._temperature = temperature
        self._loader = data.subset(sample.indices)
        self._layout = Layout.of(plan.layers)
        self._kept: list[_Part] | None = None

    @property
    def definite(self) -> bool:
        """Whether no eigenvalue is negative, whatever the model."""
        return not self._exact

    def product(self, vectors: Tensor) -> Tensor:
        """Return ``H V``, ``(V, P)``.

        Raises:
            NonFiniteError: if the result is NaN or infinite.
        """
        if self._kept is None:
            result = self._by_pass(vectors)
        else:
            result = torch.zeros_like(vectors)
            for part in self._kept:
                part.add_products(result, self._layout, vectors)
        return _finite(result)

    def energy(self, vector: Tensor) -> float:
        """Return ``v^T H v`` of a vector ``(P,)``.

        Raises:
            NonFiniteError: if it is NaN or infinite.
        """
        plain = self._share == 1 and self._temperature == 1
        if self._kept is None and plain and not self._exact:
            # Where no other product was asked for, keeping gradients would not pay.
            with contextlib.suppress(UnsupportedModelError):
                return float(vector @ _finite(self._by_pass(vector[None], "always"))[0])
        return float(vector @ self.product(vector[None])[0])

    def _by_pass(self, vectors: Tensor, autograd: Autograd | None = None) -> Tensor:
        asked = self._autograd if autograd is None else autograd
        budget = 0 if self._exact or asked == "always" else self._budget
        one_pass = _ProductPass(
            self._plan, self._data, self._sample, vectors, self._exact, budget, self._seed
        )
        one_pass.share, one_pass.temperature, one_pass.autograd = self._share, self._temperature, asked
        try:
            self._runner.run(one_pass, self._loader)
        except UnsupportedModelError:  # an operation without second derivatives
            if asked == "never" or autograd is not None:
                raise
            self._autograd = "never"
            return self._by_pass(vectors)
        if autograd is None:
            self._kept, self._budget, self._autograd = one_pass.kept, 0, one_pass.autograd
        if one_pass.mixed and MIXED not in self._notes.messages:
            self._notes.messages.append(MIXED)  # for the report: nothing is wrong
        return one_pass.total


@dataclass(frozen=True)
class _Part:
    """Gradients whose outer products, times coefficients, add up to the curvature of one batch.

    Attributes:
        gradients: by layer.
        coefficients: of the examples, ``(B,)``.
    """

    gradients: dict[str, FactoredGradients]
    coefficients: Tensor

    def add_products(self, out: Tensor, layout: Layout, vectors: Tensor) -> None:
        products = layout.dot(self.gradients, vectors)
        layout.add_combination(out, self.gradients, products * self.coefficients[:, None])

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.gradients.values())


def _finite(total: Tensor) -> Tensor:
    if not bool(torch.isfinite(total.sum())):
        raise NonFiniteError(
            "A curvature product is not finite. Check the training examples and the model's weights for NaN "
            "or infinity."
        )
    return total


class _ProductPass:
    """Sums products over some examples, and keeps their gradients if they fit."""

    description = "Edit: curvature products"

    def __init__(
        self,
        plan: LayerPlan,
        data: EditData,
        sample: Sample,
        vectors: Tensor,
        exact: bool,
        budget: int,
        seed: int,
    ) -> None:
        self.forward = Forward(plan)
        self.total = torch.zeros_like(vectors)
        self.kept: list[_Part] | None = [] if budget else None
        self._plan, self._layout = plan, Layout.of(plan.layers)
        self._data, self._sample, self._vectors = data, sample, vectors
        self._exact, self._free, self._seed, self._batches = exact, budget, seed, 0
        self.share, self.temperature, self.mixed = 1.0, 1.0, False
        self.autograd: Autograd = "never"

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one batch."""
        twice = self._exact or self.autograd == "always"
        captured = self._captured(module, batch, indices, twice)
        if self.autograd == "many" and not twice and _many(captured):
            self.kept, self.autograd, twice = None, "always", True
            captured = self._captured(module, batch, indices, twice)
        rows, coefficients = self._sample.rows(indices)
        if self._exact or (twice and captured.loss is not None):
            add = add_hessian_products if self._exact else add_gauss_newton_products
            every = coefficients.new_zeros(len(indices)).index_put((rows,), coefficients)
            add(self.total, self._plan, captured, self._vectors, every)
            return
        gradients = {name: layer.select(rows) for name, layer in self._gradients(captured, rows).items()}
        part = _Part(gradients, coefficients.to(self.total))
        part.add_products(self.total, self._layout, self._vectors)
        if self.kept is not None:
            self._free -= part.nbytes
            self.kept.append(part)
            if self._free < 0:
                self.kept = None

    def _captured(self, module: Any, batch: Any, indices: Tensor, twice: bool) -> Captured:
        with differentiable_twice(module) if twice else contextlib.nullcontext():
            return self.forward(module, self._data.view(batch, indices), len(indices))

    def _gradients(self, captured: Captured, rows: Tensor) -> dict[str, FactoredGradients]:
        """Return gradients of columns of the output curvature, or random mixtures of them if it has many."""
        self._batches += 1
        if not _many(captured):
            if captured.loss is None or (self.share == 1 and self.temperature == 1):
                return captured.curvature_gradients("exact")
            shape, count = captured.loss.outputs.shape, captured.num_examples
            loss = softened(captured.loss, self.temperature)
            columns = torch.stack([column.reshape(count, -1) for column in loss.columns()])
            few = leading_columns(columns, rows.to(columns.device), self.share)
            return captured.recorder.gradients(
                captured.loss.outputs, [column.reshape(shape) for column in few], count
            )
        assert captured.loss is not None
        self.mixed = True
        generator = draw_generator(self._seed, self._batches, captured.loss.outputs.device)
        return captured.curvature_gradients("mixed", generator, DRAWS)


def _many(captured: Captured) -> bool:
    return captured.loss is not None and captured.loss.num_columns > MAX_COLUMNS
