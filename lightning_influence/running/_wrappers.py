"""What the Trainer sees in a pass: stand-ins for the user's module, callbacks and datamodule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Callback

from lightning_influence.host.attributes import defines
from lightning_influence.running.base import Count, Pass, step_context
from lightning_influence.running.loaders import IndexedLoader


class PassModule(LightningModule):
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
        self._work: tuple[Pass, list[IndexedLoader], Count, Count] | None = None

    def begin(self, one_pass: Pass, loaders: list[IndexedLoader], expected: Count, done: Count) -> None:
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
        with step_context(self.module.device):
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


class Restorer(Callback):
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


class SetUpOnly(LightningDataModule):
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
