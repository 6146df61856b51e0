"""Passes in a plain loop, where there is no Trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

from lightning_influence.running.host.module import borrowed_module, unwrap_compiled
from lightning_influence.running.host.trainer import make_idle_trainer
from lightning_influence.running.loaders import IndexedLoader
from lightning_influence.running.runner import Expected, Runner, Stepper
from lightning_influence.support.errors import InfluenceError
from lightning_influence.support.whole import is_sharded


class LoopRunner(Runner):
    """Passes in a plain loop, for a module that has no Trainer. One process visits everything.

    Args:
        module: the module; batches go to its device through its own transfer hooks.
        progress: whether to show a progress bar.
        fit_loop: how far the training was, the state of the fit loop in a checkpoint: for the time of the
            passes the module finds a Trainer at that epoch and step. None leaves it with the one it has.
    """

    def __init__(
        self, module: nn.Module, *, progress: bool = False, fit_loop: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.module = unwrap_compiled(module)
        self.progress = progress
        self._fit_loop = fit_loop

    @property
    def shows_progress(self) -> bool:
        """Whether passes show a progress bar."""
        return self.progress

    def _borrow(self, stack: contextlib.ExitStack) -> None:
        if torch.is_inference_mode_enabled():
            raise InfluenceError("Gradients cannot be taken inside torch.inference_mode(). Leave it first.")
        if any(is_sharded(parameter) for parameter in self.module.parameters()):
            raise InfluenceError(
                "The module's parameters are sharded over processes, which a Trainer has to run: use "
                "influence(trainer, model, ...) with its ModelParallelStrategy, or a module that is whole."
            )
        stack.enter_context(borrowed_module(self.module))
        if self._fit_loop:
            self.module.trainer = make_idle_trainer(self.module, self._fit_loop)

    def _run(self, stepper: Stepper, loaders: list[IndexedLoader], expected: Expected) -> None:
        module, device = self.module, self.module.device
        expected.batches = sum(map(len, loaders))
        expected.examples = sum(loader.num_examples for loader in loaders)
        bar = Progress(transient=True)
        with bar if self.progress else contextlib.nullcontext():  # a disabled bar of rich 13 prints a line
            task = bar.add_task(self.label(stepper.one_pass), total=expected.batches)
            for position, loader in enumerate(loaders):
                for batch, indices in stepper.draws.read(loader):
                    batch = module.on_before_batch_transfer(batch, position)
                    batch = module.transfer_batch_to_device(batch, device, position)
                    batch = module.on_after_batch_transfer(batch, position)
                    stepper.step(batch, indices, position)
                    bar.advance(task)
