"""Compiled modules run eagerly: a graph that was compiled without hooks calls none."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch


def eagerly() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which what ``torch.compile`` made runs as if it had not been compiled."""
    stance: Any = getattr(torch.compiler, "set_stance", None)
    context: contextlib.AbstractContextManager[Any] = (
        _without_compiled_frames() if stance is None else stance("force_eager")
    )
    return context


@contextlib.contextmanager
def _without_compiled_frames() -> Iterator[None]:
    """The same before torch 2.6: compiled modules switch to their compiled frames by one function.

    It has one name in torch 2.4 and another in 2.5.
    """
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")
    if frames is None:  # nothing was ever compiled
        yield
        return
    name = next(name for name in ("set_eval_frame", "_maybe_set_eval_frame") if hasattr(frames, name))
    switch = getattr(frames, name)
    setattr(frames, name, lambda callback: switch(None))
    try:
        yield
    finally:
        setattr(frames, name, switch)
