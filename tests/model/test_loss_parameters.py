"""Parameters that the loss itself uses: gradients of each example and curvature, against dense references."""

import pytest
import torch
from drive import mute
from torch import nn
from torch.nn import functional as F

from lightning_influence.curvature.gauss_newton import DenseCurvaturePass
from lightning_influence.curvature.hessian import DenseHessianPass
from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.plan import find_layers
from lightning_influence.model.losses.shared import JointLoss
from lightning_influence.support.errors import InfluenceWarning, UnsupportedModelError

B = 6
CLOSE = {"rtol": 1e-8, "atol": 1e-10}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.classes, self.values = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.classes(h), self.values(h)


class Step(nn.Module):
    """A step whose loss is a function of two outputs, the batch's targets and parameters of its own."""

    def __init__(self, loss, **shapes):
        super().__init__()
        self.net, self.loss = Net(), loss
        self.own = nn.ParameterDict({
            name: nn.Parameter(0.3 * torch.randn(shape)) for name, shape in shapes.items()
        })

    def training_step(self, batch, batch_idx):
        x, labels, y = batch
        return self.loss(dict(self.own), *self.net(x), labels, y)


def kendall(own, f, g, labels, y):
    terms = [F.cross_entropy(f, labels), F.mse_loss(g, y)]
    return sum((-s).exp() * term + s for s, term in zip(own["s"], terms, strict=True))


def kendall_by_hand(own, f, g, labels, y):
    terms = torch.stack([(f[:, 0] - y[:, 0]).square().mean(), (g - y).cosh().log().sum() / y.numel()])
    return (terms / (2 * own["s"].square()) + (1 + own["s"].square()).log()).sum()


def kendall_by_example(own, f, g, labels, y):
    terms = [F.cross_entropy(f, labels, reduction="none"), (g - y).square().mean(1)]
    return sum((-s).exp() * term + s for s, term in zip(own["s"], terms, strict=True)).mean()


def normal(own, f, g, labels, y):
    return (0.5 * (own["v"] + (g - y).square() / own["v"].exp())).sum(1).mean()


def normal_by_hand(own, f, g, labels, y):
    return ((g - y).square() / own["v"].exp()).mean(0).sum() / 2 + own["v"].sum() / 2


def library_normal(own, f, g, labels, y):
    return -torch.distributions.Normal(g, own["v"].exp()).log_prob(y).mean()


def negative_binomial(own, f, g, labels, y):
    mean, theta, counts = g.exp(), own["r"].exp(), (3 * y.abs()).floor()
    whole = (theta + mean).log()
    values = theta * (own["r"] - whole) + counts * (g - whole)
    values = values + torch.lgamma(counts + theta) - torch.lgamma(theta) - torch.lgamma(counts + 1)
    return -values.sum(-1).mean()


def matrix(own, f, g, labels, y):
    return ((g - y) @ own["w"]).square().sum(1).mean() - torch.linalg.slogdet(own["w"])[1]


def temperature(own, f, g, labels, y):
    scaled = f * own["t"].exp()
    return -scaled.log_softmax(1)[torch.arange(len(labels)), labels].mean()


def prototypes(own, f, g, labels, y):
    return (f - own["p"][labels]).square().sum(1).mean() / 2 + F.mse_loss(g, y)


def exponent(own, f, g, labels, y):
    return (1e-2 + (g - y).square()).pow(1 + own["a"].sigmoid()).mean()


def mixed_weights(own, f, g, labels, y):
    first, second = own["w"].softmax(0)
    return first * F.cross_entropy(f, labels) + second * F.mse_loss(g, y)


CASES = {
    "named terms weighed": (kendall, {"s": 2}),
    "terms weighed": (kendall_by_hand, {"s": 2}),
    "terms weighed by example": (kendall_by_example, {"s": 2}),
    "variances": (normal, {"v": 2}),
    "variances beside a mean": (normal_by_hand, {"v": 2}),
    "variances of a distribution": (library_normal, {"v": 2}),
    "dispersion of counts": (negative_binomial, {"r": 2}),
    "matrix": (matrix, {"w": (2, 2)}),
    "temperature": (temperature, {"t": ()}),
    "prototypes": (prototypes, {"p": (3, 3)}),
    "exponent": (exponent, {"a": ()}),
    "softmax of weights": (mixed_weights, {"w": 2}),
}


