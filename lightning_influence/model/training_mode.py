"""Steps that fail in eval mode, as those of models that answer otherwise than they are trained."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from weakref import WeakSet

from torch import nn

from lightning_influence.support.notes import warn

T = TypeVar("T")

_IN_TRAINING_MODE = (
    "The training step fails in eval mode ({error}), and runs where modules that are no part of torch are in "
    "training mode, as in a fit. Influence is that of the step in this mode; torch's own modules, such as "
    "dropout and BatchNorm, stay in eval mode."
)
# Modules whose steps have failed in eval mode and succeeded otherwise, which is tried first from then on.
_TRAINING: WeakSet[nn.Module] = WeakSet()


def run_in_mode(module: Any, run: Callable[[], T]) -> T:
    """Run a step in the mode that the module is in, or else with its own code in training mode.

    Args:
        module: the user's module.
        run: the step, which may be run again.

    Returns:
        What the step returns.

    Raises:
        Exception: what the step raises, if it fails in both modes.
    """
    if not isinstance(module, nn.Module) or module.training:
        return run()
    if module in _TRAINING:
        with own_modules_in_training(module):
            return run()
    try:
        return run()
    except Exception as error:
        try:
            with own_modules_in_training(module):
                result = run()
        except Exception:  # whatever the user's code may raise: the first reason is the one to give
            raise error from None
        _TRAINING.add(module)
        warn(_IN_TRAINING_MODE.format(error=_first_line(error)))
        return result


@contextlib.contextmanager
def own_modules_in_training(module: nn.Module) -> Iterator[None]:
    """Set ``training`` of all modules whose class is not torch's, for the duration of a ``with`` block."""
    own = [
        part
        for part in module.modules()
        if not part.training and not type(part).__module__.startswith("torch.")
    ]
    try:
        for part in own:
            part.training = True
        yield
    finally:
        for part in own:
            part.training = False


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
