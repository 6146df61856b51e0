"""A user's project as a command sees it: the module, data and Trainer of a LightningCLI configuration.

LightningCLI reads the configuration, but does not run the commands. Its subcommands are methods of the
Trainer by name, which ``self-influence`` cannot be and ``report`` is not; it builds the parsers of them all
at each start; and what it saves for one of them others refuse, as each has arguments of its own. So there is
one LightningCLI a command, which instantiates only (``run=False``), with the command's arguments beside.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from lightning_influence.collecting.callback import InfluenceCallback
from lightning_influence.running.host.attributes import defines
from lightning_influence.running.trainer_runner import TrainerRunner

CALLBACK = "influence_callback"
CLASSES = {
    "model_class": (LightningModule, "the LightningModule, where the configuration names no class_path"),
    "data_class": (
        LightningDataModule,
        "the LightningDataModule, where the configuration names no class_path",
    ),
    "cli_class": (LightningCLI, "your subclass of LightningCLI, for its arguments and links"),
}
TRAIN, QUERIES = ("train_dataloader",), ("predict_dataloader", "test_dataloader", "val_dataloader")

_Base = TypeVar("_Base")


class UsageError(Exception):
    """The command line cannot be understood; the message says what is accepted."""


class _Reader(LightningCLI):
    """Reads a configuration with a command's arguments; made into a subclass of the user's LightningCLI."""

    add_more: Callable[[LightningArgumentParser], None]

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments that remain beside the command's name, whatever ``sys.argv`` holds."""
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the command's arguments, after those of the user's class."""
        super().add_arguments_to_parser(parser)
        type(self).add_more(parser)
        for key, (_, what) in CLASSES.items():
            parser.add_argument(f"--{key}", type=str | None, default=None, help=f"Path of {what}.")
        known = vars(parser.get_defaults(skip_validation=True)).keys()
        for key in sorted({*_list_arguments_of_lightning(), CALLBACK} - known):
            parser.add_argument(f"--{key}", type=Any, default=None, help=argparse.SUPPRESS)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Make the Trainer, with one influence callback: the configuration's, or else that of the command.

        Returns:
            The Trainer.

        Raises:
            UsageError: if the configuration has one, and the command line sets options of another.
        """
        keys = self.parser.callback_keys
        given = self.config_init.trainer.callbacks or []
        given = given if isinstance(given, list) else [given]
        if CALLBACK in keys and any(isinstance(callback, InfluenceCallback) for callback in given):
            if self.config[CALLBACK] != self.parser.get_defaults()[CALLBACK]:
                raise UsageError(
                    f"trainer.callbacks has an InfluenceCallback, and --{CALLBACK} sets options of another; "
                    "set them there, or take it out."
                )
            keys.remove(CALLBACK)
        return super().instantiate_trainer(**kwargs)


class Project:
    """The module, data and Trainer of a configuration, with a command's arguments.

    Args:
        name: of the command, for the help.
        summary: what it does.
        add_more: adds its arguments to a parser.
        arguments: the command line without the command's name.
        trainer_class: of the Trainer.
        saves_config: whether the Trainer saves the configuration beside its logs, as LightningCLI does.

    Attributes:
        model: the module, as its constructor left it.
        datamodule: the data; None without any.
        trainer: the Trainer.
        values: all arguments by name, instantiated.
    """

    def __init__(
        self,
        name: str,
        summary: str,
        add_more: Callable[[LightningArgumentParser], None],
        arguments: Sequence[str],
        *,
        trainer_class: type[Trainer],
        saves_config: bool = False,
    ) -> None:
        classes = _read_classes(arguments)
        base = classes["cli_class"] or LightningCLI
        reader = type("InfluenceCLI", (_Reader, base), {"add_more": staticmethod(add_more)})
        self._cli = reader(
            model_class=classes["model_class"],
            datamodule_class=classes["data_class"],
            trainer_class=trainer_class,
            save_config_callback=SaveConfigCallback if saves_config else None,
            parser_kwargs={
                "prog": f"lightning-influence {name}",
                "usage": "%(prog)s --config FILE [arguments]",
                "description": summary,
            },
            run=False,
            args=list(arguments),
        )
        self.model: LightningModule = self._cli.model
        self.datamodule: LightningDataModule | None = self._cli.datamodule
        self.trainer: Trainer = self._cli.trainer
        self.values: dict[str, Any] = dict(vars(self._cli.config_init))
        self._loaders: dict[str, Any] = {}
        for owner in (self.model, self.datamodule):
            for hook in (*TRAIN, *QUERIES):
                if owner is not None and defines(owner, hook):
                    self._watch(owner, hook)

    def save_config(self, path: Path) -> None:
        """Write the whole configuration, which the same command reads; an existing file is replaced."""
        dump = self._cli.parser.dump
        # None may be a choice beside another default. The argument got a new name in jsonargparse 4.49.
        skip = "skip_unset" if "skip_unset" in inspect.signature(dump).parameters else "skip_none"
        path.write_text(dump(self._cli.config, **{skip: False}), encoding="utf-8")

    def find_dataset(self) -> Any:
        """The dataset of the train loader that was used; None where it has no items by index."""
        return self._find(TRAIN)

    def find_query_dataset(self) -> Any:
        """The dataset of the query loader that was used, or a list for several; None as above."""
        return self._find(QUERIES)

    def load_data(self, with_queries: bool) -> None:
        """Set the data up and make their loaders, where no question has done so."""
        with TrainerRunner(self.trainer, self.model, datamodule=self.datamodule) as runner:
            runner.train_dataloaders()
            if with_queries:
                runner.query_dataloaders()

    def _watch(self, owner: Any, hook: str) -> None:
        """Remember the loaders that a hook returns: a second setup could split the data anew."""
        make = getattr(owner, hook)

        @wraps(make)
        def remember() -> Any:
            self._loaders[hook] = make()
            return self._loaders[hook]

        setattr(owner, hook, remember)

    def _find(self, hooks: Sequence[str]) -> Any:
        loaders = next((self._loaders[hook] for hook in hooks if hook in self._loaders), None)
        if isinstance(loaders, list | tuple):
            datasets = [_get_items(loader) for loader in loaders]
            return None if any(dataset is None for dataset in datasets) else datasets
        return _get_items(loaders)


