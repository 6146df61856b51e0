"""Scores by position of the sequence: what each token of a training example adds to its score.

A layer's gradient is a sum over positions of outer products, and scores are linear in it: the positions of an
example are scored as examples of their own. Layers whose rows are not the positions of the sequence have a
part together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_influence.methods.context import Context
from lightning_influence.methods.score_parts import Told
from lightning_influence.model.captured import Captured
from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.gradients import LayerGradients
from lightning_influence.model.layers.plan import LayerPlan
from lightning_influence.model.layers.positions import count_positions, split_positions
from lightning_influence.support.errors import UnsupportedModelError

# Chosen by hand: positions that are scored at once. Products of so many rows run at full speed, and what is
# held of each beside its scores stays small.
_AT_ONCE = 4096
# How many layers a note or an error names.
_NAMED = 4


class PositionParts:
    """Parts of positions; the first one is of what has none, and the positions follow.

    Args:
        layers: names of the layers whose rows are the positions of the sequence.
        length: positions of the longest example that is known, ``T``.
        others: names of the other layers.
    """

    def __init__(self, layers: set[str], length: int, others: Collection[str]) -> None:
        self._layers, self._length, self._others = layers, length, list(others)
        self._regular: Collection[str] = ()  # layers of the batch whose rows are not picked by values

    @property
    def count(self) -> int:
        """``T + 1``."""
        return self._length + 1

    def describe(self) -> str:
        """Return what was asked and how many there are."""
        return f"by='position' for {self._length} positions and what has none"

    def look(self, captured: Captured) -> None:
        """See whose rows are in the order of the positions."""
        self._regular = self._layers & captured.recorder.count_calls().keys()

    def score(self, scorer: Any, gradients: Mapping[str, LayerGradients]) -> Tensor:
        """Return scores ``(T' + 1, Q, B)``, where ``T'`` is the length of the batch's examples.

        Raises:
            UnsupportedModelError: if layers differ in their number of positions.
        """
        total: Tensor = scorer(gradients)
        counts = {name: count_positions(gradients[name]) for name in gradients if name in self._regular}
        counts = {name: count for name, count in counts.items() if count}
        if not counts:
            return total[None]
        first = next(iter(counts))
        length = counts[first]
        other = next((name for name in counts if counts[name] != length), None)
        if other is not None:
            raise UnsupportedModelError(
                f"Got by='position', but in one batch layer {first!r} has {length} rows an example and layer "
                f"{other!r} has {counts[other]}, which in another had as many. Leave layers of other "
                f"sequences out with layers=, or omit by=."
            )
        step = max(1, _AT_ONCE // length)
        runs = [slice(start, start + step) for start in range(0, total.shape[1], step)]
        found = torch.cat(
            [scorer({name: split_positions(gradients[name].select(run)) for name in counts}) for run in runs],
            dim=1,
        )
        parts = found.view(len(found), -1, length).permute(2, 0, 1)
        # Of the scores of whole gradients, so that parts add up to what is answered without them.
        rest = total - parts.sum(0) if len(counts) < len(gradients) else torch.zeros_like(total)
        return torch.cat([rest[None], parts])

    def finish(self, scores: Tensor, context: Told) -> dict[str, Any]:
        """Return the sums and the parts, and note what has no position; the first part becomes the last."""
        rest = scores[0].clone()
        for position in range(len(scores) - 1):  # in place: no second tensor of this size
            scores[position] = scores[position + 1]
        scores[-1] = rest
        total = scores.sum(dim=0)
        others = [name for name in self._others if name in context.plan.layers]
        share = float(rest.norm() / total.norm()) if bool(total.any()) else 0.0
        context.extra["without_position"] = {"layers": others, "share": share}
        if others:
            context.notes.inform(
                f"{_list(others)} have no rows by position of the sequence: what they add to the scores, "
                f"{share:.2g} of these by norm, stands in position_scores[-1]."
            )
        return {"scores": total, "position_scores": scores}


class PositionTrial:
    """Sees on a first batch which layers have the positions of the sequence as rows.

    Args:
        plan: the covered layers.

    Attributes:
        counts: rows of an example by layer; none of layers whose rows are in no order.
        length: how many most layers have that are called once, ``T``; 0 if none has several.
    """

    description = "Influence: positions"

    def __init__(self, plan: LayerPlan) -> None:
        self.forward = Forward(plan)
        self.counts: dict[str, int] = {}
        self.length = 0

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Look at one batch, unless one before has told."""
        captured = self.forward(module, batch, len(indices))
        calls = captured.recorder.count_calls()
        gradients = captured.loss_gradients(keep_graph=False)
        counts = {name: count_positions(layer) for name, layer in gradients.items() if name in calls}
        rows = Counter(count for name, count in counts.items() if count > 1 and calls[name] == 1)
        if rows and not self.length:
            self.counts, self.length = counts, rows.most_common(1)[0][0]


def find_positions(context: Context) -> PositionParts:
    """Find out which layers have rows by position; processes agree.

    Args:
        context: runs a batch of the training examples.

    Returns:
        The parts, as many as the batch shows.

    Raises:
        UnsupportedModelError: if none has.
    """
    runner, train, names = context.runner, context.train, list(context.plan.layers)
    trial = PositionTrial(context.plan)
    each = -(-train.num_examples // len(train))
    runner.run(trial, train.parts(each * runner.world_size)[0])
    seen = torch.tensor([[trial.length, *(trial.counts.get(name, 0) for name in names)]])
    found = next((row for row in runner.all_gather_cat(seen).tolist() if row[0]), None)
    if found is None:
        raise UnsupportedModelError(
            "Got by='position', but no layer that is called once has several rows an example, as layers on "
            "the positions of a sequence have. by='layer' tells layers apart; omit by= for scores alone."
        )
    length, counts = found[0], dict(zip(names, found[1:], strict=True))
    layers = {name for name in names if counts[name] == length}
    return PositionParts(layers, length, [name for name in names if name not in layers])


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"Layers {', '.join(map(repr, names[:_NAMED]))}{more}"
