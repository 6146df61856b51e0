"""Capture of a training step that somebody else runs: the user's own, in the middle of a fit."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from lightning_influence.model.batches.ragged import find_places
from lightning_influence.model.captured import Captured
from lightning_influence.model.checks import check_independent, check_loss
from lightning_influence.model.layers.plan import LayerPlan
from lightning_influence.model.layers.recorder import Recorder
from lightning_influence.model.losses.capture import LossCapture
from lightning_influence.model.losses.hook import check_per_example, per_example_capture
from lightning_influence.model.losses.picked import PICKERS
from lightning_influence.model.losses.way import Way
from lightning_influence.model.uses.calls import Call
from lightning_influence.model.uses.watch import Watch
from lightning_influence.support.errors import LossCaptureError, UnsupportedModelError
from lightning_influence.support.fast_paths import keep_open, let_go
from lightning_influence.support.whole import is_of_fsdp


class _StepRecorder(Recorder):
    """A recorder whose hooks raise nothing into the user's forward pass; what failed is kept for later."""

    failure: Exception | None = None

    def _hook(self, name: str) -> Callable[..., None]:
        record = super()._hook(name)

        def hook(*args: Any) -> None:
            try:
                record(*args)
            except Exception as error:
                self.failure = self.failure or error

        return hook


class _LiveWatch(Watch):
    """Follows the examples through the user's own step, which no failure of following may end."""

    def _prepare(self, call: Call) -> Any:
        try:
            return super()._prepare(call)
        except Exception:  # whatever it is: the examples are lost here
            return None


