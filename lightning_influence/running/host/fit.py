"""Questions to a Trainer in the middle of a fit; nothing here changes anything."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import BatchSampler

from lightning_influence.running.host.module import muted
from lightning_influence.running.host.processes import sum_over_processes
from lightning_influence.running.host.shards import Shards
from lightning_influence.running.host.states import ModuleStates
from lightning_influence.running.host.trainer import check_strategy, splits_parameters
from lightning_influence.support.batches import MOST_DEPTH, guess_count, open_part
from lightning_influence.support.errors import (
    UnsupportedDataError,
    UnsupportedModelError,
    UnsupportedTrainerError,
)
from lightning_influence.support.random_states import preserve_rng

SEVERAL_BACKWARDS = (
    "One training step ran several backward passes (several losses, or a closure that is called again), and "
    "which of them is the training loss cannot be told. Define `influence_loss(batch) -> (B,)` on the module."
)
LOSS_NOT_SEEN = (
    "The training step optimizes manually and did not call self.manual_backward(loss), so its loss was not "
    "seen. Call that in place of loss.backward(), or define `influence_loss(batch) -> (B,)` on the module."
)


def check_collectable(trainer: Trainer) -> None:
    """Refuse a fit whose steps cannot be collected from.

    Raises:
        UnsupportedTrainerError: for LBFGS, and for strategies that split parameters over processes.
    """
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
        raise UnsupportedTrainerError("LBFGS runs the training step several times for one batch.")
    check_strategy(trainer)


def refuse_step(reason: str) -> None:
    """Refuse what a training step does.

    Raises:
        UnsupportedModelError: always.
    """
    raise UnsupportedModelError(reason)


def count_planned_batches(trainer: Trainer, seen: int) -> int | None:
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


def read_loss_divisor(trainer: Trainer, module: LightningModule) -> float:
    """Return what the training loss was divided by to give the one before the backward pass.

    Automatic optimization divides for accumulation (also by 1); mixed float16 precision multiplies by the
    scale of its scaler.
    """
    divisor = float(trainer.accumulate_grad_batches) if module.automatic_optimization else 1.0
    scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
    return divisor / float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else divisor


def will_step(trainer: Trainer, optimizer: torch.optim.Optimizer) -> bool:
    """Tell, after the backward pass, whether an optimizer is going to change the parameters.

    Returns:
        False where the training step returned None, and where the scaler of mixed float16 precision has
        found a gradient that overflowed.
    """
    scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return False
    found = scaler._found_inf_per_device(optimizer)
    if found:
        return not any(bool(value) for value in found.values())
    # Fused optimizers unscale the gradients themselves, later than this.
    return all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


def count_examples(trainer: Trainer, batch: Any, batch_idx: int) -> int:
    """Count the examples in a batch.

    The first dimension of the first tensor may be that of a mask, a table, or the nodes of graphs. How many
    examples the loader has put into the batch decides where that is another number, and some part of the
    batch has as many rows or items.

    Args:
        trainer: the Trainer, whose loader the batch is from.
        batch: the batch.
        batch_idx: its number in the epoch.

    Returns:
        ``B``.

    Raises:
        UnsupportedDataError: if the batch shows no number of examples.
    """
    loaded = _count_loaded(trainer.train_dataloader, batch_idx)
    if loaded is not None and loaded in _lengths(batch):
        return loaded
    guess = guess_count(batch)  # which may have to read a tensor
    if guess is None:
        raise UnsupportedDataError(
            f"No batch size can be read from a batch of type {type(batch).__name__}. Accepted are tensors, "
            "and collections of tensors whose first dimension is the examples."
        )
    return guess


def _count_loaded(loader: Any, batch_idx: int) -> int | None:
    """Return how many examples a loader put into a batch; None where it does not tell."""
    sampler = getattr(loader, "batch_sampler", None)  # not tested for truth: of a stream it has no length
    if sampler is None:
        sampler = getattr(loader, "sampler", None)
    if type(sampler) is not BatchSampler or not isinstance(sampler.sampler, Sized):
        return None
    left = len(sampler.sampler) - batch_idx * sampler.batch_size
    return min(sampler.batch_size, left) if left > 0 else None


def _lengths(batch: Any, depth: int = MOST_DEPTH) -> Iterator[int]:
    """Yield the first dimensions of the tensors in a batch, and the lengths of its lists and objects."""
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield len(batch)
        return
    opened = open_part(batch) if depth else None
    if opened is None:
        return
    if isinstance(batch, Sized) and not isinstance(batch, Mapping | tuple):
        yield len(batch)
    for part in opened.parts:
        yield from _lengths(part, depth - 1)


def make_all_reduce(trainer: Trainer) -> Callable[[Tensor], Tensor] | None:
    """Return a function that sums a tensor over the processes in place, None for one process."""
    if trainer.world_size == 1:
        return None
    return functools.partial(sum_over_processes, device=trainer.strategy.root_device)


@contextlib.contextmanager
def lent_parameters(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """A context in which this process can run a module whose parameters are sharded, whatever others do.

    At its end each process serves the others until all are there. Without shards nothing is done.

    Args:
        trainer: the Trainer, between two steps.
        module: the user's module.
    """
    if not splits_parameters(trainer):
        yield
        return
    shards = Shards(module, trainer.strategy.root_device)
    with shards.lent():
        try:
            yield
        finally:
            shards.meeting.wait()


@contextlib.contextmanager
def set_aside(trainer: Trainer, module: LightningModule, batch: Any = None) -> Iterator[Any]:
    """A context for what is computed in addition to the user's step, and leaves no trace in it.

    Random states, the module's state and gradients are put back, and nothing is logged. A backward pass of
    ours needs this as well: activation checkpointing runs parts of the forward pass once more in it.

    Args:
        trainer: the Trainer.
        module: the user's module.
        batch: what a forward pass of ours reads; without one, parameters are not looked after.

    Yields:
        A copy of the batch.
    """
    states = ModuleStates(module, parameters=batch is not None)
    grads = [(p, p.grad) for p in module.parameters()]
    for parameter, _ in grads:
        parameter.grad = None  # a backward pass in here would add to what a window of batches accumulates
    try:
        with preserve_rng(), muted(module), torch.enable_grad():
            yield copy.deepcopy(batch)
    finally:
        states.restore()
        for parameter, grad in grads:
            parameter.grad = grad


def enter_precision(trainer: Trainer) -> contextlib.AbstractContextManager[None]:
    """Return the precision context that the Trainer runs training steps in."""
    return trainer.precision_plugin.train_step_context()


def read_log_interval(trainer: Trainer) -> int:
    """Return after how many steps the Trainer logs again."""
    host: Any = trainer  # the attribute is declared nowhere
    return int(host.log_every_n_steps)
