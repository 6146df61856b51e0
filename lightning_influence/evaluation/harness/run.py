"""One run: a fresh module and Trainer on a subset, then the queries' values."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sized
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset, Subset

from lightning_influence.evaluation.harness.retraining import Retraining, check_distinct, check_types
from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.plan import find_layers
from lightning_influence.model.measurements import Measurement, ResolvedMeasurement, resolve_measurement
from lightning_influence.running.loop_runner import LoopRunner
from lightning_influence.support.errors import NonFiniteError, UnsupportedDataError, UnsupportedTrainerError
from lightning_influence.support.random_states import preserve_rng


class Runs:
    """The runs of one process: data are made once, and every product of a factory is compared with the last.

    Args:
        retraining: the factories.
    """

    def __init__(self, retraining: Retraining) -> None:
        self._retraining = retraining
        with preserve_rng():
            seed_all(0, "data")
            self._data: Dataset[Any] = retraining.data()
            self._queries = retraining.queries()
        self._last: tuple[LightningModule, Trainer] | None = None

    def __call__(self, kept: Tensor, seed: int) -> Tensor:
        """Train on a subset and measure the queries; random states are left as they were.

        Initial values follow the seed alone; the order of batches follows the seed and the subset's size.

        Args:
            kept: boolean, ``(N,)``.
            seed: the run's.

        Returns:
            Values ``(Q,)``, float64, in the order of the queries' data set.

        Raises:
            NonFiniteError: if the loss, a parameter or a value is NaN or infinite.
            UnsupportedDataError: if the loader does not hold the subset.
            UnsupportedTrainerError: if the Trainer was used before, or did no step.
        """
        indices = kept.nonzero().squeeze(1).tolist()
        label = f"The run with seed {seed} on {len(indices)} examples"
        with preserve_rng():
            seed_all(seed, "init")
            module, trainer = self._retraining.module(), self._retraining.trainer()
            self._check(module, trainer)
            seed_all(seed, "order")
            loader = self._retraining.loader(Subset(self._data, indices))
            _check_loader(loader, len(indices))
            trainer.fit(module, loader)
            if trainer.global_step < 1:
                raise UnsupportedTrainerError(
                    f"{label} did no optimizer step, so it measures nothing. Look at max_epochs, max_steps "
                    "and limit_train_batches of `trainer()`, and at drop_last of `loader(dataset)`."
                )
            _check_finite(module, trainer, label)
            return _measure(module, self._queries, self._retraining.measurement, label)

    def _check(self, module: LightningModule, trainer: Trainer) -> None:
        check_types(module, trainer)
        if trainer.global_step or trainer.current_epoch:
            raise UnsupportedTrainerError(
                f"`trainer()` returned a Trainer that has done {trainer.global_step} steps. Build the "
                "Trainer inside the function."
            )
        if self._last is not None:
            check_distinct(module, self._last[0], trainer, self._last[1])
        self._last = module, trainer


class _ValuePass:
    """Measures every example of the queries."""

    description = "Retraining: queries"

    def __init__(self, module: LightningModule, measure: ResolvedMeasurement) -> None:
        self._measure = measure
        # A function is called as it is; what comes from the loss needs the loss to be found.
        self._forward = Forward(find_layers(module)) if measure.needs_loss else None
        self._parts: list[tuple[int, Tensor, Tensor]] = []

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Measure one batch."""
        if self._forward is None:
            assert self._measure.function is not None
            values = self._measure.function(module, batch)
            _check_shape(values, len(indices))
        else:
            values = self._forward(module, batch, len(indices), self._measure).per_example()
        self._parts.append((dataloader_idx, indices.cpu(), values.detach().cpu().double()))

    def values(self) -> Tensor:
        """Return the values in the order of loaders and data sets, ``(Q,)``."""
        loaders = torch.cat([torch.full_like(indices, loader) for loader, indices, _ in self._parts])
        indices = torch.cat([indices for _, indices, _ in self._parts])
        values = torch.cat([values for _, _, values in self._parts])
        by_index = indices.argsort(stable=True)
        return values[by_index[loaders[by_index].argsort(stable=True)]]


def _measure(module: LightningModule, queries: Any, measurement: Measurement, label: str) -> Tensor:
    one_pass = _ValuePass(module, resolve_measurement(measurement, module))
    LoopRunner(module).run(one_pass, queries)
    values = one_pass.values()
    if not bool(values.isfinite().all()):
        raise NonFiniteError(
            f"{label} gives {int((~values.isfinite()).sum())} of {len(values)} queries a value that is not "
            "finite. Look at the learning rate of `module()`."
        )
    return values


def _check_shape(values: object, count: int) -> None:
    if not isinstance(values, Tensor) or values.shape != (count,):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"The measurement returned {got}; accepted is one value an example, ({count},).")


def _check_loader(loader: object, count: int) -> None:
    """Refuse a loader that forgot its argument: every subset would train on the same examples.

    Raises:
        UnsupportedDataError: if its data set has another length than the subset.
    """
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, Sized) and len(dataset) != count:
        raise UnsupportedDataError(
            f"`loader(dataset)` was given {count} examples and returned a loader of {len(dataset)}. Accepted "
            "is a loader of the data set it was given, however wrapped: another one measures nothing."
        )


def _check_finite(module: LightningModule, trainer: Trainer, label: str) -> None:
    """Refuse a run that diverged: its last logged losses and its parameters.

    Raises:
        NonFiniteError: naming what is not finite.
    """
    wrong = [name for name, p in module.named_parameters() if not bool(p.isfinite().all())]
    wrong += [
        name
        for name, value in trainer.callback_metrics.items()
        if "loss" in name and not bool(torch.as_tensor(value).isfinite().all())
    ]
    if wrong:
        raise NonFiniteError(
            f"{label} diverged: {wrong[:4]} are not finite. Lower the learning rate in `module()`, or clip "
            "gradients in `trainer()`."
        )


def derive_seed(seed: int, purpose: str) -> int:
    """Derive the seed of one part of a run, a function of the run's seed alone and not of its examples.

    Args:
        seed: the run's seed.
        purpose: what is drawn, such as ``"init"`` or ``"order"``.

    Returns:
        An integer in ``[0, 2**63)``.
    """
    digest = hashlib.sha256(f"{seed}|{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_all(seed: int, purpose: str) -> None:
    """Seed torch, NumPy and Python's own generator for one part of a run."""
    value = derive_seed(seed, purpose)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
