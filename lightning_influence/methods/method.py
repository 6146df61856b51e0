"""What a method of attribution is: something that solves against a curvature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_influence.curvature.inverse import BlockInverse, EigenInverse
from lightning_influence.methods.context import Context
from lightning_influence.methods.options import Options
from lightning_influence.methods.scoring_passes import Scorer
from lightning_influence.model.gradients import LayerGradients
from lightning_influence.model.plan import Layout

#: Options that only some methods use, and that change what is computed.
SPECIFIC = (
    "tolerance",
    "max_steps",
    "curvature",
    "preconditioner",
    "batch_size",
    "step_size",
    "momentum",
    "blocks",
    "negative_curvature",
)

Gradients = Mapping[str, LayerGradients]
Queries = MutableMapping[str, LayerGradients]


@dataclass(frozen=True)
class Solved:
    """Solved queries.

    Attributes:
        scorer: scores training gradients against them.
        residuals: relative residual of each query in the method's own system, ``(Q,)``; None for closed
            forms, which solve their system exactly.
    """

    scorer: Scorer
    residuals: Tensor | None = None


class Method(ABC):
    """One way to solve ``(H + lambda I) x = v``; register it with :func:`register_method`.

    Args:
        context: passes, data, state and settings.
    """

    name: ClassVar[str]
    #: Mean loss weight of a training example, once the method knows it; 1 unless a pass or factors tell.
    mean_weight: float = 1.0
    #: Whether queries that do not fit into the memory budget together are solved and scored in groups.
    in_groups: ClassVar[bool] = False
    #: Which of :data:`SPECIFIC` the method uses.
    uses: ClassVar[frozenset[str]] = frozenset()
    #: What an iterative method uses where the options say None.
    default_tolerance: ClassVar[float] = 0.2
    default_max_steps: ClassVar[int] = 3

    def __init__(self, context: Context) -> None:
        self.context = context

    def note_unused(self) -> None:
        """Say which options were given that the method does not use."""
        options, default = self.context.options, Options()
        given = [name for name in SPECIFIC if getattr(options, name) != getattr(default, name)]
        unused = [f"{name}={getattr(options, name)!r}" for name in given if name not in self.uses]
        if unused:
            self.context.notes.add(f"The method {self.name!r} does not use {', '.join(unused)}.")

    @property
    def tolerance(self) -> float:
        """Relative residual at which a query counts as solved: the user's, or the method's own."""
        own = self.context.options.tolerance
        return self.default_tolerance if own is None else own

    @property
    def max_steps(self) -> int:
        """Most steps of an iterative method: the user's, or the method's own."""
        own = self.context.options.max_steps
        return self.default_max_steps if own is None else own

    @abstractmethod
    def prepare(self) -> None:
        """Run whatever passes do not depend on the queries."""

    @abstractmethod
    def solve(self, queries: Queries) -> Solved:
        """Solve for query gradients, ``K = 1``; the mapping may be emptied."""

    def group_size(self) -> int:
        """Return how many queries are solved and scored at once, if :attr:`in_groups`.

        As many as half of the memory budget holds solved: solving needs the other half.
        """
        context = self.context
        width = torch.empty((), dtype=context.dtype).element_size()
        return max(1, context.options.memory_budget // max(1, 2 * context.layout.numel * width))

    @abstractmethod
    def solutions(self, queries: Gradients) -> tuple[Tensor, Tensor | None]:
        """``(H + lambda I)^{-1} v`` as flat vectors ``(Q, P)``, and the residuals as in :class:`Solved`."""

    @abstractmethod
    def quadratic(self) -> Callable[[Gradients], Tensor]:
        """The function ``g -> g^T (.)^{-1} g``, mapping gradients of a batch to ``(B,)``."""


_METHODS: dict[str, type[Method]] = {}


def register_method(name: str) -> Callable[[type[Method]], type[Method]]:
    """Class decorator: make a method available under a name.

    Args:
        name: what users pass as ``method=``.

    Returns:
        The decorator; it returns the class with its ``name`` set.
    """

    def decorate(method: type[Method]) -> type[Method]:
        method.name = name
        _METHODS[name] = method
        return method

    return decorate


def find_method(name: str) -> type[Method]:
    """Return the method of this name.

    Raises:
        ValueError: listing the registered names.
    """
    if not isinstance(name, str) or name not in _METHODS:
        raise ValueError(f"Got method={name!r}; accepted are {', '.join(sorted(_METHODS))}.")
    return _METHODS[name]


def identity_inverse(layout: Layout, like: Tensor) -> BlockInverse:
    """Return the identity on every layer."""
    ones = {name: EigenInverse(None, like.new_ones(shape), 0.0) for name, shape in layout.shapes.items()}
    return BlockInverse(layout, ones)
