import math

import pytest
import torch
from finite_sums import FiniteSum
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence.linalg.lissa import Scale, explain_small_batch, lissa, plan_lissa, plan_minibatch
from lightning_influence.support.errors import DivergenceError


def scale_of(problem, **changes):
    numbers = {
        "largest": problem.largest,
        "trace": float(problem.H.trace()),
        "kappa": problem.kappa,
        "damping_low": problem.damping,
        "damping_high": problem.damping,
        "num_examples": problem.N,
    }
    return Scale(**{**numbers, **changes})


def solve(problem, plan, scale, **options):
    return lissa(problem.product, problem.batch_product, problem.vectors, plan, scale, **options)


@pytest.mark.parametrize("damping", [5.0, 0.3, 1e-2, 1e-3])
@pytest.mark.parametrize("size", [100, 4000])
def test_derived_hyperparameters_reach_the_tolerance(damping, size):
    problem = FiniteSum(N=size, damping=damping)
    scale = scale_of(problem)
    for tolerance in (0.05, 0.01):
        problem.examples = 0
        plan = plan_lissa(scale, tolerance=tolerance)
        result = solve(problem, plan, scale, tolerance=tolerance)
        assert problem.errors(result.solutions).max() <= tolerance
        assert problem.examples <= 1.5 * plan.cost + 2 * size


def test_the_cheaper_way_is_chosen():
    """Minibatches for much data and a damping that is not tiny; else products over everything."""
    variants = {
        (size, damping): plan_lissa(scale_of(FiniteSum(N=200, damping=damping), num_examples=size)).variant
        for size in (100, 1_000_000)
        for damping in (0.1, 1e-7)
    }
    assert variants[1_000_000, 0.1] == "minibatch"
    assert set(variants.values()) == {"minibatch", "full"}
    assert variants[100, 0.1] == variants[100, 1e-7] == variants[1_000_000, 1e-7] == "full"


def test_the_numbers_are_those_of_the_theory():
    scale = Scale(2.0, 12.0, 1.5, 0.5, 0.5, 10**9)
    # kappa Tr(H) lambda_1 / (lambda_1 + lambda)^2, at most the paper's kappa Tr(H) / (lambda_1 + lambda)
    assert scale.smallest_batch == math.ceil(1.5 * 12 * 2 / 2.5**2)
    assert scale.stable_step(9) == pytest.approx(2 / (2.5 + 1.5 * 12 / 9 * 2 / 2.5), rel=1e-6)
    differing = Scale(2.0, 12.0, 1.5, 0.4, 0.5, 10**9)
    assert differing.smallest_batch == math.ceil(1.5 * 12 / 2.5)
    assert differing.stable_step(9) == pytest.approx(2 / (2.5 + 1.5 * 12 / 9), rel=1e-6)
    plan = plan_minibatch(scale, 0.05, 9)
    assert plan.step == pytest.approx(scale.stable_step(9) / 2)
    assert plan.steps == math.ceil(4 / (plan.step * 0.5))
    few = Scale(2.0, 12.0, 1.5, 0.5, 0.5, 10)
    assert few.noise(10) == 0.0
    assert few.smallest_batch < scale.smallest_batch  # drawn without replacement from few
    assert few.noise(few.smallest_batch) * few.share <= 2.5 < few.noise(few.smallest_batch - 1) * few.share


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 0.95), st.integers(1, 60))
def test_the_mean_square_error_falls_below_the_stable_step(seed, share, batch):
    """One step from any error: E||e'||^2 < ||e||^2, with the expectation over batches in closed form."""
    torch.manual_seed(seed)
    problem = FiniteSum(N=60, P=6, damping=0.1)
    scale = scale_of(problem)
    step = share * scale.stable_step(batch)
    published = share * 2 / (scale.top + scale.noise(batch))
    assert step >= published * (1 - 1e-12)  # at least the paper's; equal without noise, but for rounding
    identity = torch.eye(problem.P, dtype=torch.float64)
    norms = problem.rows.square().sum(dim=1, keepdim=True)
    second = (problem.rows * norms).T @ problem.rows / problem.N  # E[h^2]
    left = (problem.N - batch) / (batch * (problem.N - 1))
    noise = left * (second - problem.H @ problem.H)
    step_matrix = identity - step * problem.A
    expected = step_matrix @ step_matrix + step**2 * noise
    assert float(torch.linalg.eigvalsh(expected)[-1]) < 1


