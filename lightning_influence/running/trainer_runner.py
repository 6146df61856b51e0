"""Passes through ``Trainer.predict`` on a module that wraps the user's.

Devices, processes, progress bars and data hooks are Lightning's; afterwards the Trainer and the module are as
before.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from typing_extensions import Self

from lightning_influence.running.host.attributes import TRANSFER_HOOKS, combine_loaders, defines
from lightning_influence.running.host.module import borrowed_module, enter_eval_mode, unwrap_compiled
from lightning_influence.running.host.packages import check_same_package, find_package
from lightning_influence.running.host.shards import Shards
from lightning_influence.running.host.trainer import (
    borrowed_trainer,
    check_trainer,
    loading_into,
    make_labelled_bar,
    read_progress,
    resolve_checkpoint,
    set_progress,
    splits_parameters,
)
from lightning_influence.running.loaders import IndexedLoader
from lightning_influence.running.runner import Expected, Runner, Stepper
from lightning_influence.support.errors import UnsupportedDataError
from lightning_influence.support.notes import warn
from lightning_influence.support.random_states import preserve_rng


class _PassModule:
    """What the Trainer predicts with: the user's module, with the pass in place of its ``predict_step``."""

    trainer: Any

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
        self.checkpoint: dict[str, Any] = {}
        self._to_set_up = set_up
        self.has_begun = False
        self.lend: Callable[[], object] | None = None
        self._hooks: dict[str, Any] = {}
        for hook in TRANSFER_HOOKS:
            from_data = datamodule is not None and defines(datamodule, hook)
            self._hooks[hook] = getattr(datamodule if from_data else module, hook)
        self._work: tuple[Stepper, list[IndexedLoader], Expected] | None = None

    def begin(self, stepper: Stepper, loaders: list[IndexedLoader], expected: Expected) -> None:
        self.has_begun = False
        self._work = (stepper, loaders, expected)

    def end(self) -> None:
        self._work, self.lend = None, None

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
        mesh = getattr(self, "_device_mesh", None)
        if mesh is not None:  # which Lightning gives to the module that it runs
            self.module._device_mesh = mesh
        if self._to_set_up:
            self.module.configure_model()
            enter_eval_mode(self.module)  # with what was made only now
        self._to_set_up = False

    def predict_dataloader(self) -> Any:
        assert self._work is not None
        stepper, loaders, expected = self._work
        strategy, trainer = self.trainer.strategy, self.trainer
        shards = []
        for loader in loaders:
            if trainer.world_size > 1:
                loader.agree(strategy.broadcast)
            shard = stepper.draws.read(loader, trainer.global_rank, trainer.world_size)
            expected.batches += len(shard)
            expected.examples += shard.num_examples
            shards.append(shard)
        return combine_loaders(shards, self.trainer)

    def on_predict_model_eval(self) -> None:
        """The module is in the mode that its author wants already, see ``enter_eval_mode``."""

    def on_predict_start(self) -> None:
        self.has_begun = True  # Lightning lets the processes wait for each other until here
        if self.lend is not None:
            self.lend()
        self.trainer.datamodule = self._shown

    def on_predict_end(self) -> None:
        self.trainer.datamodule = None

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> tuple[()]:
        assert self._work is not None
        inputs, indices = batch
        self._work[0].step(inputs, indices, dataloader_idx)
        return ()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._hooks["on_before_batch_transfer"](batch[0], dataloader_idx), batch[1]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return self._hooks["transfer_batch_to_device"](batch[0], device, dataloader_idx), batch[1]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._hooks["on_after_batch_transfer"](batch[0], dataloader_idx), batch[1]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.module.on_load_checkpoint(checkpoint)
        self.checkpoint = checkpoint

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

    def to(self, *args: Any, **kwargs: Any) -> Self:
        if self.lend is None:
            super().to(*args, **kwargs)  # type: ignore[misc]
        return self  # sharded parameters are where they belong, and cannot be moved while they are held

    def cpu(self) -> Self:
        return self  # Lightning moves a model off its device after every run; here after the last pass only


