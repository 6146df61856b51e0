"""Progress bars of the Trainer's kind with the name of a pass."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar


class _LabelledRichBar(RichProgressBar):
    label = "Influence"

    @property
    def predict_description(self) -> str:
        return self.label


class _LabelledTQDMBar(TQDMProgressBar):
    label = "Influence"

    @property
    def predict_description(self) -> str:
        return self.label


def labelled_bar(trainer: Trainer) -> _LabelledRichBar | _LabelledTQDMBar | None:
    """Return a progress bar of the Trainer's kind with a ``label`` to set, or None if it shows none."""
    host: Any = trainer
    bar = next((c for c in host.callbacks if isinstance(c, ProgressBar)), None)
    if bar is None or not getattr(bar, "is_enabled", True):
        return None
    if isinstance(bar, RichProgressBar):
        return _LabelledRichBar(
            refresh_rate=int(bar.refresh_rate), theme=bar.theme, console_kwargs=bar._console_kwargs
        )
    if isinstance(bar, TQDMProgressBar):
        return _LabelledTQDMBar(refresh_rate=bar.refresh_rate, process_position=bar.process_position)
    return _LabelledTQDMBar()
