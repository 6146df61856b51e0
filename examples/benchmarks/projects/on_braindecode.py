"""Networks on EEG windows in a plain LightningModule, as the project's example on Lightning has it."""

from __future__ import annotations

import functools
from typing import Any

import braindecode.models as models
import lightning.pytorch as pl
import numpy as np
import torch
from harness import QUIET, Fitted, collate_singles, run
from torch.utils.data import DataLoader, Dataset, default_collate

COUNT, CHANNELS, TIMES, EPOCHS = 64, 6, 200, 3
SHAPE = {"n_chans": CHANNELS, "n_outputs": 2, "n_times": TIMES}
NETWORKS = {
    "EEGNet": lambda: models.EEGNet(**SHAPE, F1=4, D=2),
    "ShallowFBCSPNet": lambda: models.ShallowFBCSPNet(
        **SHAPE, n_filters_time=8, n_filters_spat=8, final_conv_length="auto"
    ),
    "EEGConformer": lambda: models.EEGConformer(
        **SHAPE, n_filters_time=8, filter_time_length=9, pool_time_length=15, pool_time_stride=5,
        num_layers=1, num_heads=2, final_fc_length="auto",
    ),
    "BDTCN": lambda: models.BDTCN(**SHAPE, n_blocks=2, n_filters=4, kernel_size=3),
    "ATCNet": lambda: models.ATCNet(
        **SHAPE, sfreq=100, input_window_seconds=2, conv_block_n_filters=4, n_windows=2
    ),
}  # fmt: skip


class Windows(Dataset[Any]):
    """Items of the project's form: signal, label, and where the window was."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.labels = rng.integers(0, 2, COUNT)
        wave = np.sin(np.arange(TIMES) / 3)
        self.signals = (rng.normal(size=(COUNT, CHANNELS, TIMES)) + self.labels[:, None, None] * wave).astype(
            "float32"
        )

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, n: int) -> Any:
        return self.signals[n], int(self.labels[n]), [n, n * TIMES, n * TIMES + TIMES]


class Classifier(pl.LightningModule):
    """The example's module."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module, self.loss = module, torch.nn.CrossEntropyLoss()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Return the loss of a batch."""
        signals, labels, _ = batch
        loss: torch.Tensor = self.loss(self.module(signals), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return optimizer and schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)]


def fit(kind: str, callbacks: list[Any]) -> Fitted:
    """Train one network."""
    pl.seed_everything(0)
    module, windows = Classifier(NETWORKS[kind]()), Windows()
    loader = DataLoader(windows, batch_size=16, shuffle=True)
    trainer = pl.Trainer(max_epochs=EPOCHS, callbacks=callbacks, **QUIET)
    trainer.fit(module, loader)
    singles = collate_singles(windows, default_collate)
    queries = DataLoader(torch.utils.data.Subset(windows, range(12)), batch_size=8)
    return Fitted(trainer, module, loader, queries, EPOCHS, singles, singles[:12])


if __name__ == "__main__":
    run("braindecode", {kind: functools.partial(fit, kind) for kind in NETWORKS})
