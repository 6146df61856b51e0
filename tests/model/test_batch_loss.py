"""Losses without a name, on models of several kinds, against automatic differentiation in float64."""

import pytest
import torch
from drive import TIGHT, mute
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.plan import Layout, find_layers
from lightning_influence.model.losses.batch import BatchLoss
from lightning_influence.model.losses.draws import draw_signs
from lightning_influence.support.errors import InfluenceWarning, LossCaptureError, UnsupportedModelError

B, T = 6, 4
# Gradients of batches are as exact as float64; eigendecompositions of small blocks a little less so.
CLOSE = {"rtol": 1e-8, "atol": 1e-10}


class Heads(nn.Module):
    """A body and two heads."""

    def __init__(self, width: int = 3, other: int = 2) -> None:
        super().__init__()
        self.body, self.first, self.second = nn.Linear(4, 5), nn.Linear(5, width), nn.Linear(5, other)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return self.first(h), self.second(h)


class Chain(nn.Module):
    """Two blocks whose outputs are added, the second fed by what the first leaves over, as in N-BEATS."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        return a + self.second(torch.tanh(x - a))


def module_of(net: nn.Module, loss) -> nn.Module:
    module = nn.Module()
    module.net = net
    module.training_step = lambda batch, batch_idx: loss(net, *batch)
    return mute(module.double())


def batch(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*(shape or (B, 4)), dtype=torch.float64, generator=generator)
    return x, torch.rand(len(x), dtype=torch.float64, generator=generator) + 0.5


def flat(module: nn.Module, plan, grads) -> Tensor:
    """Gradients by parameter as one vector in the layout's order."""
    blocks, left = {}, iter(grads)
    for name, layer in plan.layers.items():
        weight = next(left)
        blocks[name] = layer.from_parameters(weight, next(left) if layer.has_bias else None)
    return Layout.of(plan.layers).join(blocks)


def parameters(plan) -> list[Tensor]:
    return [p for layer in plan.layers.values() for p in layer.module.parameters(recurse=False)]