def batch(count=B, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return x, torch.arange(count) % 3, y


def make(name, seed=0):
    loss, shapes = CASES[name]
    torch.manual_seed(seed)
    return mute(Step(loss, **shapes)).double()


def part(data, numbers):
    return tuple(values[numbers] for values in data)


def dense(plan, found):
    """All per-example gradients ``(B, P)`` in the layout's order; zero for a layer without any."""
    like = next(iter(found.values())).like
    blocks = [
        found[name].dense()[0].flatten(1) if name in found else like.new_zeros(B, layer.numel)
        for name, layer in plan.layers.items()
    ]
    return torch.cat(blocks, 1)


def parameters_in_order(layer):
    weight, bias = layer.rule.weight(layer.module), layer.rule.bias(layer.module)
    return [weight] if bias is None else [weight, bias]


def in_order(plan, value):
    """The gradient of a scalar in the layout's order, by automatic differentiation."""
    rows = []
    for layer in plan.layers.values():
        wanted = parameters_in_order(layer)
        grads = torch.autograd.grad(
            value, wanted, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(layer.from_parameters(grads[0], grads[1] if len(grads) > 1 else None).flatten())
    return torch.cat(rows)


def expected_gradients(module, plan, data):
    return torch.stack([
        in_order(plan, module.training_step(part(data, [n]), 0)) for n in range(len(data[0]))
    ])


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_each_example(name):
    module, data = make(name), batch()
    plan = find_layers(module)
    run = Forward(plan)
    for seed in (0, 1):  # what was found in the first batch serves in the second
        data = batch(seed=seed)
        captured = run(module, data, B)
        assert isinstance(captured.loss, JointLoss)
        torch.testing.assert_close(
            dense(plan, captured.loss_gradients()), expected_gradients(module, plan, data), **CLOSE
        )
    assert run.silent <= {"net.classes", "net.values"}


def positive_part(matrix):
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return (vectors * values.clamp_min(0)) @ vectors.mT


def joint_gauss_newton(module, plan, data):
    """J^T H J with the blocks of the loss's Hessian in the outputs of each example, and in the parameters."""
    own = {name: p.detach() for name, p in module.own.items()}
    total, sizes = 0, {name: layer.numel for name, layer in plan.layers.items()}
    starts = dict(zip(sizes, torch.tensor([0, *sizes.values()]).cumsum(0).tolist(), strict=False))
    for n in range(B):
        x, *targets = part(data, [n])
        outputs = torch.cat(module.net(x), 1)[0]
        jacobian = torch.stack([in_order(plan, output) for output in outputs])
        hessian = torch.func.hessian(lambda v: module.loss(own, v[None, :3], v[None, 3:], *targets))  # noqa: B023
        total = total + jacobian.T @ positive_part(hessian(outputs.detach())) @ jacobian / B
    fixed = [part.detach() for part in module.net(data[0])]
    for name, p in own.items():
        hessian = torch.func.hessian(lambda v: module.loss({**own, name: v}, *fixed, *data[1:]))  # noqa: B023
        block = positive_part(hessian(p).reshape(p.numel(), p.numel()))
        start = starts[f"own.{name}"]
        total[start : start + p.numel(), start : start + p.numel()] += block
    return total


@pytest.mark.filterwarnings("ignore:The training loss is not convex")
@pytest.mark.parametrize("name", [name for name in CASES if name != "softmax of weights"])
def test_curvature_is_that_of_outputs_and_parameters(name):
    module, data = make(name), batch()
    plan = find_layers(module)
    one_pass = DenseCurvaturePass(plan, fisher="exact")
    one_pass.step(module, data, torch.arange(B), 0)
    torch.testing.assert_close(one_pass.result(), joint_gauss_newton(module, plan, data), **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_the_hessian_mixes_outputs_and_parameters(name):
    module, data = make(name), batch()
    plan = find_layers(module)
    one_pass = DenseHessianPass(plan)
    one_pass.step(module, data, torch.arange(B), 0)
    wanted = [p for layer in plan.layers.values() for p in parameters_in_order(layer)]
    loss = module.training_step(data, 0)
    first = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True, materialize_grads=True)
    rows = [
        torch.autograd.grad(entry, wanted, retain_graph=True, allow_unused=True, materialize_grads=True)
        if entry.requires_grad
        else [torch.zeros_like(p) for p in wanted]
        for grad in first
        for entry in grad.flatten()
    ]
    expected = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    # Weights and biases stand in another order in the layout, which changes no eigenvalue.
    torch.testing.assert_close(
        torch.linalg.eigvalsh(one_pass.result()), torch.linalg.eigvalsh(expected), **CLOSE
    )


def test_a_parameter_in_which_the_loss_is_linear_has_the_squares_of_its_gradients():
    module, data = mute(Step(lambda own, f, g, labels, y: (own["w"] * (g - y).cosh()).mean(), w=2)), batch()
    module = module.double()
    plan = find_layers(module)
    one_pass = DenseCurvaturePass(plan, fisher="exact")
    with pytest.warns(InfluenceWarning, match=r"linear in parameter 'own.w'.*squared gradients"):
        one_pass.step(module, data, torch.arange(B), 0)
    x, _, y = data
    rows = (module.net(x)[1] - y).cosh().detach() / 2
    torch.testing.assert_close(one_pass.result()[-2:, -2:], rows.T @ rows / B, **CLOSE)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_sums_and_batches_of_other_sizes(size):
    """A sum over examples counts once what is added to each batch, whatever its size."""
    torch.manual_seed(0)
    step = Step(lambda own, f, g, labels, y: normal(own, f, g, labels, y) * (len(y) if size > 1 else 1), v=2)
    module, data = mute(step).double(), batch()
    plan = find_layers(module)
    run, rows = Forward(plan), []
    for start in range(0, B, size):
        found = run(module, part(data, slice(start, start + size)), size).loss_gradients()
        rows.append(found["own.v"].dense()[0].reshape(size, 2))
    expected = [
        torch.autograd.grad(normal(dict(module.own), *module.net(x), labels, y), module.own["v"])[0]
        for x, labels, y in (part(data, [n]) for n in range(B))
    ]
    torch.testing.assert_close(torch.cat(rows), torch.stack(expected), **CLOSE)


@pytest.mark.parametrize("name", ["terms weighed by example", "variances", "matrix"])
def test_given_losses_of_examples(name):
    module, data = make(name), batch()
    plan = find_layers(module)

    def values(module, batch):
        return torch.stack([module.training_step(part(batch, [n]), 0) for n in range(len(batch[0]))])

    captured = Forward(plan, values)(module, data, B)
    torch.testing.assert_close(
        dense(plan, captured.loss_gradients()), expected_gradients(module, plan, data), **CLOSE
    )
    one_pass = DenseCurvaturePass(plan, fisher="exact")
    one_pass.forward = Forward(plan, values)
    one_pass.step(module, data, torch.arange(B), 0)
    torch.testing.assert_close(one_pass.result(), joint_gauss_newton(module, plan, data), **CLOSE)


def test_a_factor_of_given_losses():
    """The values are those of a loss that has a name, times a parameter."""
    torch.manual_seed(0)
    module, data = mute(Step(None, s=())).double(), batch()

    def values(module, batch):
        losses = F.cross_entropy(module.net(batch[0])[0], batch[1], reduction="none")
        return module.own["s"].exp() * losses

    module.training_step = lambda batch, number: values(module, batch).mean()
    plan = find_layers(module)
    run = Forward(plan, values)
    found = run(module, data, B).loss_gradients()
    assert "own.s" not in run.silent
    torch.testing.assert_close(dense(plan, found), expected_gradients(module, plan, data), **CLOSE)


class Criterion(nn.Module):
    """A module of the loss with a matrix, whose result is one number, or one for each example."""

    def __init__(self, is_mean):
        super().__init__()
        self.weight, self.is_mean = nn.Parameter(torch.randn(2, 2)), is_mean

    def forward(self, g, y):
        losses = ((g - y) @ self.weight).square().sum(1) - torch.linalg.slogdet(self.weight)[1]
        return losses.mean() if self.is_mean else losses


@pytest.mark.parametrize("is_mean", [True, False])
def test_modules_of_the_loss(is_mean):
    """The cut is before them, so that the curvature is that of the loss and not of a mean of numbers."""
    torch.manual_seed(0)
    module, data = mute(Step(None)), batch()
    module.criterion = Criterion(is_mean)
    module.training_step = lambda batch, number: module.criterion(module.net(batch[0])[1], batch[2]).mean()
    module.double()
    plan = find_layers(module)
    captured = Forward(plan)(module, data, B)
    torch.testing.assert_close(
        dense(plan, captured.loss_gradients()), expected_gradients(module, plan, data), **CLOSE
    )
    one_pass = DenseCurvaturePass(plan, fisher="exact")
    one_pass.step(module, data, torch.arange(B), 0)
    own = module.criterion.weight.detach()
    outputs = module.net(data[0])[1]
    jacobians = [torch.stack([in_order(plan, value) for value in row]) for row in outputs]
    expected = sum(2 * jacobian.T @ own @ own.T @ jacobian / B for jacobian in jacobians)

    def loss(w):
        error = outputs.detach() - data[2]
        return (error @ w).square().sum(1).mean() - torch.linalg.slogdet(w)[1]

    expected[-4:, -4:] += positive_part(torch.func.hessian(loss)(own).reshape(4, 4))
    torch.testing.assert_close(one_pass.result(), expected, **CLOSE)


def test_weights_of_layers_that_the_loss_uses_as_well():
    """The decoder of an autoencoder is its encoder's transposed weight, in the step."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(4, 3)

        def training_step(self, batch, batch_idx):
            hidden = torch.tanh(self.encoder(batch[0]))
            return (hidden @ self.encoder.weight - batch[0] + self.encoder.bias[:1]).cosh().log().mean()

    torch.manual_seed(0)
    module, data = mute(Tied()).double(), batch()
    plan = find_layers(module)
    found = Forward(plan)(module, data, B).loss_gradients()
    torch.testing.assert_close(dense(plan, found), expected_gradients(module, plan, data), **CLOSE)


def test_noise_is_that_of_the_draw():
    def loss(own, f, g, labels, y):
        noisy = g * (1 + 0.1 * torch.randn_like(g))
        return ((noisy - y).square() * own["s"].exp() - own["s"]).mean()

    torch.manual_seed(0)
    module, data = mute(Step(loss, s=2)).double(), batch()
    plan = find_layers(module)
    torch.manual_seed(3)
    with pytest.warns(InfluenceWarning, match="draws noise in eval mode"):
        found = Forward(plan)(module, data, B).loss_gradients()
    torch.manual_seed(3)
    noise = torch.randn_like(data[2])  # of the first run as well, that of a loss by name
    errors = module.net(data[0])[1] * (1 + 0.1 * noise) - data[2]
    losses = (errors.square() * module.own["s"].exp() - module.own["s"]).mean(1)
    expected = torch.stack([in_order(plan, value) for value in losses])
    torch.testing.assert_close(dense(plan, found), expected, **CLOSE)


def in_one_product(own, f, g, labels, y):
    """The mean is made by an operation that does not tell what each example adds to it."""
    losses = (g - y).square().mean(1)
    return own["s"].exp() * torch.dot(losses, torch.full_like(losses, 1 / len(losses))) - own["s"]


def test_what_operations_do_not_tell_is_had_from_the_examples_alone():
    torch.manual_seed(0)
    module, data = mute(Step(in_one_product, s=())).double(), batch()
    plan = find_layers(module)
    found = Forward(plan)(module, data, B).loss_gradients()
    torch.testing.assert_close(dense(plan, found), expected_gradients(module, plan, data), **CLOSE)


class Several(Step):
    def training_step(self, batch, batch_idx):
        assert len(batch[0]) > 1, "a batch of one"
        return super().training_step(batch, batch_idx)


def test_what_cannot_be_had_is_left_out_by_name():
    torch.manual_seed(0)
    module, data = mute(Several(in_one_product, s=())).double(), batch()
    plan = find_layers(module)
    run = Forward(plan)
    with pytest.warns(
        InfluenceWarning, match=r"uses 'own.s' beside the outputs.*left out.*self.scale.expand"
    ):
        found = run(module, data, B).loss_gradients()
    assert "own.s" in run.silent
    names = [name for name in plan.layers if name not in run.silent]
    x, _, y = data
    losses = module.own["s"].exp() * (module.net(x)[1] - y).square().mean(1)
    expected = torch.stack([in_order(plan, value) for value in losses])
    start = 0
    for name, layer in plan.layers.items():
        if name in names:
            rows = expected[:, start : start + layer.numel]
            torch.testing.assert_close(found[name].dense()[0].flatten(1), rows, **CLOSE)
        start += layer.numel


def test_what_cannot_be_had_and_outputs_depend_on_is_refused():
    torch.manual_seed(0)

    class Inside(Several):
        def training_step(self, batch, batch_idx):
            x, labels, y = batch
            return super().training_step((x * self.own["s"], labels, y), batch_idx)

    module = mute(Inside(in_one_product, s=())).double()
    with pytest.raises(UnsupportedModelError, match=r"uses 'own.s' beside.*layers=\['!own.s'\]"):
        Forward(find_layers(module))(module, batch(), B)


def test_penalties_are_no_part_of_the_examples_losses():
    torch.manual_seed(0)

    def loss(own, f, g, labels, y):
        return normal(own, f, g, labels, y) + own["u"].square().sum()

    module, data = mute(Step(loss, v=2, u=3)).double(), batch()
    plan = find_layers(module)
    run = Forward(plan)
    found = run(module, data, B).loss_gradients()
    assert "own.u" in run.silent
    assert "own.v" in found


@pytest.mark.parametrize("count", [1, 2, B])
@pytest.mark.parametrize("named", [False, True])
def test_penalties_on_weights_that_the_step_uses_as_well_are_left_out_or_refused(count, named):
    """The same weight in its layer, in a function behind it, and in a penalty."""

    class Behind(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.body, self.factor = nn.Linear(4, 4), factor

        def training_step(self, batch, batch_idx):
            z = F.linear(torch.tanh(self.body(batch[0])), self.body.weight)
            values = F.mse_loss(z, batch[0]) if named else (z - batch[0]).cosh().log().mean()
            return values + self.factor * self.body.weight.square().sum()

    def differentiate(factor):
        torch.manual_seed(0)
        module = mute(Behind(factor)).double()
        return Forward(find_layers(module))(module, part(batch(), slice(0, count)), count).loss_gradients()

    plain = differentiate(0.0)["body"].dense()
    if named:
        torch.testing.assert_close(differentiate(0.1)["body"].dense(), plain, **CLOSE)
    else:
        with pytest.raises(UnsupportedModelError, match=r"'weight of body'.*penalty.*weight_decay"):
            differentiate(0.1)


def test_a_term_that_comes_with_other_batches_is_refused():
    """What is added to each batch alike is that in all of them."""

    def loss(own, f, g, labels, y):
        return normal(own, f, g, labels, y) + own["v"].sum() * (y.sum() > 0)

    torch.manual_seed(0)
    module, (x, labels, y) = mute(Step(loss, v=2)).double(), batch()
    run = Forward(find_layers(module))
    run(module, (x, labels, -y.abs()), B)
    with pytest.raises(UnsupportedModelError, match=r"'own.v' beside the outputs.*do not add up"):
        run(module, (x, labels, y.abs()), B)
