"""The command ``lightning-influence``, also ``python -m lightning_influence``; says errors in sentences."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from lightning_influence.api.command_line.commands import (
    Command,
    Question,
    make_edit,
    make_fit,
    make_question,
    make_report,
)
from lightning_influence.api.command_line.project import Project, UsageError
from lightning_influence.api.dynamics import training_dynamics
from lightning_influence.api.trainer import (
    InfluenceTrainer,
    forget,
    influence,
    relabel,
    self_influence,
    suspects,
)
from lightning_influence.support.errors import InfluenceError

PROGRAM = "lightning-influence"
FAILED, MISUSED = 1, 2
_PACKAGE = Path(__file__).parent

COMMANDS: dict[str, Command] = {
    "fit": make_fit(),
    "influence": make_question(Question(influence), "Score the training examples for each query."),
    "self-influence": make_question(
        Question(self_influence), "Score each training example for its own loss."
    ),
    "dynamics": make_question(
        Question(training_dynamics), "What each training example's loss did during the fit."
    ),
    "suspects": make_question(
        Question(suspects, passes_to=self_influence),
        "Rank the training examples by how likely their labels are wrong.",
    ),
    "forget": make_edit(Question(forget), "Edit the model as if it had not seen some training examples."),
    "relabel": make_edit(Question(relabel), "Edit the model as if some training examples had other targets."),
    "report": make_report(),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: without the program's name; None for those of the process.

    Returns:
        0, or 1 after an error that this package raised, which was said in a sentence on standard error.

    Raises:
        SystemExit: with 2 if the arguments cannot be understood, with 0 after ``--help`` and the like.
        Exception: what the user's own code raised.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if importlib.util.find_spec("jsonargparse") is None:
        return _fail(
            PROGRAM, "The command line needs jsonargparse: pip install 'lightning-influence[cli]'", 1
        )
    name = _read_name(arguments[:1], {name: command.summary for name, command in COMMANDS.items()})
    program = f"{PROGRAM} {name}"
    # Scripts are run with their own folder on the path, installed programs are not.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        _run(name, arguments[1:])
    except UsageError as error:
        return _fail(program, str(error), MISUSED)
    except Exception as error:
        if not _is_ours(error):
            raise
        notes = [note for note in getattr(error, "__notes__", []) if note not in str(error)]
        return _fail(program, " ".join([str(error), *notes]), FAILED)
    return 0


def _run(name: str, arguments: Sequence[str]) -> None:
    command = COMMANDS[name]
    project = Project(
        name,
        command.summary,
        command.add_arguments,
        arguments,
        trainer_class=InfluenceTrainer,
        saves_config=command.saves_config,
    )
    command.run(project)


def _read_name(arguments: Sequence[str], summaries: dict[str, str]) -> str:
    width = max(map(len, summaries))
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Training data attribution for the model of a LightningCLI configuration.",
        epilog="\n".join([
            "commands:",
            *(f"  {name:{width}}  {summary}" for name, summary in summaries.items()),
            "",
            f"'{PROGRAM} COMMAND --help' lists the arguments of one.",
        ]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = importlib.metadata.version("lightning-influence")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {version}")
    parser.add_argument("command", choices=list(summaries), metavar="command", help="one of those below")
    name: str = parser.parse_args(arguments).command
    return name


def _is_ours(error: Exception) -> bool:
    """Whether an error is this package's, which says what to do, or else of the user's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, InfluenceError) or _PACKAGE in Path(frames[-1].filename).parents


def _fail(program: str, message: str, code: int) -> int:
    print(f"{program}: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
