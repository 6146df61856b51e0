"""What to do about negative curvature before a matrix is inverted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

#: ``"absolute"`` replaces negative eigenvalues by their magnitudes, ``"clip"`` by zero; ``"keep"`` leaves
#: them as they are, and ``"refuse"`` does too, for those who want an error if damping does not outweigh them.
NegativeCurvature = Literal["absolute", "clip", "keep", "refuse"]


@dataclass(frozen=True)
class Definite:
    """A symmetric matrix after its negative eigenvalues were dealt with.

    Attributes:
        matrix: ``(P, P)``, to be inverted.
        magnitude: ``|H|``, ``(P, P)``: what damping rules look at.
        negative: number of negative eigenvalues of ``H``, beyond rounding.
        smallest: smallest eigenvalue of ``H``.
        largest: largest eigenvalue of ``H``.
    """

    matrix: Tensor
    magnitude: Tensor
    negative: int
    smallest: float
    largest: float

    def describe(self, how: str) -> str:
        """Return what was found and what was done, in words."""
        if not self.negative:
            return f"none: the smallest eigenvalue is {self.smallest:.3g}"
        done = {
            "absolute": "replaced by their magnitudes",
            "clip": "replaced by zero",
            "keep": "kept",
            "refuse": "kept, as the damping outweighs them",
        }[how]
        return (
            f"{self.negative} of {len(self.matrix)} eigenvalues are negative, the smallest "
            f"{self.smallest:.3g} beside a largest of {self.largest:.3g}; {done}"
        )


def definite(matrix: Tensor, how: NegativeCurvature = "absolute") -> Definite:
    """Deal with the negative eigenvalues of a symmetric matrix.

    A damped inverse divides by ``h + lambda``, which is near zero for an eigenvalue ``h`` near ``-lambda``: a
    direction of hardly any curvature would then dominate every answer. ``|H|`` (the saddle-free matrix of
    Dauphin et al. 2014) divides by ``|h| + lambda``, which is at least ``lambda``, changes continuously with
    ``H``, and is ``H`` itself where there is no negative curvature.

    Args:
        matrix: ``H``, ``(P, P)``, symmetric.
        how: what becomes of negative eigenvalues.

    Returns:
        The matrix and what was found, in float64.

    Raises:
        ValueError: if ``how`` is not one of the accepted names.
    """
    if how not in get_args(NegativeCurvature):
        names = ", ".join(repr(name) for name in get_args(NegativeCurvature))
        raise ValueError(f"Got negative_curvature={how!r}; accepted are {names}.")
    matrix = matrix.double()
    values, vectors = torch.linalg.eigh(matrix)
    rounding = torch.finfo(values.dtype).eps * len(values) * values.abs().max().clamp_min(0)
    negative = int((values < -rounding).sum())
    magnitude = matrix if not negative else (vectors * values.abs()) @ vectors.T
    changed = {
        "absolute": magnitude,
        "clip": matrix if not negative else (vectors * values.clamp_min(0)) @ vectors.T,
    }.get(how, matrix)
    return Definite(changed, magnitude, negative, float(values[0]), float(values[-1]))