class StepLosses(LossCapture):
    """A loss capture that can be left in any order, and notes whether the step registers gradient hooks.

    Attributes:
        watch: follows the examples to the losses; None to let them be.
        met: how many functions of torch have been called while it was entered.
    """

    allows_weights = True
    met: int = 0
    paused: ClassVar[int] = 0
    hooks: bool = False
    watch: Watch | None = None

    def follow(self, batch: Any, num_examples: int) -> None:
        """Follow the examples of the next step."""
        self.watch, self.way = _LiveWatch({}, batch, num_examples, find_places(batch, num_examples)), Way()

    def are_in_order(self) -> bool:
        """Return whether the rows of all losses are the examples in their order, as far as was followed.

        Where nobody could follow outputs, their targets tell; where neither was followed because values have
        left torch, they may be in any order.
        """
        if self.watch is None:
            return True
        for call in self.calls:
            places = [self.watch.place_of(part) for part in (call.outputs, *call.tensors)]
            place = next((place for place in places if place is not None), None)
            if not (place.is_plain() if place is not None else not self.way.leaves_torch):
                return False
        return True

    def clear(self) -> None:
        """Forget the recorded calls, their graph, and where examples were."""
        super().clear()
        self.watch = None

    def __enter__(self) -> Self:
        """Begin to record.

        Returns:
            The capture itself.
        """
        keep_open(self)
        return super().__enter__()

    def __exit__(self, *details: Any) -> None:
        """Leave the stack of modes, also where others have entered it since: those stay."""
        stack: Any = torch.overrides  # torch itself takes the uppermost mode off, whichever it is
        above: list[TorchFunctionMode] = []
        while stack._len_torch_function_stack() and (mode := stack._pop_mode()) is not self:
            above.append(mode)
        for mode in reversed(above):
            stack._push_mode(mode)
        let_go(self)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the function; keep losses, unless it is another callback's work that runs.

        Returns:
            What the function returns.
        """
        self.met += 1
        if func is Tensor.register_hook and not (StepLosses.paused or args[0].is_leaf or is_of_fsdp(args[1])):
            self.hooks = True
        is_loss = func in self._losses
        if StepLosses.paused or not (is_loss or func in PICKERS or self.watch is not None):
            return func(*args, **(kwargs or {}))
        if self.watch is not None and not (is_loss or torch.compiler.is_compiling()):
            self.way.note(func)
            result = self.watch.__torch_function__(func, types, tuple(args), kwargs)
            if func in PICKERS:
                self.note_picked(func, args, result)
            return result
        return super().__torch_function__(func, types, args, kwargs)


def time_call() -> float:
    """Return the seconds that a function of torch takes longer while a step is watched."""
    probe, count = torch.zeros(1), 32

    def take_time() -> float:
        start = time.perf_counter()
        for _ in range(count):
            torch.neg(probe)
        return time.perf_counter() - start

    plain = min(take_time() for _ in range(3))
    with StepLosses():
        watched = min(take_time() for _ in range(3))
    return max(0.0, watched - plain) / count


class LiveCapture:
    """Records layers and losses between :meth:`open` and :meth:`close`.

    Args:
        plan: the covered layers.
    """

    def __init__(self, plan: LayerPlan) -> None:
        self._plan = plan
        self._recorder = _StepRecorder(plan.layers)
        self._losses = StepLosses()
        self._stack: contextlib.ExitStack | None = None

    @property
    def is_open(self) -> bool:
        """Whether hooks are in place."""
        return self._stack is not None

    def open(self, module: nn.Module) -> None:
        """Put hooks on the layers and watch for losses; a step that was open is let go.

        Args:
            module: the model.

        Raises:
            UnsupportedModelError: if it has hooks on gradients.
        """
        self.close()
        self.clear()
        hooked = [
            name for name, part in module.named_modules() if part._backward_hooks or part._backward_pre_hooks
        ]
        if hooked:
            raise UnsupportedModelError(f"Module {hooked[0]!r} has a backward hook. {_GRADIENT_HOOKS}")
        self._recorder.failure, self._losses.hooks = None, False
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._recorder)
            stack.enter_context(self._losses)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Remove every hook; what was recorded stays until :meth:`clear`."""
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()

    def clear(self) -> None:
        """Let go of the recorded tensors and their graph."""
        self._recorder.clear()
        self._losses.clear()

    def resolve(self, loss: Tensor, num_examples: int, divisor: float = 1.0) -> Captured:
        """Find the training loss among what was recorded.

        Args:
            loss: the scalar that is about to be differentiated.
            num_examples: ``B``.
            divisor: what the training loss was divided by to give ``loss``.

        Returns:
            The captured step; its graph is the user's own and is kept.

        Raises:
            LossCaptureError: if the loss is not found.
            NonFiniteError: if it is NaN or infinite; the first layer concerned is named.
            UnsupportedModelError: if no layer took part, or the step put hooks on gradients.
        """
        if self._losses.hooks:
            raise UnsupportedModelError(f"The training step registers a hook on a tensor. {_GRADIENT_HOOKS}")
        check_loss(loss.detach() * divisor, self._recorder, self._plan.layers)
        resolved = self._losses.resolve(loss, num_examples, activations=self._recorder.nodes, divisor=divisor)
        return self._complete(Captured(num_examples, resolved, None, self._recorder))

    def read_recorder(self) -> Recorder:
        """Return what the layers of a step saw, whose loss need not be found.

        Raises:
            UnsupportedModelError: if the step put hooks on gradients, or no layer took part.
        """
        if self._losses.hooks:
            raise UnsupportedModelError(f"The training step registers a hook on a tensor. {_GRADIENT_HOOKS}")
        return self._complete(Captured(0, None, None, self._recorder)).recorder

    def run_apart(
        self,
        module: Any,
        batch: Any,
        num_examples: int,
        context: contextlib.AbstractContextManager[None],
        run_step: Callable[[Any, Any], Tensor],
    ) -> Captured:
        """Run a loss under capture, in addition to the user's step.

        That is the plan's, or else the module's ``influence_loss``, or else that of a step of ours.

        Args:
            module: the user's module.
            batch: the batch, on the module's device.
            num_examples: ``B``.
            context: what to run it in: the precision of the training steps.
            run_step: runs a step on a batch, and returns its loss.

        Returns:
            The captured batch.

        Raises:
            LossCaptureError: if a single number was returned whose parts are not found.
            UnsupportedModelError: if no layer took part.
        """
        self.open(module)
        try:
            with context:
                loss, hook = self._plan.loss, getattr(module, "influence_loss", None)
                if loss is not None:
                    values = loss(module, batch)
                else:
                    values = hook(batch) if callable(hook) else run_step(module, batch)
        finally:
            self.close()
        source = "influence_loss(batch)" if loss is None else "loss="
        is_hook = loss is None and callable(hook)
        if not is_hook and isinstance(values, Tensor) and values.dim() == 0:
            try:
                found = self._losses.resolve(values, num_examples, activations=self._recorder.nodes)
            except LossCaptureError as error:
                if loss is None:
                    raise
                refused = "What `loss=` returns cannot be collected from."
                raise LossCaptureError(f"{refused} {error}", f"{refused} {error.reason}") from error
            return self._complete(Captured(num_examples, found, None, self._recorder))
        check_per_example(values, num_examples, source)
        captured = per_example_capture(values, self._losses, num_examples)
        return self._complete(Captured(num_examples, captured, values, self._recorder))

    def _complete(self, captured: Captured) -> Captured:
        if self._recorder.failure is not None:
            raise self._recorder.failure
        if len(self._recorder.silent) == len(self._plan.layers):
            raise UnsupportedModelError(
                "No covered layer took part in the training step with a gradient graph. Accepted are layers "
                "that are called as modules, outside torch.no_grad() and outside reentrant gradient "
                f"checkpointing. Layers: {sorted(self._plan.layers)[:8]}."
            )
        return captured


