"""Forecasters whose batches hold whole series, of which the training step draws windows at random."""

from __future__ import annotations

import functools
from typing import Any

from harness import Fitted, run

# isort: split


import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from neuralforecast import NeuralForecast
from neuralforecast.losses.pytorch import MAE, MQLoss
from neuralforecast.models import MLP, NBEATS, NHITS, TFT
from neuralforecast.tsdataset import TimeSeriesDataset, TimeSeriesLoader

SERIES, TIMES, STEPS = 24, 40, 12
OPTIONS: dict[str, Any] = {
    "h": 4, "input_size": 12, "max_steps": STEPS, "batch_size": 8, "accelerator": "cpu", "logger": False,
    "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "MLP, all windows": functools.partial(MLP, hidden_size=16, loss=MAE(), windows_batch_size=None),
    "NHITS, all windows": functools.partial(
        NHITS, mlp_units=[[16, 16]] * 3, loss=MAE(), windows_batch_size=None
    ),
    "NBEATS, random windows": functools.partial(NBEATS, mlp_units=[[16, 16]] * 3, windows_batch_size=64),
    "TFT, quantiles, all windows": functools.partial(
        TFT, hidden_size=8, n_head=2, loss=MQLoss(level=[80]), windows_batch_size=None
    ),
}


def fit(kind: str, callbacks: list[Any]) -> Fitted:
    """Train as in the project's quickstart."""
    rng = np.random.default_rng(0)
    parts = [
        pd.DataFrame({
            "unique_id": f"s{n:02d}",
            "ds": pd.date_range("2020-01-01", periods=TIMES, freq="D"),
            "y": 10 + 3 * np.sin(np.arange(TIMES) / 4 + n) + rng.normal(0, 0.3, TIMES),
        })
        for n in range(SERIES)
    ]
    table = pd.concat(parts, ignore_index=True)
    forecast = NeuralForecast(models=[MODELS[kind](**OPTIONS, callbacks=callbacks or None)], freq="D")
    forecast.fit(table)
    module = forecast.models[0]
    data, *_ = TimeSeriesDataset.from_df(table)
    loader = TimeSeriesLoader(data, batch_size=8, shuffle=True)
    queries = TimeSeriesLoader(torch.utils.data.Subset(data, range(12)), batch_size=8)
    singles = [loader.collate_fn([data[n]]) for n in range(len(data))]
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)  # its own is let go of
    return Fitted(trainer, module, loader, queries, STEPS * 8 // SERIES, singles, singles[:12])


if __name__ == "__main__":
    run("neuralforecast", {kind: functools.partial(fit, kind) for kind in MODELS})
