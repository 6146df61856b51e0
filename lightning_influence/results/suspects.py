"""Examples that are likely to be wrongly labelled, each with the reasons to suspect it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from rich.console import Group, RenderableType
from torch import Tensor

from lightning_influence.results.diagnostics import Diagnostics
from lightning_influence.results.dynamics import TrainingDynamics
from lightning_influence.results.per_example import PerExample
from lightning_influence.results.ranking import Labels, Ranking
from lightning_influence.results.rendering import build_facts_table
from lightning_influence.results.report import charts
from lightning_influence.results.report.certificate import build_certificate, say
from lightning_influence.results.report.page import read_options, write_page
from lightning_influence.results.report.sections import build_ranking
from lightning_influence.results.result import import_pandas
from lightning_influence.results.self_influence import SelfInfluence
from lightning_influence.results.top_k import check_finite
from lightning_influence.support.arguments import check_shape
from lightning_influence.support.storage import PathLike

if TYPE_CHECKING:
    import pandas as pd

# Weight of the rank by self-influence beside that by margin. On flipped digits (one seed, eight cases) 0.05
# found as much as the margin alone (mean average precision .970 and .971), and more where 1% were flipped
# (.980 and .979); equal weights of loss, margin and self-influence found less (.951).
_SHARE = 0.05
# Chosen by hand: what is higher than in this share of the examples is worth mentioning.
_REMARKABLE = 0.95


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Suspects(PerExample):
    """Training examples ranked by how likely their labels are wrong, with the reasons.

    Attributes:
        train_indices: ``(N,)`` distinct dataset indices.
        diagnostics: those of the self-influence, with the notes of the dynamics.
        scores: ``(N,)`` between 0 and 1: the mean of the ranks that the signals give an example, weighted.
        loss_mean: ``(N,)`` mean loss over the epochs of the fit.
        self_influence: ``(N,)`` influence of each example on its own loss.
        epochs_seen: ``(N,)`` in how many epochs the example came.
        margin_mean: ``(N,)`` mean margin; None where the loss has no labels, as all that follows.
        epochs_right: ``(N,)`` in how many epochs it was right.
        forgotten: ``(N,)`` number of forgetting events.

    Raises:
        ValueError: if shapes or dtypes do not fit.
        NonFiniteError: if a value is NaN or infinite.
    """

    KIND: ClassVar[str] = "suspects"
    FLOATS: ClassVar[frozenset[str]] = frozenset({"loss_mean", "self_influence", "margin_mean"})

    scores: Tensor
    loss_mean: Tensor
    self_influence: Tensor
    epochs_seen: Tensor
    margin_mean: Tensor | None = None
    epochs_right: Tensor | None = None
    forgotten: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, tensor in self._tensors().items():
            check_shape(name, tensor, tuple(self.train_indices.shape))
            if tensor.is_floating_point():
                check_finite(tensor, self.train_indices)

    def top(self, k: int = 5, *, labels: Labels | None = None) -> Ranking:
        """The examples whose labels are most likely wrong, with the reasons in place of labels.

        Args:
            k: how many.
            labels: texts to show beside the indices, before the reasons.

        Returns:
            Indices ``(1, k)`` and scores ``(1, k)`` that print as a table.

        Raises:
            ValueError: if there are fewer than ``k`` examples.
        """
        return self._ranking(k, True, labels)

    def bottom(self, k: int = 5, *, labels: Labels | None = None) -> Ranking:
        """The examples whose labels are least likely wrong.

        Args:
            k: how many.
            labels: texts to show beside the indices.

        Returns:
            Indices ``(1, k)`` and scores ``(1, k)``, the lowest first, that print as a table.

        Raises:
            ValueError: if there are fewer than ``k`` examples.
        """
        return self._ranking(k, False, labels)

    def _ranking(self, k: int, largest: bool, labels: Labels | None) -> Ranking:
        scores, indices = self._rank(self.scores, k, largest=largest)
        texts = {}
        for index, reasons in zip(indices[0].tolist(), self.reasons(indices[0]), strict=True):
            own = labels.train_text(index) if labels is not None else ""
            texts[index] = "; ".join([*([own] if own else []), *reasons])
        title = f"{'Most' if largest else 'Least'} likely wrong labels"
        signal = "loss" if self.margin_mean is None else "margin"
        caption = f"Score: rank by mean {signal}, and by self-influence to a small part; 1: most suspect."
        return Ranking(indices, scores, title=title, caption=caption, labels=Labels(train=texts))

    def reasons(self, train_indices: Tensor) -> list[list[str]]:
        """Why examples are suspected.

        Args:
            train_indices: ``(k,)`` dataset indices.

        Returns:
            For each of them the reasons, the plainest first; none where nothing is remarkable.

        Raises:
            ValueError: if an example is unknown.
        """
        rows = self.find_rows(train_indices)
        shares = {name: _ranks(getattr(self, name)) for name in ("loss_mean", "self_influence")}
        return [self._reasons_of(row, shares) for row in rows.tolist()]

    def _reasons_of(self, row: int, shares: dict[str, Tensor]) -> list[str]:
        found = []
        seen = int(self.epochs_seen[row])
        if self.margin_mean is not None and self.epochs_right is not None and self.forgotten is not None:
            right, forgotten = int(self.epochs_right[row]), int(self.forgotten[row])
            if not right:
                found.append(f"never right in {seen} epochs")
            elif 2 * right < seen:
                found.append(f"right in {right} of {seen} epochs only")
            if float(self.margin_mean[row]) < 0:
                found.append(f"another label preferred by {-float(self.margin_mean[row]):.2g} on average")
            if forgotten > 1:
                found.append(f"forgotten {forgotten} times")
        for name, text in (("loss_mean", "mean loss"), ("self_influence", "self-influence")):
            share = float(shares[name][row])
            if share >= _REMARKABLE:
                found.append(
                    f"{text} {float(getattr(self, name)[row]):.3g}, above {min(99, int(100 * share))}% of all"
                )
        return found

    def to_pandas(self) -> pd.DataFrame:
        """All values as a pandas DataFrame, one row an example, the most suspect first.

        Returns:
            Columns ``train``, ``score``, the attributes that there are, and ``reasons``.

        Raises:
            ImportError: if pandas is not installed.
        """
        order = torch.argsort(self.scores, descending=True, stable=True)
        tensors = {name: tensor[order].numpy() for name, tensor in self._tensors().items()}
        columns: dict[str, Any] = {"train": tensors.pop("train_indices"), "score": tensors.pop("scores")}
        reasons = ["; ".join(texts) for texts in self.reasons(self.train_indices[order])]
        return import_pandas().DataFrame({**columns, **tensors, "reasons": reasons})

    def report(self, path: PathLike, dataset: Any = None, *, k: int = 200, **options: Any) -> Path:
        """Write a page that opens in any browser, without a network, for people to look through.

        Args:
            path: the file, used as it stands; an existing one is replaced.
            dataset: the training examples: anything indexed by training dataset indices.
            k: how many of the most suspect examples to show, or all if there are fewer.
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
        order = torch.argsort(self.scores, descending=True, stable=True)[: max(1, k)]
        names = ("scores", "loss_mean", "margin_mean", "self_influence")
        columns = {
            ("suspicion" if name == "scores" else name.replace("_", " ")): value[order].tolist()
            for name in names
            if (value := getattr(self, name)) is not None
        }
        indices = self.train_indices[order]
        ranked = build_ranking(
            material,
            "suspects",
            f"Likely wrong labels ({len(order):,})",
            "Training examples whose labels are most likely wrong come first, with the reasons. Look at them "
            "in order, and stop where the labels are right again and again.",
            indices.tolist(),
            columns,
            self.reasons(indices),
        )
        certificate = build_certificate(
            [
                say(
                    "Suspicion is an example's rank by its mean margin over the fit (its mean loss, where "
                    "there are no classes), and to a small part by self-influence: it orders examples, and "
                    "is no probability."
                ),
                say("An example that is rare or hard is suspected as well, with the right label."),
                *(say(warning, "fair") for warning in self.diagnostics.warnings),
            ],
            self.diagnostics.facts(),
        )
        drawn = charts.build_charts([
            charts.histogram("Mean loss of all examples", "mean loss over the epochs", self.loss_mean),
            charts.histogram(
                "Self-influence of all examples", "predicted rise of the own loss", self.self_influence
            ),
        ])
        lead = f"Which of {self.stored:,} training examples are likely to have a wrong label?"
        return write_page(path, material, "Suspects", lead, [ranked, certificate, drawn])

    def __rich__(self) -> RenderableType:
        facts = [("training examples", str(self.stored)), *self.diagnostics.facts()]
        return Group(build_facts_table(facts, "Suspects"), self.top(min(5, self.stored)))

    def __repr__(self) -> str:
        return f"Suspects(N={self.stored})"


