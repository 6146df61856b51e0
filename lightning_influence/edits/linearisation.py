"""One linearisation of a model for an edit: what has to be nullified, the curvature, and the rules' scores.

With ``U`` sums of losses, ``W`` sums of their weights, ``E`` the edited and ``K`` the kept examples, and a
model at the optimum of its training objective (weight decay ``w`` included):

- forgetting: the new objective is ``U_K / W_K``, its gradient there ``-(W_E / W_K) (g + w theta)`` with ``g``
  the mean gradient of the forgotten examples;
- relabelling: it is ``(U_K + U_E') / W``, its gradient ``-(W_E / W) (g_old - g_new)``.

The factor in front is the scale of the edit, and the curvature that of the new objective.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_influence.edits.curvature_products import CurvatureProducts, ProductSettings
from lightning_influence.edits.data import EditData
from lightning_influence.edits.directions import Problem
from lightning_influence.edits.losses import Sample
from lightning_influence.edits.rules import RuleScores, Source, compute_gains
from lightning_influence.edits.start import Start
from lightning_influence.linalg.lanczos import estimate_largest_eigenvalue
from lightning_influence.linalg.normal_equations import find_leading_direction
from lightning_influence.model.finite import check_finite
from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.gradients import FactoredGradients, LayerGradients
from lightning_influence.model.layers.plan import LayerPlan, Layout
from lightning_influence.model.weightless import forward_if_weighted
from lightning_influence.support.errors import InfluenceError, NonFiniteError

# Share of the trace of each example's output curvature that is kept when relabelling in several steps.
# Chosen by hand: a classifier hesitates between few classes, and every column saved is a backward pass saved.
COLUMN_SHARE = 0.9
# Of the outputs whose curvature such a relabelling takes: it has to reach beyond where the model is sure.
# Chosen by hand, as one setting for all three editing examples (see docs/editing.md).
TEMPERATURE = 3.0
# Directions whose curvature is below this share of the largest are not told from noise. Chosen by hand.
AUTO_DAMPING = 0.01
# Random vectors that tell the diagonal of a matrix: a relative error of about sqrt(2 / 16) is good enough for
# a preconditioner and a ranking, and all of them go through the curvature in one product.
PROBES = 16


class GradientSumPass:
    """Sums signed loss gradients of the edited examples, and what their channels see.

    Args:
        plan: the editable layers.
        data: the examples, of whose edited ones the gradients are summed: at the training targets with factor
            1, and at the new targets, if there are any, with factor -1.

    Attributes:
        terms: the sums ``(P,)`` at the ``"old"`` and at the ``"new"`` targets, without the factors.
        inputs: by layer the sums over examples of mean inputs over positions, ``(G, D_in)``.
        channels: by layer the signed sums of mean gradients in the channels' outputs, ``(G, D_out)``.
        examples: how many examples were summed over.
    """

    description = "Edit: gradients"

    def __init__(self, plan: LayerPlan, data: EditData) -> None:
        self.terms: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        self.channels: dict[str, Tensor] = {}
        self.examples = 0
        self._factors = {"old": 1.0, "new": 0.0 if data.targets is None else -1.0}
        self._forward, self._layout, self._data = Forward(plan), Layout.of(plan.layers), data

    @property
    def total(self) -> Tensor:
        """The signed sum over both targets, ``(P,)``."""
        return self._factors["old"] * self.terms["old"] + self._factors["new"] * self.terms["new"]

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one batch."""
        rows = torch.isin(indices, self._data.edited).nonzero().flatten()
        gradients: dict[str, LayerGradients] = {}
        for name, factor in self._factors.items():
            if not factor:
                continue
            seen = self._data.view(batch, indices) if name == "new" else batch
            captured = forward_if_weighted(self._forward, module, seen, len(indices))
            if captured is None:  # its examples had no part in training: relabelling gives them one
                continue
            gradients = {key: layer.select(rows) for key, layer in captured.loss_gradients().items()}
            check_finite(gradients)
            self._add_gradients(name, factor, gradients, len(rows))
        if len(rows):
            self._add_inputs(gradients)
        self.examples += len(rows)

    def _add_gradients(
        self, name: str, factor: float, gradients: dict[str, LayerGradients], count: int
    ) -> None:
        like = next(iter(gradients.values())).like
        for key in self._factors:
            self.terms.setdefault(key, like.new_zeros(self._layout.numel))
        self._layout.add_combination(self.terms[name][None], gradients, like.new_ones(1, count, 1))
        for key, layer in gradients.items():
            # A mean over positions: channels are compared with others of their layer only.
            if isinstance(layer, FactoredGradients):
                pulled = factor * layer.outputs[0].mean(dim=2).sum(dim=1)
            else:  # the columns of a table are its positions
                pulled = factor * layer.combine(like.new_ones(1, count, 1))[0].mean(dim=2)
            self.channels[key] = self.channels.get(key, torch.zeros_like(pulled)) + pulled

    def _add_inputs(self, gradients: dict[str, LayerGradients]) -> None:
        for key, layer in gradients.items():
            if isinstance(layer, FactoredGradients):
                fed = layer.inputs.mean(dim=2).sum(dim=1)
            else:
                fed = layer.like.new_full((1, layer.shape[2]), layer.num_examples / layer.shape[2])
            self.inputs[key] = self.inputs.get(key, torch.zeros_like(fed)) + fed


