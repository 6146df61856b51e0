"""What an influence query returns: scores of training examples, and the certificate of how they came about.

A score is the predicted change of a query's measurement when a training example is removed, in the
measurement's unit: ``tau(q, n) = (1/N) g_q^T (H + lambda I)^{-1} g_n``. With the loss as the measurement, a
positive score means that the training example helps the query (a proponent), a negative one that it hurts (an
opponent).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NotRequired, Self, TypedDict

import torch
from rich.console import Group, RenderableType
from rich.jupyter import JupyterMixin
from torch import Tensor

from .errors import CorruptFileError, NonFiniteError
from .rendering import Labels, Ranking, facts_table, score_caption
from .storage import PathLike, check_kind, load_tensors, save_tensors
from .topk import Extremes, check_finite, select_topk

if TYPE_CHECKING:
    import pandas as pd


class PassFacts(TypedDict):
    """One pass over data: its name, how long it took, how many examples (and batches) it saw."""

    name: str
    seconds: float
    examples: int
    batches: NotRequired[int]


@dataclass(frozen=True, eq=False)
class Diagnostics:
    """How scores were computed; saved with them.

    Attributes:
        method: name of the method.
        measurement: what was measured on the queries, the unit of the scores.
        damping: lambda of each layer.
        damping_origin: where lambda comes from, in words.
        residuals: ``(Q,)`` relative residual ``||v - (H + lambda)x|| / ||v||`` per query, None if not
            computed.
        passes: the passes over data, in order.
        seconds: wall-clock time of the whole call.
        layers: parameter counts of the layers that scores account for.
        parameters_covered: share of the model's trainable parameters in these layers, 0 to 1.
        checkpoint: path of the checkpoint, None for the weights in memory.
        warnings: what was left out or assumed.
        extra: anything else: JSON values, and tensors at the top level.
    """

    method: str
    measurement: str = "loss"
    damping: Mapping[str, float] = field(default_factory=dict)
    damping_origin: str = ""
    residuals: Tensor | None = None
    passes: Sequence[PassFacts] = ()
    seconds: float = 0.0
    layers: Mapping[str, int] = field(default_factory=dict)
    parameters_covered: float = 1.0
    checkpoint: str | None = None
    warnings: Sequence[str] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def facts(self) -> list[tuple[str, str]]:
        """Pairs of name and value for people.

        Returns:
            Everything but the tensors' entries, of which the residuals are summarised.
        """
        count = f"{len(self.layers)} layers, {sum(self.layers.values()):,} parameters"
        facts = [
            ("method", self.method),
            ("measurement", self.measurement),
            ("damping", _damping_text(self.damping, self.damping_origin)),
            ("residual", _residual_text(self.residuals)),
            ("layers", f"{count}, {self.parameters_covered:.1%} of the trainable ones"),
            ("checkpoint", self.checkpoint or "none: the weights in memory"),
            ("seconds", f"{self.seconds:.3g}"),
        ]
        facts += [
            (f"pass {p['name']}", f"{p['seconds']:.3g} s, {p['examples']} examples") for p in self.passes
        ]
        facts += [(name, _extra_text(value)) for name, value in self.extra.items()]
        return facts + [("warning", warning) for warning in self.warnings]

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and the JSON values that :meth:`from_state` makes the diagnostics of again.

        Returns:
            Tensors by name, and the other values.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["extra"] = {k: v for k, v in self.extra.items() if not isinstance(v, Tensor)}
        tensors = {f"extra.{k}": v for k, v in self.extra.items() if isinstance(v, Tensor)}
        if self.residuals is not None:
            tensors["residuals"] = values.pop("residuals")
        return tensors, values

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Self:
        """Diagnostics from what :meth:`to_state` returned.

        Args:
            tensors: the tensors by name.
            values: the other values.

        Returns:
            Equal diagnostics.
        """
        extra = {k.removeprefix("extra."): v for k, v in tensors.items() if k.startswith("extra.")}
        residuals = tensors.get("residuals")
        return cls(**{**values, "residuals": residuals, "extra": {**values["extra"], **extra}})


def _damping_text(damping: Mapping[str, float], origin: str) -> str:
    values = sorted(set(damping.values()))
    spread = " to ".join(f"{value:.4g}" for value in (values if len(values) < 2 else [values[0], values[-1]]))
    return f"{spread or 'none'} ({origin})" if origin else spread or "none"


def _residual_text(residuals: Tensor | None) -> str:
    if residuals is None or residuals.numel() == 0:
        return "not computed"
    return f"mean {float(residuals.mean()):.3g}, max {float(residuals.max()):.3g}"


def _extra_text(value: Any) -> str:
    return f"tensor {tuple(value.shape)}" if isinstance(value, Tensor) else str(value)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class _Result(JupyterMixin):
    """What attributions and self-influence share: their files, checks and looks."""

    KIND: ClassVar[str]

    train_indices: Tensor
    diagnostics: Diagnostics

    def __post_init__(self) -> None:
        for name, tensor in self._tensors().items():
            tensor = tensor.detach().cpu()
            if tensor.dtype in {torch.float16, torch.bfloat16}:
                tensor = tensor.float()
            sound = tensor.is_floating_point() if name.endswith("scores") else tensor.dtype == torch.long
            if not sound:
                kind = "floating-point" if name.endswith("scores") else "int64"
                raise ValueError(f"{name} must be {kind}, got {tensor.dtype}")
            object.__setattr__(self, name, tensor)
        if self.train_indices.dim() != 1 or not _distinct(self.train_indices):
            raise ValueError(
                f"train_indices must be (N,) and distinct, got {tuple(self.train_indices.shape)}"
            )
        if len(self.train_indices) == 0:
            raise ValueError("train_indices is empty; attributions take at least one training example")

    def save(self, path: PathLike) -> Path:
        """Write everything to one safetensors file, atomically.

        Args:
            path: the file, used as it stands; an existing one is replaced.

        Returns:
            The path.
        """
        own = self._tensors()
        more, values = self.diagnostics.to_state()
        more = {f"diagnostics.{name}": tensor for name, tensor in more.items()}
        save_tensors(path, {**own, **more}, {"kind": self.KIND, "diagnostics": values})
        return Path(path)

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """Read and verify a file that :meth:`save` wrote.

        Args:
            path: the file.

        Returns:
            An equal object, its tensors on the CPU.

        Raises:
            CorruptFileError: if the file is truncated, altered, of an unknown version or of another kind.
        """
        tensors, metadata = load_tensors(path)
        check_kind(path, metadata, cls.KIND)
        prefix = "diagnostics."
        more = {
            name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)
        }
        try:
            return cls(diagnostics=Diagnostics.from_state(more, metadata["diagnostics"]), **tensors)
        except (TypeError, ValueError, KeyError) as error:
            raise CorruptFileError(f"{str(path)!r} does not hold sound {cls.KIND}: {error}") from error

    def _tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Attributions(_Result):
    """Scores of training examples for queries: all of them, or the strongest at either end.

    A score is the predicted change of the query's measurement when the training example is removed, in the
    measurement's unit; for the loss, positive means that the example helps the query. A group's predicted
    effect is the sum of its members' scores. All tensors are on the CPU, half-precision scores in float32.

    Attributes:
        train_indices: ``(N,)`` distinct training dataset indices, the columns of ``scores``.
        query_indices: ``(Q,)`` query dataset indices.
        diagnostics: how the scores were computed.
        query_dataloaders: ``(Q,)`` which query dataloader each query is from, when there are several.
        scores: ``(Q, N)`` all scores, or None when only both ends were kept.
        top_scores: ``(Q, k)`` the highest scores, descending.
        top_indices: ``(Q, k)`` their training dataset indices.
        bottom_scores: ``(Q, k)`` the lowest scores, ascending.
        bottom_indices: ``(Q, k)`` their training dataset indices.

    Raises:
        ValueError: if shapes or dtypes do not fit, or both or neither of ``scores`` and the ends are given.
        NonFiniteError: if a score is NaN or infinite.

    Example:
        >>> import torch
        >>> attributions = Attributions(
        ...     scores=torch.tensor([[0.1, -0.2, 0.3]]),
        ...     train_indices=torch.tensor([10, 11, 12]),
        ...     query_indices=torch.tensor([4]),
        ...     diagnostics=Diagnostics(method="ekfac"),
        ... )
        >>> attributions.top(2).indices
        tensor([[12, 10]])
        >>> attributions.group([10, 12])
        tensor([0.4000])
    """

    KIND: ClassVar[str] = "attributions"

    query_indices: Tensor
    query_dataloaders: Tensor | None = None
    scores: Tensor | None = None
    top_scores: Tensor | None = None
    top_indices: Tensor | None = None
    bottom_scores: Tensor | None = None
    bottom_indices: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        Q, N = len(self.query_indices), len(self.train_indices)
        ends = [self.top_scores, self.top_indices, self.bottom_scores, self.bottom_indices]
        given = [end for end in ends if end is not None]
        if len(given) != (4 if self.scores is None else 0):
            raise ValueError(
                "give either scores, or top and bottom scores and indices; got both, neither or a part"
            )
        _check_shape("query_indices", self.query_indices, (max(Q, 1),))
        _check_shape("query_dataloaders", self.query_dataloaders, (Q,))
        _check_shape("diagnostics.residuals", self.diagnostics.residuals, (Q,))
        if self.scores is not None:
            _check_shape("scores", self.scores, (Q, N))
            check_finite(self.scores, self.train_indices)
        if self.top_scores is not None and self.bottom_scores is not None:
            self._check_ends(Q, self.top_scores, self.bottom_scores)

    def _check_ends(self, Q: int, top: Tensor, bottom: Tensor) -> None:
        k = max(1, top.shape[-1] if top.dim() else 1)
        for name in ("top_scores", "top_indices", "bottom_scores", "bottom_indices"):
            _check_shape(name, getattr(self, name), (Q, k))
        for name, scores in (("top", top), ("bottom", -bottom)):
            indices = getattr(self, f"{name}_indices")
            if not bool(torch.isfinite(scores).all()):
                raise NonFiniteError(
                    f"{name}_scores hold NaN or infinity; look at the losses and at the damping"
                )
            if bool((scores.diff(dim=1) > 0).any()):
                raise ValueError(f"{name}_scores must be sorted, the strongest first")
            if not bool(torch.isin(indices, self.train_indices).all()):
                raise ValueError(f"{name}_indices hold examples that train_indices does not")

    @classmethod
    def from_extremes(cls, extremes: Extremes, **others: Any) -> Self:
        """Attributions from the result of a :class:`~lightning_influence.topk.StreamingExtremes`.

        Args:
            extremes: both ends of the rankings, and what was ranked.
            **others: ``query_indices``, ``diagnostics`` and, with several loaders, ``query_dataloaders``.

        Returns:
            The attributions.
        """
        return cls(
            train_indices=extremes.train_indices,
            top_scores=extremes.top.scores,
            top_indices=extremes.top.indices,
            bottom_scores=extremes.bottom.scores,
            bottom_indices=extremes.bottom.indices,
            **others,
        )

    @property
    def stored(self) -> int:
        """How many examples per query :meth:`top` and :meth:`bottom` can return."""
        return len(self.train_indices) if self.top_scores is None else self.top_scores.shape[1]

    def top(self, k: int = 5, *, labels: Labels | None = None, max_queries: int = 10) -> Ranking:
        """The highest scores of each query: with the loss measured, its strongest proponents.

        Args:
            k: how many.
            labels: texts to show beside the indices.
            max_queries: how many queries the printed table shows; the rest is counted.

        Returns:
            Indices ``(Q, k)`` and scores ``(Q, k)`` that print as a table.

        Raises:
            ValueError: if fewer than ``k`` are stored.
        """
        return self._ranking(k, True, labels, max_queries)

    def bottom(self, k: int = 5, *, labels: Labels | None = None, max_queries: int = 10) -> Ranking:
        """The lowest scores of each query: with the loss measured, its strongest opponents.

        Args:
            k: how many.
            labels: texts to show beside the indices.
            max_queries: how many queries the printed table shows; the rest is counted.

        Returns:
            Indices ``(Q, k)`` and scores ``(Q, k)``, the lowest first, that print as a table.

        Raises:
            ValueError: if fewer than ``k`` are stored.
        """
        return self._ranking(k, False, labels, max_queries)

    def _ranking(self, k: int, largest: bool, labels: Labels | None, max_queries: int) -> Ranking:
        _check_k(
            k, self.stored, "all scores are stored" if self.scores is not None else f"top_k={self.stored}"
        )
        if self.scores is not None:
            scores, indices = select_topk(self.scores, self.train_indices, k, largest=largest)
        else:
            end = "top" if largest else "bottom"
            scores, indices = getattr(self, f"{end}_scores")[:, :k], getattr(self, f"{end}_indices")[:, :k]
        return Ranking(
            indices=indices,
            scores=scores,
            query_indices=self.query_indices,
            query_dataloaders=self.query_dataloaders,
            title=_title(self.diagnostics.measurement, largest),
            caption=score_caption(self.diagnostics.measurement),
            labels=labels or Labels(),
            max_queries=max_queries,
        )

    def for_query(self, index: int, dataloader: int | None = None) -> Self:
        """The attributions of one query.

        Args:
            index: its dataset index.
            dataloader: its query dataloader, to tell queries of several apart.

        Returns:
            Attributions of the rows with this index: one, or several if it was queried more than once.

        Raises:
            ValueError: if it was not queried.
        """
        rows = self.query_indices == index
        if dataloader is not None:
            loaders = self.query_dataloaders
            rows &= (torch.zeros_like(self.query_indices) if loaders is None else loaders) == dataloader
        if not bool(rows.any()):
            where = "" if dataloader is None else f" of dataloader {dataloader}"
            known = _some(self.query_indices)
            raise ValueError(f"query {index}{where} was not asked for; query_indices are {known}")
        per_query = {name: t[rows] for name, t in self._tensors().items() if name != "train_indices"}
        residuals = self.diagnostics.residuals
        diagnostics = dataclasses.replace(
            self.diagnostics, residuals=None if residuals is None else residuals[rows.to(residuals.device)]
        )
        return dataclasses.replace(self, diagnostics=diagnostics, **per_query)

    def group(self, train_indices: Tensor | Sequence[int]) -> Tensor:
        """Predicted change of each query's measurement when a group of training examples is removed.

        Args:
            train_indices: the group's distinct dataset indices.

        Returns:
            ``(Q,)``, the sum of the members' scores, in the measurement's unit.

        Raises:
            ValueError: if only the ends of the rankings are stored, or an example is unknown or repeated.
        """
        if self.scores is None:
            raise ValueError(
                f"a group needs all scores, but only {self.stored} at either end are stored: omit top_k"
            )
        wanted = torch.as_tensor(train_indices, dtype=torch.long).cpu()
        unknown = wanted[~torch.isin(wanted, self.train_indices)]
        if len(unknown) or not _distinct(wanted):
            what = f"unknown examples: {_some(unknown)}" if len(unknown) else "an example twice"
            raise ValueError(f"the group holds {what}; it takes distinct members of train_indices")
        members = torch.isin(self.train_indices, wanted)
        return self.scores[:, members].sum(1)

    def to_pandas(self) -> pd.DataFrame:
        """The scores as a pandas DataFrame in long form, one row per query and training example.

        Returns:
            Columns ``query``, ``dataloader`` (with several), ``train`` and ``score``; when only the ends are
            stored also ``end`` (``top`` or ``bottom``) and ``rank`` (from 1).

        Raises:
            ImportError: if pandas is not installed.
        """
        pandas = _pandas()
        if self.scores is not None:
            return pandas.DataFrame(self._columns(self.train_indices.expand(self.scores.shape), self.scores))
        frames = []
        for end, ranking in (("top", self.top(self.stored)), ("bottom", self.bottom(self.stored))):
            frame = pandas.DataFrame(self._columns(ranking.indices, ranking.scores))
            frame["end"] = end
            frame["rank"] = torch.arange(1, self.stored + 1).repeat(len(self.query_indices)).numpy()
            frames.append(frame)
        return pandas.concat(frames, ignore_index=True)

    def _columns(self, indices: Tensor, scores: Tensor) -> dict[str, Any]:
        width = scores.shape[1]
        columns = {"query": self.query_indices.repeat_interleave(width).numpy()}
        if self.query_dataloaders is not None:
            columns["dataloader"] = self.query_dataloaders.repeat_interleave(width).numpy()
        return columns | {"train": indices.flatten().numpy(), "score": scores.flatten().numpy()}

    def __rich__(self) -> RenderableType:
        kept = "all scores" if self.scores is not None else f"the {self.stored} strongest at either end"
        counts = [
            ("queries", str(len(self.query_indices))),
            ("training examples", str(len(self.train_indices))),
        ]
        facts = [*counts, ("stored", kept), *self.diagnostics.facts()]
        return Group(facts_table(facts, "Attributions"), self.top(min(5, self.stored)))

    def __repr__(self) -> str:
        kept = "full" if self.scores is not None else f"top_k={self.stored}"
        return (
            f"Attributions(Q={len(self.query_indices)}, N={len(self.train_indices)}, {kept}, "
            f"method={self.diagnostics.method!r}, measurement={self.diagnostics.measurement!r})"
        )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SelfInfluence(_Result):
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
        _check_shape("scores", self.scores, tuple(self.train_indices.shape))
        check_finite(self.scores, self.train_indices)

    @property
    def stored(self) -> int:
        """How many examples :meth:`top` can return: all."""
        return len(self.train_indices)

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
        _check_k(k, self.stored, "all scores are stored")
        scores, indices = select_topk(self.scores[None], self.train_indices, k, largest=largest)
        caption = "Score: predicted rise of the example's own loss when it is removed."
        title = f"{'Highest' if largest else 'Lowest'} self-influence"
        return Ranking(indices, scores, title=title, caption=caption, labels=labels or Labels())

    def to_pandas(self) -> pd.DataFrame:
        """The scores as a pandas DataFrame.

        Returns:
            Columns ``train`` and ``score``.

        Raises:
            ImportError: if pandas is not installed.
        """
        return _pandas().DataFrame({"train": self.train_indices.numpy(), "score": self.scores.numpy()})

    def __rich__(self) -> RenderableType:
        facts = [("training examples", str(self.stored)), *self.diagnostics.facts()]
        return Group(facts_table(facts, "Self-influence"), self.top(min(5, self.stored)))

    def __repr__(self) -> str:
        return f"SelfInfluence(N={self.stored}, method={self.diagnostics.method!r})"


def _title(measurement: str, largest: bool) -> str:
    if measurement == "loss":
        return "Strongest proponents" if largest else "Strongest opponents"
    return "Highest scores" if largest else "Lowest scores"


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def _check_k(k: int, stored: int, how: str) -> None:
    if not 1 <= k <= stored:
        raise ValueError(f"k={k}, but {stored} examples per query are stored ({how}); k is 1 to {stored}")


def _distinct(indices: Tensor) -> bool:
    return not bool((indices.sort().values.diff() == 0).any())


def _some(indices: Tensor) -> str:
    shown = ", ".join(map(str, indices[:10].tolist()))
    return shown if len(indices) <= 10 else f"{shown} and {len(indices) - 10} more"


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_pandas needs pandas: pip install 'lightning-influence[pandas]'") from error
    return pandas
