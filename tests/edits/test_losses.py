"""Output traces against the oracle, and samples that stand for all examples."""

import oracle
import pytest
import torch
from drive import TIGHT, Setup
from edit_models import asked, fitted, of_class, train

from lightning_influence.edits.losses import (
    Losses,
    LossPass,
    Sample,
    ValuePass,
    draw_sample,
    take_most_curved,
)


def losses(curvature):
    n = len(curvature)
    ones = torch.ones(n)
    return Losses(torch.arange(10, 10 + n), ones, ones, ones, torch.as_tensor(curvature))


@pytest.mark.parametrize(
    "name", ["mlp_gelu", "mlp_softplus_weighted_smoothing", "mlp_bce", "tokens", "mlp_mse"]
)
def test_traces_losses_and_chance(name):
    setup = Setup.of(name)
    case = setup.case
    found = setup.run(LossPass(setup.plan, None)).result()
    H = oracle.output_hessians(case.model, case.loss, case.x, case.y) * case.loss.normaliser(case.y)
    torch.testing.assert_close(found.curvature, H.diagonal(dim1=1, dim2=2).sum(1), **TIGHT)
    outputs = case.model(case.x).detach()
    for got, given in ((found.values, outputs), (found.chance, torch.zeros_like(outputs))):
        expected = [case.loss.example_loss(o, t) for o, t in zip(given, case.y, strict=True)]
        torch.testing.assert_close(got, torch.stack(expected), **TIGHT)
    assert found.mean() == pytest.approx(
        float(found.values.sum()) / (len(case.x) * case.loss.normaliser(case.y)), rel=1e-9
    )


@pytest.mark.parametrize("name", ["mlp_gelu", "mlp_bce", "tokens_weighted", "mlp_mse"])
def test_values_alone_are_those_of_the_losses_however_often(name):
    setup = Setup.of(name)
    losses, chosen = setup.run(LossPass(setup.plan, None)).result(), torch.tensor([1, 3])
    for picked, expected in ((None, losses), (chosen, losses.at(chosen))):
        one_pass = ValuePass(None, picked)
        for _ in range(2):
            values = setup.run(one_pass).take_values()
            torch.testing.assert_close(values, expected.values, **TIGHT)
    setup.run(one_pass)
    one_pass.clear()  # as after a run that failed
    assert len(setup.run(one_pass).take_values()) == 2
    moved = losses.with_values(2 * losses.values)
    assert moved.mean() == pytest.approx(2 * losses.mean())
    assert torch.equal(moved.at(chosen).chance, losses.at(chosen).chance)


@pytest.mark.parametrize("limit", [None, 5, 9])
def test_all_examples_stand_for_themselves(limit):
    sample = take_most_curved(losses([1.0, 2, 3, 4, 5]), limit, 0)
    assert sample.indices.tolist() == [10, 11, 12, 13, 14]
    assert sample.coefficients.tolist() == [1 / 5] * 5


def test_the_most_curved_are_taken_and_scaled_to_the_whole_trace():
    sample = take_most_curved(losses([1.0, 5, 0, 3, 1]), 2, 0)
    assert sample.indices.tolist() == [11, 13]
    # The mean over the two has trace 4, the mean over all 2.
    assert sample.coefficients.tolist() == pytest.approx([0.5 / 2] * 2)


def test_among_equals_the_choice_is_random_and_the_scale_one():
    chosen = {tuple(take_most_curved(losses([2.0] * 20), 5, seed).indices.tolist()) for seed in range(5)}
    assert len(chosen) == 5
    for curvature in (0.0, 2.0):
        sample = take_most_curved(losses([curvature] * 20), 5, 0)
        assert sample.coefficients.tolist() == pytest.approx([1 / 5] * 5)


def test_mixed_samples_stand_for_the_mixed_mean():
    first, second = (
        Sample(torch.tensor([2, 5]), torch.tensor([0.5, 1.0])),
        Sample(torch.tensor([3]), torch.tensor([4.0])),
    )
    mixed = first.mix(second, 0.25)
    assert mixed.indices.tolist() == [2, 3, 5]
    assert mixed.coefficients.tolist() == [0.375, 1.0, 0.75]
    rows, coefficients = mixed.find(torch.tensor([5, 9, 3]))
    assert (rows.tolist(), coefficients.tolist()) == ([0, 2], [0.75, 1.0])


def test_a_sample_changes_the_edit_little():
    """Twenty of the forty kept examples carry nearly all of the curvature."""
    module = fitted()
    options = {"ratio": 0.3, "step": "theory", "damping": 0.05, "rule": "highest_gradients"}
    some, every = (
        asked(module).generalized_influence(of_class(0), train(), curvature_examples=n, **options)
        for n in (20, None)
    )
    first, second = (torch.cat([t.flatten() for t in found.values()]) for found in (some, every))
    assert torch.nn.functional.cosine_similarity(first, second, dim=0) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("limit", [7, 30])
def test_drawn_samples_are_unbiased(limit):
    generator = torch.Generator().manual_seed(0)
    curvature, weights, values = torch.rand(3, 60, generator=generator).double()
    curvature, weights = curvature**8, weights + 0.1
    losses = Losses(torch.arange(100, 160), values, weights, values, curvature)
    total, draws = torch.zeros(160).double(), 8000
    for seed in range(draws):
        sample = draw_sample(losses, limit, seed)
        assert len(sample.indices) == limit
        assert (sample.coefficients >= 1 / weights.sum() * (1 - 1e-9)).all()
        assert (sample.coefficients <= 4 * len(values) / limit / weights.sum() * weights.mean() / 0.1).all()
        total[sample.indices] += sample.coefficients / draws
    torch.testing.assert_close(total[100:], torch.ones(60).double() / weights.sum(), rtol=0.6, atol=0.0)
    assert float(total.sum()) == pytest.approx(60 / float(weights.sum()), rel=0.02)
    everything = draw_sample(losses, 60, 0)
    assert everything.coefficients.tolist() == pytest.approx([1 / float(weights.sum())] * 60)


def test_draws_without_curvature_or_weight():
    nothing, ones = torch.zeros(20), torch.ones(20)
    plain = draw_sample(Losses(torch.arange(20), ones, ones, ones, nothing), 5, 0)
    assert plain.coefficients.tolist() == pytest.approx([1 / 5] * 5)
    few = torch.tensor([1.0, 2.0, 1.0] + 17 * [0.0])
    assert draw_sample(Losses(torch.arange(20), ones, few, ones, nothing), 5, 0).indices.tolist() == [0, 1, 2]
    assert len(draw_sample(Losses(torch.arange(20), ones, nothing, ones, nothing), 5, 0).indices) == 5
