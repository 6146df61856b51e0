"""The studies past the Gauss-Newton matrix: their mathematics against dense references, and short runs."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_influence.curvature.factors import Eigenbasis
from lightning_influence.curvature.inverse import BlockInverse, EigenInverse
from lightning_influence.curvature.two_level import TwoLevel
from lightning_influence.model.layers.plan import Layout

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The benchmark modules, with an empty cache; forgotten afterwards."""
    known, folder = set(sys.modules), tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import coarse_choices
        import coarse_vectors
        import ladder_scores
        import ladder_tasks
        import run_average
        import snapshots
        import tasks
        import unrolling
        import unrolling_study

        patch.setattr(tasks, "CACHE", folder)
        patch.setattr(ladder_tasks, "CACHE", folder)
        patch.setattr(ladder_scores, "DRAWS", 10)
        yield SimpleNamespace(
            choices=coarse_choices,
            coarse=coarse_vectors,
            average=run_average,
            snapshots=snapshots,
            unrolling=unrolling,
            study=unrolling_study,
        )
    for name in set(sys.modules) - known:
        if getattr(sys.modules[name], "__file__", None) and str(BENCHMARKS) in sys.modules[name].__file__:
            del sys.modules[name]


@pytest.fixture(scope="module")
def problem(bench):
    return bench.choices.Problem(bench.study.small_task(), 16)


