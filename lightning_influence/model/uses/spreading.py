"""Parameters with a row for each example, to which gradients of single examples can be sent."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lightning_influence.model.uses.calls import Call, Use
from lightning_influence.model.uses.operations.registry import ExampleCall, register_operation
from lightning_influence.model.uses.parts import Dense, Part
from lightning_influence.model.uses.places import Place


def spread_parameter(parameter: Tensor, num_examples: int) -> Tensor:
    """Return a parameter once for each example, ``(B, *shape)``."""
    return parameter.unsqueeze(0).expand(num_examples, *parameter.shape)


@register_operation(spread_parameter, arguments=("parameter", "num_examples"), reads_inputs=False)
def pull_spread(call: ExampleCall) -> dict[str, Part]:
    """Return the gradients of the rows, which are those of the parameter."""
    return {"parameter": Dense(call.gradient()[:, :, 0])}


def make_spread_use(parameter: Tensor, num_examples: int) -> tuple[Tensor, Use]:
    """Spread a parameter, as a use of it by the examples in their order.

    Args:
        parameter: the parameter.
        num_examples: ``B``.

    Returns:
        Its rows ``(B, *shape)``, and the use.
    """
    rows = spread_parameter(parameter, num_examples)
    use = Use(
        Call(spread_parameter, (parameter, num_examples), {}),
        {(0, 0): parameter},
        {},
        {},
        [get_gradient_edge(rows)],
        [Place(0)],
        [rows.shape],
    )
    return rows, use
