"""What passes note about a loss once they have found it out, in :attr:`.LayerPlan.verified`."""

from __future__ import annotations

from collections.abc import Collection

#: A layer is a module whose weights the loss, or a measurement, uses by calling it on the examples in their
#: order: its uses need not be watched.
CALLED = "{} is called for the {}"
#: A loss leaves out so many positions of each example, as one with shifted targets does.
LEFT_OUT = "{} positions are left out"
#: Rows of losses cannot be followed because values have left torch.
LOST = "rows of losses are lost"
#: Losses are in the order of the examples; what was left out follows.
ORDER = "order "
#: How the notes of a loss end that depend on where its batches hold the examples.
FOR_LOSS = "for the loss"
#: Gradients were checked where dimensions of these sizes coincide with the batch's.
COINCIDES = "{} has the batch's size for the {}"
#: Functions that losses are made of give examples other weights than one.
WEIGHED = "examples have weights"
#: Why a question has to be asked anew where batches with such weights are followed by others.
OTHER_WEIGHTS = (
    "The losses of some batches are made of functions that are known by name, and those of others of rows "
    "that a mask or an index picked, whose weights are not known. Define `influence_loss(batch) -> (B,)` on "
    "the module, or mask losses without dropping rows (`ignore_index`)."
)


# What follows was told while batches were run, and is told once a model.
_TOLD = "told: "


def note_told(verified: set[str], message: str, kind: str) -> bool:
    """Note what is told of a model, for the certificates of later questions; listens to warnings."""
    verified.add(_TOLD + message)
    return True


def read_told(verified: Collection[str]) -> list[str]:
    """Return what was told of a model before, in an order that is the same everywhere."""
    return sorted(text.removeprefix(_TOLD) for text in verified if text.startswith(_TOLD))


def forget_measurement(verified: set[str]) -> None:
    """Forget what passes have found of a measurement, as there may be another one."""
    verified -= {text for text in verified if text.endswith("measurement")}
