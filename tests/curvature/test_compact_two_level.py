"""The compact coarse space: products and answers are those of dense algebra on the directions it stores."""

import math

import pytest
import torch
from drive import TIGHT, Setup, closed_form
from test_two_level import DAMPING, SOME, Problem, definition

from lightning_influence.curvature import passes
from lightning_influence.curvature.compact_space import CompactSpace, CurvatureRows
from lightning_influence.curvature.compact_two_level import (
    CompactTwoLevel,
    compute_best_step,
    list_forms,
    solve_closed,
)
from lightning_influence.curvature.inverse import BlockInverse
from lightning_influence.curvature.low_rank_matrices import compress, draw_rank_one
from lightning_influence.curvature.row_passes import CombinationPass, RowsPass
from lightning_influence.curvature.two_level import TwoLevel, rescale_inverse
from lightning_influence.linalg.block_krylov import block_krylov
from lightning_influence.linalg.galerkin import GalerkinInverse
from lightning_influence.methods.compact_scorer import CompactScorer
from lightning_influence.model.layers.gradients import DenseGradients


def divide(p: Problem, stages: int) -> dict[str, int]:
    return {name: number % stages for number, name in enumerate(p.setup.layout.shapes)}


def build(p: Problem, rank: int, probes: int = 32, stages: int = 1, seed: int = 1) -> CompactSpace:
    """The space of a problem's anchors, in whole precision but for the rank."""
    setup = p.setup
    vectors = p.inverse.apply(setup.layout.dense(p.anchors)[0])
    directions = {name: compress(x, rank) for name, x in setup.layout.split(vectors).items()}
    W = draw_rank_one(setup.layout.shapes, probes, seed, vectors)
    divided = divide(p, stages)
    rows = [
        setup.run(RowsPass(setup.plan, V, stages=told), batch_size=size)
        for V, told, size in ((W, None, 5), (directions, divided, 4))
    ]
    found = [one.rows(vectors) for one in rows]
    values = torch.cat([part.values for part in found], dim=2)
    both = type(found[0])(found[0].indices, values)
    normaliser = rows[0].count.normaliser
    return CompactSpace(setup.layout, directions, W, both, normaliser, p.inverse, 0, rank, 0, divided)


def operate(p: Problem, inverse: BlockInverse, space: CompactSpace, step: float = 1.0) -> CompactTwoLevel:
    plan = p.setup.plan
    return CompactTwoLevel(
        inverse,
        space,
        lambda vectors: p.setup.run(RowsPass(plan, vectors)).rows(space.rows.values),
        lambda rows: p.setup.run(CombinationPass(plan, rows)).result(),
        lambda tensor: tensor,
        step,
    )


def compare(p: Problem, operator: CompactTwoLevel, closed: BlockInverse, low_rank: float = 0.0, **options):
    forms = list_forms(operator.inverse, closed)
    answers = solve_closed(forms, p.queries, low_rank, torch.float64)
    return operator.compare(p.queries, answers, **{"tolerance": math.inf, **options})


def densify(p: Problem, vectors) -> torch.Tensor:
    return p.setup.layout.join({name: part.dense() for name, part in vectors.items()})


def split(p: Problem, space: CompactSpace) -> torch.Tensor:
    """The parts of the directions in the stages, one after the other, (m S, P)."""
    parts = [
        p.setup.layout.join({
            name: part.dense() * (space.stages[name] == stage) for name, part in space.directions.items()
        })
        for stage in range(space.num_stages)
    ]
    return torch.stack(parts, dim=1).flatten(0, 1)


