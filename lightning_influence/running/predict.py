"""Passes through ``Trainer.predict`` on a module that wraps the user's.

Devices, processes, progress bars and data hooks are Lightning's; afterwards the Trainer and the module are as
before.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_influence.errors import InfluenceWarning, UnsupportedDataError
from lightning_influence.host.attributes import defines
from lightning_influence.host.module import borrowed_module, unwrap_compiled
from lightning_influence.host.progress import labelled_bar
from lightning_influence.host.random_states import preserved_rng
from lightning_influence.host.trainer import borrowed_trainer, check_trainer, resolve_checkpoint
from lightning_influence.running._wrappers import PassModule, Restorer, SetUpOnly
from lightning_influence.running.base import Count, Pass, Runner
from lightning_influence.running.loaders import IndexedLoader


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
    def device(self) -> torch.device:
        """The device of this process, which the module may be moved to by the first pass only."""
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
        self._warn_of_partial_training()
        host: Any = self.trainer
        known = host.lightning_module is self.module
        bar = labelled_bar(self.trainer)
        shown = host.datamodule if self.datamodule is None else self.datamodule
        data = None if self.datamodule is None else SetUpOnly(self.datamodule, self._ready(known))
        self._stages = ["fit"]
        stack.enter_context(borrowed_module(self.module))
        stack.enter_context(borrowed_trainer(self.trainer, [] if bar is None else [bar]))
        self._wrapper = PassModule(self.module, self.datamodule, shown, set_up=not known)
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

    def _warn_of_partial_training(self) -> None:
        host: Any = self.trainer
        overfit, limit = host.overfit_batches, host.limit_train_batches
        name, value = ("overfit_batches", overfit) if overfit else ("limit_train_batches", limit)
        quick = getattr(host, "fast_dev_run", False)  # said already
        if not quick and (isinstance(value, int) or value != 1.0):
            warnings.warn(
                f"The Trainer's {name}={value} lets a fit see part of the training loader; influence takes "
                "every example of it for a training example. If the model was not trained on all, pass a "
                "loader over a torch.utils.data.Subset of those that it was trained on.",
                InfluenceWarning,
                stacklevel=2,
            )

    def _predict_nothing(self, data: SetUpOnly | None) -> None:
        """Let the Trainer set up data and model and load the checkpoint, without a batch."""
        host: Any = self.trainer
        restorers = [Restorer(callback, self.module) for callback in self._restore if self.ckpt_path]
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

    def _run(self, one_pass: Pass, loaders: list[IndexedLoader], expected: Count, done: Count) -> None:
        host: Any = self.trainer
        host.datamodule = None
        if self._bar is not None:
            self._bar.label = one_pass.description
        self._wrapper.begin(one_pass, loaders, expected, done)
        try:
            self.trainer.predict(self._wrapper, return_predictions=False)
        finally:
            self._wrapper.end()
