import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence.evaluation.lds import (
    LinearDatamodelingScore,
    linear_datamodeling_score,
    predict_subsets,
    random_subsets,
)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(3, 12), st.sampled_from([3, 1000]))
def test_a_query_is_scored_as_scipy_correlates_ranks_with_and_without_ties(seed, subsets, levels):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randint(levels, (subsets, 4), generator=generator).double() for _ in range(2))
    for column in range(4):
        a, b = left[:, column], right[:, column]
        ours = linear_datamodeling_score(a[:, None], b[:, None])[0].item()
        if len(a.unique()) == 1 or len(b.unique()) == 1:
            assert ours == 0
        else:
            reference = scipy.stats.spearmanr(a.numpy(), b.numpy()).statistic
            # Ranks are exact in float64; what is left is the rounding of one dot product.
            assert ours == pytest.approx(reference, rel=0, abs=1e-12)


def test_score_is_the_mean_over_queries_of_scipys_correlation():
    predicted, observed = draw(0, 9, 5), draw(1, 9, 5)
    reference = [scipy.stats.spearmanr(predicted[:, q], observed[:, q]).statistic for q in range(5)]
    score, interval = linear_datamodeling_score(predicted, observed)
    assert interval is None
    assert score.item() == pytest.approx(sum(reference) / 5, abs=1e-12)


def test_a_query_that_never_varies_counts_zero():
    predicted = draw(0, 6, 2)
    predicted[:, 1] = 1.0
    observed = predicted.clone()
    observed[:, 1] = draw(1, 6)
    assert linear_datamodeling_score(predicted, observed)[0].item() == pytest.approx(0.5, abs=1e-12)


def test_prediction_over_removed_equals_minus_kept_up_to_a_constant():
    scores, masks = draw(0, 3, 10), random_subsets(10, 6, fraction=0.3)
    removed, kept = predict_subsets(scores, masks), -(masks.double() @ scores.T)
    torch.testing.assert_close(removed - kept, scores.sum(1).expand(6, 3), rtol=0, atol=1e-12)


def test_our_sign_is_positive_on_exact_ridge_refits():
    # Ridge regression: tau is the exact influence, the truth is refitted in closed form on every subset.
    inputs, weights = draw(0, 60, 4), draw(1, 4)
    targets = inputs @ weights + draw(2, 60)
    queries, answers = draw(3, 20, 4), draw(4, 20)

    def fit(rows):
        x, y = inputs[rows], targets[rows]
        return torch.linalg.solve(x.T @ x / len(x) + 0.1 * torch.eye(4), x.T @ y / len(x))

    theta = fit(torch.ones(60, dtype=torch.bool))
    hessian = inputs.T @ inputs / 60 + 0.1 * torch.eye(4)
    train_gradients = (inputs @ theta - targets)[:, None] * inputs
    query_gradients = (queries @ theta - answers)[:, None] * queries
    scores = query_gradients @ torch.linalg.solve(hessian, train_gradients.T) / 60
    masks = random_subsets(60, 40)
    observed = torch.stack([(queries @ fit(mask) - answers).square() / 2 for mask in masks])
    score = linear_datamodeling_score(predict_subsets(scores, masks), observed)[0]
    assert 0.8 < score < 1.0
    reversed_score = linear_datamodeling_score(predict_subsets(-scores, masks), observed)[0]
    assert reversed_score.item() == pytest.approx(-score.item(), abs=1e-12)


def test_metric_accumulates_subsets_and_equals_the_functional_form():
    predicted, observed = draw(0, 12, 5), draw(1, 12, 3, 5)
    metric = LinearDatamodelingScore()
    metric.update(predicted[:4], observed[:4])
    metric.update(predicted[4:], observed[4:].mean(1))
    expected = linear_datamodeling_score(predicted, observed.mean(1))[0]
    assert metric.compute() == expected
    metric.reset()
    assert metric(predicted, observed) == expected


def test_metric_from_scores_equals_metric_from_predictions():
    scores, masks, observed = draw(0, 5, 8), random_subsets(8, 6), draw(1, 6, 5)
    first, second = LinearDatamodelingScore(), LinearDatamodelingScore()
    first.update_from_scores(scores, masks, observed)
    second.update(predict_subsets(scores, masks), observed)
    assert first.compute() == second.compute()


def test_metric_states_reduce_across_processes():
    predicted, observed = draw(0, 12, 5), draw(1, 12, 5)
    here, there, whole = (LinearDatamodelingScore(bootstrap=20) for _ in range(3))
    here.update(predicted[:7], observed[:7])
    there.update(predicted[7:], observed[7:])
    whole.update(predicted, observed)
    there.merge_state(here)  # torchmetrics puts the incoming state first.
    assert there.compute() == whole.compute()


def test_bootstrap_is_seeded_centred_and_narrows_with_more_subsets():
    truth = draw(0, 200, 10)
    predicted = truth + draw(1, 200, 10)

    def interval(count, seed):
        return linear_datamodeling_score(predicted[:count], truth[:count], bootstrap=200, seed=seed)

    score, wide = interval(25, 0)
    assert torch.equal(wide, interval(25, 0)[1])
    assert not torch.equal(wide, interval(25, 1)[1])
    assert wide[0] < score < wide[1]
    narrow = interval(200, 0)[1]
    # The standard error falls as 1/sqrt(M): by 2.8 here; 1.5 leaves room for the noise of 200 draws.
    assert (wide[1] - wide[0]) > 1.5 * (narrow[1] - narrow[0])


def test_metric_reports_the_interval_when_asked():
    predicted, observed = draw(0, 12, 5), draw(1, 12, 5)
    metric = LinearDatamodelingScore(bootstrap=50, seed=3)
    metric.update(predicted, observed)
    score, interval = linear_datamodeling_score(predicted, observed, bootstrap=50, seed=3)
    assert metric.compute() == {"score": score, "lower": interval[0], "upper": interval[1]}


def test_metric_declares_its_conventions():
    assert LinearDatamodelingScore.higher_is_better is True
    assert LinearDatamodelingScore.full_state_update is False
    assert LinearDatamodelingScore.is_differentiable is False


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 40), st.floats(0.01, 0.99), st.integers(0, 99))
def test_random_subsets_have_one_size_and_a_smaller_draw_is_a_prefix(size, fraction, seed):
    masks = random_subsets(size, 5, fraction, seed)
    kept = masks.sum(1)
    assert masks.shape == (5, size)
    assert kept.unique().tolist() == [min(max(int(fraction * size), 1), size - 1)]
    assert torch.equal(masks[:3], random_subsets(size, 3, fraction, seed))


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"same subsets and queries, got \(4, 3\) and.*\(4, 2\)"):
        linear_datamodeling_score(draw(0, 4, 3), draw(1, 4, 2))
    with pytest.raises(ValueError, match="at least 2 subsets"):
        linear_datamodeling_score(draw(0, 1, 3), draw(1, 1, 3))
    with pytest.raises(ValueError, match="must be finite"):
        LinearDatamodelingScore().update(draw(0, 2, 1), torch.tensor([[float("nan")], [1.0]]))
    with pytest.raises(ValueError, match="one row per query"):
        predict_subsets(draw(0, 3, 4), torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="boolean masks"):
        predict_subsets(draw(0, 3, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"0 < fraction < 1, got 10, 2 and 1\.0"):
        random_subsets(10, 2, fraction=1.0)
    with pytest.raises(ValueError, match="0 < confidence < 1, got 5 and 1"):
        LinearDatamodelingScore(bootstrap=5, confidence=1)
