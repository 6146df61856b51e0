"""``trainer.influence``, ``self_influence``, ``forget`` and ``relabel``: the entry points for a Trainer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lightning_influence.api.checks import check_name
from lightning_influence.api.dynamics import training_dynamics
from lightning_influence.api.engine import Question
from lightning_influence.api.session import Session, average_over_checkpoints, read_paths
from lightning_influence.curvature.factors import Factors
from lightning_influence.edits.data import SetTargets
from lightning_influence.edits.editor import compute_edit
from lightning_influence.edits.parameter_edit import ParameterEdit
from lightning_influence.edits.request import EditOptions, EditRequest, Examples, check_targets
from lightning_influence.edits.start import set_out
from lightning_influence.methods.answers import By
from lightning_influence.methods.groups import GroupLabels
from lightning_influence.methods.method import read_options
from lightning_influence.methods.options import Damping
from lightning_influence.methods.queries import Aggregate
from lightning_influence.model.captured import Fisher
from lightning_influence.model.layers.plan import ModuleLoss
from lightning_influence.model.measurements import Measurement
from lightning_influence.results.attributions import Attributions
from lightning_influence.results.loggers import Loggable, log_attributions, log_edit
from lightning_influence.results.ranking import Labels, to_labels
from lightning_influence.results.self_influence import SelfInfluence
from lightning_influence.results.suspects import Suspects, find_suspects
from lightning_influence.running.host.trainer import (
    find_log_folder,
    register_trainer_method,
    splits_parameters,
)
from lightning_influence.support.arguments import parse_options
from lightning_influence.support.errors import UnsupportedTrainerError
from lightning_influence.support.storage import PathLike
from lightning_influence.support.turns import take_turns


@take_turns
def influence(
    trainer: Trainer,
    model: LightningModule | None = None,
    train_dataloaders: Any = None,
    query_dataloaders: Any = None,
    datamodule: LightningDataModule | None = None,
    *,
    method: str = "auto",
    damping: Damping = "auto",
    measurement: Measurement | None = None,
    loss: ModuleLoss | None = None,
    top_k: int | None = None,
    aggregate: Aggregate | None = None,
    train_groups: GroupLabels | None = None,
    by: By | None = None,
    scores_file: PathLike | None = None,
    ckpt_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    layers: Sequence[str] | None = None,
    factors: Factors | Literal["refit"] | None = None,
    fisher: Fisher | None = None,
    memory_budget: int = 2**30,
    tolerance: float | None = None,
    max_steps: int | None = None,
    low_rank_tolerance: float | None = None,
    curvature_examples: int | None = None,
    seed: int = 0,
    log: bool = True,
    name: str = "influence",
    labels: Labels | None = None,
    **further: Any,
) -> Attributions:
    """Attribute a model's behaviour on queries to its training examples.

    The score of training example ``n`` for query ``q`` is ``(1/N) g_q^T (H + damping)^{-1} g_n``: the
    predicted change of the measurement on ``q`` when ``n`` is removed from the training data. With the loss
    as measurement, positive scores belong to examples that help ``q``.

    Args:
        trainer: the Trainer; with an :class:`~lightning_influence.InfluenceCallback` its factors are used.
        model: the trained module; by default the one the Trainer ran last.
        train_dataloaders: the training examples; by default those of the datamodule, of the module, or of
            the last fit. Every example of the loader's dataset that its sampler can draw is visited once.
        query_dataloaders: one or several loaders, or ready-made batches; by default those of the datamodule
            or module.
        datamodule: where loaders come from if they are not given.
        method: ``"auto"`` (two-level EK-FAC), ``"ekfac"``, ``"kfac"``, ``"diagonal"``, ``"identity"``, or
            for small models ``"hessian"``, ``"exact"`` (Gauss-Newton) or ``"block_ggn"``; by iteration
            ``"cg"``, ``"minres"``, ``"astra"`` or ``"lissa"``.
        damping: ``"auto"`` (from the recorded training run), ``"heuristic"`` (a tenth of a layer's mean
            eigenvalue), or a number.
        measurement: ``"loss"``, ``"margin"``, ``"logit"``, a callable ``(module, batch) -> (B,)``, or
            ``"hook"`` for the module's ``influence_measurement``, which is also the default if it is defined;
            else the loss. A function that returns one number, ``()``, measures the batch as a set: each batch
            of the queries is then one query.
        loss: a callable ``(module, batch)`` that returns the losses of the examples ``(B,)``, or the loss of
            the batch, where the training step's own couples the examples or cannot be found; it is compared
            with the step's gradient. None for the loss of ``training_step``, or of ``influence_loss``.
        top_k: keep only the strongest ``top_k`` at either end of each ranking; all scores if None.
        aggregate: ``"mean"`` asks one question about all queries: the scores of their mean measurement, in
            one row. A list, tensor or array of texts or integers by query dataset index (or a mapping; with
            several loaders a list with one for each) asks about the mean of every group with the same label,
            a row each. Queries' gradients are averaged as they are computed: one solve a row. None for a row
            a query.
        train_groups: labels of the training examples, by dataset index like those of the queries: scores are
            summed by label as they are computed, and columns are groups (a source, a class, a file). None for
            a column an example.
        by: parts of the scores to keep as well: ``"layer"`` for each layer's and ``"block"`` for those of
            blocks of layers, as ``net.blocks.3`` (``layer_scores``), ``"position"`` for what each position of
            a sequence adds (``position_scores``); refused where they do not fit into ``memory_budget``.
        scores_file: a new file that the scores live in, so that queries times examples may exceed memory:
            NumPy's ``.npy``, memory-mapped. ``scores`` is then the mapped tensor. None for memory.
        ckpt_path: ``"best"``, ``"last"`` or a path: weights, and factors if the file has them, to load first.
            A list of them, such as runs that differ in the seed alone, gives the average of their answers,
            which predicts retraining better than one (the module keeps its own weights then).
        layers: names or shell patterns of the layers to cover, with ``!`` before of those to leave out; all
            supported ones if None.
        factors: factors to use, or ``"refit"`` to fit them anew; by default the callback's, if it has any.
        fisher: what factors are made of: random mixtures of the columns of the output curvature
            (``"mixed"``), labels drawn from the model (``"sampled"``), all columns (``"exact"``) or the
            training labels (``"empirical"``, biased); None uses stored factors of any kind, mixtures where
            they have to be fitted, and the exact matrix in ``"exact"`` and ``"block_ggn"``.
        memory_budget: bytes for solved queries of closed forms (scored in groups that fit), for the coarse
            space, for iterations, and for the curvature gradients that iterative methods keep.
        tolerance: relative residual ``||v - (H + damping) x|| / ||v||`` at which a query is solved; None for
            the method's own, see :class:`~lightning_influence.methods.Options`.
        max_steps: most steps of an iterative method; None for the method's own.
        low_rank_tolerance: largest relative error of scores from the low-rank route; 0 for the exact one,
            None for the method's own.
        curvature_examples: at most this many training examples enter the coarse space's curvature; None for
            4,096, and for 256 a query where few are asked about a large model.
        seed: of random draws, anchors and curvature examples.
        log: whether to log the answer to the Trainer's loggers, and to files in its log directory.
        name: prefix of what is logged, and name of the folder of files.
        labels: texts to show beside the indices.
        **further: further fields of :class:`~lightning_influence.methods.Options`, such as ``curvature``,
            ``preconditioner``, ``batch_size``, ``blocks`` or ``negative_curvature``.

    Returns:
        The attributions, with the certificate of how they were computed in ``diagnostics``.

    Raises:
        InfluenceError: a subclass that says what is not supported and what to do.
        ValueError: if a setting is out of range.
        TypeError: if an argument is of a wrong type.
    """
    further |= {
        "damping": damping,
        "fisher": fisher,
        "memory_budget": memory_budget,
        "tolerance": tolerance,
        "max_steps": max_steps,
        "low_rank_tolerance": low_rank_tolerance,
        "curvature_examples": curvature_examples,
        "seed": seed,
    }
    settings = read_options(method, further)
    groups: dict[str, Any] = {"aggregate": aggregate, "train_groups": train_groups, "by": by}
    groups["scores_file"] = scores_file
    question = Question(method, measurement, top_k, layers, settings, loss, **groups)
    to_labels(labels)
    check_name(name)
    paths = read_paths(ckpt_path)

    def answer(path: str | None) -> Attributions:
        with Session(trainer, model, datamodule, path, factors) as session:
            train = session.find_train_loader(train_dataloaders)
            queries = session.find_query_loaders(query_dataloaders)
            attributions = session.ask(question).attribute(train, queries)
            session.keep()
        return attributions

    if isinstance(paths, list):
        _check_several(top_k, factors, scores_file)
        attributions = average_over_checkpoints(trainer, model, paths, answer)
    else:
        attributions = answer(paths)
    if log:
        _log(trainer, attributions, name, labels)
    return attributions


@take_turns
def self_influence(
    trainer: Trainer,
    model: LightningModule | None = None,
    train_dataloaders: Any = None,
    datamodule: LightningDataModule | None = None,
    *,
    method: str = "ekfac",
    damping: Damping = "auto",
    loss: ModuleLoss | None = None,
    ckpt_path: str | os.PathLike[str] | None = None,
    layers: Sequence[str] | None = None,
    factors: Factors | Literal["refit"] | None = None,
    fisher: Fisher | None = None,
    memory_budget: int = 2**30,
    curvature_examples: int | None = None,
    seed: int = 0,
    log: bool = True,
    name: str = "self_influence",
    labels: Labels | None = None,
    **further: Any,
) -> SelfInfluence:
    """Influence of every training example on its own loss: high for rare and mislabelled ones.

    Args:
        trainer: as in :func:`influence`, like all arguments that are not listed here.
        model: the trained module.
        train_dataloaders: the training examples.
        datamodule: where the loader comes from if it is not given.
        method: as in :func:`influence`; EK-FAC by default, which needs two small products an example and
            layer.
        damping: as in :func:`influence`.
        loss: as in :func:`influence`.
        ckpt_path: ``"best"``, ``"last"`` or one path, as in :func:`influence`.
        layers: as in :func:`influence`.
        factors: as in :func:`influence`.
        fisher: as in :func:`influence`.
        memory_budget: as in :func:`influence`.
        curvature_examples: as in :func:`influence`.
        seed: as in :func:`influence`.
        log: as in :func:`influence`.
        name: as in :func:`influence`.
        labels: texts to show beside the indices.
        **further: as in :func:`influence`.

    Returns:
        One score a training example: the predicted rise of its loss when it is removed.

    Raises:
        InfluenceError: a subclass that says what is not supported and what to do.
        ValueError: if a setting is out of range.
        TypeError: if there are several checkpoints, or an argument is of a wrong type.
    """
    further |= {
        "damping": damping,
        "fisher": fisher,
        "memory_budget": memory_budget,
        "curvature_examples": curvature_examples,
        "seed": seed,
    }
    question = Question(method, layers=layers, options=read_options(method, further), loss=loss)
    to_labels(labels)
    check_name(name)
    path = read_paths(ckpt_path)
    if isinstance(path, list):
        raise TypeError(
            f"Got ckpt_path of type {type(ckpt_path).__name__}; self-influence takes one checkpoint. Ask at "
            "each, and average the scores."
        )
    with Session(trainer, model, datamodule, path, factors) as session:
        train = session.find_train_loader(train_dataloaders)
        result = session.ask(question).self_influence(train)
        session.keep()
    if log:
        _log(trainer, result, name, labels)
    return result


def suspects(
    trainer: Trainer,
    model: LightningModule | None = None,
    train_dataloaders: Any = None,
    datamodule: LightningDataModule | None = None,
    *,
    ckpt_path: str | os.PathLike[str] | None = None,
    log: bool = True,
    name: str = "suspects",
    labels: Labels | None = None,
    **options: Any,
) -> Suspects:
    """Rank the training examples by how likely their labels are wrong, each with the reasons.

    The ranking joins what the fit kept of each example's loss (:func:`training_dynamics`) with its
    self-influence, which is computed here.

    Args:
        trainer: as in :func:`influence`, like all arguments that are not listed here; its fit was watched by
            ``InfluenceCallback(dynamics=True)``.
        model: the trained module.
        train_dataloaders: the training examples, of the dataset that was fitted.
        datamodule: where the loader comes from if it is not given.
        ckpt_path: as in :func:`self_influence`; the dynamics are read from it as well.
        log: as in :func:`influence`.
        name: as in :func:`influence`.
        labels: texts to show beside the indices.
        **options: as in :func:`self_influence`.

    Returns:
        The examples with their scores and signals.

    Raises:
        InfluenceError: a subclass that says what is not supported and what to do.
        ValueError: if a setting is out of range.
        TypeError: if an argument is of a wrong type.
    """
    to_labels(labels)
    check_name(name)
    dynamics = training_dynamics(trainer, ckpt_path=ckpt_path, log=False)
    own = self_influence(
        trainer, model, train_dataloaders, datamodule, ckpt_path=ckpt_path, log=False, **options
    )
    found = find_suspects(dynamics, own)
    if log:
        _log(trainer, found, name, labels)
    return found


def _check_several(
    top_k: int | None, factors: Factors | Literal["refit"] | None, scores_file: PathLike | None
) -> None:
    """Refuse what has no meaning over several checkpoints.

    Raises:
        ValueError: saying what to do.
    """
    if top_k is not None:
        raise ValueError(
            f"Got top_k={top_k} with several checkpoints, whose average needs all scores; omit top_k."
        )
    if scores_file is not None:
        raise ValueError(
            "Got scores_file with several checkpoints, whose average is in memory; omit it, or ask at each."
        )
    if isinstance(factors, Factors):
        raise ValueError(
            "Got factors with several checkpoints; factors belong to one. Omit them: those in each file are "
            "used, or fitted."
        )


def _log(trainer: Trainer, result: Loggable, name: str, labels: Labels | None) -> None:
    """Log to every logger, and to files where the Trainer has a log directory."""
    directory = find_log_folder(trainer)
    target = None if directory is None else os.path.join(directory, name)
    log_attributions(
        trainer.loggers, result, step=trainer.global_step, name=name, directory=target, labels=labels
    )


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
    request = EditRequest(examples, parse_options(EditOptions, options), validation=validation, layers=layers)
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
    request = EditRequest(
        examples, parse_options(EditOptions, options), new_targets, set_targets, validation, layers
    )
    return _edit(trainer, request, model, train_dataloaders, datamodule, ckpt_path, name if log else None)


@take_turns
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
        UnsupportedTrainerError: if the Trainer has several processes, or shards parameters.
    """
    path = read_paths(ckpt_path)
    if isinstance(path, list):
        raise TypeError(f"Got ckpt_path={ckpt_path!r}; an edit is of one checkpoint.")
    session = Session(trainer, model, datamodule, path, None)
    if splits_parameters(trainer):
        raise UnsupportedTrainerError(
            f"{type(trainer.strategy).__name__} shards the parameters, which edits change whole; accepted is "
            "a Trainer without it, such as Trainer(devices=1), with the consolidated checkpoint as ckpt_path."
        )
    processes = max(trainer.world_size, trainer.num_devices * trainer.num_nodes)
    if processes > 1:  # before any of them starts
        raise UnsupportedTrainerError(
            f"The Trainer has {processes} processes; edits run on one. Pass a Trainer with "
            "devices=1 (and num_nodes=1), such as Trainer(devices=1), and the same model or ckpt_path."
        )
    with session:
        data = request.split(session.find_train_loader(train_dataloaders))
        edit = compute_edit(set_out(session.runner, request, data, session.record))
    if name is not None:
        directory = find_log_folder(trainer)
        log_edit(trainer.loggers, edit, step=trainer.global_step, name=name, directory=directory)
    return edit


class InfluenceTrainer(Trainer):
    """A Lightning ``Trainer`` that can be asked for influence and edits; everything else is as it was."""

    influence = influence
    self_influence = self_influence
    forget = forget
    relabel = relabel
    training_dynamics = training_dynamics
    suspects = suspects


for function in (influence, self_influence, forget, relabel, training_dynamics, suspects):
    register_trainer_method(function)
