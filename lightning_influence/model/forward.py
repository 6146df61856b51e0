"""One forward pass of the user's module under capture."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from lightning_influence.model.batches.forms import note_form, read_form
from lightning_influence.model.batches.rearranging import rearranged
from lightning_influence.model.captured import Captured
from lightning_influence.model.checks import NO_GRAPH, check_independent, check_loss
from lightning_influence.model.layers.parameter_recorder import ParameterRecorder
from lightning_influence.model.layers.plan import LayerPlan, ModuleLoss
from lightning_influence.model.layers.recorder import Recorder
from lightning_influence.model.loss_checks import OTHER_ORDER, check_losses, count_left_out
from lightning_influence.model.loss_values import OTHER_ROWS, ROWS_VARY, compute_losses
from lightning_influence.model.losses.batch import BatchLoss
from lightning_influence.model.losses.capture import LossCapture
from lightning_influence.model.losses.hook import check_per_example, per_example_capture
from lightning_influence.model.losses.picked import WholeRows
from lightning_influence.model.losses.shared import JointLoss
from lightning_influence.model.losses.way import Way
from lightning_influence.model.measure import Measure
from lightning_influence.model.other_layouts import read_otherwise
from lightning_influence.model.own_loss import compare_with_step
from lightning_influence.model.training_step import call_loss, call_own_loss
from lightning_influence.model.unnamed import one_by_one
from lightning_influence.model.unnamed.additivity import COUPLED
from lightning_influence.model.unnamed.alone import ONE_BY_ONE
from lightning_influence.model.unnamed.unnamed_loss import UnnamedLoss
from lightning_influence.model.verified import (
    CALLED,
    COINCIDES,
    LEFT_OUT,
    LOST,
    ORDER,
    OTHER_WEIGHTS,
    WEIGHED,
    note_told,
)
from lightning_influence.support.errors import (
    LossCaptureError,
    NonFiniteError,
    ReadOtherwiseError,
    UnsupportedModelError,
)
from lightning_influence.support.notes import listening, warn
from lightning_influence.support.random_states import preserve_rng, remember_draws
from lightning_influence.support.waiting import read_later
from lightning_influence.support.whole import holds_stand_ins


class Forward:
    """Runs batches through a module and captures what gradients need.

    Args:
        plan: the covered layers.
        loss: the user's own loss, a callable ``(module, batch)`` that returns the losses of the examples
            ``(B,)`` or the loss of the batch; None for the plan's, or else that of the module.
    """

    def __init__(self, plan: LayerPlan, loss: ModuleLoss | None = None) -> None:
        self.plan = plan
        self.silent: set[str] = set(plan.layers)
        self._loss = plan.loss if loss is None else loss
        self._capture = LossCapture()
        self._unnamed: UnnamedLoss | None = None
        self._weights: Tensor | None = None  # of the examples of the last batch
        self._way = Way()  # that the last batch has taken
        self._picked = 0  # batches whose rows were picked by values
        self._rewind: Callable[[], None] = remember_draws()  # to what the batch began to draw with

    def __call__(
        self, module: Any, batch: Any, num_examples: int, measure: Measure | None = None
    ) -> Captured:
        """Forward one batch with gradients enabled.

        Args:
            module: the user's LightningModule.
            batch: a batch, on the module's device.
            num_examples: ``B``.
            measure: what to measure in place of the loss; if it needs no loss, it is all that runs.

        Returns:
            The captured batch.

        Raises:
            LossCaptureError: if the loss is not found or not reproduced.
            NonFiniteError: if a loss is NaN or infinite.
            UnsupportedModelError: if the model cannot be differentiated example by example.
        """
        with listening(partial(note_told, self.plan.verified)):
            return self._read_batch(module, batch, num_examples, measure)

    def _read_batch(self, module: Any, batch: Any, num_examples: int, measure: Measure | None) -> Captured:
        self._rewind = remember_draws()
        if measure is not None and not measure.needs_loss:
            captured = self._run_in_its_way(
                partial(self._measure, module, batch, num_examples, measure), module, "measurement"
            )
        else:
            captured = self._run_in_its_way(partial(self._run, module, batch, num_examples), module, "loss")
            if measure is not None:
                # Training batches of one example have not shown it.
                captured = self._check_measured(captured, module, batch)
                values = measure(module, batch, loss=captured.loss, batch_size=num_examples)
                captured = Captured(num_examples, None, values, captured.recorder)
        silent = captured.recorder.silent
        self.silent &= {*silent, *(() if self._unnamed is None else self._unnamed.own.silent)}
        if len(silent) == len(self.plan.layers) and not self.plan.is_part:
            raise UnsupportedModelError(NO_GRAPH.format(sorted(self.plan.layers)[:8]))
        if measure is None and (self._loss is not None or callable(getattr(module, "influence_loss", None))):
            self._compare_with_step(captured, module, batch)
        note = None if captured.loss is None else captured.loss.note
        if (
            note is not None
            and note not in self.plan.verified
            and not isinstance(captured.loss, BatchLoss | JointLoss)
        ):
            warn(note)
            self.plan.verified.add(note)
        is_looked_at, slow = self._look_at_way(captured, module, measure), set(self.plan.slow)
        try:
            self._check_examples(captured, module, batch, measure=measure)
            if self.plan.slow - slow and measure is None:
                captured = self._read_other_layouts(module, batch, num_examples, slow) or captured
        except UnsupportedModelError as refusal:
            if measure is not None:
                raise
            other = self._read_other_layouts(module, batch, num_examples, slow)
            captured = other or self._read_other_rows(captured, module, batch, refusal, slow)
        self.plan.verified |= self._describe_way(captured, measure) if is_looked_at else set()
        self._keep_one_reading(captured)
        return captured

    def _run_in_its_way(self, run: Callable[[], Captured], module: Any, subject: str) -> Captured:
        """Run a batch, and once more where what batches have shown of layers is not known of this one's way.

        Returns:
            The captured batch.
        """
        captured, verified, called = run(), self.plan.verified, self._called(subject)
        if called <= verified and captured.recorder.uses is None and self._way.is_new(verified, module):
            self.plan.verified -= called
            captured = run()
        return captured

    def _measure(self, module: Any, batch: Any, num_examples: int, measure: Measure) -> Captured:
        """Run a measurement that needs no loss."""
        self._rewind()
        recorder = self._make_recorder(batch, num_examples, "measurement")
        with recorder, self._capture:
            values = measure(module, batch, loss=None, batch_size=num_examples)
        self._way = self._capture.way
        self._capture.calls = []
        return Captured(num_examples, None, values, recorder)

    def _look_at_way(self, captured: Captured, module: Any, measure: Measure | None) -> bool:
        """Have a batch checked anew if the step has called other functions than for those that were.

        So is one of which other dimensions have its size: which of them are the examples' is a guess.

        Returns:
            Whether its way is to be noted.
        """
        verified, subject = self.plan.verified, "loss" if measure is None else "measurement"
        reads_loss = measure is None or measure.needs_loss
        if captured.num_examples == 1 or (reads_loss and ONE_BY_ONE in verified):
            return False
        orders = {text for text in verified if text.startswith(ORDER)} if reads_loss else set()
        is_new = self._way.is_new(verified, module)
        if is_new or LOST in verified:
            verified -= orders
        if captured.recorder.picks:
            verified.add(ROWS_VARY)
            # Each batch has its rows in another order: further ones are checked, ever more rarely.
            self._picked += 1
            is_due = self._picked & (self._picked - 1) == 0 and not holds_stand_ins(module)
            verified -= {subject, *orders} if is_due else set()
        if not (self._describe_way(captured, measure) <= verified or holds_stand_ins(module)):
            verified.discard(subject)
        return True

    def _describe_way(self, captured: Captured, measure: Measure | None) -> set[str]:
        """Return what to note of a batch that was checked."""
        subject = "loss" if measure is None else "measurement"
        return {self._way.text, *(COINCIDES.format(text, subject) for text in captured.recorder.coincidences)}

    def _check_measured(self, captured: Captured, module: Any, batch: Any) -> Captured:
        """Check that losses come in the order of the examples where no batch before has shown it.

        Returns:
            The batch, read in another way if it is right that way only.

        Raises:
            UnsupportedModelError: if they do not.
        """
        if captured.num_examples == 1:
            return captured
        try:
            self._check_order(captured, module, batch)
        except UnsupportedModelError as refusal:
            return self._read_other_rows(captured, module, batch, refusal, set(self.plan.slow))
        return captured

    def _keep_one_reading(self, captured: Captured) -> None:
        """Note how a batch was read; batches of one question are all read in the same way.

        Raises:
            ReadOtherwiseError: if some before gave examples weights, which this reading does not know.
        """
        loss, verified = captured.loss, self.plan.verified
        if isinstance(loss, BatchLoss) and loss.values is None:
            self._read_rows_otherwise()
        elif loss is not None and WEIGHED not in verified:
            self._weights = loss.weights().detach()
            read_later((self._weights != 1).any(), lambda found: verified.add(WEIGHED) if found else None)

    def _read_rows_otherwise(self) -> None:
        """Note that batches are read by the values of their losses from now on.

        Raises:
            ReadOtherwiseError: as :meth:`_keep_one_reading`.
        """
        verified = self.plan.verified
        if OTHER_ROWS not in verified:
            verified.add(OTHER_ROWS)
            if WEIGHED in verified or (self._weights is not None and bool((self._weights != 1).any())):
                raise ReadOtherwiseError(OTHER_WEIGHTS)

    def _read_other_rows(
        self, captured: Captured, module: Any, batch: Any, refusal: UnsupportedModelError, slow: set[str]
    ) -> Captured:
        """Return a batch whose loss was refused, by the outputs of modules that it is made of, or one by one.

        Their rows are followed to the examples, or are in order where only the loss takes them in another.

        Returns:
            The batch, checked.

        Raises:
            UnsupportedModelError: if it is refused that way, too, or has been read so before: the refusal; if
                that asks for another order, which mends no loss that couples the examples, this reason.
        """
        if captured.values is not None or self._unnamed is not None or captured.num_examples == 1:
            raise refusal
        if not isinstance(refusal, ReadOtherwiseError):  # losses in a wrong order call right gradients wrong
            self.plan.slow &= slow
        read = partial(self._read_unnamed, is_strict=True)
        other, reason = self._try(read, module, batch, captured.num_examples)
        if other is not None:
            self._read_rows_otherwise()
            return other
        self._unnamed = None
        other, _ = self._try(self._read_one_by_one, module, batch, captured.num_examples)
        if other is None:
            raise reason if reason and (str(refusal), str(reason)) == (OTHER_ORDER, COUPLED) else refusal
        return other

    def _read_other_layouts(
        self, module: Any, batch: Any, num_examples: int, slow: set[str]
    ) -> Captured | None:
        """Return a batch whose examples stand elsewhere than was taken for granted; None if they do not."""
        read = partial(self._try, self._run, module, batch, num_examples)
        return read_otherwise(self.plan, module, batch, num_examples, slow, lambda: read()[0])

    def _try(
        self, read: Callable[[Any, Any, int], Captured | None], module: Any, batch: Any, num_examples: int
    ) -> tuple[Captured | None, Exception | None]:
        """Return a batch as it is read in some way, checked; or None, and why it cannot be."""
        try:
            other = read(module, batch, num_examples)
            if other is not None:
                self._check_examples(other, module, batch)
        except (UnsupportedModelError, NonFiniteError) as reason:
            self.plan.verified.discard(ONE_BY_ONE)
            return None, reason
        return other, None

    def _check_examples(
        self, captured: Captured, module: Any, batch: Any, measure: Measure | None = None
    ) -> None:
        """Check, on a first batch, that gradients are right, examples independent and losses in their order.

        Raises:
            UnsupportedModelError: if they are not.
        """
        uses, verified, alone = captured.recorder.uses, self.plan.verified, captured.num_examples == 1
        measured = measure is not None
        subject = "measurement" if measured else "loss"
        if subject not in verified:
            if uses is not None:
                uses.certify(captured.per_example())
            try:
                check_independent(captured)
            except UnsupportedModelError:
                # The rows of layers that are had from their uses are known to be the examples': it may be the
                # losses that are in another order, of which more can be said.
                if not measured and not alone and captured.recorder.follows_modules:
                    self._check_order(captured, module, batch)
                raise
            if not alone:  # one example alone shows no coupling
                verified.add(subject)
                # A measurement of the loss's outputs does not show in which order it takes them.
                if (uses is None or not uses.is_needed) and not (measure is not None and measure.needs_loss):
                    verified |= self._called(subject)
        if not measured and not alone:
            self._check_order(captured, module, batch)

    def _called(self, subject: str) -> set[str]:
        return {CALLED.format(name, subject) for name in self.plan.layers}

    def _make_recorder(self, batch: Any, num_examples: int, subject: str = "loss") -> Recorder:
        plan = self.plan
        if self._called(subject) <= plan.verified and ROWS_VARY not in plan.verified:
            return Recorder(plan.layers)
        return Recorder(plan.layers, self._watch_uses(batch, num_examples))

    def _watch_uses(self, batch: Any, num_examples: int) -> ParameterRecorder:
        plan = self.plan
        note_form(plan.verified, batch, num_examples)
        return ParameterRecorder(plan.layers, batch, num_examples, plan.slow, plan.verified)

    def _run(self, module: Any, batch: Any, num_examples: int) -> Captured:
        """Run the loss: by the functions that it is made of, or where these are not known by its values.

        Returns:
            The captured batch.

        Raises:
            LossCaptureError: if the loss is found neither way.
            NonFiniteError: if the loss is NaN or infinite; says where that began.
        """
        self._rewind()
        if ONE_BY_ONE in self.plan.verified:
            alone, _ = self._run_one_by_one(module, batch, num_examples)
            one_by_one.check_mean(alone, self._call, module, batch)
            return alone
        if self._unnamed is None and OTHER_ROWS in self.plan.verified:
            self._unnamed = UnnamedLoss(self._call, self.plan.layers, self.plan.verified)
        if self._unnamed is not None:
            return self._run_unnamed(self._unnamed, module, batch, num_examples)
        recorder = self._make_recorder(batch, num_examples)
        with recorder, self._capture:
            values, batch_loss = self._call(module, batch)
        self._way = self._capture.way
        if not self._judge_rows(batch, num_examples, recorder):
            return self._watch_rows(module, batch, num_examples)
        try:
            if batch_loss is None:
                source = "influence_loss(batch)" if self._loss is None else "loss="
                values = check_per_example(values, num_examples, source)
                loss = per_example_capture(values, self._capture, num_examples)
                captured = None if loss is not None else self._read_unnamed(module, batch, num_examples)
                return captured or Captured(num_examples, loss, values, recorder)
            loss = self._capture.resolve(batch_loss, num_examples, activations=recorder.nodes)
        except NonFiniteError:
            if batch_loss is not None:
                check_loss(batch_loss.detach(), recorder, self.plan.layers)  # says where that began
            raise
        except LossCaptureError:
            assert batch_loss is not None
            check_loss(batch_loss.detach(), recorder, self.plan.layers)
            captured = self._read_values(module, batch, num_examples)
            if captured is None:
                raise
            return captured
        finally:
            self._capture.calls = []  # lets go of the graph
        return Captured(num_examples, loss, None, recorder)

    def _judge_rows(self, batch: Any, num_examples: int, recorder: Recorder) -> bool:
        """Return whether rows that layers saw are known to be the examples', and mark losses of others."""
        known = [text.split()[0] for text in self.plan.verified if text.endswith(LEFT_OUT.format(""))]
        whole = WholeRows(batch, num_examples, recorder.positions(num_examples), map(int, known))
        uses = recorder.uses
        if uses is not None and self._capture.is_lost(uses.place_of):
            self.plan.verified.add(LOST)
        if uses is not None and self._capture.put_in_order(uses.place_of, num_examples, picks=uses.picks):
            self.plan.verified.add(ROWS_VARY)
        in_order = self._capture.judge(whole, None if uses is None else uses.is_in_order)
        for rows in in_order:
            self.plan.verified |= {LEFT_OUT.format(number) for number in whole.left_out(rows)}
        return uses is not None or all(rows in whole for rows in recorder.flat_rows(num_examples))

    def _watch_rows(self, module: Any, batch: Any, num_examples: int) -> Captured:
        """Run a batch again whose layers were called on rows that are nobody's by their number."""
        self.plan.verified.add(ROWS_VARY)
        self.plan.verified.discard("loss")
        return self._run(module, batch, num_examples)

    def _run_unnamed(self, unnamed: UnnamedLoss, module: Any, batch: Any, num_examples: int) -> Captured:
        make = partial(self._make_recorder, batch, num_examples)
        self._rewind()
        loss, recorder = unnamed.read(module, batch, num_examples, make)
        self._way = unnamed.way
        if not self._judge_rows(batch, num_examples, recorder):
            return self._watch_rows(module, batch, num_examples)
        return Captured(num_examples, loss, None, recorder)

    def _read_unnamed(
        self, module: Any, batch: Any, num_examples: int, *, is_strict: bool = False
    ) -> Captured | None:
        """Return the batch by the values of its loss, None if that depends on the output of no module."""
        unnamed = UnnamedLoss(self._call, self.plan.layers, self.plan.verified, is_strict=is_strict)
        try:
            captured = self._run_unnamed(unnamed, module, batch, num_examples)
        except LossCaptureError:
            return None
        self._unnamed = unnamed
        return captured

    def _read_values(self, module: Any, batch: Any, num_examples: int) -> Captured | None:
        """Return the batch by the values of its loss, or by those of its examples alone.

        Outputs of unlike sizes, as of images that are run one after the other, are not known again in parts
        of the batch, and look as if the examples were coupled.

        Returns:
            The batch; None if the loss depends on the output of no module, and is no mean of its examples'.

        Raises:
            UnsupportedModelError: if it couples the examples.
        """
        try:
            captured = self._read_unnamed(module, batch, num_examples)
        except UnsupportedModelError as refusal:
            captured = None
            if str(refusal) == COUPLED:
                captured = self._read_one_by_one(module, batch, num_examples)
            if captured is None:
                raise
        return captured or self._read_one_by_one(module, batch, num_examples)

    def _run_one_by_one(self, module: Any, batch: Any, num_examples: int) -> tuple[Captured, Tensor]:
        uses = self._watch_uses(batch, num_examples)
        layout = read_form(self.plan.verified, batch, num_examples)
        parts = [rearranged(batch, [number], num_examples, layout) for number in range(num_examples)]
        self._rewind()
        return one_by_one.run(Recorder(self.plan.layers, uses), uses, self._call, module, parts)

    def _read_one_by_one(self, module: Any, batch: Any, num_examples: int) -> Captured | None:
        """Return a batch by the losses of its examples alone; None if its loss is not their mean."""
        if num_examples == 1:
            return None
        try:
            captured, losses = self._run_one_by_one(module, batch, num_examples)
            is_mean = one_by_one.is_mean_of_examples(losses, self._call, module, batch)
        except Exception:  # whatever the user's code may raise on a batch of one
            return None
        if not is_mean:
            return None
        self.plan.verified.add(ONE_BY_ONE)
        warn(one_by_one.SLOWER)
        return captured

    def _compare_with_step(self, captured: Captured, module: Any, batch: Any) -> None:
        """Compare the gradient of the user's own loss with that of ``training_step``, on a first batch.

        Raises:
            LossCaptureError: if it points the other way.
        """
        name, count = "`influence_loss`" if self._loss is None else "`loss=`", captured.num_examples
        if name in self.plan.verified:
            return
        # Of one example, uses would see penalties on weights as its own.
        recorder = Recorder(self.plan.layers) if count == 1 else self._make_recorder(batch, count)
        with preserve_rng():
            self._rewind()
            if compare_with_step(captured, recorder, module, batch, name):
                self.plan.verified.add(name)

    def _check_order(self, captured: Captured, module: Any, batch: Any) -> None:
        """Check that the losses come in the order of the examples, for each way in which their rows do."""
        loss = captured.loss
        if isinstance(loss, BatchLoss | JointLoss) and loss.values is None:
            return  # its gradients were compared with those of parts of the batch
        if ONE_BY_ONE in self.plan.verified:
            return
        subject = f"{ORDER}{count_left_out(captured, batch)}"
        if subject not in self.plan.verified:
            follows = captured.recorder.uses is not None  # as a batch in another order may need
            verified = {ROWS_VARY} if follows else self.plan.verified & {ROWS_VARY}
            losses = partial(compute_losses, module, run=self._call, verified=verified)
            check_losses(captured, module, batch, losses)
            self.plan.verified.add(subject)

    def _call(self, module: Any, batch: Any) -> tuple[Tensor | None, Tensor | None]:
        """Run the loss of the call if there is one, else that of the module.

        Returns:
            ``(per-example values, None)``, or ``(None, batch loss)``.
        """
        return call_loss(module, batch) if self._loss is None else call_own_loss(self._loss, module, batch)
