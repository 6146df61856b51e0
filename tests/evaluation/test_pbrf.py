"""The proximal Bregman response equals damped Gauss-Newton influence, and closed forms."""

import oracle
import pytest
import torch
from torch import nn

from lightning_influence.evaluation.losses import binary_cross_entropy, cross_entropy, squared_error
from lightning_influence.evaluation.pbrf import proximal_response
from lightning_influence.support.errors import InfluenceError, NonFiniteError

LAYERS = ["0", "2"]
EXAMPLES = [0, 11]


def network(outputs):
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(count, seed):
    return torch.randint(3, (count,), generator=torch.Generator().manual_seed(seed))


KINDS = {
    "cross-entropy": (cross_entropy, oracle.CrossEntropy(), lambda n, seed: labels(n, seed)),
    "mse": (squared_error, oracle.MeanSquaredError(), lambda n, seed: draw(n, 3, seed=seed)),
    "bce": (
        binary_cross_entropy,
        oracle.BinaryCrossEntropy(),
        lambda n, seed: (draw(n, 3, seed=seed) > 0).double(),
    ),
}


def dense_scores(model, reference, data, queries, damping):
    train = oracle.flatten(oracle.per_example_gradients(model, reference, *data, LAYERS))
    asked = oracle.flatten(oracle.per_example_gradients(model, reference, *queries, LAYERS))
    return oracle.influence(oracle.ggn(model, reference, *data, LAYERS), damping, asked, train)


@pytest.mark.grid
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damping", [1e-2, 1.0])
def test_small_epsilon_gives_the_dense_gauss_newton_influence(kind, damping):
    """The error of one side is of order epsilon; the mean of both sides is of order epsilon squared."""
    loss, reference, targets = KINDS[kind]
    model = network(3)
    data, queries = (draw(12, 3, seed=1), targets(12, 2)), (draw(4, 3, seed=3), targets(4, 4))
    expected = dense_scores(model, reference, data, queries, damping)[:, EXAMPLES]
    errors = {}
    for epsilon in (1e-4, 1e-5):
        sides = [
            proximal_response(model, data, queries, EXAMPLES, damping=damping, loss=loss, epsilon=side).scores
            for side in (epsilon, -epsilon)
        ]
        errors[epsilon] = float((sides[0] - expected).norm() / expected.norm())
        both = (sides[0] + sides[1]) / 2
        # Second order: (1e-4 / 1e-2)^2 at the smaller damping, with room for the curvature's own change.
        assert (both - expected).norm() <= 1e-3 * expected.norm()
    assert errors[1e-5] < 1e-2
    assert errors[1e-5] == pytest.approx(errors[1e-4] / 10, rel=0.1)


def test_another_measurement_is_differentiated():
    def first_logit(outputs, targets):
        return outputs[:, 0]

    model, data, queries = (
        network(3),
        (draw(12, 3, seed=1), labels(12, 2)),
        (draw(4, 3, seed=3), labels(4, 4)),
    )
    jacobian = oracle.output_jacobians(model, queries[0], LAYERS)[:, 0]
    reference = oracle.CrossEntropy()
    train = oracle.flatten(oracle.per_example_gradients(model, reference, *data, LAYERS))
    expected = oracle.influence(oracle.ggn(model, reference, *data, LAYERS), 0.1, jacobian, train)[
        :, EXAMPLES
    ]
    sides = [
        proximal_response(
            model, data, queries, EXAMPLES, damping=0.1, measurement=first_logit, epsilon=side
        ).scores
        for side in (1e-4, -1e-4)
    ]
    assert (sum(sides) / 2 - expected).norm() <= 1e-4 * expected.norm()


