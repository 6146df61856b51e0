"""Texts to show beside dataset indices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Labels:
    """Texts to show beside dataset indices, such as class names.

    Attributes:
        train: anything indexed by the training dataset's indices: a mapping, a sequence, a tensor of targets.
            An index it does not have gets no text.
        query: the same for queries; with several query dataloaders, a sequence with one of them for each.

    Example:
        >>> Labels(train={3: "cat"}).train_text(3)
        'cat'
    """

    train: Any = None
    query: Any = None

    def train_text(self, index: int) -> str:
        """Returns the text of training example ``index``, or an empty one."""
        return _lookup(self.train, index)

    def query_text(self, index: int, dataloader: int | None = None) -> str:
        """Returns the text of query ``index`` (of query dataloader ``dataloader``), or an empty one."""
        texts = self.query
        if texts is not None and dataloader is not None:
            texts = texts[dataloader]
        return _lookup(texts, index)


def checked(labels: Labels | None) -> Labels:
    """Return the labels, or none.

    Raises:
        TypeError: if they are something else.
    """
    if labels is None or isinstance(labels, Labels):
        return labels or Labels()
    raise TypeError(
        f"Got labels of type {type(labels).__name__}; accepted are Labels(train=..., query=...), each "
        "anything that an index finds its text in."
    )


def _lookup(texts: Any, index: int) -> str:
    if texts is None:
        return ""
    try:
        value = texts[index]
    except (KeyError, IndexError):
        return ""
    return str(value.item() if hasattr(value, "item") else value)
