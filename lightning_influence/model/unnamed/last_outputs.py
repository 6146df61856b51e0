"""The outputs of the modules that come last before the loss, and the loss as a function of them alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
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
        outputs: what the modules returned there.
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
    """Hooks on all modules that own parameters, for the duration of a ``with`` block.

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
        self.calls: Counter[str] = Counter()
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        """Register the hooks.

        Returns:
            The tap itself.
        """
        for name, part in self._module.named_modules():
            if next(part.parameters(recurse=False), None) is not None:
                self._handles.append(part.register_forward_hook(self._hook(name), prepend=False))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def last(self, loss: Tensor, without: Collection[Key] = ()) -> list[Key]:
        """Return the outputs that a graph leads to without passing another one, in the order of the model.

        Args:
            loss: a scalar of the forward pass that was watched.
            without: outputs that do not count.
        """
        met: set[Key] = set()
        todo: list[tuple[Any, int]] = [(get_gradient_edge(loss).node, loss.output_nr)]
        seen = set(todo)
        while todo:
            node, number = todo.pop()
            if (node, number) in self._nodes and self._nodes[node, number] not in without:
                met.add(self._nodes[node, number])
                continue
            for following in node.next_functions:
                if following[0] is not None and following not in seen:
                    seen.add(following)
                    todo.append(following)
        return [key for key in self._nodes.values() if key in met]

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            call = self.calls[name]
            self.calls[name] += 1
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
                    self._nodes.setdefault((get_gradient_edge(part).node, part.output_nr), key)
                    self.seen[key] = part
                elif key in self._cut:
                    self.outputs[key] = part
                    if self._replaces:
                        parts[place] = self.leaves[key] = part.detach().requires_grad_()
                    else:
                        parts[place] = part.clone()
                    changed = True
            return pytree.tree_unflatten(parts, form) if changed else None

        return hook


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
