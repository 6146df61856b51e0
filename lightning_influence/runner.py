"""Passes over data: through a Lightning Trainer, or in a plain loop where there is none.

A *pass* visits every example of one or several loaders once and hands each batch to :meth:`Pass.step`. Under
:class:`TrainerRunner` it runs as ``Trainer.predict`` on a module that wraps the user's, so that devices,
processes, progress bars and data hooks are Lightning's; afterwards the Trainer and the module are as before.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.progress import Progress
from torch import Tensor, nn

from lightning_influence._lightning import (
    borrowed_module,
    borrowed_trainer,
    check_trainer,
    defines,
    labelled_bar,
    resolve_checkpoint,
    unwrap_compiled,
)
from lightning_influence.dataloading import IndexedLoader, prepare, preserved_rng
from lightning_influence.errors import InfluenceError, InfluenceWarning, UnsupportedDataError


class Pass(Protocol):
    """What is done with every batch.

    Attributes:
        description: label of the progress bar, and name in the records.
    """

    description: str

    def step(self, module: LightningModule, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Take one batch.

        Args:
            module: the user's own module: in eval mode, gradients enabled, autocast off, logging muted.
            batch: the batch after the user's transfer hooks, on the module's device.
            indices: dataset indices of the batch's examples, shape ``(B,)``, int64, on the CPU.
            dataloader_idx: position of the loader among those of the pass.
        """


@dataclass(frozen=True)
class PassRecord:
    """What one pass took: seconds on this process, batches and examples summed over all processes."""

    name: str
    seconds: float
    batches: int
    examples: int


class Runner(ABC):
    """Common part of the runners: a context in which the module is borrowed, and the records of its passes.

    Attributes:
        module: the user's module.
        records: one :class:`PassRecord` for each finished pass.
    """

    module: LightningModule

    def __init__(self) -> None:
        self.records: list[PassRecord] = []
        self._stack: contextlib.ExitStack | None = None

    def __enter__(self) -> Self:
        """Return the runner with the module (and Trainer) borrowed; on failure everything is as before.

        Raises:
            InfluenceError: if the runner is in use already.
        """
        if self._stack is not None:
            raise InfluenceError("This runner is in use; leave its `with` block before entering it again.")
        with contextlib.ExitStack() as stack:
            self._borrow(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """Give everything back."""
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.__exit__(kind, error, trace)

    def run(self, one_pass: Pass, dataloaders: Any) -> PassRecord:
        """Run a pass over loaders.

        Random states are the same after the pass as before it. Every pass of a runner therefore sees the same
        random augmentations, if there are any.

        Args:
            one_pass: what to do with each batch.
            dataloaders: anything that :func:`~lightning_influence.dataloading.prepare` reads, or its result.
                Hand in the result to several passes: workers that persist then persist between them.

        Returns:
            What the pass took; also appended to :attr:`records`.

        Raises:
            InfluenceError: if batches were left out, for instance because a step raised ``StopIteration``.
        """
        if self._stack is None:
            with self:
                return self.run(one_pass, dataloaders)
        loaders = prepare(dataloaders)
        expected = _Count()
        done = _Count()
        start = time.perf_counter()
        with preserved_rng(), torch.compiler.set_stance("force_eager"):
            self._run(one_pass, loaders, expected, done)
        seconds = time.perf_counter() - start
        if (done.batches, done.examples) != (expected.batches, expected.examples):
            raise InfluenceError(
                f"Pass {one_pass.description!r} ended after {done.examples} of {expected.examples} examples. "
                "Look for a StopIteration that escapes from the model or the data."
            )
        total = self.all_reduce_sum(torch.tensor([done.batches, done.examples]))
        record = PassRecord(one_pass.description, seconds, int(total[0]), int(total[1]))
        self.records.append(record)
        return record

    @property
    def world_size(self) -> int:
        """Number of processes that share a pass."""
        return 1

    @property
    def _device(self) -> torch.device:
        return self.module.device

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes, computed in place; on one process, the tensor."""
        if self.world_size == 1:
            return tensor
        buffer = tensor.to(self._device).contiguous()
        dist.all_reduce(buffer)
        return tensor if buffer is tensor else tensor.copy_(buffer)

    def all_gather_cat(self, tensor: Tensor) -> Tensor:
        """Return all processes' tensors joined along their first dimension, which may differ in length."""
        if self.world_size == 1:
            return tensor
        counts = torch.zeros(self.world_size, dtype=torch.int64)
        counts[dist.get_rank()] = len(tensor)
        sizes = self.all_reduce_sum(counts).tolist()
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]), device=self._device)
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).to(tensor.device)

    @abstractmethod
    def _borrow(self, stack: contextlib.ExitStack) -> None:
        """Enter, on the stack, what has to be undone at the end."""

    @abstractmethod
    def _run(self, one_pass: Pass, loaders: list[IndexedLoader], expected: _Count, done: _Count) -> None:
        """Visit every batch of this process's share."""


