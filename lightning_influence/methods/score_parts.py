"""Parts that scores are the sums of: those of layers, and those of blocks of layers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_influence.model.captured import Captured
from lightning_influence.model.layers.gradients import LayerGradients
from lightning_influence.model.layers.plan import LayerPlan
from lightning_influence.support.errors import UnsupportedModelError
from lightning_influence.support.notes import Notes


class Told(Protocol):
    """What a finished answer says of itself, as the context of a call has it."""

    plan: LayerPlan
    notes: Notes
    extra: dict[str, Any]


class ScoreParts(Protocol):
    """What a scoring pass tells apart, and what an answer makes of it."""

    @property
    def count(self) -> int:
        """How many parts there are, ``P``, as far as is known."""
        ...

    def describe(self) -> str:
        """Return what was asked and how many there are, as ``by='layer' for 3 layers``."""
        ...

    def look(self, captured: Captured) -> None:
        """See a batch whose gradients come next."""
        ...

    def score(self, scorer: Any, gradients: Mapping[str, LayerGradients]) -> Tensor:
        """Scores ``(P', Q, B)`` of the first ``P'`` parts; further ones are zero."""
        ...

    def finish(self, scores: Tensor, context: Told) -> dict[str, Any]:
        """Return what attributions hold of the finished parts ``(P, Q, N)``: the scores and the parts."""
        ...


class LayerParts:
    """Parts of layers, or of blocks of them.

    Args:
        parts: the name of each layer's part, in the order of the plan.
        kind: what a part is: a layer or a block.
    """

    def __init__(self, parts: Mapping[str, str], kind: str = "layer") -> None:
        self._parts, self._kind = dict(parts), kind
        self._names = list(dict.fromkeys(parts.values()))

    @property
    def count(self) -> int:
        """How many parts there are."""
        return len(self._names)

    def describe(self) -> str:
        """Return what was asked and how many there are."""
        return f"by={self._kind!r} for {self.count} {self._kind}s"

    def look(self, captured: Captured) -> None:
        """Need nothing of a batch but its gradients."""

    def score(self, scorer: Any, gradients: Mapping[str, LayerGradients]) -> Tensor:
        """Return scores ``(P, Q, B)``.

        Raises:
            UnsupportedModelError: if the scorer cannot tell layers apart.
        """
        by_layer = getattr(scorer, "by_layer", None)
        if by_layer is None:
            raise UnsupportedModelError(
                f"{type(scorer).__name__} does not tell layers apart, which by={self._kind!r} needs. Omit "
                "by=, or give the method's scorer by_layer(gradients), which returns scores (Q, B) by layer."
            )
        sums: dict[str, Tensor] = {}
        for name, scores in by_layer(gradients).items():
            part = self._parts[name]
            sums[part] = sums[part] + scores if part in sums else scores
        return stack_layers(sums, self._names)

    def finish(self, scores: Tensor, context: Told) -> dict[str, Any]:
        """Return the sums, the parts and their names: layers that took no part have left the plan since."""
        left = {self._parts[name] for name in context.plan.layers}
        kept = [name in left for name in self._names]
        parts = scores if all(kept) else scores[torch.tensor(kept)]
        names = [name for name in self._names if name in left]
        return {"scores": parts.sum(dim=0), "layer_scores": parts, "layer_names": names}


def stack_layers(scores: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Return scores ``(Q, B)`` of layers as one tensor ``(L, Q, B)``, zero for layers without."""
    zero = torch.zeros_like(next(iter(scores.values())))
    return torch.stack([scores.get(name, zero) for name in names])


def name_blocks(layers: Iterable[str]) -> dict[str, str]:
    """Return the block of each layer, by its name.

    A block is what a name has up to and with its first number, as ``net.blocks.3``. What has no number stands
    beside the blocks: under as many components of its name as come before the first number of those that have
    one (the fewest), or, where none has, under the first in which names differ.

    Args:
        layers: names of layers, and of parameters by themselves.

    Returns:
        The block's name by that of the layer.
    """
    paths = {name: name.split(".") for name in layers}
    numbers = {
        name: next((at for at, part in enumerate(path) if part.isdigit()), None)
        for name, path in paths.items()
    }
    known = [number for number in numbers.values() if number is not None]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths.values(), strict=False))
    beside = min(known) if known else len(list(shared)) + 1
    ends = {name: beside if number is None else number + 1 for name, number in numbers.items()}
    return {name: ".".join(path[: max(1, ends[name])]) for name, path in paths.items()}
