"""Forecasters whose batches hold whole series, of which the training step draws windows at random."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

from harness import Draws, Fitted, Later, run

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


class Windows:
    """The windows that the step has drawn at random from batches, and the losses of one series in these."""

    def __init__(self, module: Any) -> None:
        self._module, self.draws = module, Draws(type(module), "_sample_windows")

    def split(self, loader: Any) -> Iterator[Any]:
        """Yield each series: the batch that it is in, what was drawn of this, and its number in there."""
        for batch in loader:
            windows, *_ = self._module._create_windows(batch, step="train")
            for number in range(len(batch["temporal"])):
                yield batch, self.draws.find(windows), number

    def compute(self, module: Any, single: Any) -> torch.Tensor:
        """Return the sum of a series' errors in what was drawn of its batch, as its share in the mean."""
        batch, (given, result), number = single
        count = len(batch["temporal"])
        drawn = given["final_condition"][given["w_idxs"]]
        own = drawn // (len(given["windows_temporal"]) // count) == number

        def sum_errors(_: Any, y: Any, y_hat: Any, mask: Any, **others: Any) -> torch.Tensor:
            errors = (y - y_hat).abs() * mask
            return count * errors[own].sum() / mask.sum()

        with (
            mock.patch.object(type(module), "_sample_windows", return_value=result),
            mock.patch.object(type(module.loss), "__call__", sum_errors),
        ):
            loss = module.training_step(batch, 0)
        assert isinstance(loss, torch.Tensor)
        return loss


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
    # Other batches than those of training, by whose content draws are known.
    queries = TimeSeriesLoader(torch.utils.data.Subset(data, range(12)[::-1]), batch_size=8)
    singles = [loader.collate_fn([data[n]]) for n in range(len(data))]
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)  # its own is let go of
    fitted = Fitted(trainer, module, loader, queries, STEPS * 8 // SERIES, singles, singles[11::-1])
    if "random" in kind:
        windows, in_order = Windows(module), TimeSeriesLoader(data, batch_size=8)
        fitted.train_singles = Later(lambda: windows.split(in_order))
        fitted.query_singles = Later(lambda: windows.split(queries))
        fitted.loss, fitted.quiet, fitted.draws = windows.compute, windows.draws.keep, windows.draws
    return fitted


if __name__ == "__main__":
    run("neuralforecast", {kind: functools.partial(fit, kind) for kind in MODELS})
