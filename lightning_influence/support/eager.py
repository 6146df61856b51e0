"""Passes run a model's own operations: neither compiled, nor checkpointed with a graph of their own.

A graph that was compiled without hooks calls none, and reentrant checkpointing allows of no gradients
but those of a plain backward pass.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import checkpoint


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Run what ``torch.compile`` made, and what is checkpointed, as if it were neither."""
    stance: Any = getattr(torch.compiler, "set_stance", None)
    context: contextlib.AbstractContextManager[Any] = (
        _without_compiled_frames() if stance is None else stance("force_eager")
    )
    kept = checkpoint.CheckpointFunction
    checkpoint.CheckpointFunction = _Direct  # type: ignore[misc, assignment]
    try:
        with context:
            yield
    finally:
        checkpoint.CheckpointFunction = kept  # type: ignore[misc]


class _Direct:
    """Stands in for reentrant checkpointing."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        """Return what the function makes of the arguments, with its graph."""
        return function(*args)


@contextlib.contextmanager
def _without_compiled_frames() -> Iterator[None]:
    """The same for torch 2.5: compiled modules switch to their compiled frames by this function."""
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")
    if frames is None:  # nothing was ever compiled
        yield
        return
    switch = frames._maybe_set_eval_frame
    frames._maybe_set_eval_frame = lambda callback: switch(None)
    try:
        yield
    finally:
        frames._maybe_set_eval_frame = switch
