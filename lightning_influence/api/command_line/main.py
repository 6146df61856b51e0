"""The entry point ``lightning-influence``: finds the command, and says errors in sentences."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import lightning_influence.api as _api
from lightning_influence.api.command_line.commands import COMMANDS, run_command
from lightning_influence.api.command_line.project import UsageError
from lightning_influence.support.errors import InfluenceError

PROGRAM = "lightning-influence"
FAILED, MISUSED = 1, 2
_PACKAGE = Path(_api.__file__).parents[1]


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
        run_command(name, arguments[1:])
    except UsageError as error:
        return _fail(program, str(error), MISUSED)
    except Exception as error:
        if not _is_ours(error):
            raise
        notes = [note for note in getattr(error, "__notes__", []) if note not in str(error)]
        return _fail(program, " ".join([str(error), *notes]), FAILED)
    return 0


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
