"""Variational models of single cells: losses with latent draws, a KL term, and the project's own loader."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

from harness import Fitted, Later, run

# isort: split


import anndata
import numpy as np
import scvi
from torch.distributions import Normal
from torch.utils.data import RandomSampler, default_convert

CELLS, GENES, EPOCHS = 160, 20, 3


def make_cells() -> anndata.AnnData:
    """Counts of two kinds of cells in two batches."""
    rng, kind = np.random.default_rng(0), np.arange(CELLS) % 2
    rates = (
        rng.normal(0, 0.5, (CELLS, 1))
        + rng.normal(0, 1, (1, GENES))
        + kind[:, None] * rng.normal(0, 1, (1, GENES))
    )
    cells = anndata.AnnData(rng.poisson(np.exp(rates)).astype("float32"))
    cells.obs["batch"] = np.array(["b0", "b1"])[np.arange(CELLS) % 3 % 2]
    cells.obs["type"] = np.array(["t0", "t1"])[kind]
    return cells


def make_model(kind: str) -> Any:
    """Return a small model of the project."""
    cells, small = make_cells(), {"n_hidden": 16, "n_latent": 4}
    if kind == "SCANVI":
        scvi.model.SCANVI.setup_anndata(cells, labels_key="type", unlabeled_category="?", batch_key="batch")
        return scvi.model.SCANVI(cells, **small)
    if kind == "LinearSCVI":
        scvi.model.LinearSCVI.setup_anndata(cells)
        return scvi.model.LinearSCVI(cells, **small)
    scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
    options = {"gene_likelihood": "nb", "use_batch_norm": "none", "use_layer_norm": "none"}
    return scvi.model.SCVI(cells, **small, **(options if "negative" in kind else {}))


@contextlib.contextmanager
def without_draws() -> Iterator[None]:
    """Let the latent variables be their means, and the semi-supervised loader draw no order."""

    def draw(self: Any, shape: tuple[int, ...] = ()) -> Any:
        return self.mean.expand(self._extended_shape(shape))

    with (
        mock.patch.object(Normal, "rsample", draw),
        mock.patch.object(RandomSampler, "__iter__", lambda self: iter(range(len(self.data_source)))),
    ):
        yield


def split(loader: Any) -> Iterator[Any]:
    """Yield each pair of a cell and a labelled cell, as the semi-supervised loader joins them."""
    for batches in itertools.islice(loader, len(loader)):
        for n in range(len(batches[0]["X"])):
            yield tuple({name: value[n : n + 1] for name, value in batch.items()} for batch in batches)


def fit(kind: str, callbacks: list[Any]) -> Fitted:
    """Train as in the project's tutorials."""
    scvi.settings.seed = 0
    model = make_model(kind)
    options: dict[str, Any] = {"callbacks": callbacks} if callbacks else {}
    model.train(
        max_epochs=EPOCHS, batch_size=32, accelerator="cpu", enable_progress_bar=False, early_stopping=False,
        train_size=1.0, logger=False, enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer = model.trainer
    loader = trainer.train_dataloader
    singles = (
        Later(lambda: split(loader))
        if kind == "SCANVI"
        else [default_convert(loader.dataset[[n]]) for n in range(len(loader.dataset))]
    )
    return Fitted(
        trainer, trainer.lightning_module, loader, loader, EPOCHS, singles, singles, quiet=without_draws
    )


if __name__ == "__main__":
    kinds = ("SCVI", "SCVI, negative binomial", "LinearSCVI", "SCANVI")
    run("scvi-tools", {kind: functools.partial(fit, kind) for kind in kinds})
