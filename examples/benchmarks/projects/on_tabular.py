"""Tabular networks: the project makes datamodule, module and Trainer (of ``pytorch_lightning``) itself."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pandas as pd
from harness import Fitted, collate_singles, run
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import (
    CategoryEmbeddingModelConfig,
    FTTransformerConfig,
    GANDALFConfig,
)

TRAIN, COUNT, EPOCHS = 160, 180, 3
MODELS: dict[str, Any] = {
    "CategoryEmbedding": functools.partial(CategoryEmbeddingModelConfig, layers="32-16"),
    "FTTransformer": functools.partial(
        FTTransformerConfig, input_embed_dim=16, num_heads=2, num_attn_blocks=2
    ),
    "GANDALF": functools.partial(GANDALFConfig, gflu_stages=2),
}


def make_table() -> pd.DataFrame:
    """Numbers, one category, and targets of both kinds."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame({f"x{i}": rng.normal(size=COUNT) for i in range(4)})
    table["c"] = rng.choice(list("abc"), COUNT)
    table["regression"] = table.x0 + table.x1 * table.x2 + (table.c == "a")
    table["classification"] = (table.regression > 0).astype(int).astype(str)
    return table


def fit(kind: str, task: str, callbacks: list[Any]) -> Fitted:
    """Train as in the project's tutorials."""
    table = make_table()
    train, test = table[:TRAIN], table[TRAIN:]
    model = TabularModel(
        data_config=DataConfig(
            target=[task], continuous_cols=[f"x{i}" for i in range(4)], categorical_cols=["c"]
        ),
        model_config=MODELS[kind](task=task),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(
            auto_lr_find=False, batch_size=32, max_epochs=EPOCHS, accelerator="cpu", progress_bar="none",
            checkpoints=None, early_stopping=None, load_best=False, seed=1,
            trainer_kwargs={"enable_model_summary": False},
        ),
        verbose=False,
        suppress_lightning_logger=True,
    )  # fmt: skip
    model.fit(train=train, validation=test, seed=3, callbacks=callbacks or None)
    loader, queries = model.datamodule.train_dataloader(), model.datamodule.prepare_inference_dataloader(test)
    return Fitted(
        model.trainer,
        model.model,
        loader,
        queries,
        EPOCHS,
        collate_singles(loader.dataset, loader.collate_fn, 2),
        collate_singles(queries.dataset, queries.collate_fn, 2),
    )


if __name__ == "__main__":
    cases = [("CategoryEmbedding", "regression"), *((kind, "classification") for kind in MODELS)]
    run("pytorch-tabular", {f"{kind}, {task}": functools.partial(fit, kind, task) for kind, task in cases})
