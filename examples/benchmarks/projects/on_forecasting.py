"""Forecasters whose data set, normalisers, networks and losses are the project's own."""

from __future__ import annotations

import functools
from typing import Any

from harness import QUIET, Fitted, run

# isort: split


import lightning.pytorch as pl
import numpy as np
import pandas as pd
from pytorch_forecasting import DeepAR, NBeats, TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.data import EncoderNormalizer, GroupNormalizer
from pytorch_forecasting.metrics import (
    MAE,
    RMSE,
    NegativeBinomialDistributionLoss,
    NormalDistributionLoss,
    QuantileLoss,
)

EPOCHS, TRAINED_UNTIL = 3, 34


def make_data(kind: str) -> tuple[TimeSeriesDataSet, TimeSeriesDataSet]:
    """Return the training and the validation data of four series."""
    rng, parts = np.random.default_rng(0), []
    for group in range(4):
        time = np.arange(40)
        value = 10 + 5 * np.sin(time / 4 + group) + rng.normal(0, 0.5, 40) + group
        month, price = (time % 4).astype(str), rng.normal(size=40)
        parts.append(
            pd.DataFrame({
                "time_idx": time,
                "group": f"g{group}",
                "month": month,
                "price": price,
                "value": value,
            })
        )
    table = pd.concat(parts, ignore_index=True)
    table["count"] = rng.poisson(table.value.clip(1)).astype(float)
    target = "count" if "counts" in kind else "value"
    options: dict[str, Any] = {
        "time_idx": "time_idx", "group_ids": ["group"], "max_encoder_length": 12, "max_prediction_length": 4,
        "target": target, "time_varying_unknown_reals": [target],
    }  # fmt: skip
    if kind.startswith("N-BEATS"):
        options |= {"target_normalizer": EncoderNormalizer(), "add_relative_time_idx": False}
    else:
        options |= {
            "static_categoricals": ["group"],
            "time_varying_known_reals": ["time_idx", "price"],
            "target_normalizer": GroupNormalizer(groups=["group"], center=target == "value"),
        }
    if kind.startswith("TFT"):
        options |= {
            "time_varying_known_categoricals": ["month"],
            "add_relative_time_idx": True,
            "add_target_scales": True,
        }
    train = TimeSeriesDataSet(table[table.time_idx < TRAINED_UNTIL], **options)
    return train, TimeSeriesDataSet.from_dataset(train, table, min_prediction_idx=TRAINED_UNTIL)


def make_module(kind: str, data: TimeSeriesDataSet) -> pl.LightningModule:
    """Return a small network of the project."""
    common: dict[str, Any] = {"learning_rate": 0.01, "optimizer": "adam", "log_interval": 0}
    small = {"hidden_size": 8, "attention_head_size": 2, "hidden_continuous_size": 4}
    tft, deep, beats = TemporalFusionTransformer.from_dataset, DeepAR.from_dataset, NBeats.from_dataset
    makers: dict[str, Any] = {
        "TFT, quantiles": lambda: tft(data, loss=QuantileLoss(), **small, **common),
        "TFT, RMSE": lambda: tft(data, loss=RMSE(), output_size=1, **small, **common),
        "N-BEATS, MASE and backcast": lambda: beats(data, widths=[16, 32], backcast_loss_ratio=0.1, **common),
        "N-BEATS, MAE": lambda: beats(data, widths=[16, 32], loss=MAE(), **common),
        "DeepAR, Normal": lambda: deep(data, hidden_size=8, loss=NormalDistributionLoss(), **common),
        "DeepAR, counts": lambda: deep(
            data, hidden_size=8, loss=NegativeBinomialDistributionLoss(), **common
        ),
    }
    module: pl.LightningModule = makers[kind]()
    return module


def fit(kind: str, callbacks: list[Any]) -> Fitted:
    """Train as in the project's tutorials."""
    train, queries = make_data(kind)
    pl.seed_everything(0)
    module = make_module(kind, train)
    loader = train.to_dataloader(train=True, batch_size=16, num_workers=0)
    asked = queries.to_dataloader(train=False, batch_size=16, num_workers=0)
    trainer = pl.Trainer(max_epochs=EPOCHS, gradient_clip_val=0.1, callbacks=callbacks, **QUIET)
    trainer.fit(module, loader)
    collate = loader.collate_fn
    singles = [[collate([data[n]]) for n in range(len(data))] for data in (train, queries)]
    return Fitted(trainer, module, loader, asked, EPOCHS, *singles)


KINDS = (
    "TFT, quantiles", "N-BEATS, MASE and backcast", "N-BEATS, MAE", "DeepAR, Normal", "DeepAR, counts",
    "TFT, RMSE",
)  # fmt: skip

if __name__ == "__main__":
    run("pytorch-forecasting", {kind: functools.partial(fit, kind) for kind in KINDS})