def expect(p: Problem, inverse: BlockInverse, damping, Q: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    A, z = p.matrix(damping), inverse.apply(V)
    T = Q @ A @ Q.T
    return z + (torch.linalg.pinv(T, hermitian=True) @ (Q @ (V - z @ A).T)).T @ Q


@pytest.mark.grid
@pytest.mark.parametrize(("rank", "stages"), [(1, 1), (2, 2), (50, 1), (1, 3)])
@pytest.mark.parametrize("name", SOME)
def test_products_are_those_of_what_is_stored(name, rank, stages):
    p = Problem(name)
    space = build(p, rank, stages=stages)
    Q, W, G = split(p, space), densify(p, space.probes), p.setup.ggn()
    both = torch.cat([W, Q])
    rows = space.rows.values
    assert rows.shape[:1] == (12,)
    gram = torch.einsum("nkv,nkw->vw", rows, rows) / space.normaliser
    torch.testing.assert_close(gram, both @ G @ both.T, **TIGHT)
    for damping in (DAMPING, {layer: 0.01 * k for k, layer in enumerate(p.setup.layout.shapes)}):
        operator = operate(p, closed_form(p.factors, p.setup.layout, damping), space)
        torch.testing.assert_close(operator.small, Q @ p.matrix(damping) @ Q.T, **TIGHT)
        weights = torch.randn(3, len(Q), dtype=torch.float64)
        torch.testing.assert_close(operator.combine(weights), weights @ Q, **TIGHT)
        expected = weights @ Q @ p.matrix(damping)
        for few in (slice(0, 3), slice(1, 2)):  # by columns, and by a backward pass for what is asked
            found = operator.multiply(weights[few])
            torch.testing.assert_close(found, expected[few], rtol=1e-9, atol=1e-10)
        vectors = torch.randn(2, p.setup.layout.numel, dtype=torch.float64)
        torch.testing.assert_close(operator.project(vectors), vectors @ Q.T, **TIGHT)


def test_batches_of_fewer_columns_than_others_are_combined():
    """One vector takes one backward pass; four take one a column: rows of shorter examples end in zeros."""
    p = Problem("mlp_gelu")
    rows = p.setup.run(RowsPass(p.setup.plan, build(p, 1).directions)).rows(torch.empty(0).double())
    padded = torch.cat([rows.values, torch.zeros_like(rows.values)], dim=1)
    few, many = (CurvatureRows(rows.indices, padded[..., :count]) for count in (1, padded.shape[1]))
    one, all_ = (p.setup.run(CombinationPass(p.setup.plan, W)).result() for W in (few, many))
    torch.testing.assert_close(one, all_[:1], **TIGHT)


@pytest.mark.grid
@pytest.mark.parametrize(("rank", "stages"), [(1, 1), (3, 1), (1, 2)])
@pytest.mark.parametrize("damping", [DAMPING, 0.3, {}])
@pytest.mark.parametrize("name", SOME)
def test_the_answer_is_the_galerkin_correction_with_what_is_stored(name, damping, rank, stages):
    p = Problem(name)
    if damping == {}:
        damping = {layer: 0.01 * (k + 1) for k, layer in enumerate(p.setup.layout.shapes)}
    space = build(p, rank, stages=stages)
    inverse = closed_form(p.factors, p.setup.layout, damping)
    V, Q = p.setup.layout.dense(p.queries)[0], split(p, space)
    correction, residuals, own = compare(p, operate(p, inverse, space), p.inverse)
    solved = expect(p, inverse, damping, Q, V)
    torch.testing.assert_close(correction.solutions(), solved, rtol=1e-6, atol=1e-7)
    for room in (0, 2**30):
        scorer = CompactScorer(correction, room)
        expected = solved @ p.setup.gradients().T / 12
        torch.testing.assert_close(p.scores(scorer), expected, rtol=1e-5, atol=1e-8)
    # The residuals are those that the probes see: of the answer, and of the closed form in the same system.
    W = densify(p, space.probes)
    for x, told in ((solved, residuals), (p.inverse.apply(V), own)):
        seen = ((V - x @ p.matrix(damping)) @ W.T).square().mean(1).sqrt() / V.norm(dim=1)
        torch.testing.assert_close(told, seen, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SOME)
def test_with_full_rank_it_is_the_answer_of_the_dense_space(name):
    p = Problem(name)
    V = p.setup.layout.dense(p.queries)[0]
    correction, _, own = compare(p, operate(p, p.inverse, build(p, 50)), p.inverse)
    expected = TwoLevel(p.inverse, p.space).solve(V)
    torch.testing.assert_close(correction.solutions(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(expected, definition(p, p.inverse, DAMPING, V), rtol=1e-8, atol=1e-8)
    step = compute_best_step(p.inverse, build(p, 50))
    for one in rescale_inverse(p.inverse, p.space).layers.values():
        assert one.scale == pytest.approx(step, rel=1e-6)
    assert own.shape == (3,)


def test_residuals_are_estimated_without_bias():
    p = Problem("mlp_gelu")
    V = p.setup.layout.dense(p.queries)[0]
    correction, residuals, own = compare(p, operate(p, p.inverse, build(p, 2, 4000)), p.inverse)
    for x, told in ((correction.solutions(), residuals), (p.inverse.apply(V), own)):
        true = (V - x @ p.matrix(DAMPING)).norm(dim=1) / V.norm(dim=1)
        assert true.min() > 1e-3
        # The relative error is at most about sqrt(8 / s) / 2: 2.2% for 4000 probes, and four times that here.
        torch.testing.assert_close(told, true, rtol=0.09, atol=0)


@pytest.mark.slow
def test_residuals_are_not_flattered_by_the_choice_that_probes_make():
    """Few probes choose among several answers: what they tell is right on average all the same."""
    p = Problem("mlp_gelu", anchors=2)
    V, A = p.setup.layout.dense(p.queries)[0], p.matrix(1e-4)
    inverse = closed_form(p.factors, p.setup.layout, 1e-4)
    told = true = 0.0
    for seed in range(150):
        space = build(p, 1, 4, seed=seed)
        correction, residuals, _ = compare(p, operate(p, inverse, space), p.inverse, tolerance=0.0)
        told += float(residuals.square().mean())
        true += float((((V - correction.solutions() @ A).norm(dim=1) / V.norm(dim=1)) ** 2).mean())
    assert told > 0.85 * true


@pytest.mark.grid
@pytest.mark.parametrize("low_rank", [0.3, 1e-3])
@pytest.mark.parametrize("name", SOME)
def test_answers_that_are_cut_are_corrected_as_they_are_held(name, low_rank):
    p = Problem(name, anchors=4)
    space = build(p, 1, stages=2)
    V, Q, W = p.setup.layout.dense(p.queries)[0], split(p, space), densify(p, space.probes)
    correction, residuals, own = compare(p, operate(p, p.inverse, space), p.inverse, low_rank)
    z = densify(p, correction.solved)
    off = (z - p.inverse.apply(V)).norm(dim=1) / p.inverse.apply(V).norm(dim=1)
    assert float(off.square().mean().sqrt()) <= 2 * low_rank
    A = p.matrix(DAMPING)
    T = Q @ A @ Q.T
    expected = z + (torch.linalg.pinv(T, hermitian=True) @ (Q @ (V - z @ A).T)).T @ Q
    torch.testing.assert_close(correction.solutions(), expected, rtol=1e-5, atol=1e-6)
    for x, told in ((expected, residuals), (z, own)):
        seen = ((V - x @ A) @ W.T).square().mean(1).sqrt() / V.norm(dim=1)
        torch.testing.assert_close(told, seen, rtol=1e-5, atol=1e-6)


@pytest.mark.grid
@pytest.mark.parametrize("other", ["itself", "shorter", "other"])
@pytest.mark.parametrize("name", SOME)
def test_unsolved_queries_get_the_best_of_what_the_closed_forms_and_their_steps_make(name, other):
    p = Problem(name, anchors=2)
    space, V, A = build(p, 1, 600), p.setup.layout.dense(p.queries)[0], p.matrix(DAMPING)
    # Far too long in every case.
    inverse, step = (p.inverse.scaled(7.0), 1.0) if other == "itself" else (p.inverse, 7.0)
    damped = closed_form(p.factors, p.setup.layout, 30 * DAMPING)
    closed = {"itself": inverse, "shorter": inverse, "other": damped}[other]
    operator, bases = operate(p, inverse, space, step), [step * inverse.apply(V), closed.apply(V)]
    bases = bases[:1] if other == "itself" else bases
    plain, before, own = compare(p, operator, closed)
    assert plain.steps.eq(step).all()
    found, after, same = compare(p, operator, closed, tolerance=0.0)
    assert (after <= before).all()
    torch.testing.assert_close(own, same)
    Q, W, shortened = densify(p, space.directions), densify(p, space.probes), 0
    chosen = []
    for q, v in enumerate(V):
        seen = W @ v
        tried = [plain.solutions()[q]]
        for z in bases:
            basis = torch.cat([z[q : q + 1], Q])
            tried.append(torch.linalg.lstsq(basis @ A @ basis.T, basis @ v, driver="gelsd").solution @ basis)
        if len(bases) > 1:
            image = W @ A @ bases[1][q]
            tried.append(bases[1][q] * (image @ seen) / (image @ image))
        sizes = [float((seen - W @ A @ x).square().sum()) for x in tried]
        chosen.append(sizes.index(min(sizes)))
        best = tried[chosen[-1]]
        image = W @ A @ best
        if float((seen - image).square().mean()) > float(v.square().sum()):
            # Worse than nothing: as long as is best for the residual, as the probes see it.
            best, shortened = best * (image @ seen) / (image @ image), shortened + 1
        torch.testing.assert_close(found.solutions()[q], best, rtol=1e-5, atol=1e-6)
    assert set(chosen) - {0}
    assert found.shortened == shortened
    assert plain.shortened == 0
    if name == "conv2d_replicate_depthwise" and other == "itself":
        assert shortened
    some = found.select(slice(1, 3))
    assert torch.equal(some.steps, found.steps[1:3])
    patient = compare(p, operator, closed, tolerance=float(before.max()) * (1 + 1e-9))[0]
    assert patient.steps.eq(step).all()


@pytest.mark.parametrize("name", SOME)
def test_dependent_and_zero_directions_change_nothing(name):
    p = Problem(name)
    few = compare(p, operate(p, p.inverse, build(p, 50)), p.inverse)[0]
    flat = p.setup.layout.dense(p.anchors)[0]
    more = torch.cat([flat, 3 * flat[:2], 0 * flat[:1], flat[1:2] - flat[2:3]])
    p.anchors = {k: DenseGradients(v[None]) for k, v in p.setup.layout.split(more).items()}
    operator = operate(p, p.inverse, build(p, 50))
    assert operator.rank <= operator.space.size - 4
    again = compare(p, operator, p.inverse)[0]
    torch.testing.assert_close(again.solutions(), few.solutions(), rtol=1e-6, atol=1e-7)


@pytest.mark.grid
@pytest.mark.parametrize(("rank", "stages"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("name", SOME)
def test_block_krylov_beside_the_space_is_galerkin_and_converges(name, rank, stages):
    p = Problem(name)
    space = build(p, rank, stages=stages)
    operator, A = operate(p, p.inverse, space), p.matrix(DAMPING)
    V, Q = p.setup.layout.dense(p.queries)[0], split(p, space)
    product = lambda vectors: vectors @ A  # noqa: E731
    one = block_krylov(product, p.inverse.apply, operator.begin(V), max_steps=1, tolerance=1e-12)
    basis = torch.cat([Q, p.inverse.apply(V)])
    T = basis @ A @ basis.T
    expected = (torch.linalg.pinv(T, hermitian=True, rtol=1e-12) @ basis @ V.T).T @ basis
    torch.testing.assert_close(one.solutions, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        one.residuals, (V - one.solutions @ A).norm(dim=1) / V.norm(dim=1), rtol=1e-6, atol=1e-9
    )
    all_ = block_krylov(product, p.inverse.apply, operator.begin(V), max_steps=40, tolerance=1e-9)
    torch.testing.assert_close(all_.solutions, torch.linalg.solve(A, V.T).T, rtol=1e-6, atol=1e-7)


def test_it_is_told_and_stored_and_grows():
    p = Problem("mlp_gelu")
    space = build(p, 1)
    assert repr(space) == "CompactSpace(8 directions of 89 in rank 1, 12 curvature examples)"
    again = CompactSpace.from_state_dict(space.state_dict())
    first, second = (
        compare(p, operate(p, p.inverse, one), p.inverse)[0].solutions() for one in (space, again.to("cpu"))
    )
    assert torch.equal(first, second)
    numbers = sum(t.nbytes for part in space.directions.values() for t in part.tensors().values())
    numbers += sum(t.nbytes for part in space.probes.values() for t in part.tensors().values())
    assert space.nbytes == numbers + space.rows.values.nbytes
    more = {k: g.select(slice(8, 11)) for k, g in p.train.items()}
    vectors = p.inverse.apply(p.setup.layout.dense(more)[0])
    directions = {name: compress(x, 1) for name, x in p.setup.layout.split(vectors).items()}
    rows = p.setup.run(RowsPass(p.setup.plan, directions)).rows(vectors)
    grown = space.grown(directions, rows)
    p.anchors = {k: g.select(slice(0, 11)) for k, g in p.train.items()}
    whole = build(p, 1)
    assert grown.size == whole.size == 11
    torch.testing.assert_close(grown.rows.values, whole.rows.values, **TIGHT)


def test_examples_with_fewer_columns_have_rows_of_zeros():
    p = Problem("mlp_gelu")
    V = {k: compress(torch.randn(2, *shape).double(), 1) for k, shape in p.setup.layout.shapes.items()}
    one_pass = p.setup.run(RowsPass(p.setup.plan, V))
    one_pass._rows[0] = torch.cat([one_pass._rows[0]] * 2, dim=1)
    rows = one_pass.rows(torch.zeros(0).double())
    columns = rows.values.shape[1]
    assert rows.values[:5].all()
    assert not rows.values[5:, columns // 2 :].any()
    assert Setup.of("mlp_gelu").wbar  # the problem is unchanged


class TestGalerkinInverse:
    def test_it_is_the_inverse_whatever_the_scale_of_the_directions(self):
        generator = torch.Generator().manual_seed(0)
        Q = torch.randn(6, 20, generator=generator, dtype=torch.float64)
        Q *= torch.logspace(-6, 6, 6, dtype=torch.float64)[:, None]
        T, y = Q @ Q.T, torch.randn(3, 6, generator=generator, dtype=torch.float64)
        found = GalerkinInverse(T, torch.float64)
        assert found.rank == 6
        torch.testing.assert_close(found.solve(y), torch.linalg.solve(T, y.T).T, rtol=1e-8, atol=0)

    def test_many_directions_are_solved_for_as_few_are(self, monkeypatch):
        generator = torch.Generator().manual_seed(1)
        Q = torch.randn(6, 20, generator=generator, dtype=torch.float64)
        Q = torch.cat([
            Q,
            Q[:2] - Q[2:4],
            torch.zeros(1, 20, dtype=torch.float64),
        ])  # dependent, and of nothing
        T, y = Q @ Q.T, torch.randn(3, 20, generator=generator, dtype=torch.float64) @ Q.T
        few = GalerkinInverse(T, torch.float64).solve(y)
        monkeypatch.setattr("lightning_influence.linalg.galerkin._MANY", 0)
        many = GalerkinInverse(T, torch.float64)
        assert many.rank == 8
        torch.testing.assert_close(many.solve(y) @ Q, few @ Q, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(many.solve(y[0]) @ Q, few[0] @ Q, rtol=1e-6, atol=1e-9)

    def test_of_nothing(self):
        empty = torch.zeros(0, 0, dtype=torch.float64)
        assert GalerkinInverse(empty, torch.float64).solve(torch.zeros(2, 0)).shape == (2, 0)
        zero = GalerkinInverse(torch.zeros(3, 3, dtype=torch.float64), torch.float64)
        assert zero.rank == 0
        assert not zero.solve(torch.ones(2, 3)).any()


@pytest.mark.parametrize("name", ["tokens_weighted", "mlp_gelu"])
def test_rows_are_the_same_a_few_columns_at_a_time(name, monkeypatch):
    p = Problem(name)
    found = {}
    vectors = draw_rank_one(p.setup.layout.shapes, 5, 0, torch.empty(0, dtype=torch.float64))
    monkeypatch.setattr(passes, "_SEED_BYTES", 1)
    for room in (0, 2**30):
        counts = set()
        one_pass = RowsPass(p.setup.plan, vectors, room=room)

        def watch(*args, real=one_pass._runs, counts=counts):
            for run in real(*args):
                counts.add(next(iter(run.values())).num_seeds)
                yield run

        monkeypatch.setattr(one_pass, "_runs", watch)
        found[room] = p.setup.run(one_pass).rows(torch.empty(0, dtype=torch.float64)).values
        assert counts == ({1} if room == 0 else {one_pass.columns})
    torch.testing.assert_close(found[0], found[2**30], rtol=1e-12, atol=1e-14)