class Linearisation:
    """A model linearised at the weights that it has when this is made; what is asked for is computed once.

    Args:
        start: where the edit sets out.
        change: of the weights so far, ``(P,)``.
        at_optimum: whether the model is taken to be at the optimum of its training objective, so that the
            edited examples' gradient tells that of the new objective. It is measured otherwise.
        previous: the linearisation before, whose damping and preconditioner still serve.
    """

    def __init__(
        self, start: Start, change: Tensor, *, at_optimum: bool, previous: Linearisation | None = None
    ) -> None:
        self.start, self.change, self.previous = start, change, previous
        self._at_optimum = at_optimum
        self._theta = start.weights.flat()

    @cached_property
    def target(self) -> GradientSumPass:
        """The gradients of the edited examples."""
        one_pass = GradientSumPass(self.start.weights.plan, self.start.data)
        self.start.runner.run(one_pass, self.start.data.edited_loader)
        return one_pass

    @cached_property
    def gradient(self) -> Tensor:
        """``g``, ``(P,)``: what the edit nullifies, so that the weights move by ``scale H^{-1} g``.

        Raises:
            InfluenceError: if it is zero.
            NonFiniteError: if it is NaN or infinite.
        """
        start = self.start
        if start.objective is not None and not self._at_optimum:
            found = start.objective(self.change)
            if found is None:
                raise NonFiniteError(
                    "A loss or gradient is NaN or infinite. Check the examples and the weights."
                )
            return found[1] / -start.scale  # in the unit of the edited examples' mean
        gradient = self.target.total / start.sums[0]
        if self.previous is None and not bool(gradient.any()):
            raise InfluenceError(
                "The edited examples have no gradient in the layers that may change: there is nothing to "
                "nullify. They may be fitted perfectly, or none of these layers may reach their loss."
            )
        return gradient + start.weights.decay * self._theta if start.forgets else gradient

    @cached_property
    def curvature(self) -> CurvatureProducts:
        """The curvature of the new objective, without weight decay."""
        edited, kept = self.start.samples
        return self._make_products(kept if self.start.forgets else kept.mix(edited, self.start.share))

    @cached_property
    def edited_curvature(self) -> CurvatureProducts:
        """The curvature of the edited examples, at their new targets if they have any."""
        return self._make_products(self.start.samples[0])

    def _make_products(self, sample: Sample) -> CurvatureProducts:
        start, options = self.start, self.start.options
        reaches = start.descends and options.linearisations != 1
        settings = ProductSettings(
            exact=options.curvature == "hessian",
            memory_budget=options.memory_budget // 2,
            seed=options.seed,
            share=COLUMN_SHARE if reaches else 1.0,
            temperature=TEMPERATURE if reaches else 1.0,
            mixes=options.curvature_examples is not None and options.solver != "dense",
        )
        return CurvatureProducts(start.runner, start.weights.plan, start.data, sample, settings, start.notes)

    def multiply(self, vectors: Tensor) -> Tensor:
        """Return products ``(V, P)`` with the curvature of the new objective, weight decay included."""
        return self.curvature.multiply(vectors) + self.start.weights.decay * vectors

    def multiply_edited(self, vectors: Tensor) -> Tensor:
        """Return products ``(V, P)`` with the curvature of the edited examples, weight decay included."""
        return self.edited_curvature.multiply(vectors) + self.start.weights.decay * vectors

    @cached_property
    def _images(self) -> tuple[Tensor, Tensor]:
        """The products with random signs ``(K, P)`` and with the gradient ``(P,)``, computed together."""
        signs = draw_probes(self.gradient, self.start.options.seed)
        images = self.multiply(torch.cat([signs, self.gradient[None]]))
        return images[:-1], images[-1]

    @cached_property
    def image(self) -> Tensor:
        """``H g``, ``(P,)``."""
        return self._images[1] if self.previous is None else self.multiply(self.gradient[None])[0]

    @cached_property
    def squared_norms(self) -> Tensor:
        """Estimates of ``(H^2)_ii``, ``(P,)``: with random signs ``v``, means of ``(H v)_i^2``."""
        if self.previous is not None:
            return self.previous.squared_norms
        return self._images[0].square().mean(dim=0)

    @cached_property
    def damping(self) -> float:
        """What is added to the curvature."""
        options = self.start.options
        if options.damping != "auto":
            return float(options.damping)
        if self.previous is not None:
            return self.previous.damping
        # Along the leading direction of what the products at hand have reached, Lanczos is halfway there.
        start = find_leading_direction(self._images[0])
        return AUTO_DAMPING * estimate_largest_eigenvalue(self.multiply, start, steps=3)

    def score(self, source: Source | None) -> RuleScores:
        """Return scores of one kind for selection rules; only shapes for a rule that looks at none."""
        layout = self.start.weights.layout
        if source == "gain":
            ridge = 0.0 if self.start.forgets else self.damping**2
            gain = compute_gains(self.image, self.squared_norms, ridge)
            return RuleScores(layout.shapes, gain=layout.split(gain))
        if source == "outputs":
            return RuleScores(layout.shapes, outputs=self._score_outputs())
        if source == "gradients":
            zeros = {name: self.gradient.new_zeros(g * o) for name, (g, o, _) in layout.shapes.items()}
            pulled = {name: sums.flatten().abs() for name, sums in self.target.channels.items()}
            return RuleScores(layout.shapes, gradients={**zeros, **pulled})
        return RuleScores(layout.shapes)

    def _score_outputs(self) -> dict[str, Tensor]:
        """Return the absolute mean pre-activation of each channel: its row times the mean input."""
        result = {}
        for name, layer in self.start.weights.plan.layers.items():
            weight, bias = layer.rule.weight(layer.module).detach(), layer.rule.bias(layer.module)
            matrix = layer.from_parameters(weight, None if bias is None else bias.detach())
            fed = self.target.inputs.get(name)
            if fed is None:
                result[name] = matrix.new_zeros(layer.groups * layer.d_out)
                continue
            mean = torch.einsum("goi,gi->go", matrix.to(fed), fed / self.target.examples).flatten()
            frozen = bias is not None and not layer.has_bias
            result[name] = (mean + bias.detach().to(mean) if frozen and bias is not None else mean).abs()
        return result

    def pose(self, mask: Tensor) -> Problem:
        """Return the linear problem of a selection ``(P,)``, boolean."""
        start, options = self.start, self.start.options
        return Problem(
            product=self.multiply,
            edited_product=self.multiply_edited if start.forgets else None,
            gradient=self.gradient,
            image=self.image,
            share=start.share,
            mask=mask.to(self.gradient.device),
            squared_norms=self.squared_norms,
            damping=self.damping,
            definite=options.curvature == "ggn",
            solver=options.solver,
            tolerance=options.tolerance,
            max_steps=options.max_steps,
            seed=options.seed,
        )

    def predict(self, change: Tensor) -> tuple[float, float]:
        """Return what the linearised model predicts for the mean losses of edited and kept examples.

        The gradient of the kept examples follows from that of the edited ones at the optimum.

        Args:
            change: of the weights, ``(P,)``.

        Returns:
            The changes of the two losses, to second order.
        """
        start, (edited, kept) = self.start, self.start.sums
        old, new = (self.target.terms[name] for name in ("old", "new"))
        own = (old if start.forgets else new) / edited
        at_optimum = -(old + (edited + kept) * start.weights.decay * self._theta) / kept
        kept_curvature = self.curvature if start.forgets else self._make_products(start.samples[1])
        bend = [0.5 * products.energy(change) for products in (self.edited_curvature, kept_curvature)]
        return float(own @ change) + bend[0], float(at_optimum @ change) + bend[1]


def draw_probes(like: Tensor, seed: int, probes: int = PROBES) -> Tensor:
    """Draw vectors of random signs, whose products with a matrix tell its diagonal (Hutchinson 1990).

    Args:
        like: a vector ``(P,)``.
        seed: of the signs.
        probes: how many; what is estimated from them has a relative error of about ``sqrt(2 / probes)``.

    Returns:
        ``(probes, P)``.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (probes, len(like)), generator=generator).to(like) * 2 - 1
