"""Whether answers made of few curvature examples hold on others.

Many directions solve the system of few examples well, and their residual there is small, even where the
answer is far from that of all examples: it is long where these few happen to have no curvature. Others show
it. With ``A`` of examples that an answer ``x`` to ``v`` does not depend on, the expectation of ``x^T A x -
2 x^T v`` is ``||x - x*||^2`` in the norm of the whole matrix, less a constant: but for the damping, the mean
squared error of the scores of all training examples. A residual would tell of little but which were drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Chosen by hand: with fewer, which answer is longer is a matter of luck.
_FEWEST = 16


@dataclass(frozen=True)
class Verified:
    """What other examples say of answers.

    Attributes:
        lengths: of each answer, best in the norm of their matrix, at most 1, ``(Q,)``.
        worse: which answers gain less, at their best lengths, than those that they are compared with.
    """

    lengths: Tensor
    worse: Tensor

    def choose(self, answers: Tensor, others: Tensor) -> Tensor:
        """Return the answers in their best lengths, or the others where these are better, ``(Q, P)``."""
        return torch.where(self.worse[:, None], others, answers * self.lengths[:, None].to(answers))

    def bound(self, residuals: Tensor, others: Tensor) -> Tensor:
        """Return relative residuals of what :meth:`choose` returns, at most, from those before, ``(Q,)``."""
        lengths = self.lengths.to(residuals)
        return torch.where(self.worse, others, 1 - lengths + lengths * residuals)

    def describe(self, examples: int) -> str:
        """Return a note, empty if nothing was changed."""
        replaced = int(self.worse.sum())
        shortened = int(((self.lengths < 1) & ~self.worse).sum())
        parts = []
        if replaced:
            parts.append(f"{replaced} got the answer of method='ekfac', which gains more there")
        if shortened:
            parts.append(f"{shortened} were shortened to the length that is best there")
        if not parts:
            return ""
        return (
            f"Answers of the small coarse space were verified on {examples} training examples that it was "
            f"not made of: {', and '.join(parts)}. `curvature_examples=4096` asks for a large space."
        )


def verify_answers(
    rights: Tensor, answers: Tensor, others: Tensor, curved: Tensor, examples: int
) -> Verified:
    """Compare answers by the matrix of examples that none of them was made of.

    Args:
        rights: right-hand sides ``v``, ``(Q, P)``.
        answers: ``x``, ``(Q, P)``.
        others: other answers to the same, ``(Q, P)``.
        curved: ``x^T A x`` of the answers and then of the others, ``(2 Q,)``.
        examples: how many; where they are too few to tell, everything stays.

    Returns:
        Best lengths, and where the others are better. What has no finite length is worse.
    """
    count = len(rights)
    if examples < _FEWEST:
        ones = rights.new_ones(count)
        return Verified(ones, ones < 0)
    along = torch.cat([(part.double() * rights).sum(dim=1) for part in (answers, others)])
    lengths = (along / curved)[:count].nan_to_num(nan=0.0).clamp(0.0, 1.0)
    gains = (along.clamp_min(0).square() / curved).nan_to_num(nan=0.0, posinf=0.0)
    return Verified(lengths.to(rights), gains[:count] < gains[count:])
