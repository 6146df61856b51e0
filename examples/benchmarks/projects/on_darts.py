"""Forecasters that hide module, Trainer (of ``pytorch_lightning``) and loader behind their own object."""

from __future__ import annotations

import functools
from typing import Any

from harness import Fitted, run

# isort: split


import numpy as np
from darts import TimeSeries
from darts.models import BlockRNNModel, NBEATSModel, NLinearModel, TCNModel, TiDEModel, TransformerModel
from darts.utils.likelihood_models.torch import GaussianLikelihood, QuantileRegression
from torch.utils.data import DataLoader, Subset

EPOCHS = 3
OPTIONS: dict[str, Any] = {
    "input_chunk_length": 12, "output_chunk_length": 4, "n_epochs": EPOCHS, "batch_size": 16,
    "random_state": 0,
}  # fmt: skip
TRAINER: dict[str, Any] = {
    "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "N-BEATS": functools.partial(NBEATSModel, num_stacks=2, num_blocks=1, num_layers=2, layer_widths=16),
    "TCN, weight norm": functools.partial(TCNModel, kernel_size=3, num_filters=4, weight_norm=True),
    "Transformer": functools.partial(
        TransformerModel, d_model=16, nhead=2, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=16
    ),
    "NLinear": NLinearModel,
    "LSTM": functools.partial(BlockRNNModel, model="LSTM", hidden_dim=8),
    "TiDE, quantiles": functools.partial(
        TiDEModel, hidden_size=16, likelihood=QuantileRegression([0.1, 0.5, 0.9])
    ),
    "TiDE, Gaussian": functools.partial(TiDEModel, hidden_size=16, likelihood=GaussianLikelihood()),
    "TiDE, reversible norm": functools.partial(TiDEModel, hidden_size=16, use_reversible_instance_norm=True),
}


def fit(kind: str, callbacks: list[Any]) -> Fitted:
    """Train as in the project's quickstart."""
    rng = np.random.default_rng(0)
    waves = [np.sin(np.arange(60) / 4 + n) + rng.normal(0, 0.1, 60) for n in range(3)]
    series = [TimeSeries.from_values(wave.astype(np.float32)) for wave in waves]
    model = MODELS[kind](**OPTIONS, pl_trainer_kwargs={**TRAINER, "callbacks": callbacks})
    model.fit(series)
    loader = model.trainer.train_dataloader
    queries = DataLoader(Subset(loader.dataset, range(12)), batch_size=8, collate_fn=loader.collate_fn)
    singles = [loader.collate_fn([loader.dataset[n]]) for n in range(len(loader.dataset))]
    return Fitted(model.trainer, model.model, loader, queries, EPOCHS, singles, singles[:12])


if __name__ == "__main__":
    run("darts", {kind: functools.partial(fit, kind) for kind in MODELS})
