"""What is measured on a query: one number per example (or set), whose gradient the scores explain.

``loss`` is the training loss of the example, ``margin`` the log-odds of its true label, ``logit`` the output
of its true label, ``hook`` the module's own ``influence_measurement(batch) -> (B,)``; a callable gets
``(module, batch)`` and returns ``(B,)``. The last two may return one number, shape ``()``, in place of one
an example: a measurement of the batch as a set, such as a gap. A positive score for ``loss`` means
that removing the training example raises the query's loss; for ``margin`` and ``logit``, where more is
better, a helpful training example has a negative score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from lightning_influence.model.losses.hook import check_per_example, check_values
from lightning_influence.model.losses.loss import OutputLoss
from lightning_influence.support.errors import LossCaptureError

MeasurementName = Literal["loss", "margin", "logit", "hook"]
Measurement = MeasurementName | Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class ResolvedMeasurement:
    """A measurement that is ready to be taken.

    Attributes:
        name: one of the names above, or that of the callable.
        needs_loss: whether the training loss of the query batch has to be captured for it. A module with
            ``influence_loss`` can serve ``loss`` without.
        function: the callable or the bound hook; None for the three that come from the loss.
        hint: how messages call the function.
    """

    name: str
    needs_loss: bool
    function: Callable[[Any, Any], Any] | None = None
    hint: str = ""

    def __call__(
        self, module: Any, batch: Any, *, loss: OutputLoss | None, batch_size: int, wbar: float = 1.0
    ) -> Tensor:
        """Measure one query batch.

        Args:
            module: the user's module.
            batch: the query batch, on the module's device.
            loss: the captured loss of this batch, if there is one; see ``needs_loss``.
            batch_size: number of queries ``B`` in the batch.
            wbar: mean weight of a training example, which divides the value of ``loss``.

        Returns:
            One value per query, shape ``(B,)``, differentiable in the parameters.

        Raises:
            LossCaptureError: if the measurement needs a captured loss and there is none.
            UnsupportedModelError: if the loss has no labels and the measurement needs them.
            NonFiniteError: if a value is NaN or infinite.
            TypeError: if the user's function returns no floating-point tensor.
            ValueError: if the values are not of shape ``(B,)``, or have no graph.
        """
        if self.function is not None:
            values = self.function(module, batch)
        elif loss is not None:
            values = self._of_loss(loss, wbar)
        elif self.name == "loss" and callable(getattr(module, "influence_loss", None)):
            values = module.influence_loss(batch)
        else:
            raise LossCaptureError(
                f"measurement={self.name!r} needs the training loss of the query batch, and none was "
                "captured. Accepted without one are a callable `(module, batch) -> (B,)` and, for 'loss', a "
                "module that defines `influence_loss(batch) -> (B,)`."
            )
        return check_per_example(values, batch_size, self.hint or f"measurement {self.name!r}")

    @property
    def is_loss(self) -> bool:
        """Whether it is the training loss itself, not a function of the user's that is called so."""
        return self.name == "loss" and self.function is None

    def of_set(self, module: Any, batch: Any) -> Tensor:
        """Measure a batch as one set, with a function that returns one number for it.

        Args:
            module: the user's module.
            batch: the set, on the module's device.

        Returns:
            Shape ``()``, differentiable in the parameters.

        Raises:
            TypeError: if the function returns no floating-point tensor.
            ValueError: if it returns another shape, or has no graph.
        """
        assert self.function is not None
        accepted = "of shape (), one number for the batch, as it returned for the first one"
        return check_values(self.function(module, batch), (), self.hint, accepted)

    def _of_loss(self, loss: OutputLoss, wbar: float) -> Tensor:
        if self.name == "margin":
            return loss.margin()
        if self.name == "logit":
            return loss.true_score()
        return loss.per_example() / wbar


def resolve_measurement(measurement: Measurement | None, module: Any) -> ResolvedMeasurement:
    """Decide what to measure: what was asked for, else the module's hook, else the loss.

    Args:
        measurement: a name, a callable ``(module, batch) -> (B,)``, or None.
        module: the user's module, looked at for ``influence_measurement``.

    Returns:
        The measurement.

    Raises:
        ValueError: if the name is unknown, or the hook is asked for and the module has none.
        TypeError: if it is neither a name nor a callable.

    Example:
        >>> resolve_measurement(None, object()).name
        'loss'
    """
    has_hook = callable(getattr(module, "influence_measurement", None))
    if measurement is None:
        measurement = "hook" if has_hook else "loss"
    if isinstance(measurement, str):
        return _named(measurement, module, has_hook)
    if callable(measurement):
        name = getattr(measurement, "__name__", type(measurement).__name__)
        return ResolvedMeasurement(name, False, measurement, f"The measurement {name!r}")
    raise TypeError(
        f"Got a measurement of type {type(measurement).__name__}; accepted are {_names()} or a callable "
        "`(module, batch)` that returns (B,) or one number."
    )


def _named(name: str, module: Any, has_hook: bool) -> ResolvedMeasurement:
    if name not in get_args(MeasurementName):
        raise ValueError(
            f"Got measurement={name!r}; accepted are {_names()} or a callable `(module, batch)` that returns "
            "(B,) or one number."
        )
    if name != "hook":
        return ResolvedMeasurement(name, True)
    if not has_hook:
        raise ValueError(
            f"Got measurement='hook', but {type(module).__name__} defines no `influence_measurement(batch) "
            "-> (B,)`. Define it, or choose 'loss', 'margin', 'logit' or a callable."
        )
    return ResolvedMeasurement(
        name, False, lambda owner, batch: owner.influence_measurement(batch), "influence_measurement"
    )


def _names() -> str:
    return ", ".join(repr(name) for name in get_args(MeasurementName))