def find_suspects(dynamics: TrainingDynamics, influence: SelfInfluence) -> Suspects:
    """Rank examples by how likely their labels are wrong.

    The score is a weighted mean of an example's ranks from 0 to 1: 0.95 by mean margin (by mean loss, where
    the loss has no labels) and 0.05 by self-influence, which tells apart those that the fit leaves near a
    tie. Ranks, because the signals have different units and tails.

    Args:
        dynamics: of the fit.
        influence: of the model that the fit ended with, on the same data.

    Returns:
        The examples that are in both.

    Raises:
        ValueError: if none is.
    """
    both = torch.isin(dynamics.train_indices, influence.train_indices)
    if not bool(both.any()):
        raise ValueError(
            "The training dynamics and the self-influence have no example in common; pass both of one "
            "dataset."
        )
    indices, rows = dynamics.train_indices[both].sort()
    picked: dict[str, Any] = {
        name: None if (value := getattr(dynamics, name)) is None else value[both][rows]
        for name in ("loss_mean", "epochs_seen", "margin_mean", "epochs_right", "forgotten")
    }
    own = influence.scores[influence.find_rows(indices)]
    margins = picked["margin_mean"]
    watched = picked["loss_mean"] if margins is None else -margins
    scores = (1 - _SHARE) * _ranks(watched) + _SHARE * _ranks(own)
    facts = influence.diagnostics
    left = len(dynamics.train_indices) + len(influence.train_indices) - 2 * len(indices)
    notes = [*facts.warnings, *dynamics.diagnostics.warnings]
    if margins is None:
        notes.append(
            "The loss has no labels, so that examples are ranked by their mean loss: what is rare or hard "
            "comes first, whether its target is right or not."
        )
    if left:
        notes.append(f"{left} examples are in one of dynamics and self-influence only, and are left out.")
    diagnostics = Diagnostics(**{**vars(facts), "warnings": notes})
    return Suspects(
        train_indices=indices, diagnostics=diagnostics, scores=scores, self_influence=own, **picked
    )


def _ranks(values: Tensor) -> Tensor:
    """Return the share of the others that are lower, ties shared, ``(N,)`` from 0 to 1."""
    ordered = values.sort().values
    below = torch.searchsorted(ordered, values, right=False)
    upto = torch.searchsorted(ordered, values, right=True)
    return ((below + upto - 1).double() / 2 / max(1, len(values) - 1)).float()
