"""What is worth keeping between queries: factors, the coarse space, and the record of the training run."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_influence.factors.factors import Factors
from lightning_influence.factors.training_record import TrainingRecord
from lightning_influence.solvers.two_level import CoarseSpace


@dataclass
class InfluenceState:
    """Query-independent state of a trained model.

    Attributes:
        factors: Kronecker factors, or None if they have to be fitted.
        record: what the training run tells of its damping, or None.
        coarse: the coarse space of two-level EK-FAC, or None if it has to be built.
        coarse_key: what the coarse space was built for; it is built again when this changes.
    """

    factors: Factors | None = None
    record: TrainingRecord | None = None
    coarse: CoarseSpace | None = None
    coarse_key: str = ""