_GRADIENT_HOOKS = (
    "Collecting takes gradients of its own, which would run such hooks more often than the training does, "
    "and what they do then would change it."
)


@contextlib.contextmanager
def pause_other_captures() -> Iterator[None]:
    """Keep captures that others have opened on the same step from seeing what runs in here."""
    StepLosses.paused += 1
    try:
        yield
    finally:
        StepLosses.paused -= 1


def check_not_compiled(module: nn.Module) -> None:
    """Refuse a model with compiled parts.

    Hooks are not called by a graph that was compiled without them, or become part of one that is compiled
    with them. Running compiled parts eagerly for the time being draws other random numbers.

    Raises:
        UnsupportedModelError: naming the first compiled part.
    """
    for name, part in module.named_modules():
        found = _find_compiled(part)
        if found is not None:
            where = ".".join(filter(None, (name, found)))
            raise UnsupportedModelError(
                f"{where!r} of the model is compiled by torch.compile, and compiled parts cannot be watched "
                "without changing what they compute."
            )


def _find_compiled(part: nn.Module) -> str | None:
    """Look for what is compiled in a module: itself, its attributes, methods, and the globals they use.

    Returns:
        Its name, empty for the module itself; None if nothing is compiled.
    """
    if _is_compiled(part):
        return ""
    for name, value in vars(part).items():
        if name not in {"_modules", "_trainer", "_fabric"} and _holds_compiled(value):
            return name
    for cls in type(part).__mro__:
        if cls.__module__.partition(".")[0] in {"torch", "lightning", "pytorch_lightning", "builtins"}:
            continue
        for name, value in vars(cls).items():
            if _is_compiled(value):
                return str(name)
            code, names = getattr(value, "__code__", None), getattr(value, "__globals__", {})
            for used in code.co_names if code is not None else ():
                if _is_compiled(names.get(used)):
                    return str(used)
    return None


def _is_compiled(value: Any) -> bool:
    if isinstance(value, nn.Module):  # `torch.compile(module)`, and `module.compile()`
        return "_orig_mod" in value._modules or value._compiled_call_impl is not None
    return callable(value) and hasattr(value, "_torchdynamo_orig_callable")


def _holds_compiled(value: Any, depth: int = 2) -> bool:
    if isinstance(value, functools.partial):
        value = value.func
    if depth and isinstance(value, dict | list | tuple | set):
        items = value.values() if isinstance(value, dict) else value
        return any(_holds_compiled(item, depth - 1) for item in items)
    return _is_compiled(value) or (
        isinstance(value, nn.Module) and depth > 0 and any(map(_is_compiled, value.modules()))
    )


def describe_other_loss(values: Tensor, loss: Tensor, name: str) -> str | None:
    """Say that a user's own loss does not make up the training loss of the same batch, or None if it does.

    Args:
        values: what it returned, ``(B,)``.
        loss: the training loss of the batch.
        name: of the user's own loss, for messages.

    Returns:
        A sentence with the numbers; what was left out on purpose, such as a penalty, has this effect as well.
    """
    mean, total, found = float(values.double().mean()), float(values.double().sum()), float(loss)
    limit = 1e-2 * abs(found) + 1e-6
    if min(abs(mean - found), abs(total - found)) <= limit or not math.isfinite(found):
        return None
    return (
        f"The training loss of a batch is {found:.6g}, and the values of {name} for it have the mean "
        f"{mean:.6g} and the sum {total:.6g}. Influence estimates are of {name}: this is "
        "right if it leaves out a penalty on purpose, and wrong if it lacks weights, a factor or a sign."
    )


def check_first(captured: Captured, module: nn.Module) -> None:
    """Check on a first batch that examples do not depend on each other, unless BatchNorm couples them.

    Args:
        captured: the batch.
        module: the model, in the mode of the step.

    Raises:
        NonFiniteError: if a per-example loss is not finite.
        UnsupportedModelError: if examples are coupled otherwise.
    """
    if not find_batch_coupling(module):
        check_independent(captured)


def find_batch_coupling(module: nn.Module) -> list[str]:
    """Return names of BatchNorm modules that use the statistics of the batch."""
    return [
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and (part.training or part.running_mean is None)
    ]


def describe_coupling(module: nn.Module) -> str | None:
    """Return what BatchNorm modules that use the batch mean for the factors, or None without any."""
    names = find_batch_coupling(module)
    if not names:
        return None
    return (
        f"BatchNorm in training mode ({', '.join(names[:4])}) makes an example's gradient depend on the "
        "others of its batch, and factors from the fit include that. Ask with factors='refit' to fit them "
        "in eval mode."
    )
