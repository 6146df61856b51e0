import pytest
import torch
from finite_sums import FiniteSum

from lightning_influence.linalg.minibatch_rounds import Round, run_rounds
from lightning_influence.support.errors import DivergenceError

PLAN = Round(step=0.3, batch=20, steps=120, tail=60)


def solve(problem, plan=PLAN, **options):
    return run_rounds(
        problem.product,
        problem.batch_product,
        problem.vectors,
        plan,
        **{
            "smallest": problem.damping,
            "num_examples": problem.N,
            "explain": lambda one: f"batches of {one.batch}",
            **options,
        },
    )


@pytest.mark.parametrize("tolerance", [0.1, 1e-3, 1e-8])
def test_rounds_converge_where_one_run_stops_at_its_noise(tolerance):
    problem = FiniteSum(damping=0.3)
    result = solve(problem, tolerance=tolerance)
    assert problem.errors(result.solutions).max() <= tolerance
    torch.testing.assert_close(result.residuals, problem.residuals(result.solutions), rtol=1e-4, atol=1e-12)
    assert result.facts["open"] == 0
    assert result.facts["rounds"] + 1 == result.products
    # Example products are counted as they are taken; a round's first step needs none.
    taken = result.facts["example_products"] - result.facts["rounds"] * PLAN.batch
    assert problem.examples == taken


def test_one_round_is_the_published_iteration():
    """u <- u - eta [(H_b + lambda) u - v], averaged over its tail; only the length of the step is ours."""
    problem = FiniteSum(damping=0.3)
    plan = Round(step=0.2, batch=10, steps=9, tail=4)
    result = solve(problem, plan, max_steps=9, tolerance=0.0, seed=5)
    for v, found in zip(problem.vectors, result.solutions, strict=True):
        u, total = torch.zeros_like(v), torch.zeros_like(v)
        for number in range(9):
            residual = problem.batch_product(u[None], 10, 5 + number)[0] - v
            u = u - 0.2 * residual
            if number >= 5:
                total += u / 4
        cosine = (found @ total) / (found.norm() * total.norm())
        assert float(cosine) == pytest.approx(1.0, abs=1e-12)
        length = (total @ v) / (total @ problem.A @ total)
        torch.testing.assert_close(found, length * total)


def test_momentum_and_preconditioner():
    problem = FiniteSum(damping=0.05)
    inverse = 1 / problem.A.diagonal()
    plan = Round(step=0.15, batch=40, steps=60, tail=30, momentum=0.5)
    result = solve(problem, plan, precondition=lambda v: v * inverse, tolerance=1e-6, max_steps=20_000)
    assert problem.errors(result.solutions).max() <= 1e-6


def test_the_same_seed_gives_the_same_answer():
    problem = FiniteSum(damping=0.3)
    first, second = solve(problem, seed=3), solve(problem, seed=3)
    assert torch.equal(first.solutions, second.solutions)
    assert not torch.equal(first.solutions, solve(problem, seed=4).solutions)


def test_zero_right_hand_sides_and_no_steps():
    problem = FiniteSum(damping=0.3)
    problem.vectors[2] = 0
    problem.exact[2] = 0
    result = solve(problem)
    assert not result.solutions[2].any()
    assert result.residuals[2] == 0
    nothing = solve(problem, max_steps=0)
    assert not nothing.solutions.any()


def test_divergence_is_never_an_answer():
    problem = FiniteSum(damping=0.05)
    with pytest.raises(DivergenceError, match="batches of 2"):
        solve(problem, Round(step=1.2, batch=2, steps=400, tail=200))


def test_a_batch_that_diverges_grows_if_it_may():
    problem = FiniteSum(damping=0.05)
    tried = []

    def regrow(batch):
        tried.append(batch)
        return Round(step=1.0, batch=batch, steps=200, tail=100)

    result = solve(problem, Round(step=1.0, batch=2, steps=200, tail=100), regrow=regrow, tolerance=0.01)
    assert tried
    assert tried == [2 * 2 ** (k + 1) for k in range(len(tried))]
    assert result.facts["batch"] == tried[-1]
    assert problem.errors(result.solutions).max() <= 0.01
