"""`auto` in little memory: directions of low rank within the budget, which grow, converge and do no harm."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F

from lightning_influence import InfluenceModule
from lightning_influence.curvature.state import InfluenceState
from lightning_influence.methods.auto import Auto
from lightning_influence.running.loop_runner import LoopRunner

pytestmark = pytest.mark.filterwarnings("ignore")
DAMPING = 0.02
PLAIN = {"damping": DAMPING, "max_steps": 0, "low_rank_tolerance": 0.0}


class Net(LightningModule):
    """Far more parameters than curvature rows; a convolution, a norm and linear layers."""

    def __init__(self, width: int = 40, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 5, 6)), nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.LayerNorm(48),
            nn.Linear(48, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3),
        )  # fmt: skip
        self.double()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])


def draw(count: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 30, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (count,), generator=generator)


TRAIN, QUERIES = [draw(15, 0), draw(15, 3)], [draw(5, 1)]
NUMEL = sum(p.numel() for p in Net().parameters())


def ask(module, budget: float, **options):
    """Scores with a memory budget of so many vectors of the size of the parameters."""
    return module.scores(
        TRAIN, QUERIES, method="auto", memory_budget=int(budget * 8 * NUMEL), **{**PLAIN, **options}
    )


def directions(space) -> torch.Tensor:
    return space.layout.join({name: part.dense() for name, part in space.directions.items()})


@pytest.mark.parametrize("budget", [5, 8, 12, 20, 30])
def test_what_is_stored_stays_within_its_share_of_the_budget(budget):
    module = InfluenceModule(Net())
    found = ask(module, budget)
    space = module.state.compact
    assert module.state.coarse is None
    assert found.diagnostics.extra["coarse_space"] == space.size > 1
    assert found.diagnostics.extra["coarse_rank"] == space.rank
    parts = [*space.directions.values(), *space.probes.values()]
    held = [*(t for part in parts for t in part.tensors().values()), space.rows.values]
    assert len({t.untyped_storage().data_ptr() for t in held}) == len(held)
    assert sum(t.untyped_storage().nbytes() for t in held) == space.nbytes <= budget * 8 * NUMEL / 2


def test_the_tolerance_leaves_no_query_a_worse_answer_than_is_known():
    """It decides about further steps alone: without any, answers do not depend on it."""
    patient, strict = (
        ask(InfluenceModule(Net()), 8, max_steps=0, tolerance=tolerance) for tolerance in (50.0, 1e-9)
    )
    torch.testing.assert_close(patient.scores, strict.scores, rtol=1e-12, atol=0.0)
    assert torch.equal(patient.diagnostics.residuals, strict.diagnostics.residuals)


def test_directions_are_preconditioned_gradients_cut_to_the_rank():
    module = InfluenceModule(Net())
    ask(module, 40)
    space = module.state.compact
    assert (space.rank, space.size) == (4, 30)
    gradients = module.ihvp(TRAIN, TRAIN, method="ekfac", damping=DAMPING)[0]
    for name in ("net.5", "net.7"):
        whole = torch.cat([gradients[f"{name}.weight"], gradients[f"{name}.bias"][:, :, None]], dim=2)
        values = torch.linalg.svdvals(whole)
        cut = space.directions[name].dense()[:, 0]
        assert torch.linalg.matrix_rank(cut).max() == 4
        # Each direction is one of these, up to what a rank of 4 leaves out, in the order of their drawing.
        errors = torch.linalg.matrix_norm(cut[:, None] - whole)
        best = errors.argmin(dim=1)
        assert len(set(best.tolist())) == 30
        left_out = values[:, 4:].norm(dim=1)[best]
        torch.testing.assert_close(errors.min(dim=1).values, left_out, rtol=0.02, atol=1e-9)


@pytest.mark.slow
def test_answers_are_better_than_those_of_as_few_dense_directions_as_fit(monkeypatch):
    exact = InfluenceModule(Net()).scores(TRAIN, QUERIES, method="exact", damping=DAMPING).scores
    compact = ask(InfluenceModule(Net()), 20)
    monkeypatch.setattr("lightning_influence.methods.auto.choose_builder", lambda builder, *_: builder)
    dense = ask(InfluenceModule(Net()), 20)
    assert "coarse_rank" not in dense.diagnostics.extra
    errors = [float((a.scores - exact).norm() / exact.norm()) for a in (compact, dense)]
    assert errors[0] < 0.5 * errors[1]
    assert compact.diagnostics.residuals.median() < 0.5 * dense.diagnostics.residuals.median()


@pytest.mark.slow
def test_steps_converge_beside_the_space():
    queries = [draw(2, 1)]
    options = {**PLAIN, "damping": 1.0, "tolerance": 1e-8, "max_steps": 25, "memory_budget": 60 * 8 * NUMEL}
    found = InfluenceModule(Net()).scores(TRAIN, queries, method="auto", **options)
    assert found.diagnostics.extra["coarse_rank"] == 4
    exact = InfluenceModule(Net()).scores(TRAIN, queries, method="exact", damping=1.0)
    torch.testing.assert_close(found.scores, exact.scores, rtol=1e-5, atol=1e-9)
    assert float(found.diagnostics.residuals.max()) <= 1e-8


def test_scores_are_those_of_the_solutions():
    options = {"method": "auto", "memory_budget": 20 * 8 * NUMEL, **PLAIN}
    module = InfluenceModule(Net())
    found = module.scores(TRAIN, QUERIES, **options)
    solved, facts = module.ihvp(TRAIN, QUERIES, **options)
    torch.testing.assert_close(facts.residuals, found.diagnostics.residuals)
    rows = module.ihvp(TRAIN, TRAIN, method="identity", damping=1.0)[0]
    expected = sum((solved[name].flatten(1) @ rows[name].flatten(1).T) for name in solved) / 30
    torch.testing.assert_close(found.scores.abs(), expected.abs(), rtol=1e-5, atol=1e-9)


def test_a_larger_budget_grows_the_space_and_reuses_it():
    kept = InfluenceModule(Net())
    first = ask(kept, 7)
    small = kept.state.compact
    again = ask(kept, 7)
    assert torch.equal(first.scores, again.scores)
    assert kept.state.compact is small
    assert [one["name"] for one in again.diagnostics.passes].count("Influence: anchors") == 0
    larger = ask(kept, 60)
    grown = kept.state.compact
    assert small.size < grown.size == 30
    assert grown.rank == small.rank
    assert torch.equal(directions(grown)[: small.size], directions(small))
    assert torch.equal(grown.rows.values[:, :, : small.rows.values.shape[2]], small.rows.values)
    assert grown.num_probes == small.num_probes
    assert larger.diagnostics.residuals.median() < first.diagnostics.residuals.median()
    assert ask(kept, 7).diagnostics.extra["coarse_space"] == 30  # what is there is used


def test_it_is_kept_in_checkpoints():
    kept = InfluenceModule(Net())
    first = ask(kept, 20)
    state = InfluenceState()
    state.take_results(kept.state.stored_results(kept.state.factors))
    other = InfluenceModule(Net(), state=state)
    again = ask(other, 20)
    torch.testing.assert_close(again.scores, first.scores, rtol=1e-9, atol=1e-12)
    assert "Influence: anchors" not in [one["name"] for one in again.diagnostics.passes]
    kept.state.forget()
    assert kept.state.compact is None


def test_self_influence_takes_the_dense_space(monkeypatch):
    options = {"method": "auto", "damping": DAMPING, "memory_budget": 60 * 8 * NUMEL, "max_steps": 0}
    module = InfluenceModule(Net())
    ask(module, 60)
    assert (module.state.coarse, module.state.compact.size) == (None, 30)
    found = module.self_influence(TRAIN, **options)
    monkeypatch.setattr("lightning_influence.methods.auto.choose_builder", lambda builder, *_: builder)
    expected = InfluenceModule(Net()).self_influence(TRAIN, **options)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-9, atol=0)


def test_self_influence_builds_no_space_that_it_does_not_use():
    module = InfluenceModule(Net())
    found = module.self_influence(TRAIN, method="auto", damping=DAMPING, memory_budget=60 * 8 * NUMEL)
    names = [one["name"] for one in found.diagnostics.passes]
    assert "Influence: curvature rows" not in names
    assert module.state.compact is None
    assert module.state.coarse is not None


@pytest.mark.parametrize(
    ("interrupted", "kept"),
    [
        ("Influence: curvature rows", False),
        ("Influence: query gradients", False),
        ("Influence: scores", True),
    ],
)
def test_what_was_finished_is_kept_when_a_call_is_interrupted(monkeypatch, interrupted, kept):
    expected = ask(InfluenceModule(Net()), 20)
    module, run = InfluenceModule(Net()), LoopRunner.run

    def stop(self, one_pass, loaders):
        if one_pass.description == interrupted:
            raise KeyboardInterrupt
        return run(self, one_pass, loaders)

    monkeypatch.setattr(LoopRunner, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        ask(module, 20)
    monkeypatch.undo()
    assert module.state.factors is not None
    assert (module.state.compact is not None) == kept
    found = ask(module, 20)
    names = [one["name"] for one in found.diagnostics.passes]
    assert not any("factor" in name or "covariances" in name for name in names)
    assert ("Influence: anchors" in names) == (not kept)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-9, atol=1e-12)


def test_the_first_queries_complete_the_space_in_one_pass():
    prepared = InfluenceModule(Net())
    prepared.prepare(TRAIN, method="auto", memory_budget=20 * 8 * NUMEL, **PLAIN)
    found, after = ask(InfluenceModule(Net()), 20), ask(prepared, 20)
    for told in (found, after):  # as many passes for rows as groups of queries, and none for the space alone
        names = [one["name"] for one in told.diagnostics.passes]
        assert names.count("Influence: curvature rows") == names.count("Influence: scores")
    torch.testing.assert_close(found.scores, after.scores, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.diagnostics.residuals, after.diagnostics.residuals)


@pytest.mark.slow
def test_few_queries_of_long_passes_get_a_small_space(monkeypatch):
    building = "lightning_influence.methods.compact_building"
    monkeypatch.setattr(f"{building}._ANCHORS_EACH", 2)
    monkeypatch.setattr(f"{building}._FEWEST_EXAMPLES", 2)
    module, options = InfluenceModule(Net()), {**PLAIN, "damping": 1e-4, "max_steps": None}

    def ask_few(**others):
        return module.scores(
            TRAIN,
            QUERIES,
            method="auto",
            memory_budget=20 * 8 * NUMEL,
            aggregate="mean",
            **{**options, **others},
        ).diagnostics

    whole = ask_few()
    assert module.state.compact.size > 2
    assert whole.extra["curvature_examples"] == 30
    monkeypatch.setattr("lightning_influence.methods.forecast._LONG", 0.0)
    again = ask_few()  # a space for many is there
    assert again.extra["curvature_examples"] == 30
    module.state = InfluenceState()
    few = ask_few()
    assert few.extra["coarse_space"] == 2
    assert few.extra["curvature_examples"] == 15  # batches that are there already are taken whole
    assert float(few.residuals.max()) <= 1
    assert any("`curvature_examples=4096`" in note for note in few.warnings)
    assert ask_few(curvature_examples=4096).extra["curvature_examples"] == 30
    # Prepared without a question, the space serves all questions.
    module.state = InfluenceState()
    module.prepare(TRAIN, method="auto", memory_budget=20 * 8 * NUMEL, **options)
    assert ask_few().extra["curvature_examples"] == 30


def test_where_dense_directions_fit_nothing_changes():
    module = InfluenceModule(Net())
    found = ask(module, 2000)
    assert module.state.compact is None
    assert "coarse_rank" not in found.diagnostics.extra


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(st.integers(0, 9), st.integers(10, 50), st.floats(5.5, 40), st.sampled_from([1e-4, 0.02, 1.0]))
def test_no_answer_is_worse_than_ekfac_or_nothing(seed, width, budget, damping):
    net = Net(width, seed)
    numel = sum(p.numel() for p in net.parameters())
    options = {**PLAIN, "damping": damping, "memory_budget": int(budget * 8 * numel)}
    module = InfluenceModule(net)
    found = module.scores(TRAIN, QUERIES, method="auto", **options)
    own = module.scores(TRAIN, QUERIES, method="ekfac", damping=damping, low_rank_tolerance=0.0)
    same = torch.isclose(found.scores, own.scores, rtol=1e-7, atol=1e-12).all(dim=1)
    assert float(found.diagnostics.residuals[~same].max() if (~same).any() else 0) <= 1
    told = any("got the answer of method='ekfac'" in note for note in found.diagnostics.warnings)
    assert told == bool(same.any())


def test_groups_are_as_large_as_answers_are_small(monkeypatch):
    """Answers of the few queries that are looked at tell how many fit, beside what else is held."""
    queries, options = [draw(24, 1)], {"low_rank_tolerance": 0.2, "method": "auto", "max_steps": 0}
    module = InfluenceModule(Net())
    options |= {"damping": DAMPING, "memory_budget": int(20 * 8 * NUMEL)}
    few = module.scores(TRAIN, queries, **options)
    with monkeypatch.context() as patch:
        patch.setattr(Auto, "measure_group_size", lambda method, queries: method.group_size())
        many = InfluenceModule(Net()).scores(TRAIN, queries, **options)

    def count(found):
        return sum(one["name"] == "Influence: scores" for one in found.diagnostics.passes)

    assert 1 <= count(few) < count(many)
    torch.testing.assert_close(few.diagnostics.residuals, many.diagnostics.residuals, rtol=0.2, atol=0.02)
    assert float((few.scores - many.scores).norm()) < 0.2 * float(many.scores.norm())
