"""Torch's fast paths, which a function mode would close.

``nn.TransformerEncoder`` and ``nn.MultiheadAttention`` compute otherwise without gradients, with results that
differ in the last digits, unless a tensor or a mode may want to see their operations. A mode that only looks
on must not make that difference: a teacher that runs inside of a training step would teach other values.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

_ASKED = torch.overrides.has_torch_function
_open: set[int] = set()


def keep_open(mode: object) -> None:
    """Let a mode that is about to be entered close no fast path."""
    _open.add(id(mode))
    torch.overrides.has_torch_function = _is_overridden  # type: ignore[assignment]


def let_go(mode: object) -> None:
    """Forget a mode; torch is as it was when no other is left."""
    _open.discard(id(mode))
    if not _open and torch.overrides.has_torch_function is _is_overridden:
        torch.overrides.has_torch_function = _ASKED


def _is_overridden(arguments: Any) -> bool:
    """Return whether anybody else than the modes that only look on may override operations on arguments.

    Torch's modules ask before they take a fast path. Who else asks wants the modes to see an operation, as
    functions do that ``torch.overrides.wrap_torch_function`` made, such as losses of a user's own.
    """
    if not sys._getframe(1).f_globals.get("__name__", "").startswith("torch.nn."):
        return bool(_ASKED(arguments))
    stack: Any = torch.overrides
    if any(id(mode) not in _open for mode in stack._get_current_function_mode_stack()):
        return bool(_ASKED(arguments))
    own = []
    while stack._len_torch_function_stack():
        own.append(stack._pop_mode())
    try:
        return bool(_ASKED(arguments))
    finally:
        for mode in reversed(own):
            stack._push_mode(mode)