def semidefinite(numel, seed, rank=None):
    root = torch.randn(
        numel, rank or numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return root @ root.T / numel


def flow(matrices, gradients, times, decay):
    """Displacement ``(P, N)`` at the end of the flow ``d' = -(G_l + w) d + g_l / N``, one segment at a time.

    By one matrix exponential of the system augmented with its constant input: no filter, no eigenvalues.
    """
    count, numel = gradients[0].shape
    state = torch.zeros(numel + count, count, dtype=torch.float64)
    state[numel:] = torch.eye(count, dtype=torch.float64)
    for matrix, g, time in zip(matrices, gradients, times, strict=True):
        system = torch.zeros(numel + count, numel + count, dtype=torch.float64)
        system[:numel, :numel] = -(matrix + decay * torch.eye(numel, dtype=torch.float64))
        system[:numel, numel:] = g.T / count
        state = torch.linalg.matrix_exp(time * system) @ state
    return state[:numel]


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_unrolled_scores_are_those_of_the_flow_without_an_example(bench, decay):
    numel, count = 6, 5
    # The second matrix is singular: the filter's limit counts.
    matrices = [semidefinite(numel, 0), semidefinite(numel, 1, rank=3), semidefinite(numel, 2)]
    generator = torch.Generator().manual_seed(3)
    gradients = [torch.randn(count, numel, generator=generator, dtype=torch.float64) for _ in matrices]
    queries = torch.randn(4, numel, generator=generator, dtype=torch.float64)
    times = (0.5, 2.0, 1.5)
    parts = [
        bench.unrolling.Segment(time, decay, bench.unrolling.DenseCurvature(matrix), g)
        for time, matrix, g in zip(times, matrices, gradients, strict=True)
    ]
    expected = queries @ flow(matrices, gradients, times, decay)
    torch.testing.assert_close(bench.unrolling.unroll(parts, queries), expected, rtol=1e-10, atol=1e-12)


def test_a_long_segment_is_the_influence_function(bench):
    matrix = semidefinite(6, 0) + torch.eye(6, dtype=torch.float64)
    train, queries = torch.randn(5, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    curvature = bench.unrolling.DenseCurvature(matrix)
    found = bench.unrolling.unroll([bench.unrolling.Segment(1e3, 0.1, curvature, train)], queries)
    damped = matrix + 0.1 * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(found, queries @ torch.linalg.solve(damped, train.T) / 5)


def orthogonal(size):
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


def kronecker(shapes):
    layers = {}
    for name, (groups, rows, columns) in shapes.items():
        basis = Eigenbasis.of_vectors(
            torch.stack([orthogonal(columns) for _ in range(groups)]),
            torch.stack([orthogonal(rows) for _ in range(groups)]),
        )
        layers[name] = EigenInverse(basis, torch.rand(groups, rows, columns, dtype=torch.float64), 0.1)
    return BlockInverse(Layout(shapes), layers)


def blocks(inverse):
    """The undamped matrix of each group of each layer."""
    found = []
    for layer in inverse.layers.values():
        for q_in, q_out, values in zip(layer.basis.q_in, layer.basis.q_out, layer.eigenvalues, strict=True):
            vectors = torch.kron(q_out, q_in)
            found.append(vectors @ torch.diag(values.flatten()) @ vectors.T)
    return found


SHAPES = {"a": (1, 2, 3), "b": (2, 2, 2)}


@pytest.mark.parametrize("function", [lambda h: torch.exp(-300 * h), lambda h: h + 0.5], ids=["exp", "shift"])
def test_functions_of_factors_are_those_of_their_matrix(bench, function):
    inverse = kronecker(SHAPES)
    inverse.layers["a"].eigenvalues[0, 0, 0] = 1e3  # its exponential is 0
    matrix = torch.block_diag(*blocks(inverse))
    vectors = torch.randn(3, len(matrix), dtype=torch.float64)
    found = bench.unrolling.FactoredCurvature(inverse).apply(function, vectors)
    values, basis = torch.linalg.eigh(matrix)
    torch.testing.assert_close(found, (vectors @ basis * function(values)) @ basis.T)


def test_average_of_factors_is_the_diagonal_of_the_mean_in_the_last_basis(bench):
    parts = [kronecker(SHAPES), kronecker(SHAPES)]
    found = bench.unrolling.average_factored(Layout(SHAPES), parts)
    means = [(a + b) / 2 for a, b in zip(*(blocks(part) for part in parts), strict=True)]
    for layer, own in ((found.layers["a"], means[:1]), (found.layers["b"], means[1:])):
        bases = [torch.kron(o, i) for o, i in zip(layer.basis.q_out, layer.basis.q_in, strict=True)]
        diagonals = [torch.diagonal(q.T @ m @ q) for q, m in zip(bases, own, strict=True)]
        torch.testing.assert_close(layer.eigenvalues.flatten(), torch.cat(diagonals))


def test_projection_on_the_whole_space_is_exact(bench):
    matrix = semidefinite(6, 0)
    basis, vectors = orthogonal(6), torch.randn(3, 6, dtype=torch.float64)
    projected = bench.unrolling.ProjectedCurvature(basis, basis @ matrix)
    expected = bench.unrolling.DenseCurvature(matrix).apply(torch.sqrt, vectors)
    torch.testing.assert_close(projected.apply(torch.sqrt, vectors), expected)


def test_snapshots_are_of_the_one_run(bench):
    task = bench.study.small_task().task
    first, last = bench.snapshots.snapshots(task, (2, 6))
    for name, value in task.trained().state_dict().items():
        torch.testing.assert_close(last.module.state_dict()[name], value, rtol=0, atol=0)
    assert (first.record.steps, last.record.steps) == (4, 12)
    rate = next(iter(last.record.layers.values())).rate
    assert rate == pytest.approx(task.recipe.effective_time(len(task.train)))
    with pytest.raises(ValueError, match=r"accepted are 1 to 6"):
        bench.snapshots.snapshots(task, (7,))


def test_the_subspace_stands_for_the_matrix(bench):
    entry = bench.study.small_task()
    run = [
        bench.snapshots.Checkpoint(entry.task, one) for one in bench.snapshots.snapshots(entry.task, (2, 6))
    ]
    parts = [[one] for one in run]
    queries = run[-1].gradients(entry.task.queries)
    found = [
        bench.unrolling.unroll(
            bench.study.segments(parts, bench.study.curvatures(parts, dense=dense), 1e-3, 1.0), queries
        )
        for dense in (True, False)
    ]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3 * float(found[0].abs().max()))


@pytest.mark.parametrize("name", ["study", "average", "coarse"])
def test_small_runs_print_a_table(bench, name, capsys):
    getattr(bench, name).main(["--small", "--draws", "5"])
    printed = capsys.readouterr().out
    kinds = {
        "study": ("auto", "ggn, unrolled, 0.5 T", "ekfac, filter, 1 T"),
        "average": ("2, 4, 6", "6, 3 solver seeds"),
        "coarse": tuple(bench.choices.KINDS),
    }
    for text in kinds[name]:
        assert f"│ {text} " in printed or f" {text} │" in printed.replace("  ", " ")
    assert "nan" not in printed


def test_ekfac_is_multiplied_as_it_is_inverted(bench, problem):
    vectors = torch.randn(3, problem.layout.numel)
    found = problem.inverse.apply(bench.choices._precondition(problem, vectors))
    torch.testing.assert_close(found, vectors, rtol=1e-3, atol=1e-3)


def test_worst_directions_are_where_ekfac_is_most_wrong(bench, problem):
    numel, choices = problem.layout.numel, bench.choices
    matrix = problem.system(torch.eye(numel)).double()
    root = torch.linalg.cholesky(problem.inverse.apply(torch.eye(numel)).double())
    values, vectors = torch.linalg.eigh(root.T @ matrix @ root - torch.eye(numel))
    leading = (root @ vectors[:, values.abs().argmax()]).float()

    def missing(choose):
        space = problem.grown(None, choose(problem, None, 0, 16))
        return float((leading - leading @ space.directions.T @ space.directions).norm() / leading.norm())

    none, one, two = (
        missing(choose)
        for choose in (choices.mixtures(None), choices.worst_directions(1), choices.worst_directions(2))
    )
    assert two < 0.1
    assert two < one < none / 2


def test_every_kind_fills_a_space_and_more_of_it_answers_better(bench, problem):
    for choose, _ in bench.choices.KINDS.values():
        small = problem.grown(None, choose(problem, None, 0, 8))
        large = problem.grown(small, choose(problem, small, 8, 16))
        before, after = (
            problem.residual(TwoLevel(problem.inverse, space).solve(problem.asked))
            for space in (small, large)
        )
        assert small.size <= 8 < large.size <= 16
        assert after < before


def test_asked_queries_are_in_their_own_space(bench, problem):
    space = problem.grown(None, bench.choices.queries_first("asked")(problem, None, 0, 5))
    vectors = problem.inverse.apply(problem.asked[:5])
    outside = vectors - vectors @ space.directions.T @ space.directions
    assert float(outside.norm() / vectors.norm()) < 1e-3
