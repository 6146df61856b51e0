"""The errors of this library: each says what was got, what is accepted and what to do."""

import sys


class InfluenceError(RuntimeError):
    """Base class of every error that this library raises for a situation it cannot serve."""


class LossCaptureError(InfluenceError):
    """The training loss of a LightningModule could not be found, or does not match what was found.

    Args:
        message: what was found, what is accepted, and what to do.
        reason: the first of these in one sentence, for those who go on without it; the message if None.

    Attributes:
        reason: the same.
    """

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = message if reason is None else reason


class UnsupportedModelError(InfluenceError):
    """The model has no layer, or no loss, that the library can work with."""


class ReadOtherwiseError(UnsupportedModelError):
    """A batch that has to be read in another way than those before it.

    The question is to be asked anew, and will be answered in that way from the start.
    """


class UnsupportedDataError(InfluenceError):
    """A loader is empty, has no dataset indices, or is otherwise not attributable."""


class UnsupportedTrainerError(InfluenceError):
    """A Trainer is set up in a way that the library's passes cannot run under."""


class FactorMismatchError(InfluenceError):
    """Stored factors do not belong to the model they are used with."""


class EditMismatchError(InfluenceError):
    """A parameter edit does not belong to the model, or to the weights that the model has now."""


class NonFiniteError(InfluenceError):
    """A loss, gradient or factor is NaN or infinite."""


class DivergenceError(InfluenceError):
    """An iteration moved away from its solution; the message says whether step or batch is the cause."""


class IndefiniteError(InfluenceError):
    """A solver that needs a positive definite matrix met a direction of negative curvature."""


class CorruptFileError(InfluenceError):
    """A saved file is truncated, altered or of another format."""


class ExistingFileError(InfluenceError, FileExistsError):
    """A file that was to be written anew exists, and is not overwritten."""


class UnsafeCheckpointError(InfluenceError):
    """A checkpoint holds objects that are not unpickled, because that can run code from the file."""


class InfluenceWarning(UserWarning):
    """Something was left out or assumed; the message says what and what to do."""


def add_note(error: BaseException, note: str) -> None:
    """Say more about an error; Python 3.10 shows no notes, so there the message also ends with it."""
    if sys.version_info >= (3, 11):
        error.add_note(note)
    else:
        error.__notes__ = [*getattr(error, "__notes__", []), note]
        if error.args and isinstance(error.args[0], str):
            error.args = (f"{error.args[0]} {note}", *error.args[1:])
