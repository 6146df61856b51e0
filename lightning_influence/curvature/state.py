"""What is worth keeping between queries: factors, the coarse space, and the record of the training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_influence.curvature.coarse_space import CoarseSpace
from lightning_influence.curvature.compact_space import CompactSpace
from lightning_influence.curvature.factors import Factors
from lightning_influence.curvature.training_record import TrainingRecord

# Chosen by hand: a checkpoint should not grow by more than this for what can be computed again.
STORED_BYTES = 256 * 2**20


@dataclass
class InfluenceState:
    """Query-independent state of a trained model.

    Attributes:
        factors: Kronecker factors, or None if they have to be fitted.
        record: what the training run tells of its damping, or None.
        coarse: the coarse space of two-level EK-FAC, or None if it has to be built.
        coarse_key: what the coarse space was built for; it is built again when this changes.
        compact: the coarse space in little memory, or None if it has to be built.
        compact_key: what that was built for.
        factors_key: what factors from a pass were fitted for; they are fitted again when this changes. Empty
            for factors of a training run and for those that a user brings, which are used as they are.
        mean_loss: of the training data that factors from a pass and the coarse space were made on, at these
            weights; None if unknown. Both are made again when it changes.
        content: digest of these examples and of the loss's settings; None if unknown, as in states that were
            stored without one.
        forgotten: whether what passes had computed turned out to be of other data, so that it is to be
            computed again whatever is kept elsewhere; not stored.
        columns: of the output curvature of an example, by the key of a coarse space; not stored.
        verified: what passes of earlier calls have found in order, by model; not stored.
        slow: the parameters whose gradients take a pass for each example, as they have found, by model; not
            stored.
        owns_part: whether the factors are of this process's own layers alone; neither is stored then.
        collected: whether the factors are those that the callback collected, which better ones may replace.
    """

    factors: Factors | None = None
    record: TrainingRecord | None = None
    coarse: CoarseSpace | None = None
    coarse_key: str = ""
    compact: CompactSpace | None = None
    compact_key: str = ""
    factors_key: str = ""
    mean_loss: float | None = None
    content: int | None = None
    forgotten: bool = field(default=False, compare=False, repr=False)
    columns: dict[str, int] = field(default_factory=dict, compare=False, repr=False)
    verified: dict[str, set[str]] = field(default_factory=dict, compare=False, repr=False)
    slow: dict[str, set[str]] = field(default_factory=dict, compare=False, repr=False)
    owns_part: bool = field(default=False, compare=False, repr=False)
    collected: bool = field(default=False, compare=False, repr=False)

    def forget(self) -> None:
        """Let go of what passes have computed; factors of a training run, or a user's own, stay."""
        self.coarse, self.coarse_key, self.mean_loss, self.content = None, "", None, None
        self.forgotten = True
        self.compact, self.compact_key, self.columns = None, "", {}
        if self.factors_key:
            self.factors, self.factors_key = None, ""

    def stored_results(self, collected: Factors, limit: int = STORED_BYTES) -> dict[str, Any]:
        """What queries have computed, as tensors and primitives.

        Args:
            collected: factors that are stored elsewhere and so not again.
            limit: what takes more bytes than this is left out, and has to be computed again.

        Returns:
            The coarse spaces, factors unless ``collected`` are as good, and what their data were.
        """
        result: dict[str, Any] = {}
        if self.coarse is not None:
            result["coarse"], result["coarse_key"] = self.coarse.state_dict(), self.coarse_key
        if self.compact is not None:
            result["compact"], result["compact_key"] = self.compact.state_dict(), self.compact_key
        other = self.factors_key or not collected.has_squares
        if self.factors is not None and other and not self.owns_part:
            result["factors"], result["factors_key"] = self.factors.state_dict(), self.factors_key
        kept = {
            name: value
            for name, value in result.items()
            if _nbytes(result[name.removesuffix("_key")]) <= limit
        }
        if kept and self.mean_loss is not None:
            kept |= {"mean_loss": self.mean_loss, "content": self.content}
        return kept

    def take_results(self, stored: Mapping[str, Any]) -> None:
        """Take up what :meth:`stored_results` returned.

        Args:
            stored: the tensors and primitives.

        Raises:
            FactorMismatchError: if they were written by an incompatible version.
        """
        self.mean_loss = stored.get("mean_loss", self.mean_loss)
        self.content = stored.get("content", self.content)
        if "coarse" in stored:
            self.coarse = CoarseSpace.from_state_dict(stored["coarse"])
            self.coarse_key = stored["coarse_key"]
        if "compact" in stored:
            self.compact = CompactSpace.from_state_dict(stored["compact"])
            self.compact_key = stored["compact_key"]
        if "factors" in stored:
            self.factors = Factors.from_state_dict(stored["factors"])
            self.factors_key = stored["factors_key"]


def _nbytes(state: Mapping[str, Any]) -> int:
    return sum(value.nbytes for value in state.values() if isinstance(value, Tensor))
