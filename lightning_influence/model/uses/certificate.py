"""The certificate: whether per-example gradients add up to the gradient that automatic differentiation has.

With a random weight ``w_n`` for each example, ``sum_n w_n g_n`` must equal the gradient of ``sum_n w_n
l_n``, for every parameter. One more backward pass thereby checks every closed form, every guess about where
the examples stand, and whether all uses of a parameter were seen. The weights have to be random: with equal
ones any partition of the rows among the examples passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.model.uses.parts import ParameterGradient

# Two orders of summation differ by a few roundings times the cancellation in between; a wrong partition is
# wrong by about one. The square root of the precision (half of the digits) lies far from both.
_SHARE_OF_DIGITS = 0.5
# Gradients that vanish but for rounding (of the bias of keys, which softmax does not see) are measured
# against the largest of the model: a few hundred roundings of it are none of theirs.
_ROUNDINGS = 256


@dataclass(frozen=True)
class Verdict:
    """How one parameter's gradients compare.

    Attributes:
        error: norm of the difference.
        allowed: the largest norm that rounding explains.
    """

    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether rounding explains the difference; NaN does not pass."""
        return self.error <= self.allowed


def draw_weights(num_examples: int, like: Tensor, seed: int = 0) -> Tensor:
    """Draw a weight for each example, away from zero and of either sign.

    Args:
        num_examples: ``B``.
        like: a tensor of the precision and device that are wanted.
        seed: of a generator of its own; the global one is left alone.

    Returns:
        Weights ``(B,)``.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = 0.5 + torch.rand(num_examples, generator=generator, dtype=torch.float64)
    signs = torch.randint(0, 2, (num_examples,), generator=generator) * 2 - 1
    return (sizes * signs).to(like)


def weigh_losses(
    losses: Tensor, weights: Tensor, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor | None]:
    """Differentiate weighted losses by automatic differentiation.

    Args:
        losses: of each example, ``(B,)``; their graph is kept.
        weights: ``(B,)``.
        parameters: by name.

    Returns:
        The gradient by name; None for a parameter that the losses do not depend on.
    """
    grads = torch.autograd.grad(
        losses @ weights.to(losses), list(parameters.values()), retain_graph=True, allow_unused=True
    )
    dense = [
        None if grad is None else grad.to_dense() for grad in grads
    ]  # those of sparse embeddings are not
    return dict(zip(parameters, dense, strict=True))


def certify(
    gradients: Mapping[str, ParameterGradient],
    weights: Tensor,
    reference: Mapping[str, Tensor | None],
    eps: float,
) -> dict[str, Verdict]:
    """Compare weighted sums of per-example gradients with a gradient of the weighted losses.

    Where only the loss of a whole batch is known, a part of the batch takes the place of the weights: these
    are 1 for its examples and 0 for others, and the reference is the gradient of the part's loss, as a sum.

    Args:
        gradients: by parameter, of one seed; missing ones count as zero.
        weights: ``(B,)``.
        reference: the gradients of the weighted losses by parameter.
        eps: relative rounding error of the lowest precision that took part, see :attr:`Watch.eps`.

    Returns:
        A verdict on every parameter that ``reference`` names.
    """
    floor = max((float(grad.norm()) for grad in reference.values() if grad is not None), default=0.0)
    verdicts = {}
    for name, grad in reference.items():
        found = gradients.get(name)
        if found is None and grad is None:
            verdicts[name] = Verdict(0.0, 0.0)
            continue
        if found is None:
            assert grad is not None
            verdicts[name] = Verdict(float(grad.norm()), eps * _ROUNDINGS * floor)
            continue
        total = found.combine(weights[None])
        error = total if grad is None else total - grad.to(total)
        scale = float(found.bound(weights[None]))
        allowed = eps**_SHARE_OF_DIGITS * scale + eps * _ROUNDINGS * floor
        verdicts[name] = Verdict(float(error.norm()), allowed)
    return verdicts
