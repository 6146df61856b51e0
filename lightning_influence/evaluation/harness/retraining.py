"""What a retraining is made of: five functions that a worker process can import."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import Dataset

from lightning_influence.model.measurements import Measurement
from lightning_influence.support.errors import UnsupportedModelError, UnsupportedTrainerError


@dataclass(frozen=True)
class Retraining:
    """The factories of one experiment. A run calls ``module`` and ``trainer`` once each.

    Worker processes are *spawned*: they import the functions by name. So every function must be defined at
    the top of a module that can be imported (no lambda, no inner function, nothing typed into a notebook or a
    prompt), and a script that starts the runs must do so under ``if __name__ == "__main__":``.

    The Trainer should write nothing and stay quiet: ``logger=False``, ``enable_checkpointing=False``,
    ``enable_progress_bar=False``, ``enable_model_summary=False``, and one CPU or GPU device.

    Attributes:
        module: makes a freshly initialised LightningModule.
        trainer: makes a Trainer that has not been used.
        data: makes the training set, with ``__len__`` and ``__getitem__``; called once in a process.
        loader: makes a training loader of a data set, which holds the kept examples only.
        queries: makes the queries: a loader, or a list of batches; called once in a process.
        measurement: what is measured on a query: ``"loss"``, ``"margin"``, ``"logit"``, ``"hook"`` or a
            function ``(module, batch) -> (B,)``.
    """

    module: Callable[[], LightningModule]
    trainer: Callable[[], Trainer]
    data: Callable[[], Dataset[Any]]
    loader: Callable[[Dataset[Any]], Any]
    queries: Callable[[], Any]
    measurement: Measurement = "loss"

    def functions(self) -> dict[str, Callable[..., Any]]:
        """Return the fields that are functions, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if callable(value)}

    def check_importable(self) -> None:
        """Refuse functions that another process cannot import.

        Raises:
            ValueError: naming the function and what to do.
        """
        for name, function in self.functions().items():
            if not _is_importable(function):
                where = getattr(function, "__module__", "?")
                title = getattr(function, "__qualname__", repr(function))
                raise ValueError(
                    f"`{name}` is {where}.{title}, which a worker process cannot import. Accepted are "
                    "functions at the top of a module or script file; or run in this process: processes=0."
                )

    def check_fresh(self) -> None:
        """Call the factories twice and refuse what runs would share.

        Raises:
            TypeError: if a factory returns something else than it should.
            UnsupportedModelError: if modules are one object, or share parameters.
            UnsupportedTrainerError: if Trainers are one object.
        """
        modules, trainers = [self.module() for _ in range(2)], [self.trainer() for _ in range(2)]
        for module, trainer in zip(modules, trainers, strict=True):
            check_types(module, trainer)
        check_distinct(modules[0], modules[1], trainers[0], trainers[1])


def check_types(module: object, trainer: object) -> None:
    """Refuse what is no LightningModule and no Trainer.

    Args:
        module: what the factory of modules returned.
        trainer: what the factory of Trainers returned.

    Raises:
        TypeError: saying what was got.
    """
    if not isinstance(module, LightningModule):
        raise TypeError(
            f"`module()` returned a {type(module).__name__}; accepted is a lightning.pytorch.LightningModule."
        )
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"`trainer()` returned a {type(trainer).__name__}; accepted is a lightning.pytorch.Trainer."
        )


def check_distinct_models(
    model: nn.Module, other: nn.Module, factory: str = "factory", *, frozen: bool = True
) -> None:
    """Refuse a factory whose products are the same object, or share parameters.

    Args:
        model: of one run.
        other: of another run.
        factory: what the factory is called.
        frozen: whether sharing parameters that are not trained is refused as well.

    Raises:
        UnsupportedModelError: naming what is shared.
    """
    if model is other:
        raise UnsupportedModelError(
            f"`{factory}()` returned the same object twice: a second run would start from the first run's "
            "parameters whatever its seed. Build the module inside the function."
        )
    known = {id(parameter) for parameter in other.parameters()}
    known |= {parameter.data_ptr() for parameter in other.parameters() if parameter.numel()}
    for name, parameter in model.named_parameters():
        shared = id(parameter) in known or parameter.data_ptr() in known
        if shared and (frozen or parameter.requires_grad):
            raise UnsupportedModelError(
                f"Two modules of `{factory}()` share the parameter {name!r}: the runs would not have values "
                "of their own. Build every layer inside the function."
            )


def check_distinct(
    module: LightningModule, last_module: LightningModule, trainer: Trainer, last_trainer: Trainer
) -> None:
    """Refuse factories whose products are the same object, or share parameters.

    Args:
        module: of this run.
        last_module: of another run.
        trainer: of this run.
        last_trainer: of another run.

    Raises:
        UnsupportedModelError: if modules are one object, or share parameters.
        UnsupportedTrainerError: if Trainers are one object.
    """
    check_distinct_models(module, last_module, "module")
    if trainer is last_trainer:
        raise UnsupportedTrainerError(
            "`trainer()` returned the same object twice: a Trainer that has fitted once does no further "
            "step. Build the Trainer inside the function."
        )


def _is_importable(function: Any) -> bool:
    module = sys.modules.get(getattr(function, "__module__", ""))
    path = getattr(function, "__qualname__", "<locals>")
    if module is None or "<" in path:
        return False
    if module.__name__ == "__main__" and not hasattr(module, "__file__"):
        return False
    try:
        found = reduce(getattr, path.split("."), module)
    except AttributeError:
        return False
    return found is function or getattr(found, "__func__", found) is getattr(function, "__func__", function)
