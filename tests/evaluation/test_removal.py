"""Leave-one-out and removal curves on ridge regression, where refits are closed forms."""

from functools import partial

import pytest
import torch
from benchmarks import load_benchmark
from torch import nn

from lightning_influence.evaluation.losses import squared_error
from lightning_influence.evaluation.mislabels import mislabel_auroc
from lightning_influence.evaluation.removal import leave_one_out, removal_curve, removal_masks

RIDGE = 0.1


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, QX = draw(20, 3, seed=0), draw(4, 3, seed=1)
Y, QY = X.sum(1) + draw(20, seed=2), QX.sum(1)


def fit(mask):
    """Minimises the mean squared error plus (RIDGE / 2) ||theta||^2."""
    x, y = X[mask], Y[mask]
    return torch.linalg.solve(2 * x.T @ x / len(x) + RIDGE * torch.eye(3), 2 * x.T @ y / len(x))


def refit(masks):
    """Predictions of the queries, (M, Q)."""
    return torch.stack([QX @ fit(mask) for mask in masks])


def without(*examples):
    mask = torch.ones(20, dtype=torch.bool)
    mask[list(examples)] = False
    return mask


def test_leave_one_out_is_the_closed_form_of_least_squares():
    """The change of the parameters is C x_n e_n / (1 - x_n C x_n), from the fit with all examples alone."""

    def unpenalised(masks):
        return torch.stack([QX @ torch.linalg.lstsq(X[m], Y[m]).solution for m in masks])

    theta = torch.linalg.lstsq(X, Y).solution
    inverse = torch.linalg.inv(X.T @ X)
    leverage = (X @ inverse * X).sum(1)
    moved = -(X @ inverse) * ((Y - X @ theta) / (1 - leverage))[:, None]
    torch.testing.assert_close(leave_one_out(unpenalised, 20), QX @ moved.T, rtol=1e-9, atol=1e-11)


def test_some_examples_and_seeds():
    def with_seeds(masks):
        values = refit(masks)
        return torch.stack([values - 1, values + 1], dim=1)

    changes = leave_one_out(with_seeds, 20, [3, 7])
    expected = torch.stack([QX @ (fit(without(n)) - fit(without())) for n in (3, 7)], dim=1)
    torch.testing.assert_close(changes, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("order", ["proponents", "opponents"])
def test_the_curve_refits_without_the_querys_own_strongest_examples(order):
    scores = leave_one_out(refit, 20)
    curve = removal_curve(scores, refit, [1, 5], order=order)
    assert curve.counts.tolist() == [1, 5]
    for row, count in enumerate((1, 5)):
        for query in range(4):
            ranked = sorted(range(20), key=lambda n: scores[query, n].item(), reverse=order == "proponents")
            chosen = ranked[:count]
            change = QX[query] @ (fit(without(*chosen)) - fit(without()))
            torch.testing.assert_close(curve.changes[row, query], change, rtol=1e-9, atol=1e-11)
            assert curve.predicted[row, query].item() == pytest.approx(scores[query, chosen].sum().item())
    # One example removed: the exact leave-one-out score predicts exactly.
    torch.testing.assert_close(curve.changes[0], curve.predicted[0], rtol=1e-9, atol=1e-11)


def test_right_scores_move_queries_further_than_random_ones():
    scores = leave_one_out(refit, 20)
    best, worst, chance = (
        removal_curve(scores, refit, [5], order=order).changes[0]
        for order in ("proponents", "opponents", "random")
    )
    assert bool((best > chance).all())
    assert bool((worst < chance).all())


def test_queries_that_agree_share_a_model():
    asked = []

    def counted(masks):
        asked.append(len(masks))
        return refit(masks)

    scores = torch.arange(20.0).expand(4, 20)
    removal_curve(scores, counted, [1, 2])
    assert asked == [3]  # the whole set and two subsets


def test_batched_retraining_to_convergence_is_the_closed_form():
    """Full-batch gradient descent with this ridge reaches the closed form of every subset."""
    recipe = load_benchmark("recipes").Recipe(
        0.1, epochs=400, batch_size=20, weight_decay=RIDGE, schedule="constant"
    )
    train = partial(
        load_benchmark("stacked_training").retrain,
        lambda: nn.Linear(3, 1, bias=False).double(),
        recipe,
        (X, Y[:, None]),
        seeds=[0],
        queries=(QX, QY[:, None]),
        loss=squared_error,
        measurement=lambda outputs, targets: outputs[:, 0],
    )
    scores = leave_one_out(refit, 20)
    measured = removal_curve(scores, train, [3])
    torch.testing.assert_close(
        measured.changes, removal_curve(scores, refit, [3]).changes, rtol=1e-6, atol=1e-8
    )


def test_mislabels_of_a_ridge_classifier_are_its_largest_leave_one_out_residuals():
    """Labels are the sign of one coordinate; self-influence in closed form finds every flipped one."""
    x = draw(40, 2, seed=5)
    x[:, 0] += 3 * x[:, 0].sign()
    labels = x[:, 0].sign()
    flipped = torch.zeros(40, dtype=torch.bool)
    flipped[[4, 17, 30]] = True
    labels[flipped] *= -1
    theta = torch.linalg.solve(x.T @ x / 40 + 0.1 * torch.eye(2), x.T @ labels / 40)
    gradients = (x @ theta - labels)[:, None] * x
    influence = (gradients @ torch.linalg.inv(x.T @ x / 40 + 0.1 * torch.eye(2)) * gradients).sum(1) / 40
    assert mislabel_auroc(influence, flipped) == 1.0
    assert mislabel_auroc(-influence, flipped) == 0.0


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(4, 20), [0]), {}, r"counts must be from 1 to N - 1 = 19, got \[0\]"),
        ((torch.zeros(4, 20), [20]), {}, r"got \[20\]"),
        ((torch.zeros(20), [1]), {}, r"of shape \(Q, N\), got shape \(20,\)"),
        ((torch.full((4, 20), float("nan")), [1]), {}, "scores must be finite"),
        (
            (torch.zeros(4, 20), [1]),
            {"order": "best"},
            "Got order='best'; accepted are 'proponents', 'opponents', 'random'",
        ),
    ],
)
def test_orders_that_do_not_exist_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        removal_masks(*arguments, **options)


def test_retrainings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"indices of the 20 training examples, got \[20\]"):
        leave_one_out(refit, 20, [20])
    with pytest.raises(ValueError, match=r"21 subsets returned values of shape \(20, 4\)"):
        leave_one_out(lambda masks: refit(masks[1:]), 20)
    with pytest.raises(ValueError, match="scores have 3 queries, the retraining measured 4"):
        removal_curve(torch.rand(3, 20), refit, [1])
