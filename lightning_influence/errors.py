"""The errors and the warning that users catch, under a short name."""

from lightning_influence.support.errors import (
    CorruptFileError,
    DivergenceError,
    EditMismatchError,
    ExistingFileError,
    FactorMismatchError,
    IndefiniteError,
    InfluenceError,
    InfluenceWarning,
    LossCaptureError,
    NonFiniteError,
    UnsafeCheckpointError,
    UnsupportedDataError,
    UnsupportedModelError,
    UnsupportedTrainerError,
)

__all__ = [
    "CorruptFileError",
    "DivergenceError",
    "EditMismatchError",
    "ExistingFileError",
    "FactorMismatchError",
    "IndefiniteError",
    "InfluenceError",
    "InfluenceWarning",
    "LossCaptureError",
    "NonFiniteError",
    "UnsafeCheckpointError",
    "UnsupportedDataError",
    "UnsupportedModelError",
    "UnsupportedTrainerError",
]
