"""The commands: what each of them asks in Python, with the same names and defaults, and what it writes."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_type_hints

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from lightning_influence.api.command_line.folder import PAGE, choose_k, write_edit, write_result
from lightning_influence.api.command_line.project import CALLBACK, Project
from lightning_influence.collecting.callback import InfluenceCallback
from lightning_influence.edits.parameter_edit import ParameterEdit
from lightning_influence.edits.request import EditOptions
from lightning_influence.methods.method import list_option_types
from lightning_influence.model.measurements import MeasurementName
from lightning_influence.results.attributions import Attributions
from lightning_influence.results.dynamics import TrainingDynamics
from lightning_influence.results.loggers import Loggable, log_attributions, log_edit
from lightning_influence.results.report.material import ReportOptions
from lightning_influence.results.self_influence import SelfInfluence
from lightning_influence.results.suspects import Suspects
from lightning_influence.support.errors import InfluenceWarning
from lightning_influence.support.storage import load_tensors

# What the configuration gives, and what a command line cannot: loaders, factors in memory, texts of examples.
_IN_PYTHON = {"trainer", "model", "train_dataloaders", "query_dataloaders", "datamodule", "validation"} | {
    "labels",
    "factors",
}
# Arguments whose types in Python do not serve: jsonargparse would take a list of paths for one text, and
# refuse functions that do not say what they return.
_TYPES: dict[str, tuple[Any, str]] = {
    "ckpt_path": (list[str] | str | None, "The checkpoint to ask about: a path, 'best' or 'last'"),
    "measurement": (
        MeasurementName | Callable | None,
        "What scores predict the change of: a name, or a function by its path",
    ),
    "loss": (Callable | None, "The losses of examples, where they are not found: a function by its path"),
    "set_targets": (Callable | None, "What puts targets into a batch: a function by its path"),
}
_FIT_SKIPS = {"self", "model", "train_dataloaders", "val_dataloaders", "datamodule"}
_PAGE_IN_PYTHON = {"dataset", "query_dataset", "labels", "predictions", "spectrum"}
_PAGE_OPTIONS = {field.name for field in fields(ReportOptions)} - _PAGE_IN_PYTHON
_KINDS: dict[str, type[Any]] = {
    kind.KIND: kind for kind in (Attributions, SelfInfluence, TrainingDynamics, Suspects, ParameterEdit)
}
_RESULTS = Path("influence_results")


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        summary: what it does, in a line.
        add_arguments: adds its arguments to a parser.
        run: runs it for a project.
        saves_config: whether the Trainer saves the configuration beside its logs.
    """

    summary: str
    add_arguments: Callable[[LightningArgumentParser], None]
    run: Callable[[Project], None]
    saves_config: bool = False


@dataclass(frozen=True)
class Question:
    """A function of the package as a command asks it.

    Attributes:
        function: takes the Trainer first.
        passes_to: the function that takes the further options of this one, if there is one.
    """

    function: Callable[..., Any]
    passes_to: Callable[..., Any] | None = None

    @property
    def parameters(self) -> set[str]:
        """Names of all its arguments that are not in an options' dataclass."""
        functions = [self.function] if self.passes_to is None else [self.function, self.passes_to]
        return {name for function in functions for name in inspect.signature(function).parameters}

    def add_arguments(self, parser: LightningArgumentParser) -> None:
        """Add the function's arguments, except those that only Python can give."""
        parser.add_function_arguments(self.function, None, skip={*_IN_PYTHON, *_TYPES}, fail_untyped=False)
        for name in sorted(_TYPES.keys() & self.parameters):
            kind, what = _TYPES[name]
            text = f"{what}. More under {self.function.__name__} in Python."
            parser.add_argument(f"--{name}", type=kind, default=None, help=text)
        if "method" in self.parameters:
            text = "'refit' to fit factors anew; those of the checkpoint by default."
            parser.add_argument("--factors", type=Literal["refit"] | None, default=None, help=text)
            _add_method_options(parser)

    def read_arguments(self, project: Project) -> dict[str, Any]:
        """Collect the function's arguments of all that were given.

        Returns:
            Them by name, with the module and the data if the function takes them.
        """
        names = self.parameters | {"factors"}
        kinds: list[type[Any]] = [EditOptions, *list_option_types()]
        names |= {option.name for kind in kinds for option in fields(kind)}
        names -= {"log", "name", "model", "trainer", "datamodule"}
        values = {name: project.values[name] for name in names if name in project.values}
        _check_checkpoints(values["ckpt_path"])
        if "model" not in self.parameters:
            return values
        if values["ckpt_path"] is None:
            warnings.warn(
                "Without --ckpt_path the question is about the weights that the module's constructor makes, "
                "as a rule untrained ones.",
                InfluenceWarning,
                stacklevel=2,
            )
        return values | {"model": project.model, "datamodule": project.datamodule}


