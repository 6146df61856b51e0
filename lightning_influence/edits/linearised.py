"""One linearisation of a model for an edit: what has to be nullified, the curvature, and the theory's step.

With ``U`` sums of losses, ``W`` sums of their weights, ``E`` the edited and ``K`` the kept examples, and a
model at the optimum of its training objective (weight decay ``w`` included):

- forgetting: the new objective is ``U_K / W_K``, its gradient there ``-(W_E / W_K) (g + w theta)`` with ``g``
  the mean gradient of the forgotten examples;
- relabelling: it is ``(U_K + U_E') / W``, its gradient ``-(W_E / W) (g_old - g_new)``.

The factor in front is the scale of the edit, and the curvature that of the new objective.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_influence.edits.curvature import Curvature
from lightning_influence.edits.data import EditData
from lightning_influence.edits.directions import Problem
from lightning_influence.edits.evidence import collect, random_signs
from lightning_influence.edits.objective import Objective
from lightning_influence.edits.options import EditOptions
from lightning_influence.edits.passes import GradientSumPass
from lightning_influence.edits.rules import Evidence, Source, gains
from lightning_influence.edits.sampling import Sample
from lightning_influence.linalg.lanczos import estimate_largest_eigenvalue
from lightning_influence.linalg.normal_equations import find_leading_direction
from lightning_influence.model.plan import LayerPlan, Layout
from lightning_influence.running.runner import Runner
from lightning_influence.support.errors import InfluenceError, NonFiniteError
from lightning_influence.support.notes import Notes

# Share of the trace of each example's output curvature that is kept when relabelling in several steps.
COLUMN_SHARE = 0.9
# Of the outputs whose curvature such a relabelling takes: it has to reach beyond where the model is sure.
TEMPERATURE = 3.0
# Directions whose curvature is below this share of the largest are not told from noise.
AUTO_DAMPING = 0.01


@dataclass
class Linearised:
    """A model linearised at its present weights.

    Attributes:
        runner: an entered runner on the module.
        plan: the covered layers.
        data: the examples.
        options: settings.
        theta: the covered weights, ``(P,)``.
        change: of the weights so far, ``(P,)``.
        decay: weight decay of each of them, ``(P,)``.
        objective: the training objective after the edit; None where a search for forgetting goes without.
        weights: the sums ``W_E`` and ``W_K``.
        samples: edited and kept examples that their curvature is an average over.
        at_optimum: whether the model is taken to be at the optimum of its training objective, so that the
            edited examples' gradient tells that of the new objective. It is measured otherwise, and after a
            first step, which has left the optimum.
        notes: where to say what was estimated.
        previous: the linearisation before, whose damping and preconditioner still serve.
    """

    runner: Runner
    plan: LayerPlan
    data: EditData
    options: EditOptions
    theta: Tensor
    change: Tensor
    decay: Tensor
    objective: Objective | None
    weights: tuple[float, float]
    samples: tuple[Sample, Sample]
    at_optimum: bool
    notes: Notes
    previous: Linearised | None = None

    @property
    def forgets(self) -> bool:
        """Whether the examples are removed rather than relabelled."""
        return self.data.targets is None

    @property
    def share(self) -> float:
        """``p``: the edited examples' share of the weight of the training data."""
        edited, kept = self.weights
        return edited / (edited + kept)

    @property
    def scale(self) -> float:
        """The theory's step."""
        edited, kept = self.weights
        return edited / kept if self.forgets else edited / (edited + kept)

    @cached_property
    def target(self) -> GradientSumPass:
        """The gradients of the edited examples."""
        new = 0.0 if self.forgets else -1.0
        one_pass = GradientSumPass(self.plan, self.data, self.data.edited, old=1.0, new=new)
        self.runner.run(one_pass, self.data.edited_loader)
        return one_pass

    @cached_property
    def gradient(self) -> Tensor:
        """``g``, ``(P,)``: what the edit nullifies, so that the weights move by ``scale H^{-1} g``.

        Raises:
            InfluenceError: if it is zero.
        """
        if self.objective is not None and not (self.at_optimum and self.previous is None):
            return self._measured()
        gradient = self.target.total / self.weights[0]
        if self.previous is None and not bool(gradient.any()):
            raise InfluenceError(
                "The edited examples have no gradient in the covered layers: there is nothing to nullify. "
                "They may be fitted perfectly, or no covered layer may reach their loss."
            )
        return gradient + self.decay * self.theta if self.forgets else gradient

    def _measured(self) -> Tensor:
        """Return the descent of the new objective, in the unit of the edited examples' mean.

        Raises:
            NonFiniteError: if it is NaN or infinite.
        """
        assert self.objective is not None
        found = self.objective(self.change)
        if found is None:
            raise NonFiniteError("A loss or gradient is NaN or infinite. Check the examples and the weights.")
        return found[1] / -self.scale

    @cached_property
    def curvature(self) -> Curvature:
        """The curvature of the new objective, without weight decay."""
        edited, kept = self.samples
        return self._curvature(kept if self.forgets else kept.mixed(edited, self.share))

    @property
    def kept_curvature(self) -> Curvature:
        """The curvature of the kept examples."""
        return self.curvature if self.forgets else self._curvature(self.samples[1])

    @cached_property
    def edited_curvature(self) -> Curvature:
        """The curvature of the edited examples, at their new targets if they have any."""
        return self._curvature(self.samples[0])

    def _curvature(self, sample: Sample) -> Curvature:
        options = self.options
        reaches = options.step == "search" and not self.forgets and options.linearisations != 1
        return Curvature(
            self.runner,
            self.plan,
            self.data,
            sample,
            exact=options.curvature == "hessian",
            memory_budget=options.memory_budget // 2,
            seed=options.seed,
            share=COLUMN_SHARE if reaches else 1.0,
            temperature=TEMPERATURE if reaches else 1.0,
            mixes=options.curvature_examples is not None and options.solver != "dense",
            notes=self.notes,
        )

    def product(self, vectors: Tensor) -> Tensor:
        """Return products ``(V, P)`` with the curvature of the new objective, weight decay included."""
        return self.curvature.product(vectors) + self.decay * vectors

    def edited_product(self, vectors: Tensor) -> Tensor:
        """Return products ``(V, P)`` with the curvature of the edited examples, weight decay included."""
        return self.edited_curvature.product(vectors) + self.decay * vectors

    @cached_property
    def _images(self) -> tuple[Tensor, Tensor]:
        """The products with random signs ``(K, P)`` and with the gradient ``(P,)``, computed together."""
        signs = random_signs(self.gradient, self.options.seed)
        images = self.product(torch.cat([signs, self.gradient[None]]))
        return images[:-1], images[-1]

    @cached_property
    def image(self) -> Tensor:
        """``H g``, ``(P,)``."""
        return self._images[1] if self.previous is None else self.product(self.gradient[None])[0]

    @cached_property
    def squared_norms(self) -> Tensor:
        """Estimates of ``(H^2)_ii``, ``(P,)``: with random signs ``v``, means of ``(H v)_i^2``."""
        if self.previous is not None:
            return self.previous.squared_norms
        return self._images[0].square().mean(dim=0)

    @cached_property
    def damping(self) -> float:
        """What is added to the curvature."""
        if self.options.damping != "auto":
            return float(self.options.damping)
        if self.previous is not None:
            return self.previous.damping
        # Along the leading direction of what the products at hand have reached, Lanczos is halfway there.
        start = find_leading_direction(self._images[0])
        return AUTO_DAMPING * estimate_largest_eigenvalue(self.product, start, steps=3)

    def evidence(self, source: Source | None) -> Evidence:
        """Return scores of one kind for selection rules."""
        if source != "gain":
            return collect(source, self.plan, self.target, self.gradient)
        gain = gains(self.image, self.squared_norms, 0.0 if self.forgets else self.damping**2)
        layout = Layout.of(self.plan.layers)
        return Evidence(layout.shapes, gain=layout.split(gain))

    def problem(self, mask: Tensor) -> Problem:
        """Return the linear problem for a selection ``(P,)``."""
        options = self.options
        return Problem(
            product=self.product,
            edited_product=self.edited_product if self.forgets else None,
            gradient=self.gradient,
            image=self.image,
            share=self.share,
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
        edited, kept = self.weights
        old, new = (self.target.terms[name] for name in ("old", "new"))
        own = (old if self.forgets else new) / edited
        at_optimum = -(old + (edited + kept) * self.decay * self.theta) / kept
        bend = [0.5 * curvature.energy(change) for curvature in (self.edited_curvature, self.kept_curvature)]
        return float(own @ change) + bend[0], float(at_optimum @ change) + bend[1]