@dataclass
class _Count:
    batches: int = 0
    examples: int = 0

    def add(self, indices: Tensor) -> None:
        self.batches += 1
        self.examples += len(indices)


@contextlib.contextmanager
def _step_context(device: torch.device) -> Iterator[None]:
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield


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

    def _run(self, one_pass: Pass, loaders: list[IndexedLoader], expected: _Count, done: _Count) -> None:
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
                    with _step_context(device):
                        one_pass.step(module, batch, indices, position)
                    done.add(indices)
                    bar.advance(task)


class TrainerRunner(Runner):
    """Passes through ``trainer.predict``.

    Entering the context borrows the Trainer and the module; with ``ckpt_path`` it also loads the weights,
    which stay in the model afterwards as they do after ``Trainer.predict(ckpt_path=...)``.

    Args:
        trainer: any Trainer, fitted or not, on one process or with the ``ddp`` strategy.
        model: the user's module; by default the one that the Trainer ran last, with the weights it has now.
        datamodule: gives the loaders of :meth:`train_dataloaders` and :meth:`query_dataloaders`, and its
            transfer hooks come before the module's. It is set up for "fit", unless the Trainer was fitted
            with it and it has no ``teardown`` of its own: a second ``setup`` could split the data anew.
        ckpt_path: ``"best"``, ``"last"`` or a path: weights to load before the first pass.
        restore: callbacks whose state is loaded from the same checkpoint; afterwards :attr:`restored` names
            those that it held. No other callback, loop or optimizer state is touched.
        weights_only: how to read the checkpoint, as in ``Trainer.predict``.

    Raises:
        TypeError: if there is no module.
        UnsupportedTrainerError: on entering, if the Trainer cannot serve passes; the message says why.
        ValueError: if ``ckpt_path`` names no checkpoint.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: nn.Module | None = None,
        *,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        restore: tuple[Callback, ...] | list[Callback] = (),
        weights_only: bool | None = None,
    ) -> None:
        super().__init__()
        if model is None and trainer.lightning_module is None:
            raise TypeError("No model: pass one, or call fit first so that the Trainer has one.")
        self.trainer = trainer
        self.module = unwrap_compiled(trainer.lightning_module if model is None else model)
        self.datamodule = datamodule
        self.ckpt_path = None if ckpt_path is None else resolve_checkpoint(trainer, ckpt_path)
        self.restored: list[Callback] = []
        self._restore = restore
        self._weights_only = weights_only

    @property
    def world_size(self) -> int:
        """Number of the Trainer's processes."""
        return int(self.trainer.world_size)

    @property
    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device

    def train_dataloaders(self) -> Any:
        """Return the train loader of the datamodule or, without one, of the module; in the context only.

        Raises:
            UnsupportedDataError: if there is no ``train_dataloader``.
        """
        return self._loaders({"train_dataloader": "fit"})

    def query_dataloaders(self) -> Any:
        """Return the first of the predict, test and validation loaders that is defined; in the context only.

        Raises:
            UnsupportedDataError: if none is defined.
        """
        hooks = {"predict_dataloader": "predict", "test_dataloader": "test", "val_dataloader": "validate"}
        return self._loaders(hooks)

    def _loaders(self, hooks: dict[str, str]) -> Any:
        owner = self.module if self.datamodule is None else self.datamodule
        for hook, stage in hooks.items():
            if not defines(owner, hook):
                continue
            if self._stack is not None and owner is self.datamodule and stage not in self._stages:
                self._stages.append(stage)
                self._stack.callback(owner.teardown, stage)
                owner.setup(stage)
            return getattr(owner, hook)()
        raise UnsupportedDataError(
            f"{type(owner).__name__} defines none of {', '.join(hooks)}. Define one, or pass the loaders."
        )

    def _borrow(self, stack: contextlib.ExitStack) -> None:
        check_trainer(self.trainer)
        self._warn_of_limit()
        host: Any = self.trainer
        known = host.lightning_module is self.module
        bar = labelled_bar(self.trainer)
        shown = host.datamodule if self.datamodule is None else self.datamodule
        data = None if self.datamodule is None else _SetUpOnly(self.datamodule, self._ready(known))
        self._stages = ["fit"]
        stack.enter_context(borrowed_module(self.module))
        stack.enter_context(borrowed_trainer(self.trainer, [] if bar is None else [bar]))
        self._wrapper = _PassModule(self.module, self.datamodule, shown, set_up=not known)
        self._bar = bar
        if self.datamodule is not None:
            stack.callback(setattr, self.datamodule, "trainer", self.datamodule.trainer)
            self.datamodule.trainer = self.trainer
        if data is not None and not data.ready:
            stack.callback(data.inner.teardown, "fit")
        if not known and defines(self.module, "setup"):
            stack.callback(self.module.teardown, "predict")
        if self.ckpt_path is not None or data is not None or not known:
            self._predict_nothing(data)

    def _ready(self, known: bool) -> bool:
        """Return whether the datamodule is still set up from a fit of this Trainer."""
        host: Any = self.trainer
        fitted = known and host.datamodule is self.datamodule and host.global_step > 0
        return fitted and not defines(self.datamodule, "teardown")

    def _warn_of_limit(self) -> None:
        limit = self.trainer.limit_predict_batches
        if isinstance(limit, int) or limit != 1.0:
            quick = getattr(self.trainer, "fast_dev_run", False)
            origin = "fast_dev_run" if quick else "limit_predict_batches"
            warnings.warn(
                f"The Trainer's {origin} limits prediction to {limit} of the batches; influence visits whole "
                "loaders all the same. Pass a loader over a torch.utils.data.Subset to use fewer examples.",
                InfluenceWarning,
                stacklevel=2,
            )

    def _predict_nothing(self, data: _SetUpOnly | None) -> None:
        """Let the Trainer set up data and model and load the checkpoint, without a batch."""
        host: Any = self.trainer
        restorers = [_Restorer(callback, self.module) for callback in self._restore if self.ckpt_path]
        callbacks, limit = host.callbacks, host.limit_predict_batches
        host.callbacks, host.limit_predict_batches = list(restorers), 0
        with warnings.catch_warnings(), preserved_rng():
            # The callbacks that Lightning misses here are those that step aside.
            warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
            host.predict(
                self._wrapper,
                datamodule=data,
                return_predictions=False,
                ckpt_path=self.ckpt_path,
                weights_only=self._weights_only,
            )
        host.callbacks, host.limit_predict_batches, host.datamodule = callbacks, limit, None
        self.restored = [restorer.callback for restorer in restorers if restorer.loaded]

    def _run(self, one_pass: Pass, loaders: list[IndexedLoader], expected: _Count, done: _Count) -> None:
        host: Any = self.trainer
        host.datamodule = None
        if self._bar is not None:
            self._bar.label = one_pass.description
        self._wrapper.begin(one_pass, loaders, expected, done)
        try:
            self.trainer.predict(self._wrapper, return_predictions=False)
        finally:
            self._wrapper.end()


