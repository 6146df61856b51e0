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