def _get_items(loader: Any) -> Any:
    dataset = getattr(loader, "dataset", None)
    return dataset if hasattr(dataset, "__getitem__") else None


def _list_arguments_of_lightning() -> Iterator[str]:
    """The arguments of LightningCLI's own subcommands, which its configurations hold beside the classes'."""
    for name, skipped in LightningCLI.subcommands().items():
        yield from inspect.signature(getattr(Trainer, name)).parameters.keys() - skipped - {"self"}


def _read_classes(arguments: Sequence[str]) -> dict[str, Any]:
    """Read which classes the parser is made for, from the command line or else from its configurations.

    Returns:
        The classes by option, None where there is none.

    Raises:
        UsageError: if one cannot be imported, or the configuration of a module or datamodule names none.
    """
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    reader.add_argument("-c", "--config", action="append", default=[])
    for key in CLASSES:
        reader.add_argument(f"--{key}")
    try:
        given, rest = reader.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from error
    config = _read_configs(given.config)
    classes: dict[str, Any] = {
        key: _import_class(key, getattr(given, key) or config.get(key), kind)
        for key, (kind, _) in CLASSES.items()
    }
    for section, key in (("model", "model_class"), ("data", "data_class")):
        on_line = any(argument.partition("=")[0] == f"--{section}" for argument in rest)
        if classes[key] is None and not on_line:
            _check_class_path(section, key, config.get(section))
    return classes


def _check_class_path(section: str, key: str, settings: Any) -> None:
    """Refuse settings of a configuration from which no class can be found.

    Raises:
        UsageError: saying how to name it.
    """
    path = settings.get("class_path") if isinstance(settings, dict) else settings
    if settings and path is None:
        raise UsageError(
            f"The configuration has settings of {section!r} without a class_path, as a LightningCLI made for "
            f"one class writes them. Name the class: --{key} module.Class."
        )
    if str(path).startswith("__main__."):
        raise UsageError(
            f"The configuration has class_path {path!r} for {section!r}, of the script that wrote it. "
            "Replace __main__ there by the name of the script's file, without '.py'."
        )


def _read_configs(paths: Sequence[str]) -> dict[str, Any]:
    """The top level of configuration files, the later over the earlier; unreadable ones are left alone."""
    found: dict[str, Any] = {}
    for path in paths:
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue  # the parser itself says what is wrong with it
        found |= content if isinstance(content, dict) else {}
    return found


def _import_class(key: str, path: str | None, kind: type[_Base]) -> type[_Base] | None:
    """Import a class by its path.

    Returns:
        The class, None without a path.

    Raises:
        UsageError: if there is none, or it is of another kind.
    """
    if path is None:
        return None
    module, _, name = str(path).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"--{key}={path} cannot be imported: {error}. Accepted is module.Class.") from error
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise UsageError(f"--{key}={path} is no subclass of {kind.__name__}.")
    return found
