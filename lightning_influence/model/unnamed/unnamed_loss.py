"""Losses of which no loss function is known by name: batches are read, and examples checked to add up."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_influence.model.batches.forms import read_form
from lightning_influence.model.batches.rearranging import Layout, UnknownPartError, find_layouts, rearranged
from lightning_influence.model.layers.layer import Layer, parameters_of
from lightning_influence.model.layers.recorder import Recorder
from lightning_influence.model.losses.batch import BatchLoss, BatchLossTraits
from lightning_influence.model.losses.combined import WEIGHTED
from lightning_influence.model.losses.picked import PickedRows
from lightning_influence.model.losses.shared import JointLoss
from lightning_influence.model.losses.way import Way
from lightning_influence.model.unnamed.additivity import (
    COUPLED,
    check_cross_derivatives,
    draw_parts,
    find_ratio,
    tell_mean,
)
from lightning_influence.model.unnamed.alone import (
    REMEDY,
    Run,
    compute_alone,
    note_layout,
    read_layout,
    to_scalar,
)
from lightning_influence.model.unnamed.cut import Cut, OtherCallsError
from lightning_influence.model.unnamed.last_outputs import CutLoss, OutputTap
from lightning_influence.model.unnamed.loss_parameters import LossParameters, PartGradients, find_direct
from lightning_influence.support.errors import UnsupportedModelError
from lightning_influence.support.random_states import preserve_rng, remember_draws

_MEAN, _SUM, _GIVEN = "loss is a mean", "loss is a sum", "losses of examples are given"
# Chosen by hand: what couples examples may do so in some batches only, as a term for the balance of experts
# of which a first batch takes one. So these are taken apart, too, once in all passes of a question.
_LOOKS, _AGAIN = (2, 4, 8), "batch {} adds up"
# Relative error of gradients that come from batches of another size; those of parameters add up more of them.
_LIMITS = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_LIMIT = 5e-2

_PICKED = (
    "A layer was called on rows that a mask picked: by their number it cannot be told which example each row "
    "is of. Call the layers on all rows, and mask the losses: `ignore_index`, or `(losses * mask).sum() / "
    "mask.sum()`. " + REMEDY
)
_LOST = (
    "The loss of a batch is made of picked rows of which it cannot be told whose they are, or what one "
    "example adds depends on the others. " + REMEDY
)
_UNKNOWN_PARTS = (
    "The loss of a batch is taken for the mean of its examples' losses, without a check: the batch could not "
    "be taken apart. If it is a sum, or couples examples, define `influence_loss(batch) -> (B,)`."
)
_RANDOM = (
    "The training loss draws noise in eval mode too, so that it could be checked by its second derivatives "
    "only: it is taken for the mean of its examples' losses, and scores are those of one draw."
)


class _LostRowsError(Exception):
    """A part of a batch has outputs of a number of rows that says nothing of its examples."""


class _OtherOrderError(Exception):
    """Rows of a batch have to be followed to the examples, as those of batches before had not to be."""


class UnnamedLoss:
    """Reads batch after batch of a loss that is known by its values only.

    Args:
        run: computes the loss.
        layers: the covered layers by name.
        verified: what passes have found in order; completed here.
        is_strict: whether a loss of which no parts can be had is refused, not taken for a mean.
    """

    def __init__(
        self, run: Run, layers: Mapping[str, Layer], verified: set[str], *, is_strict: bool = False
    ) -> None:
        self._run, self._verified, self._is_strict = run, verified, is_strict
        self._parameters = parameters_of(layers)
        #: Parameters that the loss uses itself.
        self.own = LossParameters(verified)
        self._parts: list[PartGradients] = []
        self._traits = BatchLossTraits()
        self._layout: Layout = read_layout(verified)
        self._found: Cut | None = None
        self._knows_one = False  # whether a batch of one was looked at
        self._varies = False  # whether batches take ways of their own through the model
        #: Which functions the last batch has called.
        self.way = Way()
        self._batches = 0  # of several examples
        self._lacks_rows = False  # whether parts of a batch were run whose rows nobody could follow
        self._has_looked = False  # for uses of weights beside outputs, where the values are given

    def read(
        self, module: Any, batch: Any, num_examples: int, make_recorder: Callable[[], Recorder]
    ) -> tuple[BatchLoss | JointLoss, Recorder]:
        """Run a batch.

        Args:
            module: the user's module.
            batch: the batch.
            num_examples: ``B``.
            make_recorder: makes what records the layers.

        Returns:
            The loss of the batch, and what has recorded the layers.

        Raises:
            LossCaptureError: if the loss does not depend on the outputs of any module.
            OtherCallsError: if it comes from other modules each time.
            UnsupportedModelError: if it couples examples.
        """
        find_cut = partial(self._find_cut, module, batch, num_examples)
        if self._found is None or self._varies:
            self._found = find_cut()
        rewind = remember_draws()
        try:
            return self._read(self._found, module, batch, num_examples, make_recorder())
        except (OtherCallsError, _OtherOrderError) as other:
            rewind()
            self._varies |= isinstance(other, OtherCallsError)
            self._found = find_cut()
            return self._read(self._found, module, batch, num_examples, make_recorder())

    def _find_cut(self, module: Any, batch: Any, count: int) -> Cut:
        return Cut(self._run, self._parameters, module, batch, count, self._verified)

    def _layout_of(self, batch: Any, count: int) -> Layout:
        """Return how a batch is taken apart, if not as usual."""
        return {**read_form(self._verified, batch, count), **self._layout}

    def _read(
        self, cut: Cut, module: Any, batch: Any, num_examples: int, recorder: Recorder
    ) -> tuple[BatchLoss | JointLoss, Recorder]:
        if not self._is_known() or cut.is_lost:
            self._check(cut, module, batch, num_examples)
        names, picked, uses = self.own.names, PickedRows(), recorder.uses
        assert uses is not None or not names
        spread = {name: uses.spread(name) for name in names} if uses is not None else {}
        if cut.is_chained:
            with preserve_rng():
                found = cut.run(module, batch, num_examples, names)
        tap = OutputTap(module, cut.keys, leaves=not cut.is_chained)
        following = cut.follow(batch, num_examples, () if cut.is_chained else names)
        with recorder, picked, following as (watch, shares), tap:
            if cut.is_chained:
                values, _ = self._run(module, batch)
            else:
                values, value = cut.compute(module, batch)
        self.way = picked.way
        if not cut.is_chained:
            found = cut.describe(tap, num_examples, value, values, watch, shares)
        cut.check_calls(tap)
        self._check_way(cut, module, batch, num_examples)
        outputs = list(tap.outputs.values())
        rows = {len(output) for output in outputs if output.dim()} - {num_examples}
        if not cut.follows and rows & picked.counts:
            raise UnsupportedModelError(_PICKED)
        # Picked rows are as many for each example in one batch, and not in the next.
        own = cut.rows(tap.outputs, num_examples, watch)
        if picked.counts or any(part.place is not None and part.place.is_uneven() for part in own):
            self._traits.warn(WEIGHTED)
        found = replace(found, outputs=outputs, rows=own, values=values)
        loss = self._describe(found, module, batch, num_examples)
        if not self._has_looked and (values is not None or num_examples == 1 or names):
            self._look_beside(found, loss, recorder.layers)
        if names:
            alone = partial(self._run_alone, cut, module, batch, loss)
            return self.own.join(loss, found, self._parameters, spread, alone), recorder
        return loss, recorder

    def _check_way(self, cut: Cut, module: Any, batch: Any, count: int) -> None:
        """Check a batch that was run as the first one was, if it has taken another way or it is its turn.

        Raises:
            _OtherOrderError: if its rows have to be followed.
            UnsupportedModelError: if its examples' losses do not add up.
        """
        is_new = self.way.is_new(self._verified, module) or self._is_looked_at_again(count)
        if not is_new or self._varies:
            return
        if not cut.follows and self._find_cut(module, batch, count).follows:
            raise _OtherOrderError
        self._check(cut, module, batch, count)

    def _is_looked_at_again(self, num_examples: int) -> bool:
        """Return whether this is one of the batches after the first that are checked as it was."""
        self._batches += num_examples > 1
        subject = _AGAIN.format(self._batches)
        if self._batches not in _LOOKS or subject in self._verified:
            return False
        self._verified.add(subject)
        return True

    def _describe(self, found: CutLoss, module: Any, batch: Any, num_examples: int) -> BatchLoss:
        return BatchLoss.of(
            found.outputs,
            found.leaves,
            found.value,
            num_examples,
            traits=self._traits,
            values_of=lambda: compute_alone(
                self._run, module, batch, num_examples, self._layout_of(batch, num_examples)
            ),
            values=found.values,
            rows=found.rows,
        )

    def _is_known(self) -> bool:
        """Return whether the loss was checked before; what was found then is taken over."""
        if _SUM in self._verified:
            self._traits.is_mean = False
        return bool({_MEAN, _SUM, _GIVEN} & self._verified)

    def _check(self, cut: Cut, module: Any, batch: Any, count: int) -> None:
        """Check on a first batch that the examples' losses add up, and find out how.

        Raises:
            UnsupportedModelError: if they do not.
        """
        if count == 1 and self._knows_one:
            return
        with preserve_rng():
            found = cut.run(module, batch, count)
        if count == 1:  # shows not what is a mean
            self._knows_one = True
            self.own.cover_one(found, self._parameters)
            return
        direct = find_direct(found.value, self._parameters)
        if cut.gives_values:
            self.own.cover_given(direct, self._differentiate_whole(module, batch))
            self._verified.add(_GIVEN)
            return
        loss = self._describe(found, module, batch, count)
        limit = _LIMITS.get(loss.outputs.dtype, _HALF_LIMIT)
        check_cross_derivatives(loss, draw_parts(count)[0], limit)
        if not bool(loss.gradient().any()):
            return
        find = partial(self._find_mean, cut, module, batch, loss, limit)
        is_mean, runs = self._try(find, read_form(self._verified, batch, count))
        again = self._draw_again(cut, module, batch, loss, limit) if is_mean is None else None
        if is_mean is None:
            is_mean = self._read_otherwise(find, batch, count) if again is None else True
        if is_mean is None and runs:
            raise UnsupportedModelError(_LOST if self._lacks_rows else COUPLED)
        if is_mean is None:
            if self._is_strict:
                raise UnsupportedModelError(_UNKNOWN_PARTS)
            self._traits.warn(_UNKNOWN_PARTS)
            is_mean = True
        self._traits.is_mean = is_mean
        loss = replace(loss, factor=float(count) if is_mean else 1.0)
        self._settle(cut, module, batch, loss, direct, again, 10 * limit)
        self._verified.add(_MEAN if is_mean else _SUM)

    def _settle(
        self,
        cut: Cut,
        module: Any,
        batch: Any,
        loss: BatchLoss,
        direct: dict[str, Tensor],
        again: CutLoss | None,
        limit: float,
    ) -> None:
        """Find the parameters that the loss uses itself, and how to have their gradients.

        Raises:
            UnsupportedModelError: if one cannot be had and outputs depend on it as well.
        """

        def follow(names: Collection[str]) -> CutLoss:
            with preserve_rng():
                return cut.run(module, batch, loss.num_examples, names)

        if again is None:
            alone = partial(self._run_alone, cut, module, batch, loss)
            self.own.settle(direct, self._parts, limit, follow, alone)
        else:
            self.own.settle_noise(direct, follow, again, limit)
        if self.own.left_out:
            self.own.check_left_out(direct, self._differentiate_whole(module, batch))

    def _differentiate_whole(self, module: Any, batch: Any) -> dict[str, Tensor]:
        with preserve_rng(), torch.enable_grad():
            return find_direct(to_scalar(*self._run(module, batch)), self._parameters)

    def _find_mean(
        self, cut: Cut, module: Any, batch: Any, loss: BatchLoss, limit: float, layout: Layout
    ) -> bool | None:
        """Compare parts of a batch, read in one way, with the whole.

        Returns:
            Whether the loss is a mean, not a sum; None if it is neither.
        """
        rows, count = loss.gradient() / loss.factor, loss.num_examples
        ratios: list[float] = []
        self._parts = []
        # The example of the least gradient, alone: a loss of the hardest examples gives it none among others.
        parts = [*draw_parts(count), [int(rows.norm(dim=1).argmin())]]
        for part in parts:
            try:
                found = self._run_part(cut, module, batch, part, loss, layout)
            except Exception:  # steps may fail on one example
                if len(ratios) < 4:
                    raise
                found = None
            # What has no weight, such as padding alone, divides by zero.
            if found is None or not bool(torch.isfinite(found[0]).all()):
                ratios.append(math.nan)
                continue
            ratio = find_ratio(found[0], rows[part], limit)
            if ratio is None:
                self._parts = []
                return None
            ratios.append(ratio * len(part) / count)
            if not math.isnan(ratio):
                self._parts.append(PartGradients(part, ratio, found[1]))
        is_mean = tell_mean(ratios, [len(part) / count for part in parts], limit, self._traits)
        if is_mean or int(rows.any(dim=1).sum()) > 1:
            return is_mean
        # One example counts. Its loss alone may be both the sum and the mean of those that count; where it
        # stands several times, a mean of them has smaller shares for each.
        number = int(rows.any(dim=1).int().argmax())
        for times in (2, 3):
            own, _ = self._run_part(cut, module, batch, times * [number], loss, layout)
            ratio = find_ratio(own, rows[times * [number]], limit)
            if ratio is None or abs(ratio - 1) > 10 * limit:
                return None if ratio is None else True
        return False

    def _run_alone(self, cut: Cut, module: Any, batch: Any, loss: BatchLoss) -> list[PartGradients]:
        """Return what the loss of each example alone says; nothing if they cannot be run alone."""
        rows, found = loss.gradient() / loss.factor, []
        layout = self._layout_of(batch, loss.num_examples)
        for number in range(loss.num_examples):
            try:
                own, direct = self._run_part(cut, module, batch, [number], loss, layout)
            except Exception:  # whatever the user's code may raise on one example
                return []
            ratio = find_ratio(own, rows[[number]], 1.0)
            fits = ratio is not None and not math.isnan(ratio)
            found.append(PartGradients([number], ratio if fits and ratio else loss.factor, direct))
        return found

    def _try(self, find: Callable[[Layout], bool | None], layout: Layout) -> tuple[bool | None, bool]:
        """Read a batch in one way.

        Returns:
            Whether its loss is a mean, not a sum, or None for neither; and whether parts of it run at all.

        Raises:
            UnsupportedModelError: if the model cannot be covered, whatever the batch.
        """
        try:
            return find(layout), True
        except UnsupportedModelError:
            raise
        except _LostRowsError:
            self._lacks_rows = True
            return None, True
        except Exception:  # whatever the user's code may raise on a part of a batch
            return None, False

    def _read_otherwise(self, find: Callable[[Layout], bool | None], batch: Any, count: int) -> bool | None:
        """Try other readings of a batch whose examples do not add up as it is usually read.

        Returns:
            Whether its loss is a mean; None if they do not add up in any.
        """
        for layout in itertools.islice(find_layouts(batch, count), 1, None):
            is_mean, _ = self._try(find, layout)
            if is_mean is not None:
                self._layout = layout
                self._verified.add(note_layout(layout))
                return is_mean
        return None

    def _draw_again(self, cut: Cut, module: Any, batch: Any, loss: BatchLoss, limit: float) -> CutLoss | None:
        """Return another run of a batch whose loss comes out differently each time, None if it does not.

        Of such a loss the second derivatives have been checked. One that does not couples its examples.
        """
        with preserve_rng():
            _ = torch.rand(1), np.random.rand(), random.random()  # other draws than before
            found = cut.run(module, batch, loss.num_examples, self._parameters)
        pairs = zip(_slopes(found.value, found.leaves), _slopes(loss.batch_loss, loss.leaves), strict=True)
        for new, old in pairs:
            if new.shape != old.shape or bool((new - old).norm() > limit * old.norm()):
                self._traits.warn(_RANDOM)
                return found
        return None

    def _run_part(
        self, cut: Cut, module: Any, batch: Any, part: list[int], loss: BatchLoss, layout: Layout
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the gradient of a part's loss in its outputs ``(b, d)``, and directly in parameters.

        Raises:
            UnknownPartError: if the part has outputs of another width.
            _LostRowsError: if a mask has picked rows of it, and nobody knows of which examples.
        """
        piece, count, width = (
            rearranged(batch, part, loss.num_examples, layout),
            len(part),
            loss.outputs.shape[1],
        )
        with preserve_rng():
            found = cut.run(module, piece, count, is_part=True)
            grads = _slopes(found.value, found.leaves)
            if any(own.place is None and len(own.join(grads)) % count for own in found.rows):
                raise _LostRowsError
            split = [own.split(grads, count) for own in found.rows]
            rows = torch.cat([part.flatten(1) for part in split], 1)
        if len(split) == 1 and rows.shape[1] < width:  # others have more rows
            rows = torch.nn.functional.pad(rows, (0, width - rows.shape[1]))
        if rows.shape[1] != width:
            raise UnknownPartError
        return rows, find_direct(found.value, self._parameters)

    def _look_beside(self, found: CutLoss, loss: BatchLoss, layers: Mapping[str, Layer]) -> None:
        """Note a layer that the user's losses reach in another way than through the outputs of modules.

        Penalties on weights do not count: their gradients are the same for all data.
        """
        self._has_looked, traits = loss.num_examples > 1, self._traits
        for name, layer in layers.items() if traits.beside is None else ():
            weight = layer.rule.weight(layer.module)
            [inside] = torch.autograd.grad(loss.outputs.sum(), weight, retain_graph=True, allow_unused=True)
            if inside is not None and bool(inside.any()) and _meets_outputs(found, weight):
                traits.beside = name


def _meets_outputs(found: CutLoss, weight: Tensor) -> bool:
    """Return whether a weight's gradient beside the outputs depends on these, as no penalty's does."""
    [direct] = torch.autograd.grad(found.value, weight, create_graph=True, allow_unused=True)
    if direct is None or not bool(direct.to_dense().any()) or not direct.requires_grad:
        return False
    mixed = torch.autograd.grad(direct.to_dense().sum(), found.leaves, retain_graph=True, allow_unused=True)
    return any(part is not None and bool(part.any()) for part in mixed)


def _slopes(value: Tensor, leaves: Collection[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradient of a loss in what it is computed from; the graph is kept."""
    return torch.autograd.grad(
        value, list(leaves), retain_graph=True, allow_unused=True, materialize_grads=True
    )