def check(net: nn.Module, loss, data, outputs_of, *, penalty=None, scale=1.0, convex=True) -> BatchLoss:
    """Gradients and Gauss-Newton matrix of each example, against the loss of the example alone.

    `outputs_of(net, x)` are the last outputs of a batch, `loss` takes them as the step does.
    """
    torch.manual_seed(0)
    for p in net.double().parameters():
        nn.init.normal_(p, std=0.5)
    x, y = data
    whole = lambda net, x, y: loss(outputs_of(net, x), x, y)  # noqa: E731
    step = whole if penalty is None else lambda net, x, y: whole(net, x, y) + penalty(net)
    module = module_of(net, step)
    plan = find_layers(module)
    captured = Forward(plan)(module, data, len(x))
    assert isinstance(captured.loss, BatchLoss)
    found = Layout.of(plan.layers).dense(captured.loss_gradients())[0]
    columns = Layout.of(plan.layers).dense(captured.curvature_gradients("exact"))
    matrices = torch.einsum("kbp,kbq->bpq", columns, columns)
    values, total = captured.per_example(), captured.total()
    for n in range(len(x)):
        one = x[n : n + 1], y[n : n + 1]
        value = scale * whole(net, *one)
        expected = torch.autograd.grad(value, parameters(plan), allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(found[n], flat(module, plan, expected), **CLOSE)
        if penalty is None:
            torch.testing.assert_close(values[n], value, **CLOSE)
        outputs = outputs_of(net, one[0])
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sizes = [o.numel() for o in outputs]

        def of_flat(f, one=one, outputs=outputs, sizes=sizes):
            parts = [p.view(o.shape) for p, o in zip(f.split(sizes), outputs, strict=True)]
            return scale * loss(tuple(parts) if len(parts) > 1 else parts[0], *one)

        vector = torch.cat([o.flatten() for o in outputs])
        hessian = torch.func.hessian(of_flat)(vector.detach())
        spectrum, basis = torch.linalg.eigh(hessian)
        positive = basis @ torch.diag(spectrum.clamp_min(0)) @ basis.T
        if convex:
            torch.testing.assert_close(positive, hessian, **CLOSE)
        jacobian = torch.stack([
            flat(
                module,
                plan,
                torch.autograd.grad(
                    v, parameters(plan), retain_graph=True, allow_unused=True, materialize_grads=True
                ),
            )
            for v in vector
        ])
        torch.testing.assert_close(matrices[n], jacobian.T @ positive @ jacobian, **CLOSE)
    if penalty is None:
        torch.testing.assert_close(total, values.sum(), **CLOSE)
    check_forms(captured.loss)
    return captured.loss


def check_forms(loss: BatchLoss) -> None:
    """Mixtures, energies and products are those of the columns."""
    stacked = torch.stack([column.flatten(1) for column in loss.columns()])
    assert len(stacked) == loss.num_columns
    weights = torch.randn(loss.num_examples, loss.num_columns, dtype=torch.float64)
    mixed = torch.einsum("bk,kbd->bd", weights, stacked)
    torch.testing.assert_close(loss.mix_columns(weights), mixed, **TIGHT)
    torch.testing.assert_close(loss.column_energies(), stacked.square().sum(2).T, **TIGHT)
    draws = [torch.Generator().manual_seed(2) for _ in range(2)]
    signs = draw_signs(torch.ones(weights.shape, dtype=torch.float64), draws[0])
    torch.testing.assert_close(loss.sample(draws[1]), loss.mix_columns(signs), **TIGHT)
    tangents = torch.randn(2, *loss.outputs.shape, dtype=torch.float64)
    products = torch.einsum("kbd,kbe,vbe->vbd", stacked, stacked, tangents)
    torch.testing.assert_close(loss.curvature_products(tangents), products, **TIGHT)


def student(outputs, x, y):
    """Student's negative log-likelihood with 4 degrees of freedom: not convex far from the target."""
    return torch.log1p((outputs[0].squeeze(-1) - y).square() / 4).mean() + outputs[1].square().mean()


LOSSES = {
    "squares": (lambda o, x, y: (o[0].sum(1) - y).square().mean() + o[1].exp().sum(1).mean(), 3, True),
    "entropy": (lambda o, x, y: (o[0].logsumexp(1) - o[0][:, 0] + (o[1] ** 4).sum(1)).mean(), 3, True),
    "student": (student, 1, False),
    "binomial": (
        lambda o, x, y: (
            -torch.distributions
            .NegativeBinomial(F.softplus(o[1][:, :1]), logits=o[0])
            .log_prob(y.ceil()[:, None])
            .mean()
        ),
        1,
        False,
    ),
    "focal": (
        lambda o, x, y: ((1 - o[0].softmax(1)[:, 0]) ** 2 * -o[0].log_softmax(1)[:, 0]).mean(),
        3,
        False,
    ),
    "normal": (
        lambda o, x, y: -torch.distributions.Normal(o[0].squeeze(1), o[1][:, 0].exp()).log_prob(y).mean(),
        1,
        False,
    ),
}


@pytest.mark.grid
@pytest.mark.filterwarnings("ignore:The training loss is not convex")
@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_without_a_name(name, reduction):
    loss, width, convex = LOSSES[name]
    if reduction == "sum":
        mean = loss
        loss = lambda o, x, y: mean(o, x, y) * len(x)  # noqa: E731
    found = check(Heads(width), loss, batch(), lambda net, x: net(x), convex=convex)
    assert found.traits.is_mean == (reduction == "mean")
    assert found.scale == (1 if reduction == "mean" else B)


def test_losses_that_are_not_convex_are_noted():
    with pytest.warns(InfluenceWarning, match="not convex in the model's outputs"):
        check(Heads(3), LOSSES["focal"][0], batch(), lambda net, x: net(x), convex=False)


def test_penalties_on_weights_do_not_disturb():
    def penalty(net: nn.Module) -> Tensor:
        return 0.3 * sum(p.square().sum() + p.abs().sum() for p in net.parameters())

    check(Heads(), LOSSES["squares"][0], batch(), lambda net, x: net(x), penalty=penalty)


def test_outputs_that_feed_one_another():
    def blocks(net: Chain, x: Tensor) -> tuple[Tensor, Tensor]:
        a = net.first(x)
        return a, net.second(torch.tanh(x - a))

    loss = lambda o, x, y: ((o[0] + o[1]).square().sum(1) + o[0][:, 0].exp()).mean()  # noqa: E731
    check(Chain(), loss, batch(), blocks)


@pytest.mark.parametrize("structure", ["elements", "positions", "channels", "example"])
def test_the_hessian_is_taken_apart_by_its_structure(structure):
    net = nn.Conv1d(4, 3, 1) if structure == "channels" else nn.Linear(4, 3)
    data = batch(B, T, 4)
    outputs_of = lambda net, x: net(x.mT) if structure == "channels" else net(x)  # noqa: E731
    loss = {
        "elements": lambda o, x, y: (o - y.view(-1, 1, 1)).pow(4).mean(),
        "positions": lambda o, x, y: (o.logsumexp(2) * y[:, None]).mean(),
        "channels": lambda o, x, y: (o.logsumexp(1) * y[:, None]).mean(),
        "example": lambda o, x, y: o.square().sum((1, 2)).add(1).sqrt().mean(),
    }[structure]
    found = check(net, loss, data, outputs_of)
    assert found.traits.structure == structure


def test_rows_of_examples_times_positions():
    def outputs_of(net: nn.Module, x: Tensor) -> Tensor:
        return net(x.flatten(0, 1))

    loss = lambda o, x, y: (o.logsumexp(1).view(len(x), -1).mean(1) * y).mean()  # noqa: E731
    assert check(nn.Linear(4, 3), loss, batch(B, T, 4), outputs_of).traits.structure == "positions"


def test_losses_that_are_linear_piece_by_piece_have_the_square_of_their_gradients():
    def pinball(net, x, y):
        error = y[:, None] - net(x)
        return torch.maximum(0.1 * error, -0.9 * error).mean()

    module = module_of(nn.Linear(4, 2), pinball)
    plan = find_layers(module)
    with pytest.warns(InfluenceWarning, match="linear in the model's outputs, piece by piece"):
        captured = Forward(plan)(module, batch(), B)
    exact = captured.curvature_gradients("exact")["net"].dense()
    torch.testing.assert_close(exact, captured.loss_gradients()["net"].dense())
    assert "piece by piece" in captured.loss.note


def test_weighted_means_count_as_shares_of_their_batch():
    def weighted(net, x, y):
        return (net(x).square().sum(1) * y).sum() / y.sum()

    module = module_of(nn.Linear(4, 2), weighted)
    plan, (x, y) = find_layers(module), batch()
    with pytest.warns(InfluenceWarning, match="weighted mean of its examples"):
        captured = Forward(plan)(module, (x, y), B)
    found = captured.loss_gradients()["net"].dense()[0].sum(0)[0] / B
    (weight, bias) = torch.autograd.grad(weighted(module.net, x, y), list(module.net.parameters()))
    torch.testing.assert_close(found, torch.cat([weight, bias[:, None]], 1))


COUPLED = {
    "root": lambda net, x, y: (net(x).squeeze(1) - y).square().mean().sqrt(),
    "root of a named loss": lambda net, x, y: F.mse_loss(net(x).squeeze(1), y).sqrt(),
    "dice": lambda net, x, y: (
        1 - 2 * (net(x).sigmoid().squeeze(1) * y).sum() / (net(x).sigmoid().sum() + y.sum())
    ),
    "contrastive": lambda net, x, y: F.cross_entropy(net(x) @ net(x).T, torch.arange(len(x))),
    "ranking": lambda net, x, y: (9 * (net(x) - net(x).T) + 1).relu().mean(),
    "hardest": lambda net, x, y: (net(x).squeeze(1) - y).abs().max(),
    "named": lambda net, x, y: F.mse_loss(net(x).squeeze(1), y) + net(x).std(),
}


@pytest.mark.parametrize("name", sorted(COUPLED))
def test_losses_that_couple_examples_are_refused(name):
    module = module_of(nn.Linear(4, 1), COUPLED[name])
    with pytest.raises(
        UnsupportedModelError, match=r"depends? on (the others|layer 'net' at other examples)"
    ):
        Forward(find_layers(module))(module, batch(), B)


def test_coupled_losses_are_answered_with_a_loss_of_the_call():
    module = module_of(nn.Linear(4, 1), COUPLED["root"])
    run = Forward(find_layers(module), loss=lambda m, b: (m.net(b[0]).squeeze(1) - b[1]).square())
    captured = run(module, batch(), B)
    x, y = batch()
    torch.testing.assert_close(captured.per_example(), (module.net(x).squeeze(1) - y).square())
    scalar = Forward(find_layers(module), loss=lambda m, b: (m.net(b[0]).squeeze(1) - b[1]).square().mean())
    torch.testing.assert_close(
        scalar(module, batch(), B).loss_gradients()["net"].dense(), captured.loss_gradients()["net"].dense()
    )
    with pytest.raises(TypeError, match="loss= returned float; accepted is a tensor"):
        Forward(find_layers(module), loss=lambda m, b: 0.5)(module, batch(), B)


def check_alone(module: nn.Module, found: dict, x: Tensor, y: Tensor) -> None:
    """All gradients are those of the loss of each example alone."""
    plan = find_layers(module)
    for n in range(B):
        grads = torch.autograd.grad(
            module.training_step((x[n : n + 1], y[n : n + 1]), 0), parameters(plan), materialize_grads=True
        )
        torch.testing.assert_close(
            torch.cat([found[name].dense()[0, n].flatten() for name in plan.layers]),
            flat(module, plan, grads),
            **CLOSE,
        )


def test_a_weight_used_a_second_time():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 3)

        def forward(self, x):
            return torch.tanh(self.first(x)) @ self.first.weight

    module, data = module_of(Tied(), lambda net, x, y: (net(x) - x).square().mean()), batch()
    check_alone(module, Forward(find_layers(module))(module, data, B).loss_gradients(), *data)