def _add_output(parser: LightningArgumentParser) -> None:
    where = f"{_RESULTS}/NAME by default, of the argument --name"
    parser.add_argument("--output", type=str | None, default=None, help=f"The folder to write: {where}.")


def _add_method_options(parser: LightningArgumentParser) -> None:
    """Add the options that single methods have beside the arguments of :func:`influence`."""
    known = set(vars(parser.get_defaults(skip_validation=True)))
    for kind in list_option_types():
        hints = get_type_hints(kind)
        for option in fields(kind):
            if option.name in known or option.name == "unused":
                continue
            known.add(option.name)
            default = "" if option.default in (None, MISSING) else f", {option.default!r} there"
            text = f"An option of single methods, see {kind.__name__}; the method's own by default{default}."
            parser.add_argument(f"--{option.name}", type=hints[option.name] | None, default=None, help=text)


def _add_k(parser: LightningArgumentParser) -> None:
    help = "Examples at either end of the rankings in the page; its own default, or as many as there are."
    parser.add_argument("--k", type=int | None, default=None, help=help)


def _add_page_options(parser: LightningArgumentParser) -> None:
    parser.add_class_arguments(ReportOptions, None, skip=set(_PAGE_IN_PYTHON), fail_untyped=False)


def _add_fit(parser: LightningArgumentParser) -> None:
    parser.add_lightning_class_args(InfluenceCallback, CALLBACK)
    parser.add_method_arguments(Trainer, "fit", skip=set(_FIT_SKIPS))


def _add_report(parser: LightningArgumentParser) -> None:
    parser.add_argument("--results", type=str, required=True, help="A file of results, or the folder of one.")
    parser.add_argument(
        "--output", type=str | None, default=None, help=f"The page to write; {PAGE} beside the results."
    )
    _add_k(parser)
    _add_page_options(parser)


def _fit(project: Project) -> None:
    """Fit as ``Trainer.fit`` does, and name the last checkpoint that was written."""
    names = inspect.signature(Trainer.fit).parameters.keys() - _FIT_SKIPS
    settings = {name: project.values[name] for name in sorted(names)}
    _check_checkpoints(settings["ckpt_path"])
    project.trainer.fit(project.model, datamodule=project.datamodule, **settings)
    for callback in project.trainer.checkpoint_callbacks:
        path = getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")
        if path and project.trainer.is_global_zero:
            print(f"Checkpoint: {path}")


def _ask(question: Question, project: Project) -> None:
    """Ask a question, and write its answer to the folder and to the Trainer's loggers."""
    trainer, values = project.trainer, project.values
    result: Loggable = question.function(trainer, log=False, **question.read_arguments(project))
    if "datamodule" not in question.parameters:
        project.load_data(with_queries=False)
    if not trainer.is_global_zero:
        return
    folder = _choose_folder(values)
    page: dict[str, Any] = {name: values[name] for name in _PAGE_OPTIONS}
    page["dataset"] = project.find_dataset()
    if isinstance(result, Attributions):
        page["query_dataset"] = project.find_query_dataset()
    write_result(folder, result, values["k"], **page)
    if values["log"]:
        log_attributions(trainer.loggers, result, step=trainer.global_step, name=values["name"])
    print(result.top(min(5, result.stored)))
    _finish(project, folder)


