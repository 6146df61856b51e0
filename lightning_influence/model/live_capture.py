"""Capture of a training step that somebody else runs: the user's own, in the middle of a fit."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor, nn

from lightning_influence.model.captured import Captured
from lightning_influence.model.checks import check_independent, check_loss
from lightning_influence.model.losses.capture import LossCapture
from lightning_influence.model.losses.hook import check_per_example, per_example_capture
from lightning_influence.model.plan import LayerPlan
from lightning_influence.model.recorder import Recorder
from lightning_influence.support.eager import eagerly
from lightning_influence.support.errors import UnsupportedModelError


class LiveCapture:
    """Records layers and losses between :meth:`open` and :meth:`close`.

    Compiled submodules run eagerly in between, because a graph that was compiled without hooks calls none.

    Args:
        plan: the covered layers.
    """

    def __init__(self, plan: LayerPlan) -> None:
        self._plan = plan
        self._recorder = Recorder(plan.layers)
        self._losses = LossCapture()
        self._stack: contextlib.ExitStack | None = None

    @property
    def is_open(self) -> bool:
        """Whether hooks are in place."""
        return self._stack is not None

    def open(self) -> None:
        """Put hooks on the layers and watch for losses."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(eagerly())
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

    def resolve(
        self, loss: Tensor, num_examples: int, *, divisor: float = 1.0, wrappers: int = 0
    ) -> Captured:
        """Find the training loss among what was recorded.

        Args:
            loss: the scalar that is about to be differentiated.
            num_examples: ``B``.
            divisor: what the training loss was divided by to give ``loss``.
            wrappers: how many operations (divisions for accumulation, loss scaling) lie between them. The
                loss is recognised by its node below these, which rounding cannot hide, or else by value.

        Returns:
            The captured step; its graph is the user's own and is kept.

        Raises:
            LossCaptureError: if the loss is not found.
            NonFiniteError: if it is NaN or infinite; the first layer concerned is named.
            UnsupportedModelError: if no layer took part.
        """
        node = loss.grad_fn
        for _ in range(wrappers):
            node = node.next_functions[0][0] if node is not None and node.next_functions else None
        value = loss.detach() * divisor
        check_loss(value, self._recorder, self._plan.layers)
        for call in self._losses.calls:
            if node is not None and call.node is node and call.value.numel() == 1:
                self._losses.calls, value = [call], call.value
                break
        resolved = self._losses.resolve(value, num_examples)
        return self._complete(Captured(num_examples, resolved, None, self._recorder))

    def run_hook(
        self, module: Any, batch: Any, num_examples: int, context: contextlib.AbstractContextManager[None]
    ) -> Captured:
        """Run the module's ``influence_loss`` under capture, in addition to the user's step.

        Args:
            module: the user's module.
            batch: the batch, on the module's device.
            num_examples: ``B``.
            context: what to run it in: the precision of the training steps.

        Returns:
            The captured batch.

        Raises:
            UnsupportedModelError: if no layer took part.
        """
        self.open()
        try:
            with context:
                values = module.influence_loss(batch)
        finally:
            self.close()
        check_per_example(values, num_examples, "influence_loss(batch)")
        loss = per_example_capture(values, self._losses, num_examples)
        return self._complete(Captured(num_examples, loss, values, self._recorder))

    @property
    def silent(self) -> list[str]:
        """Layers that took no part in the step."""
        return self._recorder.silent

    def _complete(self, captured: Captured) -> Captured:
        if len(self._recorder.silent) == len(self._plan.layers):
            raise UnsupportedModelError(
                "No covered layer took part in the training step with a gradient graph. Accepted are layers "
                "that are called as modules, outside torch.no_grad() and outside reentrant gradient "
                f"checkpointing. Layers: {sorted(self._plan.layers)[:8]}."
            )
        return captured


def check_first(captured: Captured, module: nn.Module) -> None:
    """Check on a first batch that examples do not depend on each other, unless BatchNorm couples them.

    Args:
        captured: the batch.
        module: the model, in the mode of the step.

    Raises:
        NonFiniteError: if a per-example loss is not finite.
        UnsupportedModelError: if examples are coupled otherwise.
    """
    if not batch_coupling(module):
        check_independent(captured)


def batch_coupling(module: nn.Module) -> list[str]:
    """Return names of BatchNorm modules that use the statistics of the batch."""
    return [
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and (part.training or part.running_mean is None)
    ]


def describe_coupling(module: nn.Module) -> str | None:
    """Return what BatchNorm modules that use the batch mean for the factors, or None without any."""
    names = batch_coupling(module)
    if not names:
        return None
    return (
        f"BatchNorm in training mode ({', '.join(names[:4])}) makes an example's gradient depend on the "
        "others of its batch, and factors from the fit include that. Ask with factors='refit' to fit them "
        "in eval mode."
    )
