import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence.linalg.low_rank import factorise_weights


def spectrum(d_out: int, d_in: int, damping: float, decay: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Weights and energies as EK-FAC has them: eigenvalues that decay from 1 over ten orders of magnitude."""
    rows = torch.logspace(0, -5 * decay, d_out, dtype=torch.float64)
    columns = torch.logspace(0, -5 * decay, d_in, dtype=torch.float64)
    noise = torch.rand(d_out, d_in, dtype=torch.float64) + 0.5
    eigenvalues = rows[:, None] * columns * noise
    return 1 / (eigenvalues + damping), eigenvalues.sum(1), eigenvalues.sum(0)


def scaled(weights: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """What is approximated: energies have a floor of a thousandth of their mean."""
    rows, columns = (x + 1e-3 * x.mean() for x in (rows, columns))
    return rows[:, None] * weights * columns


@settings(deadline=None, max_examples=25)
@given(
    d_out=st.integers(1, 30),
    d_in=st.integers(1, 30),
    damping=st.sampled_from([1e-1, 1e-3, 1e-6]),
    tolerance=st.sampled_from([1e-1, 1e-3, 1e-6]),
    seed=st.integers(0, 99),
)
def test_error_is_within_the_tolerance_and_the_rank_the_smallest(d_out, d_in, damping, tolerance, seed):
    torch.manual_seed(seed)
    weights, rows, columns = spectrum(d_out, d_in, damping)
    form = factorise_weights(weights, rows, columns, tolerance, max_rank=30)
    assert form is not None
    assert (form.left.shape, form.right.shape) == ((form.rank, d_out), (form.rank, d_in))
    exact = scaled(weights, rows, columns)
    got = scaled(form.left.T @ form.right, rows, columns)
    error = (got - exact).norm() / exact.norm()
    assert error <= tolerance * (1 + 1e-6)
    assert form.error == pytest.approx(
        float(error), rel=1e-3, abs=1e-7
    )  # 1e-8: cancellation in 1 - kept / total
    values = torch.linalg.svdvals(exact)
    best = (values.square().flip(0).cumsum(0).flip(0).sqrt() / values.norm()) > tolerance
    assert form.rank == max(1, int(best.sum()))


def test_a_flat_spectrum_costs_few_terms_more_than_the_best():
    """The sketch is far smaller than the matrix, and its power steps have to find the leading space."""
    U, V = (torch.linalg.qr(torch.randn(150, 150, dtype=torch.float64)).Q for _ in range(2))
    values = 0.9 ** torch.arange(150, dtype=torch.float64)
    weights, even = (U * values) @ V.T, torch.ones(150, dtype=torch.float64)
    tail = values.square().flip(0).cumsum(0).flip(0).sqrt() / values.norm()
    best = int((tail > 0.05).sum())
    form = factorise_weights(weights, even, even, 0.05, max_rank=best + 1)
    assert form is not None
    assert best <= form.rank <= best + 1


def test_energies_decide_where_the_error_goes():
    weights, rows, columns = spectrum(20, 20, 1e-4)
    weighted = factorise_weights(weights, rows, columns, 1e-3, 20)
    even = factorise_weights(weights, torch.ones(20), torch.ones(20), 1e-3, 20)
    assert weighted.rank != even.rank or not torch.allclose(weighted.left, even.left)


def test_a_tolerance_out_of_reach_gives_none():
    weights, rows, columns = spectrum(30, 30, 1e-6)
    assert factorise_weights(weights, rows, columns, 1e-6, max_rank=2) is None


def test_no_weights_or_no_energy_give_none():
    zero = torch.zeros(3, dtype=torch.float64)
    assert factorise_weights(torch.zeros(3, 3), zero + 1, zero + 1, 0.1, 3) is None
    assert factorise_weights(torch.ones(3, 3), zero, zero, 0.1, 3) is None


def test_the_same_every_time_without_touching_the_global_state():
    weights, rows, columns = spectrum(20, 25, 1e-3)
    before = torch.get_rng_state()
    first, second = (factorise_weights(weights, rows, columns, 1e-3, 20) for _ in range(2))
    assert torch.equal(first.left, second.left)
    assert torch.equal(torch.get_rng_state(), before)


def test_precision_of_the_weights_is_kept():
    weights, rows, columns = (x.float() for x in spectrum(12, 9, 1e-2))
    form = factorise_weights(weights, rows, columns, 1e-3, 9)
    assert form.left.dtype == form.right.dtype == torch.float32
    exact = scaled(weights.double(), rows.double(), columns.double())
    got = scaled((form.left.T @ form.right).double(), rows.double(), columns.double())
    assert (got - exact).norm() <= 1.01e-3 * exact.norm()
