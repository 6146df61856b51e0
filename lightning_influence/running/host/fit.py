"""Questions to a Trainer in the middle of a fit; nothing here changes anything."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

from lightning_influence.running.host.module import muted, preserved_states
from lightning_influence.running.host.processes import sum_over_processes
from lightning_influence.running.host.trainer import splits_parameters
from lightning_influence.support.errors import LossCaptureError
from lightning_influence.support.random_states import preserve_rng

SEVERAL_BACKWARDS = (
    "One training step ran several backward passes (several losses, or a closure that is called again), and "
    "which of them is the training loss cannot be told. Define `influence_loss(batch) -> (B,)` on the module."
)
LOSS_NOT_SEEN = (
    "The training step optimizes manually and did not call self.manual_backward(loss), so its loss was not "
    "seen. Call that in place of loss.backward(), or define `influence_loss(batch) -> (B,)` on the module."
)


def why_not_collect(trainer: Trainer) -> str | None:
    """Return why nothing can be collected from this fit, with what to do instead, or None."""
    remedy = "The factors will be fitted in a pass of their own when influence is asked for."
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
        return f"LBFGS runs the training step several times for one batch. {remedy}"
    if splits_parameters(trainer):
        name = type(trainer.strategy).__name__
        return f"{name} splits the parameters over processes. {remedy} Use a whole model for it."
    return None


def planned_batches(trainer: Trainer, seen: int) -> int | None:
    """Return how many batches will have been seen at the run's planned end, None if it has none.

    Args:
        trainer: the Trainer, at the start of a fit.
        seen: batches counted so far, in earlier fits too.
    """
    per_epoch, limits = trainer.num_training_batches, []
    if trainer.max_epochs not in {None, -1} and not math.isinf(per_epoch):
        limits.append(int(per_epoch) * int(trainer.max_epochs or 0))
    if trainer.max_steps != -1:
        limits.append(trainer.max_steps * trainer.accumulate_grad_batches)
    if not limits:
        return None
    # Batches of earlier fits by other Trainers; a checkpoint written inside a batch hook may be one off.
    offset = seen - (trainer.fit_loop.total_batch_idx + 1)
    return min(limits) + (0 if abs(offset) <= 1 else max(0, offset))


def loss_wrapping(trainer: Trainer, module: LightningModule) -> tuple[float, int]:
    """Return what the loss before backward was divided by, and how many operations that took.

    Automatic optimization divides for accumulation (also by 1); mixed float16 precision multiplies by the
    scale of its scaler.
    """
    divisor, operations = 1.0, 0
    if module.automatic_optimization:
        divisor, operations = float(trainer.accumulate_grad_batches), 1
    scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and scaler.is_enabled():
        divisor, operations = divisor / float(scaler.get_scale()), operations + 1
    return divisor, operations


def batch_size_of(batch: Any) -> int:
    """Return the number of examples in a batch.

    Raises:
        LossCaptureError: if the batch shows none.
    """
    try:
        return int(extract_batch_size(batch))
    except MisconfigurationException as error:
        raise LossCaptureError(
            f"No batch size can be read from a batch of type {type(batch).__name__}. Accepted are tensors, "
            "and collections of tensors whose first dimension is the examples."
        ) from error


def all_reduce(trainer: Trainer) -> Callable[[Tensor], Tensor] | None:
    """Return a function that sums a tensor over the processes in place, None for one process."""
    if trainer.world_size == 1:
        return None
    return functools.partial(sum_over_processes, device=trainer.strategy.root_device)


@contextlib.contextmanager
def aside(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """A context for a forward pass of our own, and what is computed from it, before the user's step.

    Random states, buffers and metrics are put back, nothing is logged, and autocast is that of the training
    step.
    """
    with preserved_states(module), preserve_rng(), muted(module), torch.enable_grad():
        yield


def forward_context(trainer: Trainer) -> contextlib.AbstractContextManager[None]:
    """Return the precision context that the Trainer runs training steps in."""
    return trainer.precision_plugin.train_step_context()


def log_every(trainer: Trainer) -> int:
    """Return after how many steps the Trainer logs again."""
    host: Any = trainer  # the attribute is declared nowhere
    return int(host.log_every_n_steps)