class _PassModule(LightningModule):
    """What the Trainer predicts with: the user's module, with the pass in place of its ``predict_step``."""

    def __init__(
        self,
        module: LightningModule,
        datamodule: LightningDataModule | None,
        shown: LightningDataModule | None,
        *,
        set_up: bool,
    ) -> None:
        super().__init__()
        self.module = module
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._shown = shown
        self._to_set_up = set_up
        self._hooks: dict[str, Any] = {}
        for hook in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
            from_data = datamodule is not None and defines(datamodule, hook)
            self._hooks[hook] = getattr(datamodule if from_data else module, hook)
        self._work: tuple[Pass, list[IndexedLoader], _Count, _Count] | None = None

    def begin(self, one_pass: Pass, loaders: list[IndexedLoader], expected: _Count, done: _Count) -> None:
        self._work = (one_pass, loaders, expected, done)

    def end(self) -> None:
        self._work = None

    @property
    def strict_loading(self) -> bool:
        return self.module.strict_loading

    @strict_loading.setter
    def strict_loading(self, strict: bool) -> None:
        self.module.strict_loading = strict

    def setup(self, stage: str) -> None:
        if self._to_set_up:
            self.module.setup(stage)

    def configure_model(self) -> None:
        if self._to_set_up:
            self.module.configure_model()
        self._to_set_up = False

    def predict_dataloader(self) -> Any:
        assert self._work is not None
        _, loaders, expected, _ = self._work
        strategy, trainer = self.trainer.strategy, self.trainer
        shards = []
        for loader in loaders:
            if trainer.world_size > 1:
                loader.agree(strategy.broadcast)
            shard = loader.shard(trainer.global_rank, trainer.world_size)
            expected.batches += len(shard)
            expected.examples += shard.num_examples
            shards.append(shard)
        return shards

    def on_predict_start(self) -> None:
        host: Any = self.trainer
        host.datamodule = self._shown

    def on_predict_end(self) -> None:
        host: Any = self.trainer
        host.datamodule = None

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> tuple[()]:
        assert self._work is not None
        one_pass, _, _, done = self._work
        inputs, indices = batch
        with _step_context(self.module.device):
            one_pass.step(self.module, inputs, indices, dataloader_idx)
        done.add(indices)
        return ()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._hooks["on_before_batch_transfer"](batch[0], dataloader_idx), batch[1]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return self._hooks["transfer_batch_to_device"](batch[0], device, dataloader_idx), batch[1]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._hooks["on_after_batch_transfer"](batch[0], dataloader_idx), batch[1]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.module.on_load_checkpoint(checkpoint)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        # A checkpoint of another model fails halfway: its first layers would stay in the user's model.
        own = {name: t.detach().clone() for name, t in self.module.named_parameters()}
        own |= {name: t.detach().clone() for name, t in self.module.named_buffers()}
        try:
            return self.module.load_state_dict(state_dict, *args, **kwargs)
        except BaseException:
            with torch.no_grad():
                for name, tensor in (*self.module.named_parameters(), *self.module.named_buffers()):
                    tensor.copy_(own[name])
            raise

    def cpu(self) -> Self:
        return self  # Lightning moves a model off its device after every run; here after the last pass only


class _Restorer(Callback):
    """Takes the state of a callback from a checkpoint without letting its other hooks run."""

    def __init__(self, callback: Callback, module: LightningModule) -> None:
        self.callback = callback
        self.loaded = False
        self._module = module

    @property
    def state_key(self) -> str:
        return self.callback.state_key

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.callback.on_load_checkpoint(trainer, self._module, checkpoint)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = True
        self.callback.load_state_dict(state_dict)


class _SetUpOnly(LightningDataModule):
    """Sets a datamodule up for fit under ``Trainer.predict``, which would do so for prediction."""

    def __init__(self, inner: LightningDataModule, ready: bool) -> None:
        super().__init__()
        self.inner = inner
        self.ready = ready
        self.prepare_data_per_node = inner.prepare_data_per_node

    def prepare_data(self) -> None:
        if not self.ready:
            self.inner.prepare_data()

    def setup(self, stage: str) -> None:
        if not self.ready:
            self.inner.setup("fit")