def _edit(question: Question, project: Project) -> None:
    """Compute an edit; write it, and a checkpoint of the model with the edit applied."""
    trainer, values = project.trainer, project.values
    edit: ParameterEdit = question.function(trainer, log=False, **question.read_arguments(project))
    folder = _choose_folder(values)
    page = {name: values[name] for name in _PAGE_OPTIONS}
    write_edit(folder, edit, values["examples"], dataset=project.find_dataset(), **page)
    if values["log"]:
        log_edit(trainer.loggers, edit, step=trainer.global_step, name=values["name"])
    edit.apply()
    print(edit)
    trainer.strategy.connect(project.model)
    trainer.save_checkpoint(folder / "edited.ckpt", weights_only=True)
    _finish(project, folder)


def _report(project: Project) -> None:
    """Write the page of results that were written before."""
    values = project.values
    path = _find_results(Path(values["results"]).expanduser())
    _, metadata = load_tensors(path)
    kind = _KINDS.get(str(metadata.get("kind")))
    if kind is None:
        raise ValueError(
            f"{str(path)!r} holds {metadata.get('kind')!r}; accepted are files of {', '.join(_KINDS)}."
        )
    page: dict[str, Any] = {name: values[name] for name in _PAGE_OPTIONS}
    project.load_data(with_queries=kind is Attributions)
    page["dataset"] = project.find_dataset()
    target = Path(values["output"] or path.parent / PAGE)
    if kind is ParameterEdit:
        ParameterEdit.load(path, project.model).report(target, **page)
    else:
        if kind is Attributions:
            page["query_dataset"] = project.find_query_dataset()
        result = kind.load(path)
        result.report(target, k=choose_k(result, values["k"]), **page)
    print(f"Written: {target}")


def _check_checkpoints(ckpt_path: Any) -> None:
    """Refuse paths of files that are not there, before anything is loaded.

    Raises:
        ValueError: saying what to pass.
    """
    for path in ckpt_path if isinstance(ckpt_path, list) else [ckpt_path]:
        kept_by_lightning = (
            path is None or path in {"best", "last", "hpc"} or str(path).startswith("registry")
        )
        if not kept_by_lightning and "://" not in str(path) and not Path(path).expanduser().exists():
            raise ValueError(
                f"There is no checkpoint {str(path)!r}. Pass the path of a file that a Trainer wrote, as "
                "--ckpt_path."
            )


def _choose_folder(values: dict[str, Any]) -> Path:
    return Path(values["output"] or _RESULTS / values["name"]).expanduser()


def _finish(project: Project, folder: Path) -> None:
    project.save_config(folder / "config.yaml")
    print(f"Written to {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def _find_results(path: Path) -> Path:
    """Find the file of results in a folder.

    Returns:
        The path itself if it is no folder.

    Raises:
        ValueError: if the folder does not hold exactly one.
    """
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ValueError(
            f"{str(path)!r} holds {len(found)} files of results ({names}); pass the path of one as --results."
        )
    return found[0]


def make_fit() -> Command:
    """The command that fits as LightningCLI does, with an influence callback."""
    return Command("Fit as LightningCLI does, watched by an InfluenceCallback.", _add_fit, _fit, True)


def make_question(question: Question, summary: str) -> Command:
    """A command that asks a question and writes its answer.

    Args:
        question: what to ask.
        summary: what the command does.

    Returns:
        The command.
    """

    def add_arguments(parser: LightningArgumentParser) -> None:
        question.add_arguments(parser)
        _add_output(parser)
        _add_k(parser)
        _add_page_options(parser)

    return Command(summary, add_arguments, partial(_ask, question))


def make_edit(question: Question, summary: str) -> Command:
    """A command that computes an edit and writes it, with the edited model.

    Args:
        question: the function that computes it.
        summary: what the command does.

    Returns:
        The command.
    """

    def add_arguments(parser: LightningArgumentParser) -> None:
        question.add_arguments(parser)
        parser.add_class_arguments(EditOptions, None)
        _add_output(parser)
        _add_page_options(parser)

    return Command(summary, add_arguments, partial(_edit, question))


def make_report() -> Command:
    """The command that writes the page of results."""
    return Command("Write the HTML page of results that were written before.", _add_report, _report)
