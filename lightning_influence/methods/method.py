"""What a method of attribution is: something that solves against a curvature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_influence.curvature.inverse import BlockInverse, EigenInverse
from lightning_influence.methods.context import Context
from lightning_influence.methods.forecast import Forecast
from lightning_influence.methods.options import Options, parse_options
from lightning_influence.methods.scoring_passes import Quadratic, Scorer, SelfScores
from lightning_influence.model.layers.gradients import LayerGradients
from lightning_influence.model.layers.plan import Layout

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
    #: The dataclass of the method's options; :func:`register_method` sets it.
    options_type: ClassVar[type[Options]] = Options
    #: What the user asked for. A method with options of its own annotates it with their class.
    options: Options

    def __init__(self, context: Context) -> None:
        self.context = context
        self.options = context.options

    def note_unused(self) -> None:
        """Say which options were given that belong to other methods."""
        if self.options.unused:
            self.context.notes.add(f"The method {self.name!r} does not use {', '.join(self.options.unused)}.")

    @property
    def whole_gauss_newton(self) -> bool:
        """Whether the system is the Gauss-Newton matrix of all layers together."""
        return False

    def forecast(self, told: Forecast, queries: int) -> bool:
        """Add the passes and seconds that scores of so many queries are going to take.

        Args:
            told: what to add them to.
            queries: how many.

        Returns:
            Whether the method can tell.
        """
        return False

    @abstractmethod
    def prepare(self) -> None:
        """Run whatever passes do not depend on the queries."""

    def prepare_to_solve(self, queries: int) -> None:
        """Run the passes that :meth:`solve` needs: those of :meth:`prepare`, unless queries can share one.

        Args:
            queries: how many there are.
        """
        self.prepare()

    def prepare_self(self) -> None:
        """Run the passes that :meth:`quadratic` needs: those of :meth:`prepare`, unless these are more."""
        self.prepare()

    @property
    def answering(self) -> Method:
        """The method that answers once this one is prepared: itself, unless another does as well for less."""
        return self

    @abstractmethod
    def solve(self, queries: Queries) -> Solved:
        """Solve for query gradients, ``K = 1``; the mapping may be emptied."""

    def group_size(self) -> int:
        """Return how many queries are solved and scored at once, if :attr:`in_groups`.

        As many as half of the memory budget holds solved: solving needs the other half.
        """
        context = self.context
        width = torch.empty((), dtype=context.dtype).element_size()
        return max(1, self.options.memory_budget // max(1, 2 * context.layout.numel * width))

    @property
    def compresses(self) -> bool:
        """Whether solved queries may take less memory than :meth:`group_size` takes them to."""
        return False

    def measure_group_size(self, queries: Queries) -> int:
        """Return :meth:`group_size` as a few queries tell it, if the method :attr:`compresses`.

        Args:
            queries: their gradients; every process calls it.
        """
        return self.group_size()

    @abstractmethod
    def solutions(self, queries: Gradients) -> tuple[Tensor, Tensor | None]:
        """``(H + lambda I)^{-1} v`` as flat vectors ``(Q, P)``, and the residuals as in :class:`Solved`."""

    @abstractmethod
    def quadratic(self) -> Quadratic:
        """The function ``g -> g^T (.)^{-1} g`` of a batch's gradients, ``(B,)``; may give residuals too."""

    def refine(self, scores: SelfScores) -> SelfScores:
        """Improve self-influence once it is known which training examples are not solved.

        Args:
            scores: what :meth:`quadratic` gave, of all processes.

        Returns:
            The same, unless the method iterates.
        """
        return scores


_METHODS: dict[str, type[Method]] = {}


def register_method(
    name: str, *, options: type[Options] | None = None
) -> Callable[[type[Method]], type[Method]]:
    """Class decorator: make a method available under a name.

    Args:
        name: what users pass as ``method=``.
        options: the dataclass of its options, derived from :class:`Options`; users pass the fields by name.
            None for those of the class that the method derives from.

    Returns:
        The decorator; it returns the class with its ``name`` and ``options_type`` set.

    Raises:
        TypeError: if the options are no dataclass derived from :class:`Options`.
    """
    if options is not None and not (
        isinstance(options, type) and issubclass(options, Options) and "__dataclass_fields__" in vars(options)
    ):
        raise TypeError(
            f"Got options={options!r} for method {name!r}; accepted is a class derived from "
            "lightning_influence.methods.Options and decorated with @dataclass(frozen=True)."
        )

    def decorate(method: type[Method]) -> type[Method]:
        method.name = name
        if options is not None:
            method.options_type = options
        _METHODS[name] = method
        return method

    return decorate


def read_options(method: str, given: Mapping[str, Any]) -> Options:
    """Return the options of a method from keyword arguments that a user gave.

    Args:
        method: name of a registered method.
        given: values by name; None asks for the default.

    Raises:
        TypeError: if no method has such an option; names the nearest, and those that this method accepts.
        ValueError: if there is no such method, or a value is out of range.
    """
    return parse_options(method, find_method(method).options_type, list_option_types(), given)


def list_option_types() -> list[type[Options]]:
    """Return the dataclasses of the options of all registered methods, each once."""
    return list(dict.fromkeys(method.options_type for method in _METHODS.values()))


def find_method(name: str) -> type[Method]:
    """Return the method of this name.

    Raises:
        ValueError: listing the registered names.
    """
    if not isinstance(name, str) or name not in _METHODS:
        raise ValueError(f"Got method={name!r}; accepted are {', '.join(sorted(_METHODS))}.")
    return _METHODS[name]


def make_identity(layout: Layout, like: Tensor) -> BlockInverse:
    """Return the identity on every layer."""
    ones = {name: EigenInverse(None, like.new_ones(shape), 0.0) for name, shape in layout.shapes.items()}
    return BlockInverse(layout, ones)
