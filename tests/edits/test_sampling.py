"""Output traces against the oracle, and samples that stand for all examples."""

import oracle
import pytest
import torch
from drive import TIGHT, Setup
from edit_models import asked, fitted, of_class, train

from lightning_influence.edits.losses import Losses, LossPass, Sample, take_most_curved


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
