"""Passes in a plain loop, where there is no Trainer."""

from __future__ import annotations

import contextlib

import torch
from rich.progress import Progress
from torch import nn

from lightning_influence.running.host.module import borrowed_module, unwrap_compiled
from lightning_influence.running.loaders import IndexedLoader
from lightning_influence.running.runner import Count, Pass, Runner, step_context
from lightning_influence.support.errors import InfluenceError


class LoopRunner(Runner):
    """Passes in a plain loop, for a module that has no Trainer. One process visits everything.

    Args:
        module: the module; batches go to its device through its own transfer hooks.
        progress: whether to show a progress bar.
    """

    def __init__(self, module: nn.Module, *, progress: bool = False) -> None:
        super().__init__()
        self.module = unwrap_compiled(module)
        self.progress = progress

    def _borrow(self, stack: contextlib.ExitStack) -> None:
        if torch.is_inference_mode_enabled():
            raise InfluenceError("Gradients cannot be taken inside torch.inference_mode(). Leave it first.")
        stack.enter_context(borrowed_module(self.module))

    def _run(self, one_pass: Pass, loaders: list[IndexedLoader], expected: Count, done: Count) -> None:
        module, device = self.module, self.module.device
        expected.batches = sum(map(len, loaders))
        expected.examples = sum(loader.num_examples for loader in loaders)
        with Progress(transient=True, disable=not self.progress) as bar:
            task = bar.add_task(one_pass.description, total=expected.batches)
            for position, loader in enumerate(loaders):
                for batch, indices in loader.shard():
                    batch = module.on_before_batch_transfer(batch, position)
                    batch = module.transfer_batch_to_device(batch, device, position)
                    batch = module.on_after_batch_transfer(batch, position)
                    with step_context(device):
                        one_pass.step(module, batch, indices, position)
                    done.add(indices)
                    bar.advance(task)
