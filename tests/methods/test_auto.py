"""`auto` on a small network: its residuals are told, its coarse space grows, and no correction does harm."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceModule, InfluenceWarning

CONVERGED = {"tolerance": 1e-9, "max_steps": 60}
DAMPING = 0.02


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
        self.double()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Weighted(Net):
    """A weighted mean of losses that no function computes."""

    def training_step(self, batch, batch_idx):
        losses = (self.net(batch[0]) - F.one_hot(batch[1], 3)).cosh().log().mean(1)
        weights = batch[0].square().sum(1)
        return (losses * weights).sum() / weights.sum()


GROWING = {"damping": DAMPING, "max_steps": 0, "tolerance": 0.0, "low_rank_tolerance": 0.0}
HARMFUL = {"damping": 1e-3, "max_steps": 0, "low_rank_tolerance": 0.0}
NUMEL = sum(p.numel() for p in Net().parameters())


def draw(count: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (count,), generator=generator)


TRAIN, QUERIES = [draw(40, 0)], [draw(6, 1)]


def mentions(result, *parts: str) -> bool:
    return any(all(part in note for part in parts) for note in result.diagnostics.warnings)


@pytest.mark.filterwarnings("ignore")
class TestSelfInfluence:
    @pytest.mark.parametrize("count", [5, 40])
    def test_it_is_iterated_to_the_tolerance(self, count):
        data = [draw(count, 2)]
        found = InfluenceModule(Net()).self_influence(data, method="auto", damping=DAMPING, **CONVERGED)
        exact = InfluenceModule(Net()).self_influence(data, method="exact", damping=DAMPING)
        torch.testing.assert_close(found.scores, exact.scores, rtol=1e-6, atol=0)
        assert found.diagnostics.residuals.shape == (count,)
        assert float(found.diagnostics.residuals.max()) < 1e-8

    def test_weights_that_are_shares_are_those_of_the_same_batches(self):
        """Also where the last batch is a single example, which others would be joined to."""
        loader = DataLoader(TensorDataset(*draw(5, 2)), batch_size=4)
        with pytest.warns(InfluenceWarning, match="Weights count as shares of their batch"):
            found = InfluenceModule(Weighted()).self_influence(
                loader, method="auto", damping=2.0, **CONVERGED
            )
        exact = InfluenceModule(Weighted()).self_influence(loader, method="exact", damping=2.0)
        torch.testing.assert_close(found.scores, exact.scores, rtol=1e-6, atol=0)

    def test_by_default_every_example_is_solved_or_told_not_to_be(self):
        data = [draw(5, 2)]
        found = InfluenceModule(Net()).self_influence(data, method="auto", damping=DAMPING)
        exact = InfluenceModule(Net()).self_influence(data, method="exact", damping=DAMPING)
        above = found.diagnostics.residuals > 0.2
        assert not above.any() or mentions(found, "training examples", "still have a residual above")
        torch.testing.assert_close(found.scores[~above], exact.scores[~above], rtol=0.2, atol=0)

    def test_without_steps_the_residuals_say_how_far_off_it_is(self):
        options = {"damping": DAMPING, "max_steps": 0, "memory_budget": 1}
        found = InfluenceModule(Net()).self_influence(TRAIN, method="auto", **options)
        residuals = found.diagnostics.residuals
        assert residuals.shape == (40,)
        assert mentions(
            found, "of 40 training examples have a residual above", "Iterating on them was left out"
        )
        assert float(residuals.median()) > 0.2

    def test_other_methods_that_solve_tell_their_residuals_too(self):
        for method in ("exact", "hessian", "cg"):
            found = InfluenceModule(Net()).self_influence(TRAIN, method=method, damping=DAMPING)
            assert found.diagnostics.residuals.shape == (40,), method
            assert float(found.diagnostics.residuals.max()) <= 1e-3, method
        assert InfluenceModule(Net()).self_influence(TRAIN, method="ekfac").diagnostics.residuals is None


@pytest.mark.filterwarnings("ignore")
class TestGrowth:
    def ask(self, module, **given):
        return module.scores(TRAIN, QUERIES, method="auto", **{**GROWING, **given})

    def passes(self, result, name: str) -> int:
        return sum(name in one["name"] for one in result.diagnostics.passes)

    def test_a_larger_budget_grows_the_space_that_is_kept(self):
        kept, budget = InfluenceModule(Net()), 60 * 8 * NUMEL
        small = self.ask(kept, memory_budget=budget)
        grown = self.ask(kept)
        fresh = self.ask(InfluenceModule(Net()))
        sizes = [answer.diagnostics.extra["coarse_space"] for answer in (small, grown, fresh)]
        assert sizes[0] < sizes[1] == sizes[2] == 39
        torch.testing.assert_close(grown.scores, fresh.scores, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(
            grown.diagnostics.residuals, fresh.diagnostics.residuals, rtol=1e-3, atol=1e-6
        )

    def test_it_is_not_looked_at_again_without_need(self):
        kept, budget = InfluenceModule(Net()), 60 * 8 * NUMEL
        self.ask(kept, memory_budget=budget)
        for given in ({"memory_budget": budget}, {"memory_budget": budget // 2}):
            again = self.ask(kept, **given)
            assert [one["name"] for one in again.diagnostics.passes if "scores" not in one["name"]] == [
                "Influence: query gradients"
            ] * self.passes(again, "query gradients")

    def test_a_space_that_suffices_grows_for_a_lower_tolerance_only(self, monkeypatch):
        monkeypatch.setattr("lightning_influence.methods.coarse_building.FIRST_ANCHORS", 4)
        kept = InfluenceModule(Net())
        first = self.ask(kept, tolerance=10.0)
        assert first.diagnostics.extra["coarse_space"] == 4
        budget = 2**31
        assert self.ask(kept, tolerance=10.0, memory_budget=budget).diagnostics.extra["coarse_space"] == 4
        lower = self.ask(kept, tolerance=0.0)
        assert lower.diagnostics.extra["coarse_space"] == 39
        fresh = self.ask(InfluenceModule(Net()))
        torch.testing.assert_close(lower.scores, fresh.scores, rtol=1e-6, atol=1e-9)

    def test_cg_takes_the_same_space(self):
        kept = InfluenceModule(Net())
        self.ask(kept, tolerance=0.2)
        space = kept.state.coarse
        options = {"preconditioner": "two_level", "damping": DAMPING, "tolerance": 1e-9}
        found = kept.scores(TRAIN, QUERIES, method="cg", **options)
        assert found.diagnostics.extra["coarse_space"] == space.size
        assert kept.state.coarse is space
        exact = InfluenceModule(Net()).scores(TRAIN, QUERIES, method="exact", damping=DAMPING)
        torch.testing.assert_close(found.scores, exact.scores, rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
class TestHarm:
    """One direction under a small damping: the correction makes residuals of more than 1."""

    def small(self, monkeypatch):
        monkeypatch.setattr("lightning_influence.methods.coarse_building.MOST_ANCHORS", 1)

    def test_what_is_worse_than_ekfac_or_zero_is_not_given(self, monkeypatch):
        self.small(monkeypatch)
        found = InfluenceModule(Net()).scores(TRAIN, QUERIES, method="auto", **HARMFUL)
        own = InfluenceModule(Net()).scores(
            TRAIN, QUERIES, method="ekfac", damping=1e-3, low_rank_tolerance=0.0
        )
        same = torch.isclose(found.scores, own.scores, rtol=1e-9, atol=1e-15).all(dim=1)
        assert same.any()
        assert mentions(found, f"{int(same.sum())} queries got the answer of method='ekfac'", "memory_budget")
        assert float(found.diagnostics.residuals[~same].max() if (~same).any() else 0) <= 1
        vectors, facts = InfluenceModule(Net()).ihvp(TRAIN, QUERIES, method="auto", **HARMFUL)
        plain = InfluenceModule(Net()).ihvp(TRAIN, QUERIES, method="ekfac", damping=1e-3)[0]
        torch.testing.assert_close(facts.residuals, found.diagnostics.residuals)
        for name, rows in vectors.items():
            torch.testing.assert_close(rows[same], plain[name][same], rtol=1e-9, atol=1e-12)

    def test_self_influence_falls_back_as_well(self, monkeypatch):
        self.small(monkeypatch)
        found = InfluenceModule(Net()).self_influence(TRAIN, method="auto", **HARMFUL)
        own = InfluenceModule(Net()).self_influence(
            TRAIN, method="ekfac", damping=1e-3, self_influence_tolerance=0.0
        )
        same = torch.isclose(found.scores, own.scores, rtol=1e-9)
        assert mentions(found, f"{int(same.sum())} training examples got the answer of method='ekfac'")
        assert (found.diagnostics.residuals[~same] <= 1).all()

    def test_steps_take_the_place_of_the_fall_back(self, monkeypatch):
        self.small(monkeypatch)
        options = {**HARMFUL, **CONVERGED}
        found = InfluenceModule(Net()).scores(TRAIN, QUERIES, method="auto", **options)
        exact = InfluenceModule(Net()).scores(TRAIN, QUERIES, method="exact", damping=1e-3)
        torch.testing.assert_close(found.scores, exact.scores, rtol=1e-5, atol=1e-9)
        assert not mentions(found, "got the answer of method='ekfac'")
