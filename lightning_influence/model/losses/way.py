"""Which torch functions a step calls, one after the other: batches that take another way are checked anew.

What a first batch has shown of a step, that its examples are independent and its losses in their order, holds
for the branches that this batch has taken. A step that flips, sorts, mixes or leaves out examples of some
batches only calls other functions for these.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from lightning_influence.support.whole import holds_stand_ins

# Says that checks have run on a batch of which the step calls these functions.
_WAY = "way "
# Values leave torch's functions here, and may come back in another order.
_ESCAPES = frozenset({"numpy", "tolist", "item", "__array__", "__int__", "__index__", "__float__"})


class Way:
    """Takes down the names of functions.

    Attributes:
        number: stands for those that were called, in their order; the same in every process.
        leaves_torch: whether values were read by other means than functions of torch.
    """

    def __init__(self) -> None:
        self.number, self.leaves_torch = 0, False

    def note(self, function: Callable[..., Any]) -> None:
        """Take down a call."""
        name = getattr(function, "__name__", "")
        self.number = zlib.crc32(name.encode(), self.number)
        self.leaves_torch |= name in _ESCAPES

    @property
    def text(self) -> str:
        """What is noted once a batch was checked."""
        return f"{_WAY}{self.number}"

    def is_new(self, verified: Collection[str], module: nn.Module) -> bool:
        """Return whether batches were checked, and none of them has taken this way.

        Args:
            verified: what passes have found in order.
            module: where parts of its weights are elsewhere, all processes check the same batches, whatever
                these hold.
        """
        known = self.text in verified or not any(text.startswith(_WAY) for text in verified)
        return not known and not holds_stand_ins(module)
