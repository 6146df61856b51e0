"""Where a training step is cut: at the last outputs of modules, of which the loss is a function."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_influence.model.batches.forms import place_examples
from lightning_influence.model.losses.output_rows import OutputRows, join_calls
from lightning_influence.model.losses.picked import PickedRows
from lightning_influence.model.unnamed.alone import REMEDY, Run, to_scalar
from lightning_influence.model.unnamed.last_outputs import CutLoss, Key, OutputTap, Share, are_chained
from lightning_influence.model.unnamed.shares import ShareWatch
from lightning_influence.model.uses.watch import Watch
from lightning_influence.support.errors import LossCaptureError, UnsupportedModelError
from lightning_influence.support.random_states import preserve_rng

_DIFFERENTIATES = (
    "The loss differentiates the model's outputs by what they depend on, as gradient penalties do, so it is "
    "no function of the outputs alone. Pass `loss=` without that term."
)
_OTHER_CALLS = (
    "The loss has no name here and comes from other modules each time that one and the same batch is run, so "
    "that it is not known which outputs it is made of. " + REMEDY
)


class OtherCallsError(UnsupportedModelError):
    """A batch whose examples are sent to other modules than those of the batch that the cut was found for."""


class Cut:
    """The outputs that the loss depends on directly, found in one batch.

    Args:
        run: computes the loss.
        parameters: the covered parameters by name.
        module: the module.
        batch: a batch.
        count: its number of examples.
        verified: what passes have found in order, which says where batches hold their examples.

    Attributes:
        keys: of the outputs.
        calls: how often each module was called.
        follows: whether the rows of outputs are followed to the examples, because they are not in their
            order.
        gives_values: whether the user gives the losses of the examples.
        is_chained: whether the network has a run of its own: outputs that feed one another cannot be cut in
            the same one, and given values keep their graph, by which they are checked.

    Raises:
        LossCaptureError: if there is no such output.
    """

    def __init__(
        self,
        run: Run,
        parameters: Mapping[str, Tensor],
        module: Any,
        batch: Any,
        count: int,
        verified: Collection[str],
    ) -> None:
        self._run, self._parameters, self._verified = run, parameters, verified
        watch, picked = self._watch(batch, count), PickedRows()
        with preserve_rng(), picked, watch, OutputTap(module) as tap:
            values, batch_loss = run(module, batch)
        self.calls: Counter[str] = tap.calls
        loss = to_scalar(values, batch_loss)

        def holds(tensor: Tensor) -> bool:
            return watch.place_of(tensor) is not None

        self.keys: list[Key] = tap.last(loss, holds)
        if not self.keys:
            raise LossCaptureError(
                f"The training loss does not depend on the output of any module with parameters. {REMEDY}"
            )
        losses = self._find_losses(tap, module, batch)
        self.keys = (tap.last(loss, holds, losses) if losses else []) or self.keys
        places = [watch.place_of(tap.seen[key]) for key in self.keys]
        # Rows of which not all are followed are taken as they are, and checked as others are.
        plain = all(place and place.is_plain() for place in places)
        self.follows = None not in places and not (plain and not picked.counts and not watch.picks)
        #: Whether values have left torch, so that rows may have come back in any order.
        self.is_lost = None in places and picked.way.leaves_torch
        self.gives_values = values is not None
        self.is_chained = self.gives_values or len(self.keys) > 1
        if self.is_chained and not self.gives_values:
            with preserve_rng(), OutputTap(module, self.keys) as tap:
                self.compute(module, batch)
            self.is_chained = are_chained(tap)

    def _find_losses(self, tap: OutputTap, module: Any, batch: Any) -> list[Key]:
        """Return the outputs that are losses of the examples: one number each, in which the loss is linear.

        A module of the loss has made them, and what they are losses of has come before.
        """
        single = [key for key in self.keys if tap.seen[key].dim() == 1]
        if not single:
            return []
        with preserve_rng(), torch.enable_grad(), OutputTap(module, single) as cut:
            _, value = self.compute(module, batch)
        leaves = [cut.leaves[key] for key in single]
        slopes = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
        pairs = zip(single, slopes, strict=True)
        return [key for key, slope in pairs if slope is not None and not slope.requires_grad]

    @contextlib.contextmanager
    def follow(
        self, batch: Any, count: int, names: Collection[str] = ()
    ) -> Iterator[tuple[Watch | None, list[Share]]]:
        """Follow the examples through a run where they are out of order, and parameters.

        Args:
            batch: the batch.
            count: its number of examples.
            names: of the parameters.

        Yields:
            What follows them, None if neither is wanted; and sums over the examples, noted for parameters.
        """
        if not (self.follows or names):
            yield None, []
            return
        with self._watch(batch, count, names) as watch:
            if not names:
                yield watch, []
                return
            with ShareWatch(count, watch.place_of) as noted:
                yield watch, noted.shares

    def run(
        self, module: Any, batch: Any, count: int, names: Collection[str] = (), *, is_part: bool = False
    ) -> CutLoss:
        """Compute a batch's loss from leaves.

        Args:
            module: the module.
            batch: the batch.
            count: its number of examples.
            names: of parameters to follow.
            is_part: whether it is a part of one, which need not take all ways through the model.

        Returns:
            The loss as a function of leaves.

        Raises:
            OtherCallsError: if the batch takes another way through the model.
        """
        following, tap = self.follow(batch, count, names), OutputTap(module, self.keys)
        with torch.enable_grad(), following as (watch, shares), tap:
            values, value = self.compute(module, batch)
        if not is_part:
            self.check_calls(tap)
        return self.describe(tap, count, value, values, watch, shares)

    def check_calls(self, tap: OutputTap) -> None:
        """Refuse a batch that takes another way through the model.

        Raises:
            OtherCallsError: if modules were called more or less often.
        """
        if tap.calls != self.calls:
            raise OtherCallsError(_OTHER_CALLS)

    def describe(
        self,
        tap: OutputTap,
        count: int,
        value: Tensor,
        values: Tensor | None,
        watch: Watch | None,
        shares: Sequence[Share],
    ) -> CutLoss:
        """Return what a run has shown.

        Args:
            tap: which has cut the run.
            count: number of examples ``B``.
            value: the loss.
            values: given losses of the examples.
            watch: see :meth:`follow`.
            shares: see :meth:`follow`.
        """
        outputs, rows = list(tap.outputs.values()), self.rows(tap.outputs, count, watch)
        return CutLoss(list(tap.leaves.values()), outputs, value, values, rows, watch, shares)

    def rows(self, outputs: Mapping[Key, Tensor], count: int, watch: Watch | None) -> tuple[OutputRows, ...]:
        """Return the rows of the examples in outputs, which are these in their order unless followed.

        Args:
            outputs: by their keys.
            count: number of examples ``B``.
            watch: see :meth:`follow`.
        """
        follows = self.follows and watch is not None
        places = [watch.place_of(part) if follows and watch else None for part in outputs.values()]
        names = [(name, part) for name, _, part in outputs]
        return join_calls(list(outputs.values()), places, names, count)

    def compute(self, module: Any, batch: Any) -> tuple[Tensor | None, Tensor]:
        """Return given losses of the examples, and that of the batch, from a run that is cut.

        Raises:
            RuntimeError: the step's own, for any other reason.
            UnsupportedModelError: if it fails with outputs that depend on nothing, though it has succeeded.
        """
        try:
            values, batch_loss = self._run(module, batch)
        except RuntimeError as error:
            if "differentiated Tensor" not in str(error) and "does not require grad" not in str(error):
                raise
            raise UnsupportedModelError(_DIFFERENTIATES) from error
        return values, to_scalar(values, batch_loss)

    def _watch(self, batch: Any, count: int, names: Collection[str] = ()) -> Watch:
        """Return what follows the examples of a batch, and parameters."""
        places = place_examples(self._verified, batch, count)
        return Watch({name: self._parameters[name] for name in names}, batch, count, places)
