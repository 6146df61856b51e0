"""What a method of attribution is: something that solves against a curvature, with passes over the data at hand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from lightning_influence.factors.damping import resolve_damping
from lightning_influence.factors.factors import Factors
from lightning_influence.factors.inverse import BlockInverse, EigenInverse
from lightning_influence.layers import LayerGradients, LayerPlan
from lightning_influence.layers.layout import Layout
from lightning_influence.passes.forward import Fisher
from lightning_influence.passes.scores import Scorer
from lightning_influence.state import InfluenceState

Damping = float | Literal["auto", "heuristic"]
Gradients = Mapping[str, LayerGradients]


class Loader(Protocol):
    """Training examples that can be subsampled."""

    @property
    def num_examples(self) -> int:
        """``N``."""
        ...

    def sample(self, count: int, seed: int) -> Loader:
        """About ``count`` examples drawn at random, the same for the same seed."""
        ...


class Passes(Protocol):
    """Runs passes over loaders, on one process or several."""

    @property
    def world_size(self) -> int:
        """Number of processes that share a pass."""
        ...

    def run(self, one_pass: Any, dataloaders: Any) -> Any:
        """Run one pass."""
        ...

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        ...

    def all_gather_cat(self, tensor: Tensor) -> Tensor:
        """All processes' tensors joined along the first dimension."""
        ...


@dataclass(frozen=True)
class Options:
    """Settings of one call, with what they mean in :func:`~lightning_influence.trainer.influence`."""

    damping: Damping = "auto"
    fisher: Fisher = "sampled"
    memory_budget: int = 2**30
    tolerance: float = 0.2
    max_steps: int = 3
    low_rank_tolerance: float = 1e-3
    curvature_examples: int = 4096
    max_parameters: int = 8192
    seed: int = 0


@dataclass
class Context:
    """Everything a method works with.

    Attributes:
        runner: runs passes.
        plan: the covered layers.
        train: the training examples.
        state: what is kept between calls.
        options: settings of this call.
        warnings: what was left out or assumed, for the diagnostics.
        extra: further diagnostics.
        damping: the damping of each layer once it is decided.
        damping_origin: where it comes from.
    """

    runner: Passes
    plan: LayerPlan
    train: Loader
    state: InfluenceState
    options: Options
    device: torch.device
    dtype: torch.dtype
    weights_key: str = ""
    warnings: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    damping: dict[str, float] = field(default_factory=dict)
    damping_origin: str = "not used"

    @property
    def layout(self) -> Layout:
        """The order of flat vectors over the covered layers."""
        return Layout.of(self.plan.layers)

    def resolve_damping(self, factors: Factors, solver: Literal["closed", "full"]) -> dict[str, float]:
        """Decide the damping, and remember it for the diagnostics."""
        self.damping, self.damping_origin = resolve_damping(
            self.options.damping, factors, self.state.record, solver=solver
        )
        return self.damping


@dataclass(frozen=True)
class Solved:
    """Solved queries.

    Attributes:
        scorer: scores training gradients against them.
        residuals: relative residual of each query in the method's own system, ``(Q,)``; None for closed forms, which
            solve their system exactly.
    """

    scorer: Scorer
    residuals: Tensor | None = None


class Method(ABC):
    """One way to solve ``(H + lambda I) x = v``; register it with :func:`register_method`.

    Args:
        context: passes, data, state and settings.
    """

    name: ClassVar[str]

    def __init__(self, context: Context) -> None:
        self.context = context

    @abstractmethod
    def prepare(self) -> None:
        """Run whatever passes do not depend on the queries."""

    @abstractmethod
    def solve(self, queries: Gradients) -> Solved:
        """Solve for query gradients, ``K = 1``."""

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
    """The method of this name.

    Raises:
        ValueError: listing the registered names.
    """
    if name not in _METHODS:
        raise ValueError(f"Got method={name!r}; accepted are {', '.join(sorted(_METHODS))}.")
    return _METHODS[name]


def identity_inverse(layout: Layout, like: Tensor) -> BlockInverse:
    """The identity on every layer."""
    ones = {name: EigenInverse(None, like.new_ones(shape), 0.0) for name, shape in layout.shapes.items()}
    return BlockInverse(layout, ones)
