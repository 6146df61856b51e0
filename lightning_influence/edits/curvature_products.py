"""Products of flat vectors with the curvature of the loss on some examples.

Edits multiply one vector at a time with the curvature, dozens of times at the same weights. The gradients
that make up the Gauss-Newton matrix are therefore kept in memory, where a product costs a few matrix
products and no forward or backward pass; where they do not fit, every product is a pass.

A classifier that hesitates does so between few classes: most of the trace of an example's output curvature
``B B^T`` lies along its leading eigenvectors, and every column saved is a backward pass saved.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_influence.curvature.differentiation import (
    Batching,
    add_gauss_newton_products,
    add_hessian_products,
)
from lightning_influence.curvature.twice_differentiable import differentiable_twice
from lightning_influence.edits.data import EditData
from lightning_influence.edits.losses import MAX_COLUMNS, Sample
from lightning_influence.model.captured import Captured
from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.gradients import (
    FactoredGradients,
    LayerGradients,
    compact,
    concatenate,
)
from lightning_influence.model.layers.plan import LayerPlan, Layout
from lightning_influence.model.losses.draws import draw_generator
from lightning_influence.model.losses.loss import OutputLoss
from lightning_influence.running.runner import Runner
from lightning_influence.support.errors import NonFiniteError, UnsupportedModelError
from lightning_influence.support.notes import Notes


def soften(loss: OutputLoss, temperature: float) -> OutputLoss:
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


def keep_leading_columns(columns: Tensor, rows: Tensor, share: float) -> Tensor:
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


# Random mixtures that stand for more columns. Chosen by hand, as four times fewer than the columns of which
# each is used: the estimate is averaged over the examples.
DRAWS = 16
# Batches of gradients are joined up to so many bytes, so that small ones take one product. Chosen by hand, as
# the limit in `model.gradients` below which a block stays in the cache; larger batches stay as they are.
JOINED_BYTES = 4 * 2**20
MIXED = (
    f"The curvature of outputs, of which an example has more than {MAX_COLUMNS}, was estimated from {DRAWS} "
    "random mixtures. curvature_examples=None or solver='dense' takes it exactly, with a pass for every "
    "product, where the model has second derivatives."
)
Autograd = Literal["never", "many", "always"]
"""Whether products are taken by differentiating twice: where outputs are many, for instance."""


@dataclass(frozen=True)
class ProductSettings:
    """Which curvature, and how it is computed.

    Attributes:
        exact: the Hessian if True, the Gauss-Newton matrix otherwise.
        memory_budget: most bytes of gradients to keep.
        seed: of random mixtures, which stand in for the columns of more than 64 outputs.
        share: of the trace of each example's output curvature that its columns hold; 1 for all columns.
        temperature: of the outputs whose curvature is taken; 1 for the model's own, and of more than 64
            outputs.
        mixes: whether there may be mixtures; if not, every product is a pass where there are so many outputs,
            and exact.
    """

    exact: bool = False
    memory_budget: int = 2**30
    seed: int = 0
    share: float = 1.0
    temperature: float = 1.0
    mixes: bool = True


class CurvatureProducts:
    """``V -> H V`` of a sum of losses, at the new targets of the examples that have any.

    Args:
        runner: an entered runner on the module.
        plan: the editable layers.
        data: the examples.
        sample: whose losses, and what they are multiplied with.
        settings: which curvature, and how.
        notes: where to say that there are mixtures.
    """

    def __init__(
        self,
        runner: Runner,
        plan: LayerPlan,
        data: EditData,
        sample: Sample,
        settings: ProductSettings,
        notes: Notes,
    ) -> None:
        self._runner, self._plan, self._data, self._sample = runner, plan, data, sample
        self._settings, self._notes = settings, notes
        self._autograd: Autograd = "never" if settings.mixes else "many"
        self._budget = 0 if settings.exact else settings.memory_budget
        self._loader = data.loader.holding(sample.indices)
        self._layout = Layout.of(plan.layers)
        self._kept: list[_Part] | None = None

    def multiply(self, vectors: Tensor) -> Tensor:
        """Return ``H V``, ``(V, P)``.

        Raises:
            NonFiniteError: if the result is NaN or infinite.
        """
        if self._kept is None:
            result = self._run(vectors)
        else:
            result = torch.zeros_like(vectors)
            for part in self._kept:
                part.add_products(result, self._layout, vectors)
        return _check_finite(result)

    def energy(self, vector: Tensor) -> float:
        """Return ``v^T H v`` of a vector ``(P,)``.

        Raises:
            NonFiniteError: if it is NaN or infinite.
        """
        settings = self._settings
        plain = settings.share == 1 and settings.temperature == 1 and not settings.exact
        if self._kept is None and plain:
            # Where no other product was asked for, keeping gradients would not pay.
            with contextlib.suppress(UnsupportedModelError):
                one_pass = self._make_pass(vector[None], "always")
                self._runner.run(one_pass, self._loader)
                return float(vector @ _check_finite(one_pass.total)[0])
        return float(vector @ self.multiply(vector[None])[0])

    def _run(self, vectors: Tensor) -> Tensor:
        """Run a pass for the products, and keep what serves the next ones.

        Returns:
            The products, ``(V, P)``.

        Raises:
            UnsupportedModelError: if the model lacks second derivatives that the Hessian needs.
        """
        one_pass = self._make_pass(vectors, self._autograd)
        try:
            self._runner.run(one_pass, self._loader)
        except UnsupportedModelError:  # an operation without second derivatives
            if self._autograd == "never":
                raise
            self._autograd = "never"
            return self._run(vectors)
        # What did not fit once will not fit later.
        self._kept, self._budget, self._autograd = one_pass.kept, 0, one_pass.autograd
        if one_pass.mixed and MIXED not in self._notes.messages:
            self._notes.messages.append(MIXED)  # for the report: nothing is wrong
        return one_pass.total

    def _make_pass(self, vectors: Tensor, autograd: Autograd) -> _ProductPass:
        settings = replace(self._settings, memory_budget=0 if autograd == "always" else self._budget)
        return _ProductPass(self._plan, self._data, self._sample, vectors, settings, autograd)


@dataclass(frozen=True)
class _Part:
    """Gradients whose outer products, times coefficients, add up to the curvature of some examples.

    Attributes:
        gradients: by layer.
        coefficients: of the examples, ``(B,)``.
    """

    gradients: dict[str, LayerGradients]
    coefficients: Tensor

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.gradients.values())

    @property
    def shapes(self) -> list[tuple[str, int, int]]:
        """By layer the numbers of columns and of positions, which parts have to share to be joined."""
        return [
            (name, g.num_seeds, g.inputs.shape[2] if isinstance(g, FactoredGradients) else 0)
            for name, g in self.gradients.items()
        ]

    def join(self, other: _Part) -> _Part:
        """Return one part for the examples of two."""
        return _Part(
            {name: concatenate([own, other.gradients[name]]) for name, own in self.gradients.items()},
            torch.cat([self.coefficients, other.coefficients]),
        )

    def add_products(self, out: Tensor, layout: Layout, vectors: Tensor) -> None:
        products = layout.dot(self.gradients, vectors)
        layout.add_combination(out, self.gradients, products * self.coefficients[:, None])


def _check_finite(total: Tensor) -> Tensor:
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
        settings: ProductSettings,
        autograd: Autograd,
    ) -> None:
        self.total = torch.zeros_like(vectors)
        self.mixed, self.autograd = False, autograd
        self._plan, self._data, self._sample, self._vectors = plan, data, sample, vectors
        self._settings, self._forward, self._layout = settings, Forward(plan), Layout.of(plan.layers)
        self.kept: list[_Part] | None = [] if settings.memory_budget else None
        self._free, self._batches = settings.memory_budget, 0
        self._batching = Batching()

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one batch."""
        exact = self._settings.exact
        twice = exact or self.autograd == "always"
        captured = self._capture(module, batch, indices, twice)
        if self.autograd == "many" and not twice and _has_many(captured):
            self.kept, self.autograd, twice = None, "always", True
            captured = self._capture(module, batch, indices, twice)
        rows, coefficients = self._sample.find(indices)
        if exact or (twice and captured.loss is not None):
            add = add_hessian_products if exact else add_gauss_newton_products
            every = coefficients.new_zeros(len(indices)).index_put((rows,), coefficients)
            add(self.total, self._plan, captured, self._vectors, every, self._batching)
            return
        # What is kept decides how much is: of long sequences, matrices take less than their factors.
        gradients = {
            name: compact(layer.select(rows), smaller=True)
            for name, layer in self._differentiate(captured, rows).items()
        }
        part = _Part(gradients, coefficients.to(self.total))
        part.add_products(self.total, self._layout, self._vectors)
        if self.kept is not None:
            self._free -= part.nbytes
            last = self.kept[-1] if self.kept else None
            if last is not None and last.nbytes + part.nbytes <= JOINED_BYTES and last.shapes == part.shapes:
                self.kept[-1] = last.join(part)
            else:
                self.kept.append(part)
            if self._free < 0:
                self.kept = None

    def _capture(self, module: Any, batch: Any, indices: Tensor, twice: bool) -> Captured:
        with differentiable_twice(module) if twice else contextlib.nullcontext():
            return self._forward(module, self._data.view(batch, indices), len(indices))

    def _differentiate(self, captured: Captured, rows: Tensor) -> dict[str, LayerGradients]:
        """Return gradients of columns of the output curvature, or random mixtures of them if it has many."""
        settings, self._batches = self._settings, self._batches + 1
        if not _has_many(captured):
            if captured.loss is None or (settings.share == 1 and settings.temperature == 1):
                return captured.curvature_gradients("exact")
            shape, count = captured.loss.outputs.shape, captured.num_examples
            loss = soften(captured.loss, settings.temperature)
            columns = torch.stack([column.reshape(count, -1) for column in loss.columns()])
            few = keep_leading_columns(columns, rows.to(columns.device), settings.share)
            return captured.recorder.gradients(
                captured.loss.outputs, [column.reshape(shape) for column in few], count
            )
        assert captured.loss is not None
        self.mixed = True
        generator = draw_generator(settings.seed, self._batches, captured.loss.outputs.device)
        return captured.curvature_gradients("mixed", generator, DRAWS)


def _has_many(captured: Captured) -> bool:
    return captured.loss is not None and captured.loss.num_columns > MAX_COLUMNS
