"""``trainer.forget(...)`` and ``trainer.relabel(...)``: edits through a Lightning Trainer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lightning_influence.api.session import Session, check_name, check_trainer, read_paths
from lightning_influence.edits.data import SetTargets
from lightning_influence.edits.parameter_edit import ParameterEdit
from lightning_influence.edits.request import EditRequest, Examples, check_targets
from lightning_influence.results.loggers import log_edit
from lightning_influence.support.errors import UnsupportedTrainerError


def forget(
    trainer: Trainer,
    examples: Examples,
    model: LightningModule | None = None,
    train_dataloaders: Any = None,
    datamodule: LightningDataModule | None = None,
    *,
    validation: Any = None,
    ckpt_path: str | os.PathLike[str] | None = None,
    layers: Sequence[str] | None = None,
    log: bool = True,
    name: str = "forget",
    **options: Any,
) -> ParameterEdit:
    """Compute an edit after which the model no longer knows some training examples.

    The passes run on the Trainer's device, with its progress bar; on one process only. After ``apply()`` the
    model is an ordinary one: ``trainer.save_checkpoint`` writes it, ``load_from_checkpoint`` reads it.

    Args:
        trainer: the Trainer; a recorded training run, in its callback or the checkpoint, gives the weight
            decay.
        examples: dataset indices of the examples to forget, or a boolean mask over the dataset.
        model: the trained module; by default the one the Trainer ran last.
        train_dataloaders: the training examples; by default those of the datamodule, of the module, or of
            the last fit.
        datamodule: where the loader comes from if it is not given.
        validation: data whose loss is reported as that of the kept data. Do not pass test data.
        ckpt_path: ``"best"``, ``"last"`` or a path: weights to load first, which stay in the model.
        layers: names or shell patterns of the layers that may change.
        log: whether to log the report to the Trainer's loggers, and the edit to a file in its log directory.
        name: prefix of what is logged, and name of the folder of files.
        **options: fields of :class:`~lightning_influence.edits.EditOptions`, as in
            :meth:`InfluenceModule.forget <lightning_influence.InfluenceModule.forget>`.

    Returns:
        The edit, not applied.

    Raises:
        ValueError: if there is nothing or everything to forget, or an option is out of range.
        InfluenceError: a subclass that says what is not supported and what to do.
    """
    check_name(name)
    request = EditRequest(examples, None, None, validation, layers, options)
    return _edit(trainer, request, model, train_dataloaders, datamodule, ckpt_path, name if log else None)


def relabel(
    trainer: Trainer,
    examples: Examples,
    new_targets: Any,
    model: LightningModule | None = None,
    train_dataloaders: Any = None,
    datamodule: LightningDataModule | None = None,
    *,
    set_targets: SetTargets | None = None,
    validation: Any = None,
    ckpt_path: str | os.PathLike[str] | None = None,
    layers: Sequence[str] | None = None,
    log: bool = True,
    name: str = "relabel",
    **options: Any,
) -> ParameterEdit:
    """Compute an edit after which the model has learned other targets for some training examples.

    Args:
        trainer: as in :func:`forget`, like all arguments that are not listed here.
        examples: dataset indices of the examples, or a boolean mask over the dataset.
        new_targets: one target for each of them, in their order, or one for all.
        model: as in :func:`forget`.
        train_dataloaders: as in :func:`forget`.
        datamodule: as in :func:`forget`.
        set_targets: puts targets into a batch: ``(batch, rows, targets) -> batch``, a copy. Not needed for
            batches that are pairs ``(inputs, targets)``.
        validation: data that take the place of the kept examples in what a search for the step minimises,
            and in the report; with a given step they are only reported. Do not pass test data.
        ckpt_path: as in :func:`forget`.
        layers: as in :func:`forget`.
        log: as in :func:`forget`.
        name: as in :func:`forget`.
        **options: fields of :class:`~lightning_influence.edits.EditOptions`, as in
            :meth:`InfluenceModule.relabel <lightning_influence.InfluenceModule.relabel>`.

    Returns:
        The edit, not applied.

    Raises:
        ValueError: if there is nothing or everything to edit, the targets do not match the examples, or an
            option is out of range.
        InfluenceError: a subclass that says what is not supported and what to do.
    """
    check_targets(new_targets)
    check_name(name)
    request = EditRequest(examples, new_targets, set_targets, validation, layers, options)
    return _edit(trainer, request, model, train_dataloaders, datamodule, ckpt_path, name if log else None)


def _edit(
    trainer: Trainer,
    request: EditRequest,
    model: LightningModule | None,
    train_dataloaders: Any,
    datamodule: LightningDataModule | None,
    ckpt_path: str | os.PathLike[str] | None,
    name: str | None,
) -> ParameterEdit:
    """Run an edit through the Trainer, and log it under a name if there is one.

    Returns:
        The edit.

    Raises:
        TypeError: if an argument is of a wrong type.
        UnsupportedTrainerError: if the Trainer has several processes.
    """
    check_trainer(trainer)
    paths = read_paths(ckpt_path)
    if isinstance(paths, list):
        raise TypeError(f"Got ckpt_path={ckpt_path!r}; an edit is of one checkpoint.")
    processes = max(trainer.world_size, trainer.num_devices * trainer.num_nodes)
    if processes > 1:
        raise UnsupportedTrainerError(
            f"The Trainer has {processes} processes; edits run on one. Pass a Trainer with "
            "devices=1 (and num_nodes=1), such as Trainer(devices=1), and the same model or ckpt_path."
        )
    with Session(trainer, model, datamodule, paths, None) as session:
        data = request.split(session.find_train_loader(train_dataloaders))
        edit = request.editor(session.runner, data, session.record).edit()
    if name is not None:
        directory = trainer.log_dir if trainer.loggers else None
        log_edit(trainer.loggers, edit, step=trainer.global_step, name=name, directory=directory)
    return edit
