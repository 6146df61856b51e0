"""Influence of each training example on its own loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Group, RenderableType
from torch import Tensor

from lightning_influence.results.per_example import PerExample
from lightning_influence.results.ranking import Labels, Ranking, to_labels
from lightning_influence.results.rendering import build_facts_table
from lightning_influence.results.report import charts
from lightning_influence.results.report.certificate import describe_certificate
from lightning_influence.results.report.page import read_options, write_page
from lightning_influence.results.report.sections import build_ranking
from lightning_influence.results.result import import_pandas
from lightning_influence.results.top_k import check_finite
from lightning_influence.support.arguments import check_shape
from lightning_influence.support.storage import PathLike

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SelfInfluence(PerExample):
    """Influence of each training example on its own loss.

    ``tau(n, n)``: the predicted rise of the example's own loss when it is removed. Examples with high scores
    the model had to memorise: rare, ambiguous or wrongly labelled.

    Attributes:
        train_indices: ``(N,)`` distinct training dataset indices.
        diagnostics: how the scores were computed.
        scores: ``(N,)`` scores, in the loss's unit.

    Raises:
        ValueError: if shapes or dtypes do not fit.
        NonFiniteError: if a score is NaN or infinite.
    """

    KIND: ClassVar[str] = "self-influence"

    scores: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shape("scores", self.scores, tuple(self.train_indices.shape))
        check_finite(self.scores, self.train_indices)

    def top(self, k: int = 5, *, labels: Labels | None = None) -> Ranking:
        """The examples with the highest self-influence.

        Args:
            k: how many.
            labels: texts to show beside the indices.

        Returns:
            Indices ``(1, k)`` and scores ``(1, k)`` that print as a table.

        Raises:
            ValueError: if there are fewer than ``k`` examples.
        """
        return self._ranking(k, True, labels)

    def bottom(self, k: int = 5, *, labels: Labels | None = None) -> Ranking:
        """The examples with the lowest self-influence.

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
        caption = "Score: predicted rise of the example's own loss when it is removed."
        title = f"{'Highest' if largest else 'Lowest'} self-influence"
        return Ranking(indices, scores, title=title, caption=caption, labels=to_labels(labels))

    def to_pandas(self) -> pd.DataFrame:
        """The scores as a pandas DataFrame.

        Returns:
            Columns ``train`` and ``score``.

        Raises:
            ImportError: if pandas is not installed.
        """
        return import_pandas().DataFrame({"train": self.train_indices.numpy(), "score": self.scores.numpy()})

    def report(self, path: PathLike, dataset: Any = None, *, k: int = 100, **options: Any) -> Path:
        """Write a page that opens in any browser, without a network, for people to look through.

        Args:
            path: the file, used as it stands; an existing one is replaced.
            dataset: the training examples: anything indexed by training dataset indices.
            k: how many of the highest scores to show, or all if there are fewer.
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
        highest = self.top(min(k, self.stored))
        ranked = build_ranking(
            material,
            "self-influence",
            f"Self-influence (highest {highest.indices.shape[1]:,})",
            "Examples that the model had to memorise come first: rare, ambiguous or wrongly labelled ones. "
            "The number is the predicted rise of the example's own loss if it were removed and the model "
            "trained again.",
            highest.indices[0].tolist(),
            {"self-influence": highest.scores[0].tolist()},
        )
        drawn = charts.build_charts([
            charts.histogram(
                "Self-influence of all training examples",
                "predicted rise of the example's own loss",
                self.scores,
                "A few examples far to the right are worth a look.",
            ),
            charts.residual_chart(self.diagnostics),
            charts.damping_chart(self.diagnostics),
            *charts.spectrum_charts(material.options.spectrum),
        ])
        lead = f"Which of {self.stored:,} training examples did the model have to memorise?"
        sections = [ranked, describe_certificate(self.diagnostics), drawn]
        return write_page(path, material, "Self-influence", lead, sections)

    def __rich__(self) -> RenderableType:
        facts = [("training examples", str(self.stored)), *self.diagnostics.facts()]
        return Group(build_facts_table(facts, "Self-influence"), self.top(min(5, self.stored)))

    def __repr__(self) -> str:
        return f"SelfInfluence(N={self.stored}, method={self.diagnostics.method!r})"