def test_removal_from_a_linear_model_is_solved_in_closed_form():
    """Quadratic, so the solution at epsilon = -1/N is one linear system."""
    model = nn.Linear(3, 1).double()
    x, y = draw(9, 3, seed=1), draw(9, 1, seed=2)
    queries = draw(4, 3, seed=3), draw(4, 1, seed=4)
    response = proximal_response(model, (x, y), queries, [2], damping=0.3, loss=squared_error)
    rows = torch.cat([x, torch.ones(9, 1)], 1)
    theta = torch.cat([model.weight.detach()[0], model.bias.detach()])
    others = torch.arange(9) != 2
    # D's gradient is (2/N) X^T X delta; the example's own divergence and loss leave only -gradient/N.
    matrix = 2 / 9 * rows[others].T @ rows[others] + 0.3 * torch.eye(4)
    gradient = 2 * (rows[2] @ theta - y[2, 0]) * rows[2]
    moved = theta + torch.linalg.solve(matrix, gradient / 9)
    asked = torch.cat([queries[0], torch.ones(4, 1)], 1)
    change = (asked @ moved - queries[1][:, 0]) ** 2 - (asked @ theta - queries[1][:, 0]) ** 2
    torch.testing.assert_close(response.scores[:, 0], change, rtol=1e-6, atol=1e-9)
    assert response.distances[0].item() == pytest.approx((moved - theta).norm().item(), rel=1e-6)
    assert response.residuals[0] <= 1e-8


@pytest.mark.parametrize("kind", KINDS)
def test_removal_is_a_minimum_of_the_objective_written_out(kind):
    """L-BFGS from elsewhere finds the same point."""
    loss, _, targets = KINDS[kind]
    model = network(3)
    data, queries = (draw(12, 3, seed=1), targets(12, 2)), (draw(4, 3, seed=3), targets(4, 4))
    response = proximal_response(model, data, queries, [5], damping=0.1, loss=loss)
    trained = [p.detach().clone() for p in model.parameters()]
    anchor = model(data[0]).detach().requires_grad_()
    slope = torch.autograd.grad(loss(anchor, data[1]).sum(), anchor)[0]
    base = loss(anchor, data[1]).detach()
    before = loss(model(queries[0]), queries[1]).detach()
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=2000,
        tolerance_grad=1e-11,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def objective():
        optimizer.zero_grad()
        outputs = model(data[0])
        losses = loss(outputs, data[1])
        divergence = (losses - base - (slope * (outputs - anchor.detach())).sum(1)).mean()
        away = sum((p - old).square().sum() for p, old in zip(model.parameters(), trained, strict=True))
        value = divergence - losses[5] / 12 + 0.05 * away
        value.backward()
        return value

    optimizer.step(objective)
    change = loss(model(queries[0]), queries[1]).detach() - before
    torch.testing.assert_close(response.scores[:, 0], change, rtol=1e-5, atol=1e-8)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 3)).double().train()
    model[2].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = draw(6, 3, seed=1), labels(6, 2)
    first = proximal_response(model, data, data, [0], damping=0.1)
    assert torch.equal(first.scores, proximal_response(model, data, data, [0], damping=0.1).scores)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_what_cannot_be_solved_is_named():
    data = draw(6, 3, seed=1), labels(6, 2)
    with pytest.raises(InfluenceError, match=r"example 1 did not converge: .* after 1 steps, 1\.0e-08"):
        proximal_response(network(3), data, data, [1], damping=1e-3, max_steps=1)
    broken = network(3)
    nn.init.constant_(broken[0].weight, float("nan"))
    with pytest.raises(NonFiniteError, match="no finite gradient"):
        proximal_response(broken, data, data, [0], damping=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"damping": 0.0}, "positive and finite, got 0.0"),
        ({"epsilon": 0.0}, "not 0 and at least -1/N = -0.167"),
        ({"epsilon": -0.2}, "not bounded below"),
        ({"examples": [6]}, r"indices of the 6 training examples, got \[6\]"),
        ({"examples": []}, r"got \[\]"),
        ({"queries": (torch.zeros(2, 3), torch.zeros(1))}, "2 query inputs with 1 targets"),
    ],
)
def test_arguments_out_of_range_are_refused(changes, message):
    data = draw(6, 3, seed=1), labels(6, 2)
    arguments = {"queries": data, "examples": [0], "damping": 0.1} | changes
    with pytest.raises(ValueError, match=message):
        proximal_response(network(3), data, **arguments)
