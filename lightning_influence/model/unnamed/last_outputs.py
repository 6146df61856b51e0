"""The outputs of the modules that come last before the loss, and the loss as a function of them alone.

These are outputs of the modules that own parameters. Where a module around them uses parameters behind them,
by a function in place of a call, its own output is the last one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Container, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from lightning_influence.model.losses.output_rows import OutputRows
from lightning_influence.model.uses.calls import Watched
from lightning_influence.support.coordinates import to_coordinates

Key = tuple[str, int, int]
"""Name of a module, number of its call in the forward pass, and place of a tensor in what it returned."""


@dataclass(frozen=True)
class Share:
    """A number, or several, that an operation has made of all examples: the sum of what each adds.

    Attributes:
        edge: of the result.
        values: what each example adds to it, ``(B, *shape)``.
    """

    edge: GradientEdge
    values: Tensor


@dataclass(frozen=True)
class CutLoss:
    """A batch's loss, computed from leaves in place of the last outputs.

    Attributes:
        leaves: in place of the outputs, of the same values.
        outputs: what the modules returned there; the coordinates of complex numbers.
        value: the loss, a scalar.
        values: the losses of the examples ``(B,)``, where the user gives them.
        rows: the examples' rows in the leaves.
        watch: what followed them, and some parameters; None if neither was wanted.
        shares: sums over the examples that the loss is made of, where parameters were followed.
    """

    leaves: list[Tensor]
    outputs: list[Tensor]
    value: Tensor
    values: Tensor | None
    rows: Sequence[OutputRows]
    watch: Watched | None
    shares: Sequence[Share] = ()


class OutputTap:
    """Hooks on all modules with parameters, their own or others', for the duration of a ``with`` block.

    Args:
        module: the model.
        cut: outputs at which to cut the graph: each is replaced by a leaf of the same values. None to watch.
        leaves: whether to cut; if not, outputs in ``cut`` are only kept, and copies handed on, which in-place
            operations may change.

    Attributes:
        outputs: what the modules returned at the keys of ``cut``, by key.
        leaves: what took their place, by key.
        seen: without a cut, all that modules returned, by key.
        calls: how often each module was called.
    """

    def __init__(self, module: nn.Module, cut: Sequence[Key] | None = None, *, leaves: bool = True) -> None:
        self.outputs: dict[Key, Tensor] = {}
        self.leaves: dict[Key, Tensor] = {}
        self.seen: dict[Key, Tensor] = {}
        self._module, self._cut, self._replaces = module, cut, leaves
        self._nodes: dict[tuple[Any, int], Key] = {}
        self._around: dict[tuple[Any, int], Key] = {}  # of modules that own no parameters themselves
        self.calls: Counter[str] = Counter()
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        """Register the hooks.

        Returns:
            The tap itself.
        """
        for name, part in self._module.named_modules():
            if next(part.parameters(), None) is not None:
                owns = next(part.parameters(recurse=False), None) is not None
                hook = self._hook(name, self._nodes if owns else self._around)
                self._handles.append(part.register_forward_hook(hook, prepend=False))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def last(
        self, loss: Tensor, holds_examples: Callable[[Tensor], bool], without: Collection[Key] = ()
    ) -> list[Key]:
        """Return the outputs that a graph leads to without passing another one, in the order of the model.

        Args:
            loss: a scalar of the forward pass that was watched.
            holds_examples: whether a tensor has a part for each example. What a module makes of parameters
                alone, as a penalty, has none, and neither has a loss that it computes.
            without: outputs that do not count.
        """
        own = {edge: key for edge, key in self._nodes.items() if key not in without}
        parameters = {id(parameter) for parameter in self._module.parameters()}
        around = {}
        for edge, key in self._around.items():
            _, leaves = _walk([edge], own.keys() - {edge})
            if edge in own or key in without or not leaves & parameters:
                continue
            if holds_examples(self.seen[key]):
                around[edge] = key
        stops = own | around
        met, _ = _walk([(get_gradient_edge(loss).node, loss.output_nr)], stops)
        return [key for edge, key in stops.items() if edge in met]

    def _hook(self, name: str, nodes: dict[tuple[Any, int], Key]) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            call = self.calls[name]
            self.calls[name] += 1
            if self._cut is not None and not any(key[0] == name for key in self._cut):
                return None
            parts, form = pytree.tree_flatten(output)
            changed = False
            for place, part in enumerate(parts):
                if not (isinstance(part, Tensor) and part.requires_grad and torch.is_grad_enabled()):
                    continue
                key = name, call, place
                if self._cut is None:
                    if not part.dim():  # a number is what a module of the loss has made of a batch
                        continue
                    # A module that hands on what another made is not its last user.
                    nodes.setdefault((get_gradient_edge(part).node, part.output_nr), key)
                    self.seen[key] = part
                elif key in self._cut:
                    self.outputs[key] = to_coordinates(part)
                    if self._replaces:
                        leaf = self.leaves[key] = to_coordinates(part.detach()).requires_grad_()
                        parts[place] = torch.view_as_complex(leaf) if part.is_complex() else leaf
                    else:
                        parts[place] = part.clone()
                    changed = True
            return pytree.tree_unflatten(parts, form) if changed else None

        return hook


def _walk(
    edges: list[tuple[Any, int]], stops: Container[tuple[Any, int]]
) -> tuple[set[tuple[Any, int]], set[int]]:
    """Follow a graph from some edges on.

    Args:
        edges: where to begin.
        stops: edges that are not passed.

    Returns:
        The stops that were met, and the identities of the leaves.
    """
    todo, seen, met, leaves = list(edges), set(edges), set(), set()
    while todo:
        edge = todo.pop()
        if edge in stops:
            met.add(edge)
            continue
        variable = getattr(edge[0], "variable", None)
        if variable is not None:
            leaves.add(id(variable))
        for following in edge[0].next_functions:
            if following[0] is not None and following not in seen:
                seen.add(following)
                todo.append(following)
    return met, leaves


def are_chained(tap: OutputTap) -> bool:
    """Return whether one of the outputs depends on another: cutting at it loses the other's share."""
    leaves = {get_gradient_edge(leaf).node for leaf in tap.leaves.values()}
    todo = [get_gradient_edge(output).node for output in tap.outputs.values()]
    seen: set[Any] = set(todo)
    while todo:
        node = todo.pop()
        if node in leaves:
            return True
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
    return False
