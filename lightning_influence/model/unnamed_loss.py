"""Losses of which no loss function is known by name: batches are read, and examples checked to add up."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_influence.model.additivity import (
    COUPLED,
    REMEDY,
    check_cross_derivatives,
    draw_halves,
    find_ratio,
    tell_mean,
)
from lightning_influence.model.last_outputs import Key, OutputTap, are_chained
from lightning_influence.model.losses.batch import BatchLoss, BatchLossTraits, split_rows
from lightning_influence.model.losses.combined import WEIGHTED
from lightning_influence.model.losses.picked import PickedRows
from lightning_influence.model.ragged import find_places
from lightning_influence.model.rearranging import Layout, UnknownPartError, find_layouts, rearranged
from lightning_influence.model.recorder import Recorder
from lightning_influence.model.uses.places import Place
from lightning_influence.model.uses.watch import Watch
from lightning_influence.support.errors import LossCaptureError, UnsupportedModelError
from lightning_influence.support.random_states import RandomStates, preserve_rng

Run = Callable[[Any, Any], tuple[Tensor | None, Tensor | None]]
"""Maps a module and a batch to the losses of the examples ``(B,)``, or else to the loss of the batch."""

_MEAN, _SUM = "loss is a mean", "loss is a sum"
_LAYOUT, _DIRECT = "batch is read as ", "the loss alone uses "
# Relative error of gradients that come from batches of another size.
_LIMITS = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_LIMIT = 5e-2

_SECOND_USE = (
    "The loss depends on the weights of layer {name!r} in another way than by calling the layer, so its "
    "gradients would be wrong. Accepted are weights that are used by their own layer only, and penalties on "
    "weights: leave out a layer whose weight is used a second time with `layers=`."
)
_DIFFERENTIATES = (
    "The loss differentiates the model's outputs by what they depend on, as gradient penalties do, so it is "
    "no function of the outputs alone. Pass `loss=` without that term."
)
_PICKED = (
    "A layer was called on rows that a mask picked: by their number it cannot be told which example each row "
    "is of. Call the layers on all rows, and mask the losses: `ignore_index`, or `(losses * mask).sum() / "
    "mask.sum()`. " + REMEDY
)
_LEFT_OUT = (
    "The loss uses the weights of {name!r} directly, beside the outputs of modules: its gradient by them is "
    "one sum over the batch, and their gradients for single examples are not known, so they are left out. To "
    "cover them, define `influence_loss(batch) -> (B,)` on the module, or let a module that owns them return "
    "them with a row for each example, such as `self.scale.expand_as(outputs)`."
)
_OTHER_CALLS = (
    "The loss has no name here and comes from other modules each time that one and the same batch is run, so "
    "that it is not known which outputs it is made of. " + REMEDY
)
_UNKNOWN_PARTS = (
    "The loss of a batch is taken for the mean of its examples' losses, without a check: the batch could not "
    "be taken apart. If it is a sum, or couples examples, define `influence_loss(batch) -> (B,)`."
)
_RANDOM = (
    "The training loss draws noise in eval mode too, so that it could be checked by its second derivatives "
    "only: it is taken for the mean of its examples' losses, and scores are those of one draw."
)


class OtherCallsError(UnsupportedModelError):
    """A batch whose examples are sent to other modules than those of the batch that the cut was found for."""


class UnnamedLoss:
    """Reads batch after batch of a loss that is known by its values only.

    Args:
        run: computes the loss.
        verified: what passes have found in order; completed here.
        is_strict: whether a loss of which no parts can be had is refused, not taken for a mean.
    """

    def __init__(self, run: Run, verified: set[str], *, is_strict: bool = False) -> None:
        self._run, self._verified, self._is_strict = run, verified, is_strict
        self._traits = BatchLossTraits()
        self._layout: Layout = read_layout(verified)
        #: Layers whose weights the loss uses, and no module: their gradients are not known.
        self.direct = {text.removeprefix(_DIRECT) for text in verified if text.startswith(_DIRECT)}
        self._cut: list[Key] | None = None
        self._calls: Counter[str] = Counter()  # of modules in the batch that the cut was found for
        self._varies = False  # whether they differ between batches
        # Whether the rows of outputs are followed to the examples, because they are not in their order.
        self._follows = False
        # Whether the network has a run of its own: outputs that feed one another cannot be cut in the same
        # one, and values that the user gives for the examples keep their graph, by which they are checked.
        self._chained = False
        self._has_looked = False  # for uses of weights beside outputs, where the values are given

    def read(self, module: Any, batch: Any, num_examples: int, recorder: Recorder) -> BatchLoss:
        """Run a batch.

        Args:
            module: the user's module.
            batch: the batch.
            num_examples: ``B``.
            recorder: records the layers.

        Returns:
            The loss of the batch.

        Raises:
            LossCaptureError: if the loss does not depend on the outputs of any module.
            OtherCallsError: if the batch takes another way through the model than those before; to be asked
                again, with another recorder.
            UnsupportedModelError: if it couples examples.
        """
        if self._cut is None or self._varies:
            self._find_cut(module, batch, num_examples)
        states = RandomStates.read()
        watch = _follow(batch, num_examples) if self._follows else None
        following, picked = contextlib.nullcontext() if watch is None else watch, PickedRows()
        if self._chained:
            with preserve_rng():
                leaves, value, _ = self._run_from_leaves(module, batch, num_examples)
            with recorder, picked, following, OutputTap(module, self._cut, leaves=False) as tap:
                values, _ = self._run(module, batch)
        else:
            values = None
            with recorder, picked, following, OutputTap(module, self._cut) as tap:
                value = self._run_cut(module, batch)
            leaves = list(tap.leaves.values())
        if tap.calls != self._calls:
            states.write()
            self._varies = True
            raise OtherCallsError(_OTHER_CALLS)
        outputs = list(tap.outputs.values())
        places = None if watch is None else [watch.place_of(output) for output in outputs]
        rows = {len(output) for output in outputs if output.dim()} - {num_examples}
        if watch is None and rows & picked.counts:
            raise UnsupportedModelError(_PICKED)
        # Picked rows are as many for each example in one batch, and not in the next.
        if picked.counts or any(place is not None and place.is_uneven() for place in places or ()):
            self._traits.warn(WEIGHTED)

        def describe() -> BatchLoss:
            return BatchLoss.of(
                outputs,
                leaves,
                value,
                num_examples,
                traits=self._traits,
                values_of=lambda: compute_alone(self._run, module, batch, num_examples, self._layout),
                values=values,
                places=places,
            )

        if values is None and not self._is_known():
            self._check(describe(), module, batch, recorder)
        if not self._has_looked and (values is not None or num_examples == 1):
            self._look_beside(value, describe(), module, batch, recorder)
        return describe()

    def _is_known(self) -> bool:
        """Return whether the loss was checked before; what was found then is taken over."""
        if _SUM in self._verified:
            self._traits.is_mean = False
        return bool({_MEAN, _SUM} & self._verified)

    def _find_cut(self, module: Any, batch: Any, count: int) -> None:
        """Find the outputs that the loss depends on directly, and whether some depend on others of them.

        Raises:
            LossCaptureError: if there is none.
        """
        watch, picked = _follow(batch, count), PickedRows()
        with preserve_rng(), picked, watch, OutputTap(module) as tap:
            values, batch_loss = self._run(module, batch)
        self._calls = tap.calls
        cut = tap.last(to_scalar(values, batch_loss))
        places = [watch.place_of(tap.seen[key]) for key in cut]
        # Rows of which not all are followed are taken as they are, and checked as others are.
        plain = all(place and place.is_plain() for place in places)
        self._follows = None not in places and not (plain and not picked.counts)
        if not cut:
            raise LossCaptureError(
                f"The training loss does not depend on the output of any module with parameters. {REMEDY}"
            )
        self._cut, self._chained = cut, values is not None or len(cut) > 1
        if values is None and len(cut) > 1:
            with preserve_rng(), OutputTap(module, cut) as tap:
                self._run_cut(module, batch)
            self._chained = are_chained(tap)

    def _run_from_leaves(
        self, module: Any, batch: Any, count: int
    ) -> tuple[list[Tensor], Tensor, list[Place | None]]:
        """Return the leaves at the cut, the batch's loss as a function of them, and where examples stand."""
        watch = _follow(batch, count) if self._follows else None
        following = contextlib.nullcontext() if watch is None else watch
        with torch.enable_grad(), following, OutputTap(module, self._cut) as tap:
            value = self._run_cut(module, batch)
        outputs = tap.outputs.values()
        places = [None if watch is None else watch.place_of(output) for output in outputs]
        return list(tap.leaves.values()), value, places

    def _run_cut(self, module: Any, batch: Any) -> Tensor:
        """Return the loss, from a run that has succeeded with the outputs attached to what they depend on.

        Raises:
            RuntimeError: the step's own, for any other reason.
            UnsupportedModelError: if it fails with outputs that depend on nothing.
        """
        try:
            return to_scalar(*self._run(module, batch))
        except RuntimeError as error:
            if "differentiated Tensor" not in str(error) and "does not require grad" not in str(error):
                raise
            raise UnsupportedModelError(_DIFFERENTIATES) from error

    def _check(self, loss: BatchLoss, module: Any, batch: Any, recorder: Recorder) -> None:
        """Check on a first batch that the examples' losses add up, and find out how.

        Raises:
            UnsupportedModelError: if they do not, or if a covered weight is used outside its layer.
        """
        count = loss.num_examples
        if count == 1:  # shows nothing
            return
        rows = loss.gradient() / loss.factor
        if not bool(rows.any()):
            return
        limit = _LIMITS.get(loss.outputs.dtype, _HALF_LIMIT)
        check_cross_derivatives(loss, draw_halves(count)[0], limit)
        direct = self._direct_gradients(loss.batch_loss, recorder)
        find = partial(self._find_mean, module, batch, loss, limit, direct, recorder)
        is_mean, runs = self._try(find, {})
        if is_mean is None and self._draws_noise(module, batch, loss, limit, direct, recorder):
            self._traits.warn(_RANDOM)
            is_mean = True
        elif is_mean is None:
            is_mean = self._read_otherwise(find, batch, count)
        if is_mean is None and runs:
            raise UnsupportedModelError(COUPLED)
        if is_mean is None:
            if self._is_strict:
                raise UnsupportedModelError(_UNKNOWN_PARTS)
            self._traits.warn(_UNKNOWN_PARTS)
            is_mean = True
        self._traits.is_mean = is_mean
        self._verified.add(_MEAN if is_mean else _SUM)

    def _find_mean(
        self,
        module: Any,
        batch: Any,
        loss: BatchLoss,
        limit: float,
        direct: dict[str, Tensor],
        recorder: Recorder,
        layout: Layout,
    ) -> bool | None:
        """Compare parts of a batch, read in one way, with the whole.

        Returns:
            Whether the loss is a mean, not a sum; None if it is neither.

        Raises:
            UnsupportedModelError: if a covered weight is used outside its layer.
        """
        rows, count = loss.gradient() / loss.factor, loss.num_examples
        ratios: list[float] = []
        # The example of the least gradient, alone: a loss of the hardest examples gives it none among others.
        parts = [*draw_halves(count), [int(rows.norm(dim=1).argmin())]]
        for part in parts:
            piece = rearranged(batch, part, count, layout)
            try:
                found = self._part_gradients(module, piece, len(part), rows.shape[1], recorder)
            except Exception:  # steps may fail on one example
                if len(ratios) < len(parts) - 1:
                    raise
                found = None
            # What has no weight, such as padding alone, divides by zero.
            if found is None or not bool(torch.isfinite(found[0]).all()):
                ratios.append(math.nan)
                continue
            ratio = find_ratio(found[0], rows[part], limit)
            if ratio is None:
                return None
            ratios.append(ratio * len(part) / count)
            self._compare_direct(direct, found[1], limit, loss, recorder)
        return tell_mean(ratios, [len(part) / count for part in parts], limit, self._traits)

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
                self._verified.add(_LAYOUT + json.dumps(list(layout.items())))
                return is_mean
        return None

    def _compare_direct(
        self,
        direct: dict[str, Tensor],
        others: dict[str, Tensor],
        limit: float,
        loss: BatchLoss,
        recorder: Recorder,
    ) -> None:
        """Tell penalties, whose gradients are the same for all data, from other direct uses of weights.

        Weights that only the loss uses have no gradients of single examples, and are left out.

        Raises:
            UnsupportedModelError: if a layer uses the weight as well, whose gradients would be wrong.
        """
        for name, gradient in direct.items():
            if name in self.direct or (others[name] - gradient).norm() <= 10 * limit * gradient.norm():
                continue
            layer = recorder.layers[name]
            weight = layer.rule.weight(layer.module)
            inside = torch.autograd.grad(
                loss.outputs.sum(), weight, retain_graph=True, allow_unused=True, materialize_grads=True
            )[0]
            if bool(inside.any()):
                raise UnsupportedModelError(_SECOND_USE.format(name=name))
            self.direct.add(name)
            self._verified.add(_DIRECT + name)
            self._traits.warn(_LEFT_OUT.format(name=name))

    def _draws_noise(
        self,
        module: Any,
        batch: Any,
        loss: BatchLoss,
        limit: float,
        direct: dict[str, Tensor],
        recorder: Recorder,
    ) -> bool:
        """Return whether the loss of one and the same batch comes out differently each time.

        Of such a loss the second derivatives have been checked. One that does not couples its examples.

        Raises:
            UnsupportedModelError: if a covered weight is used outside its layer.
        """
        with preserve_rng():
            _ = torch.rand(1), np.random.rand(), random.random()  # other draws than before
            leaves, value, _ = self._run_from_leaves(module, batch, loss.num_examples)
            again = torch.autograd.grad(
                value, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        first = torch.autograd.grad(
            loss.batch_loss, loss.leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        noisy = any(
            new.shape != old.shape or bool((new - old).norm() > limit * old.norm())
            for new, old in zip(again, first, strict=True)
        )
        if noisy:
            self._compare_direct(direct, self._direct_gradients(value, recorder), limit, loss, recorder)
        return noisy

    def _part_gradients(
        self, module: Any, part: Any, count: int, width: int, recorder: Recorder
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the gradient of a part's loss in its outputs ``(b, d)``, and directly in covered weights.

        Raises:
            UnknownPartError: if the part has outputs of another width.
        """
        with preserve_rng():
            leaves, value, places = self._run_from_leaves(module, part, count)
            grads = torch.autograd.grad(
                value, leaves, allow_unused=True, materialize_grads=True, retain_graph=True
            )
            split = [split_rows(grad, place, count) for grad, place in zip(grads, places, strict=True)]
            rows = torch.cat([part.flatten(1) for part in split], 1)
        if len(split) == 1 and rows.shape[1] < width:  # others have more rows
            rows = torch.nn.functional.pad(rows, (0, width - rows.shape[1]))
        if rows.shape[1] != width:
            raise UnknownPartError
        return rows, self._direct_gradients(value, recorder)

    def _look_beside(
        self, value: Tensor, loss: BatchLoss, module: Any, batch: Any, recorder: Recorder
    ) -> None:
        """Note a layer that the user's losses reach in another way than through the outputs of modules.

        Penalties on weights do not count: their gradients are the same for all data.
        """
        self._has_looked, traits = loss.num_examples > 1, self._traits
        beside = {name: g for name, g in self._direct_gradients(value, recorder).items() if bool(g.any())}
        weights = {name: layer.rule.weight(layer.module) for name, layer in recorder.layers.items()}
        for name in beside if traits.beside is None else ():
            output = loss.outputs.sum()
            [inside] = torch.autograd.grad(output, weights[name], retain_graph=True, allow_unused=True)
            if inside is not None and bool(inside.any()) and self._meets_outputs(loss, weights[name]):
                traits.beside = name

    def _meets_outputs(self, loss: BatchLoss, weight: Tensor) -> bool:
        """Return whether a weight's gradient beside the outputs depends on these, as no penalty's does."""
        [direct] = torch.autograd.grad(loss.batch_loss, weight, create_graph=True, allow_unused=True)
        if direct is None or not direct.requires_grad:
            return False
        mixed = torch.autograd.grad(
            direct.to_dense().sum(), loss.leaves, retain_graph=True, allow_unused=True
        )
        return any(part is not None and bool(part.any()) for part in mixed)

    def _direct_gradients(self, value: Tensor, recorder: Recorder) -> dict[str, Tensor]:
        """Return gradients of a loss in covered weights that do not pass through the last outputs."""
        weights = {name: layer.rule.weight(layer.module) for name, layer in recorder.layers.items()}
        found = torch.autograd.grad(
            value, list(weights.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return {name: grad.to_dense() for name, grad in zip(weights, found, strict=True)}


def compute_alone(run: Run, module: Any, batch: Any, count: int, layout: Layout | None = None) -> Tensor:
    """Compute the losses of the examples, each run alone; their mean where that cannot be.

    Args:
        run: computes the loss.
        module: the user's module.
        batch: the batch.
        count: number of examples ``B``.
        layout: how to read the batch, if not as usual.

    Returns:
        The losses ``(B,)``, without a graph.
    """
    values = []
    with preserve_rng(), torch.no_grad():
        for n in range(count):
            try:
                values.append(to_scalar(*run(module, rearranged(batch, [n], count, layout))))
            except Exception:  # whatever the user's code may raise
                return to_scalar(*run(module, batch)).expand(count)
    return torch.stack(values)


def _follow(batch: Any, count: int) -> Watch:
    """Return what follows the examples of a batch, and no parameters."""
    return Watch({}, batch, count, find_places(batch, count))


def read_layout(verified: Collection[str]) -> Layout:
    """Return how an earlier pass found that batches are to be read."""
    noted = next((text for text in verified if text.startswith(_LAYOUT)), None)
    return {} if noted is None else dict(json.loads(noted.removeprefix(_LAYOUT)))


def to_scalar(values: Tensor | None, batch_loss: Tensor | None) -> Tensor:
    """Return what a run has computed as the loss of the batch, a scalar.

    Raises:
        LossCaptureError: if it is no single number.
    """
    if values is not None:
        return values.mean()
    assert batch_loss is not None
    if batch_loss.numel() != 1:
        raise LossCaptureError(
            f"Got a training loss of shape {tuple(batch_loss.shape)}; accepted is a single number. {REMEDY}"
        )
    return batch_loss.reshape(())
