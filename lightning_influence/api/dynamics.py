"""``trainer.training_dynamics``: what a fit kept of each training example's loss."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch import Trainer

from lightning_influence.api.checks import check_name, check_trainer, find_callback
from lightning_influence.collecting.moments import Moments
from lightning_influence.collecting.state import read_saved_dynamics
from lightning_influence.results.diagnostics import Diagnostics
from lightning_influence.results.dynamics import TrainingDynamics
from lightning_influence.results.loggers import log_attributions
from lightning_influence.results.ranking import Labels, to_labels
from lightning_influence.running.host.checkpoints import read_checkpoint
from lightning_influence.running.host.indices import describe_collate
from lightning_influence.running.host.trainer import find_last_fit, find_log_folder, resolve_checkpoint
from lightning_influence.support.errors import UnsupportedTrainerError


def training_dynamics(
    trainer: Trainer,
    *,
    ckpt_path: str | os.PathLike[str] | None = None,
    log: bool = True,
    name: str = "training_dynamics",
    labels: Labels | None = None,
) -> TrainingDynamics:
    """What each training example's loss and margin did over the epochs of the last fit.

    Args:
        trainer: the Trainer, whose fit was watched by ``InfluenceCallback(dynamics=True)``.
        ckpt_path: ``"best"``, ``"last"`` or a path: read what the callback saved there; the model and the
            callback stay as they are.
        log: whether to log the answer to the Trainer's loggers, and to files in its log directory.
        name: prefix of what is logged, and name of the folder of files.
        labels: texts to show beside the indices.

    Returns:
        Moments over the epochs for every example that was seen, by dataset index. In the middle of an epoch,
        also after an exception, its part counts as an epoch.

    Raises:
        UnsupportedTrainerError: if no fit was watched, with the reason.
        InfluenceError: if the checkpoint cannot be read.
        TypeError: if an argument is of a wrong type.
    """
    check_trainer(trainer)
    check_name(name)
    to_labels(labels)
    if ckpt_path is None:
        callback = find_callback(trainer)
        moments = None if callback is None else callback.dynamics
        where = "the Trainer" if callback is None else "its InfluenceCallback"
    else:
        path = resolve_checkpoint(trainer, os.fspath(ckpt_path))
        moments, where = read_saved_dynamics(read_checkpoint(path)), f"the checkpoint {path!r}"
    if moments is None or not moments.epochs:
        reasons = "".join(f" {note}" for note in moments.notes) if moments is not None else ""
        raise UnsupportedTrainerError(
            f"There are no training dynamics in {where}.{reasons} Fit with InfluenceCallback(dynamics=True), "
            "whose warnings give the reason where they cannot be kept. self_influence() finds wrong labels "
            "without them."
        )
    result = build_dynamics(moments, describe_collate(find_last_fit(trainer)[0]))
    if log:
        directory = find_log_folder(trainer)
        target = None if directory is None else os.path.join(directory, name)
        step = trainer.global_step
        log_attributions(trainer.loggers, result, step=step, name=name, directory=target, labels=labels)
    return result


def build_dynamics(moments: Moments, note: str | None = None) -> TrainingDynamics:
    """Make a result of what a callback kept.

    Args:
        moments: with at least one epoch.
        note: what is assumed beside.

    Returns:
        The result, of the examples that were seen.
    """
    seen = (moments.counts[:, 0] > 0).nonzero()[:, 0]
    floats, counts = moments.floats[seen], moments.counts[seen].long()
    warnings = [*moments.notes, *([note] if note else [])]
    if moments.missed:
        total = moments.missed + moments.batches
        warnings.append(f"Of {total} batches, {moments.missed} were not seen.")
    values: dict[str, Any] = {
        "loss_mean": floats[:, 0],
        "loss_spread": (floats[:, 1] / counts[:, 0]).clamp_min(0).sqrt(),
        "epochs_seen": counts[:, 0],
    }
    if moments.has_margins:
        values |= {
            "margin_mean": floats[:, 2],
            "margin_spread": (floats[:, 3] / counts[:, 0]).clamp_min(0).sqrt(),
            "epochs_right": counts[:, 1],
            "forgotten": counts[:, 2],
            "first_learned": counts[:, 3],
        }
    diagnostics = Diagnostics(
        method="training dynamics",
        warnings=warnings,
        extra={
            "epochs": moments.epochs + moments.skipped,
            "epochs_skipped": moments.skipped,
            "batches": moments.batches,
            "batches_missed": moments.missed,
        },
    )
    return TrainingDynamics(train_indices=seen, diagnostics=diagnostics, **values)