def test_noise_leaves_the_check_to_second_derivatives():
    def noisy(net, x, y):
        return (net(x) * (1 + 0.1 * torch.randn(len(x), 1, dtype=x.dtype))).pow(2).mean()

    module = module_of(nn.Linear(4, 2), noisy)
    with pytest.warns(InfluenceWarning, match="draws noise in eval mode"):
        Forward(find_layers(module))(module, batch(), B)


def test_batches_that_cannot_be_taken_apart_are_said():
    class Unknown:
        def __init__(self, x):
            self.read = lambda: x

    module = module_of(nn.Linear(4, 2), None)
    module.training_step = lambda batch, batch_idx: module.net(batch.read()).square().mean()
    with pytest.warns(InfluenceWarning, match="could not be taken apart"):
        captured = Forward(find_layers(module))(module, Unknown(batch()[0]), B)
    x = batch()[0]
    expected = torch.autograd.grad(module.net(x[:1]).square().mean(), module.net.weight)[0]
    torch.testing.assert_close(captured.loss_gradients()["net"].dense()[0, 0, 0, :, :-1], expected)


def test_a_small_second_term_is_part_of_the_gradient():
    """Its value is a millionth of the first; one head has its gradient from it alone."""

    def step(net, x, y):
        prices, kinds = net(x)
        return F.mse_loss(1e3 * prices.squeeze(1), y) + 1e-3 * (kinds.logsumexp(1) - kinds[:, 0]).mean()

    module = module_of(Heads(1), step)
    x, y = batch()
    captured = Forward(find_layers(module))(module, (x, y), B)
    found = captured.loss_gradients()["net.second"].dense()[0, 1, 0]
    value = step(module.net, x[1:2], y[1:2])
    weight, bias = torch.autograd.grad(value, list(module.net.second.parameters()))
    torch.testing.assert_close(found, torch.cat([weight, bias[:, None]], 1))


