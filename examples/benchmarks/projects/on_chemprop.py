"""Message-passing networks on molecules: batches are objects with an index of each atom's molecule."""

from __future__ import annotations

import functools
from typing import Any

import lightning.pytorch as pl
import numpy as np
from chemprop import data, models, nn
from harness import QUIET, Fitted, collate_singles, run

MOLECULES = [
    "CCO", "CCN", "CCC", "c1ccccc1", "CC(=O)O", "CC(C)O", "CCCC", "CCOC", "c1ccncc1", "CC#N",
    "C1CCCCC1", "CCS", "CCCl", "CCBr", "OCCO", "NCCN", "CC(=O)N", "CC=O", "C=CC", "C#CC", "COC",
    "CNC", "CCF", "Oc1ccccc1", "Nc1ccccc1", "Cc1ccccc1", "CC(C)C", "CCCCC", "CCCO", "CCCN",
] * 2  # fmt: skip
TRAIN, EPOCHS = 48, 5


def fit(kind: str, callbacks: list[Any]) -> Fitted:
    """Train as in the project's tutorials."""
    noise = np.random.default_rng(0).normal(0, 0.05, len(MOLECULES))
    values = [
        m.count("C") + 0.5 * m.count("O") - m.count("N") + e for m, e in zip(MOLECULES, noise, strict=True)
    ]
    classify = kind == "classifier"
    targets = [[float(v > 2)] if classify else [v] for v in values]
    points = [data.MoleculeDatapoint.from_smi(m, y) for m, y in zip(MOLECULES, targets, strict=True)]
    train, queries = data.MoleculeDataset(points[:TRAIN]), data.MoleculeDataset(points[TRAIN:])
    pl.seed_everything(0)
    messages = (nn.AtomMessagePassing if kind == "atoms" else nn.BondMessagePassing)(d_h=16, depth=2)
    if classify:
        head = nn.BinaryClassificationFFN(input_dim=16, hidden_dim=16)
    else:
        scaler = train.normalize_targets()
        queries.normalize_targets(scaler)
        unscale = nn.UnscaleTransform.from_standard_scaler(scaler)
        maker = nn.MveFFN if kind == "mean and variance" else nn.RegressionFFN
        head = maker(input_dim=16, hidden_dim=16, output_transform=None if maker is nn.MveFFN else unscale)
    module = models.MPNN(messages, nn.MeanAggregation(), head, batch_norm=kind == "bonds", init_lr=1e-3)
    loader = data.build_dataloader(train, batch_size=16, num_workers=0, seed=0)
    asked = data.build_dataloader(queries, batch_size=16, num_workers=0, shuffle=False)
    trainer = pl.Trainer(max_epochs=EPOCHS, callbacks=callbacks, **QUIET)
    trainer.fit(module, loader)
    collate = loader.collate_fn
    return Fitted(
        trainer,
        module,
        loader,
        asked,
        EPOCHS,
        collate_singles(train, collate),
        collate_singles(queries, collate),
    )


if __name__ == "__main__":
    kinds = ("bonds", "atoms", "classifier", "mean and variance")
    run("chemprop", {kind: functools.partial(fit, kind) for kind in kinds})
