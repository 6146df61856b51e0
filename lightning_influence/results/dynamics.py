"""Training dynamics: what each example's loss and margin did over the epochs of a fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from rich.console import Group, RenderableType
from torch import Tensor

from lightning_influence.results.per_example import PerExample
from lightning_influence.results.ranking import Labels, Ranking, to_labels
from lightning_influence.results.rendering import build_facts_table
from lightning_influence.results.report import charts
from lightning_influence.results.report.certificate import build_certificate, say
from lightning_influence.results.report.page import read_options, write_page
from lightning_influence.results.report.sections import build_map, build_ranking
from lightning_influence.results.result import import_pandas
from lightning_influence.results.top_k import check_finite
from lightning_influence.support.arguments import check_choice, check_shape
from lightning_influence.support.storage import PathLike

if TYPE_CHECKING:
    import pandas as pd

#: What :meth:`TrainingDynamics.top` can rank by.
By = Literal["loss", "spread", "margin", "forgotten", "late"]
_CAPTIONS: dict[str, tuple[str, str]] = {
    "loss": ("Highest mean loss", "Score: mean loss over the epochs."),
    "spread": ("Highest spread", "Score: standard deviation of the loss over the epochs."),
    "margin": ("Lowest mean margin", "Score: mean margin over the epochs, negated: the highest is first."),
    "forgotten": (
        "Most often forgotten",
        "Score: how often it was right, and wrong in the next epoch.",
    ),
    "late": (
        "Latest learned",
        "Score: first epoch in which it was right; never: one after the last.",
    ),
}
# Chosen by hand: a page draws so many dots without effort.
_MOST_POINTS = 5000


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TrainingDynamics(PerExample):
    """What each training example's loss and margin did over the epochs of a fit.

    The model's own losses in its training steps, in train mode: before each step's update, with dropout and
    augmentations, averaged over an epoch where an example came more than once. Examples with a high mean loss
    were hard throughout (wrong labels among them); those with a high spread were ambiguous for a time, and
    tell most (Swayamdipta et al. 2020). The margin is the true label's logit less the highest other one
    (Pleiss et al. 2020), and a forgetting event an epoch in which an example that was right became wrong
    (Toneva et al. 2019).

    Attributes:
        train_indices: ``(N,)`` distinct dataset indices of the examples that were seen.
        diagnostics: what was seen and what was not; ``extra["epochs"]`` is the number of epochs,
            of which ``extra["epochs_skipped"]`` were left out.
        loss_mean: ``(N,)`` mean loss over the epochs, positions averaged.
        loss_spread: ``(N,)`` its standard deviation over the epochs.
        epochs_seen: ``(N,)`` in how many epochs the example came.
        margin_mean: ``(N,)`` mean margin in logits; None where the loss has no labels, as all that follows.
        margin_spread: ``(N,)`` its standard deviation.
        epochs_right: ``(N,)`` in how many epochs the margin was positive.
        forgotten: ``(N,)`` number of forgetting events.
        first_learned: ``(N,)`` the first epoch in which it was seen right, from 0; -1 if it never was.

    Raises:
        ValueError: if shapes or dtypes do not fit.
        NonFiniteError: if a value is NaN or infinite.
    """

    KIND: ClassVar[str] = "training-dynamics"
    FLOATS: ClassVar[frozenset[str]] = frozenset({
        "loss_mean",
        "loss_spread",
        "margin_mean",
        "margin_spread",
    })

    loss_mean: Tensor
    loss_spread: Tensor
    epochs_seen: Tensor
    margin_mean: Tensor | None = None
    margin_spread: Tensor | None = None
    epochs_right: Tensor | None = None
    forgotten: Tensor | None = None
    first_learned: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        tensors = self._tensors()
        for name, tensor in tensors.items():
            check_shape(name, tensor, tuple(self.train_indices.shape))
            if name in self.FLOATS:
                check_finite(tensor, self.train_indices)
        if len(tensors) not in {4, 9}:
            raise ValueError("give all that margins tell of, or none of it; got a part")

    @property
    def scores(self) -> Tensor:
        """The mean losses ``(N,)``."""
        return self.loss_mean

    @property
    def epochs(self) -> int:
        """How many epochs the fit had."""
        return int(self.diagnostics.extra.get("epochs", self.epochs_seen.max()))

    @property
    def watched(self) -> int:
        """How many of them were watched."""
        return self.epochs - int(self.diagnostics.extra.get("epochs_skipped", 0))

    def values(self, by: By) -> Tensor:
        """What :meth:`top` ranks by, the most conspicuous example having the highest value.

        Args:
            by: ``"loss"`` (mean loss), ``"spread"`` (its standard deviation), ``"margin"`` (mean margin,
                negated), ``"forgotten"`` (forgetting events) or ``"late"`` (first epoch in which it was
                right; where there is none, the number of epochs).

        Returns:
            ``(N,)``.

        Raises:
            ValueError: if there is no such value, or the loss has no labels and the value needs them.
        """
        check_choice("by", by, get_args(By))
        if by == "loss":
            return self.loss_mean
        if by == "spread":
            return self.loss_spread
        if self.margin_mean is None or self.forgotten is None or self.first_learned is None:
            raise ValueError(f"Got by={by!r}, but the loss has no labels; accepted are 'loss' and 'spread'.")
        if by == "margin":
            return -self.margin_mean
        if by == "forgotten":
            return self.forgotten.float()
        return torch.where(self.first_learned < 0, self.epochs, self.first_learned).float()

    def top(self, k: int = 5, *, by: By = "loss", labels: Labels | None = None) -> Ranking:
        """The most conspicuous examples.

        Args:
            k: how many.
            by: what to rank by, as in :meth:`values`.
            labels: texts to show beside the indices.

        Returns:
            Indices ``(1, k)`` and values ``(1, k)`` that print as a table.

        Raises:
            ValueError: if there are fewer than ``k`` examples, or no such value.
        """
        return self._ranking(k, True, by, labels)

    def bottom(self, k: int = 5, *, by: By = "loss", labels: Labels | None = None) -> Ranking:
        """The least conspicuous examples.

        Args:
            k: how many.
            by: what to rank by, as in :meth:`values`.
            labels: texts to show beside the indices.

        Returns:
            Indices ``(1, k)`` and values ``(1, k)``, the lowest first, that print as a table.

        Raises:
            ValueError: if there are fewer than ``k`` examples, or no such value.
        """
        return self._ranking(k, False, by, labels)

    def _ranking(self, k: int, largest: bool, by: By, labels: Labels | None) -> Ranking:
        scores, indices = self._rank(self.values(by), k, largest=largest)
        title, caption = _CAPTIONS[by]
        title = title if largest else f"The other end of: {title.lower()}"
        return Ranking(indices, scores, title=title, caption=caption, labels=to_labels(labels))

    def to_pandas(self) -> pd.DataFrame:
        """All values as a pandas DataFrame, one row an example.

        Returns:
            Columns ``train`` and those of the attributes that there are.

        Raises:
            ImportError: if pandas is not installed.
        """
        tensors = self._tensors()
        columns = {"train": tensors.pop("train_indices").numpy()}
        return import_pandas().DataFrame(columns | {name: tensor.numpy() for name, tensor in tensors.items()})

    def report(self, path: PathLike, dataset: Any = None, *, k: int = 100, **options: Any) -> Path:
        """Write a page that opens in any browser, without a network, for people to look through.

        Args:
            path: the file, used as it stands; an existing one is replaced.
            dataset: the training examples: anything indexed by training dataset indices.
            k: how many of the examples with the highest mean loss to show, or all if there are fewer.
            **options: further fields of :class:`~lightning_influence.results.report.ReportOptions`, as in
                :meth:`Attributions.report <lightning_influence.Attributions.report>`.

        Returns:
            The path.

        Raises:
            ValueError: if ``k`` is below 1, or the dataset has no entry of an index.
            TypeError: if an option is unknown or of a wrong type.
            ImportError: if Jinja2 is not installed.
        """
        material = read_options({"dataset": dataset, **options})
        highest = self.top(min(k, self.stored)).indices[0]
        rows = self.find_rows(highest)
        names = {name.replace("_", " "): name for name in self._tensors() if name != "train_indices"}
        columns = {shown: getattr(self, name)[rows].tolist() for shown, name in names.items()}
        ranked = build_ranking(
            material,
            "dynamics",
            f"Hardest examples ({len(highest):,})",
            "Training examples with the highest mean loss over the epochs come first: hard, ambiguous, or "
            "wrongly labelled. Click on a heading to sort by it.",
            highest.tolist(),
            columns,
        )
        drawn = charts.build_charts([
            charts.histogram("Mean loss of all examples", "mean loss over the epochs", self.loss_mean),
            charts.histogram("Mean margin of all examples", "mean margin in logits", self.margin_mean),
            *charts.spectrum_charts(material.options.spectrum),
        ])
        certificate = build_certificate(
            [
                say(f"The losses are those of {self.watched} epochs of one training run, as it went."),
                say(
                    "A hard example may be wrongly labelled, or rare and valuable: look before you leave it "
                    "out."
                ),
                *(say(warning, "fair") for warning in self.diagnostics.warnings),
            ],
            self.diagnostics.facts(),
        )
        lead = f"How did the model learn each of {self.stored:,} training examples?"
        sections = [ranked, self._map(), certificate, drawn]
        return write_page(path, material, "Training dynamics", lead, sections)

    def _map(self) -> dict[str, Any]:
        """Return mean against spread, of an even share of the examples where there are many."""
        stride = -(-self.stored // _MOST_POINTS)
        shade = torch.zeros(self.stored, dtype=torch.long)
        shades = ["training examples"]
        if self.epochs_right is not None:
            shade = torch.where(self.epochs_right < self.epochs_seen, 1, 0)
            shade[self.epochs_right == 0] = 2
            shades = ["right in every epoch", "wrong in some epochs", "never right"]
        picked = [self.train_indices, self.loss_spread, self.loss_mean, shade]
        points = list(zip(*(values[::stride].tolist() for values in picked), strict=True))
        share = f" Drawn: every {stride}th example." if stride > 1 else ""
        return build_map(
            "map",
            "Data map",
            "Each dot is a training example: up, its mean loss; across, how much the loss varied over the "
            f"epochs. Low and left: easy. Right: ambiguous for a time. High and left: hard to the end, "
            f"wrong labels among them. Click on a dot to see it.{share}",
            ("spread of the loss", "mean loss"),
            points,
            shades,
        )

    def __rich__(self) -> RenderableType:
        facts = [("training examples", str(self.stored)), ("epochs", str(self.epochs))]
        facts += [("note", warning) for warning in self.diagnostics.warnings]
        return Group(build_facts_table(facts, "Training dynamics"), self.top(min(5, self.stored)))

    def __repr__(self) -> str:
        return f"TrainingDynamics(N={self.stored}, epochs={self.epochs})"