def hooked(hook, step=lambda net, x, y: F.mse_loss(net(x).squeeze(1), y)) -> nn.Module:
    module = module_of(nn.Linear(4, 1), step)
    module.influence_loss = lambda data: hook(module.net, *data)
    return module


def squares(net, x, y):
    return (net(x).squeeze(1) - y).square()


@pytest.mark.parametrize("as_argument", [False, True])
def test_minus_the_loss_is_refused(as_argument):
    module = hooked(lambda net, x, y: -squares(net, x, y))
    loss = (lambda m, b: -squares(m.net, *b).mean()) if as_argument else None
    with pytest.raises(LossCaptureError, match=r"goes against the training loss .* cosine -1"):
        Forward(find_layers(module), loss=loss)(module, batch(), B)


def test_another_loss_than_the_steps_is_said():
    module = hooked(lambda net, x, y: (net(x).squeeze(1) - y).abs() ** 1.5)
    with pytest.warns(InfluenceWarning, match=r"`influence_loss` is not the loss of `training_step`"):
        Forward(find_layers(module))(module, batch(), B)


@pytest.mark.filterwarnings("error::lightning_influence.support.errors.InfluenceWarning")
@pytest.mark.parametrize("kind", ["scaled", "penalty", "failing", "manual", "root"])
def test_hooks_that_agree_with_the_step_are_taken_in_silence(kind):
    def failing(net, x, y):
        raise RuntimeError("needs a fit")

    steps = {
        "scaled": lambda net, x, y: 7 * squares(net, x, y).sum(),
        "penalty": lambda net, x, y: squares(net, x, y).mean() + net.weight.square().sum(),
        "failing": failing,
        "manual": failing,
        "root": lambda net, x, y: squares(net, x, y).mean().sqrt(),
    }
    module = hooked(squares, steps[kind])
    module.automatic_optimization = kind != "manual"
    assert Forward(find_layers(module))(module, batch(), B).num_examples == B