def test_batches_below_the_smallest_are_warned_of_and_take_longer():
    problem = FiniteSum(N=2000, damping=1.0)
    scale = scale_of(problem)
    assert scale.smallest_batch > 2
    good = plan_lissa(scale, batch_size=scale.smallest_batch)
    assert explain_small_batch(good, scale) is None
    small = plan_lissa(scale, batch_size=1)
    assert small.step < good.step
    assert small.steps > good.steps
    message = explain_small_batch(small, scale)
    assert f"ask for {scale.smallest_batch}" in message
    assert "batch_size=1 is too small" in message
    result = solve(problem, small, scale, fixed=True, tolerance=0.05)
    assert problem.errors(result.solutions).max() <= 0.05


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"step_size": 10.0}, DivergenceError, "step_size=10 is too large: LiSSA diverges from 2 / "),
        (
            {"step_size": 0.9, "batch_size": 1},
            DivergenceError,
            "batch_size=1 is too small for step_size=0.9: .* from \\d+ examples a batch on",
        ),
        ({"batch_size": 0}, ValueError, "Got batch_size=0; accepted are 1 to 400"),
        ({"batch_size": 401}, ValueError, "Got batch_size=401; accepted are 1 to 400"),
    ],
)
def test_what_cannot_work_is_refused_before_a_product(options, error, message):
    with pytest.raises(error, match=message):
        plan_lissa(scale_of(FiniteSum(damping=0.5)), **options)


def test_no_damping_is_refused():
    with pytest.raises(ValueError, match="Got a damping of 0; LiSSA accepts positive ones"):
        plan_lissa(scale_of(FiniteSum(damping=0.5), damping_low=0.0))


def test_the_batch_that_the_message_asks_for_would_do():
    problem = FiniteSum(N=2000, damping=0.5)
    scale = scale_of(problem)
    step = 1.5 / scale.top
    needed = scale.batch_for((2 / step - scale.top) / scale.share)
    with pytest.raises(DivergenceError, match=f"from {needed} examples a batch on"):
        plan_lissa(scale, step_size=step, batch_size=needed // 2)
    plan_lissa(scale, step_size=step, batch_size=needed + 1)


def test_divergence_is_explained():
    """A spectrum that was estimated far too low, with batch and step asked for: no answer, but the cause."""
    problem = FiniteSum(N=400, damping=0.02)
    wrong = scale_of(problem, largest=problem.largest / 50, trace=float(problem.H.trace()) / 50)
    plan = plan_lissa(wrong, batch_size=2)
    with pytest.raises(
        DivergenceError, match=r"LiSSA diverged with steps of .*batches of 2 examples; .*too low"
    ):
        solve(problem, plan, wrong, fixed=True)


@pytest.mark.parametrize("batch", [None, 4])
def test_a_spectrum_that_was_estimated_too_low_is_survived_where_nothing_was_asked_for(batch):
    problem = FiniteSum(N=400, damping=0.02)
    wrong = scale_of(problem, largest=problem.largest / 4, trace=float(problem.H.trace()) / 4)
    plan = plan_lissa(wrong) if batch is None else plan_minibatch(wrong, 0.05, batch)
    result = solve(problem, plan, wrong)
    assert problem.errors(result.solutions).max() <= 0.05
    assert result.facts.get("widened") or result.facts["batch"] > batch


def test_dampings_that_differ():
    problem = FiniteSum(N=300, damping=0.0)
    damping = torch.linspace(0.05, 2.0, problem.P, dtype=torch.float64)
    problem.A = problem.H + torch.diag(damping)
    problem.exact = torch.linalg.solve(problem.A, problem.vectors.T).T
    scale = scale_of(problem, damping_low=0.05, damping_high=2.0)

    def batch_product(v, count, seed):
        return FiniteSum.batch_product(problem, v, count, seed) + damping * v

    for options in ({}, {"batch_size": 30}):
        plan = plan_lissa(scale, **options)
        result = lissa(problem.product, batch_product, problem.vectors, plan, scale)
        assert problem.errors(result.solutions).max() <= 0.05
