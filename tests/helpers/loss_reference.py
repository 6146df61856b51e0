"""What every loss must satisfy against torch itself, by automatic differentiation in float64."""

import inspect
from collections.abc import Callable
from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.model.losses.loss import OutputLoss

# Whether an error is weighted; in torch 2.4 mse_loss, l1_loss and huber_loss take no weights.
WEIGHTED = st.booleans() if "weight" in inspect.signature(F.mse_loss).parameters else st.just(False)
TIGHT = {"rtol": 1e-10, "atol": 1e-12}  # float64 rounding over at most a few hundred terms


def given_weight(weight: Tensor | None) -> dict[str, Tensor]:
    """The weight as an option of torch's function, if there is one."""
    return {} if weight is None else {"weight": weight}


def blocks(matrix: Tensor, num_examples: int) -> Tensor:
    """The examples' diagonal blocks (B, d, d) of a Hessian over all outputs, which must be zero elsewhere."""
    d = int(matrix.numel() ** 0.5) // num_examples
    grid = matrix.reshape(num_examples, d, num_examples, d)
    index = torch.arange(num_examples)
    off = grid.clone()
    off[index, :, index, :] = 0
    assert not off.any()
    return grid[index, :, index, :]


def curvature(loss: OutputLoss) -> Tensor:
    """Sum of the columns' outer products, (B, d, d)."""
    columns = list(loss.columns())
    assert len(columns) == loss.num_columns
    stacked = torch.stack([column.reshape(loss.num_examples, -1) for column in columns])
    return torch.einsum("kni,knj->nij", stacked, stacked)


def check_against_torch(
    loss: OutputLoss, function: Callable[[Tensor], Tensor], information: Tensor | None = None
) -> None:
    """`function(outputs)` is the batch's loss as torch computes it; its derivatives are the reference.

    `information`, blocks (B, d, d), is the reference of curvatures that are no Hessian of the batch's loss.
    """
    outputs = loss.outputs.detach()
    share = loss.scale / loss.weights().sum()
    torch.testing.assert_close(loss.batch_value(), function(outputs), **TIGHT)
    torch.testing.assert_close(
        share * loss.per_example().sum(), function(outputs), check_dtype=False, **TIGHT
    )
    torch.testing.assert_close(share * loss.gradient(), torch.func.grad(function)(outputs), **TIGHT)
    if information is None:
        information = blocks(torch.func.hessian(function)(outputs), loss.num_examples)
    torch.testing.assert_close(share * curvature(loss), information, **TIGHT)
    check_mixtures(loss)
    check_products(loss)
    (through_values,) = torch.autograd.grad(loss.per_example().sum(), loss.outputs)
    torch.testing.assert_close(through_values, loss.gradient(), **TIGHT)


def check_mixtures(loss: OutputLoss) -> None:
    """Mixed columns and their energies: the loss's own way, and the one by columns."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(loss.num_examples, loss.num_columns, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(
        loss.mix_columns(weights), OutputLoss.mix_columns(loss, weights), check_dtype=False, **TIGHT
    )
    torch.testing.assert_close(
        loss.column_energies(), OutputLoss.column_energies(loss), check_dtype=False, **TIGHT
    )


def check_products(loss: OutputLoss) -> None:
    """The output Hessian times two tangents: the loss's own way, and the one by columns."""
    generator = torch.Generator().manual_seed(0)
    tangents = torch.randn(2, *loss.outputs.shape, dtype=torch.float64, generator=generator)
    flat = tangents.reshape(2, loss.num_examples, -1)
    expected = torch.einsum("nij,vnj->vni", curvature(loss), flat).reshape(tangents.shape)
    torch.testing.assert_close(loss.curvature_products(tangents), expected, **TIGHT)
    torch.testing.assert_close(OutputLoss.curvature_products(loss, tangents), expected, **TIGHT)


def check_rows(loss: OutputLoss, function: Callable[[Tensor, slice], Tensor]) -> None:
    """`function(outputs of one example, its rows)` is the summed loss of that example alone."""
    rows = loss.outputs.shape[0] // loss.num_examples
    alone = [
        function(loss.outputs.detach()[at], at)
        for at in (slice(n * rows, (n + 1) * rows) for n in range(loss.num_examples))
    ]
    torch.testing.assert_close(
        replace(loss, reduction="sum").per_example().detach(), torch.stack(alone), **TIGHT
    )