def test_weights_that_the_loss_alone_uses():
    """Such as the dispersion of a likelihood: their gradients do not pass through any module's outputs."""

    class WithDispersion(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.dispersion = nn.Linear(4, 2), nn.Linear(1, 2, bias=False)

    def step(net, x, y):
        error = net.mean(x) - y[:, None]
        scale = net.dispersion.weight[:, 0]
        return (error.square() * scale.exp() - scale + error.abs() ** 3).mean()

    module, data = module_of(WithDispersion(), step), batch()
    forward = Forward(find_layers(module))
    found = forward(module, data, B).loss_gradients()
    assert not forward.silent
    check_alone(module, found, *data)


class Spread(nn.Module):
    def __init__(self, rows: bool):
        super().__init__()
        self.rows, self.weight = rows, nn.Parameter(torch.tensor([0.3, -0.2]))

    def forward(self, like):
        return self.weight.expand_as(like)


def dispersed_losses(net, x, y):
    mean = net.mean(x)
    scale = net.spread(mean) if net.spread.rows else net.spread.weight
    error = mean - y[:, None]
    return (error.square() * scale.exp() - scale + error.abs() ** 3).mean(1)


@pytest.mark.parametrize("hook", [True, False])
@pytest.mark.parametrize("rows", [True, False])
def test_weights_of_the_loss_with_and_without_a_row_for_each_example(rows, hook):
    net = nn.Module()
    net.mean, net.spread = nn.Linear(4, 2), Spread(rows)

    def step(net, x, y):
        return dispersed_losses(net, x, y).mean()

    module = module_of(net, step)
    if hook:
        module.influence_loss = lambda data: dispersed_losses(net, *data)
    forward, (x, y) = Forward(find_layers(module)), batch()
    found = forward(module, (x, y), B).loss_gradients()["net.spread.weight"].dense()[0].flatten(1)
    losses = dispersed_losses(module.net, x, y)
    expected = [torch.autograd.grad(loss, module.net.spread.weight, retain_graph=True)[0] for loss in losses]
    torch.testing.assert_close(found, torch.stack(expected), **CLOSE)
    assert not forward.silent