def restore_callback(callback: Callback, trainer: Trainer, module: LightningModule, checkpoint: Any) -> bool:
    """Give a callback its state from a checkpoint, without letting its other hooks run.

    Before Lightning 2.6 only ``fit`` does so.

    Returns:
        Whether the checkpoint holds a state of it.
    """
    states = checkpoint.get("callbacks")
    if states is None:
        return False
    callback.on_load_checkpoint(trainer, module, checkpoint)
    if callback.state_key in states:
        callback.load_state_dict(copy.deepcopy(states[callback.state_key]))
    return callback.state_key in states


class _SetUpOnly:
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


@functools.cache
def _derive(stand_in: type, package: str, base: str) -> Any:
    """Derive a stand-in from a class of Lightning, of the package that the Trainer is of."""
    return type(stand_in.__name__, (stand_in, getattr(importlib.import_module(package), base)), {})


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
        hooks_of: a datamodule whose transfer hooks come before the module's although the loaders are not
            taken from it, such as that of the last fit.
        ckpt_path: ``"best"``, ``"last"`` or a path: weights to load before the first pass. Until the end of
            the passes the Trainer is at the epoch and step that the file is of.
        restore: callbacks whose state is loaded from the same checkpoint; afterwards :attr:`restored` names
            those that it held. No other callback, loop or optimizer state is touched.

    Raises:
        TypeError: if there is no module, or one of another package of Lightning than the Trainer.
        UnsupportedTrainerError: on entering, if the Trainer cannot serve passes; the message says why.
        ValueError: if ``ckpt_path`` names no checkpoint.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: nn.Module | None = None,
        *,
        datamodule: LightningDataModule | None = None,
        hooks_of: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        restore: tuple[Callback, ...] | list[Callback] = (),
    ) -> None:
        super().__init__()
        if model is None and trainer.lightning_module is None:
            raise TypeError("No model: pass one, or call fit first so that the Trainer has one.")
        self.trainer = trainer
        self.module = unwrap_compiled(trainer.lightning_module if model is None else model)
        check_same_package(trainer, self.module)
        self.datamodule = datamodule
        self.ckpt_path = None if ckpt_path is None else resolve_checkpoint(trainer, ckpt_path)
        self.restored: list[Callback] = []
        self._hooks_of = hooks_of if datamodule is None else datamodule
        self._restore = restore
        self._stages: list[str] = []
        self._wrapper: Any = None
        self._bar: Any = None
        self._shards: Shards | None = None

    @property
    def rank(self) -> int:
        """Number of this process among the Trainer's."""
        return int(self.trainer.global_rank)

    @property
    def world_size(self) -> int:
        """Number of the Trainer's processes."""
        return int(self.trainer.world_size)

    @property
    def device(self) -> torch.device:
        """The device of this process, which the module may be moved to by the first pass only."""
        return self.trainer.strategy.root_device

    def agree(self, loader: IndexedLoader) -> None:
        """Let all processes visit the first one's batches; in the context only."""
        if self.world_size > 1:
            self._meet()
            loader.agree(self.trainer.strategy.broadcast)

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
        owner: Any = self.datamodule or self.module
        if self._hooks_of is not None and not any(defines(owner, hook) for hook in hooks):
            owner = self._hooks_of
        for hook, stage in hooks.items():
            if not defines(owner, hook):
                continue
            data = self.datamodule
            if self._stack is not None and data is not None and owner is data and stage not in self._stages:
                self._stages.append(stage)
                self._stack.callback(data.teardown, stage)
                data.setup(stage)
            return getattr(owner, hook)()
        raise UnsupportedDataError(
            f"{type(owner).__name__} defines none of {', '.join(hooks)}. Define one, or pass the loaders."
        )

    def _borrow(self, stack: contextlib.ExitStack) -> None:
        check_trainer(self.trainer)
        self._warn_of_limit()
        self._warn_of_partial_training()
        host: Any = self.trainer
        package = find_package(self.trainer) or ""
        known = host.lightning_module is self.module
        bar = make_labelled_bar(self.trainer)
        shown = host.datamodule if self.datamodule is None else self.datamodule
        data = None
        if self.datamodule is not None:
            set_up_only = _derive(_SetUpOnly, package, "LightningDataModule")
            data = set_up_only(self.datamodule, self._ready(known))
        self._stages = ["fit"]
        stack.enter_context(borrowed_module(self.module))
        stack.enter_context(borrowed_trainer(self.trainer, [] if bar is None else [bar]))
        self._wrapper = _derive(_PassModule, package, "LightningModule")(
            self.module, self._hooks_of, shown, set_up=not known
        )
        self._bar = bar
        if self.datamodule is not None:
            stack.callback(setattr, self.datamodule, "trainer", self.datamodule.trainer)
            self.datamodule.trainer = self.trainer
        if data is not None and not data.ready:
            stack.callback(data.inner.teardown, "fit")
        if not known and defines(self.module, "setup"):
            stack.callback(self.module.teardown, "predict")
        stack.callback(set_progress, self.trainer, read_progress(self.trainer))
        if self.ckpt_path is not None or data is not None or not known:
            self._predict_nothing(data)
        if splits_parameters(self.trainer):
            self._shards = Shards(self.module, self.device)
            self._meeting = self._shards.meeting
            stack.callback(vars(self).update, _shards=None, _meeting=None)

    def _has_begun(self) -> bool:
        return bool(self._wrapper.has_begun)

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
            warn(
                f"The Trainer's {origin} limits prediction to {limit} of the batches; influence visits whole "
                "loaders all the same. Pass a loader over a torch.utils.data.Subset to use fewer examples."
            )

    def _warn_of_partial_training(self) -> None:
        host: Any = self.trainer
        overfit, limit = host.overfit_batches, host.limit_train_batches
        name, value = ("overfit_batches", overfit) if overfit else ("limit_train_batches", limit)
        quick = getattr(host, "fast_dev_run", False)  # said already
        if not quick and (isinstance(value, int) or value != 1.0):
            warn(
                f"The Trainer's {name}={value} lets a fit see part of the training loader; influence takes "
                "every example of it for a training example. If the model was not trained on all, pass a "
                "loader over a torch.utils.data.Subset of those that it was trained on."
            )

    def _predict_nothing(self, data: _SetUpOnly | None) -> None:
        """Let the Trainer set up data and model and load the checkpoint, without a batch."""
        host: Any = self.trainer
        callbacks, limit = host.callbacks, host.limit_predict_batches
        host.callbacks, host.limit_predict_batches = [], 0
        with warnings.catch_warnings(), preserve_rng(), contextlib.ExitStack() as stack:
            # The callbacks that Lightning misses here are those that step aside.
            warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
            stack.enter_context(loading_into(self.trainer, self.module))
            host.predict(
                self._wrapper,
                datamodule=data,
                return_predictions=False,
                ckpt_path=self.ckpt_path,
            )
        host.callbacks, host.limit_predict_batches, host.datamodule = callbacks, limit, None
        held, self._wrapper.checkpoint = self._wrapper.checkpoint, {}
        self.restored = [c for c in self._restore if restore_callback(c, self.trainer, self.module, held)]
        if self.ckpt_path is not None:
            set_progress(host, held.get("loops", {}).get("fit_loop", {}))

    @property
    def shows_progress(self) -> bool:
        """Whether the Trainer has a progress bar on this process."""
        return self._bar is not None

    def _run(self, stepper: Stepper, loaders: list[IndexedLoader], expected: Expected) -> None:
        host: Any = self.trainer
        host.datamodule = None
        if self._bar is not None:
            self._bar.label = self.label(stepper.one_pass)
        with contextlib.ExitStack() as stack:
            stack.callback(self._wrapper.end)
            self._wrapper.begin(stepper, loaders, expected)
            if self._shards is not None:  # Lightning wants the parameters until the batches come
                self._wrapper.lend = functools.partial(stack.enter_context, self._shards.lent())
            self.trainer.predict(self._wrapper, return_predictions=False)
