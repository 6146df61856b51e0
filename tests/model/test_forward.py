import warnings

import pytest
import torch
from drive import TIGHT, Setup, mute
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.plan import find_layers
from lightning_influence.model.loss_values import compute_losses
from lightning_influence.support.errors import (
    InfluenceWarning,
    LossCaptureError,
    NonFiniteError,
    UnsupportedModelError,
)

B = 4


class Module(nn.Module):
    """A module whose training step is a function of two layers and the batch."""

    def __init__(self, step) -> None:
        super().__init__()
        self.first, self.last, self._step = nn.Linear(3, 3), nn.Linear(3, 2), step

    def training_step(self, batch, batch_idx):
        return self._step(self, *batch)


def batch(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*(shape or (B, 3))), torch.randint(2, ((shape or (B,))[0],))


def forward(step, data=None, size: int = B):
    module = mute(Module(step))
    return Forward(find_layers(module))(module, data or batch(), size)


def plain(module, x, y):
    return F.cross_entropy(module.last(torch.tanh(module.first(x))), y)


def test_exact_columns_and_draws_share_one_forward_pass():
    captured = forward(plain)
    exact = captured.curvature_gradients("exact")
    assert exact["first"].outputs.shape[0] == 2
    three = captured.curvature_gradients("sampled", torch.Generator().manual_seed(0), draws=3)
    generator = torch.Generator().manual_seed(0)
    for k in range(3):
        one = captured.curvature_gradients("sampled", generator)
        for name in one:
            torch.testing.assert_close(one[name].outputs[0], 3**0.5 * three[name].outputs[k])
    empirical, loss = captured.curvature_gradients("empirical"), captured.loss_gradients()
    assert torch.equal(empirical["last"].outputs, loss["last"].outputs)


def test_gradients_of_values_are_those_of_the_loss():
    captured = forward(plain)
    through, seeded = captured.gradients_of(captured.per_example()), captured.loss_gradients()
    for name in seeded:
        torch.testing.assert_close(through[name].outputs, seeded[name].outputs)


def coupled_mean(module, x, y):
    h = module.first(x)
    return F.cross_entropy(module.last(h - h.mean(0)), y)


def swapped_last_two(module, x, y):
    """The first example stays, so only its neighbours show that rows have moved."""
    return F.cross_entropy(module.last(torch.tanh(module.first(x)))[[0, 1, 3, 2]], y)


def sequence_first(module, x, y):  # (T, B, 3)
    return F.cross_entropy(module.last(module.first(x)).mean(0), y)


def sequence_first_in_one_layer(module, x, y):
    h = module.first(x.transpose(0, 1)).transpose(0, 1)
    return F.cross_entropy(module.last(h).mean(1), y)


@pytest.mark.parametrize(
    ("step", "shape", "layer"),
    [
        (coupled_mean, (B, 3), "first"),
        (swapped_last_two, (B, 3), "first"),
    ],
)
def test_examples_that_are_not_rows_of_their_own_are_refused(step, shape, layer):
    data = torch.randn(*shape), torch.randint(2, (B,))
    with pytest.raises(
        UnsupportedModelError,
        match=rf"depends on layer '{layer}' at other examples.*influence_loss",
    ):
        forward(step, data)


@pytest.mark.parametrize(
    ("step", "shape", "dim"),
    [
        (sequence_first, (2 * B, B, 3), 1),
        (sequence_first, (3, B, 3), 1),
        (sequence_first, (B, B, 3), 1),
        (sequence_first_in_one_layer, (B, 2 * B, 3), 0),
        (sequence_first_in_one_layer, (B, B, 3), 0),
    ],
)
def test_layers_on_rows_that_do_not_begin_with_the_examples_are_exact(step, shape, dim):
    x, y = torch.randn(*shape).double(), torch.randint(2, (B,))
    module = mute(Module(step)).double()
    plan = find_layers(module)
    found = Forward(plan)(module, (x, y), B).loss_gradients()
    for n in range(B):
        loss = step(module, x.narrow(dim, n, 1), y[n : n + 1])
        for name, layer in plan.layers.items():
            expected = torch.autograd.grad(loss, [layer.module.weight, layer.module.bias], retain_graph=True)
            torch.testing.assert_close(found[name].dense()[0, n], layer.from_parameters(*expected))


def test_a_first_batch_of_one_example_does_not_end_the_check():
    module = mute(Module(coupled_mean))
    run = Forward(find_layers(module))
    run(module, batch(1, 3), 1)
    with pytest.raises(UnsupportedModelError, match="at other examples"):
        run(module, batch(), B)


def test_padding_that_other_examples_cannot_see_is_no_coupling():
    def step(module, x, y):
        mask = (y > 0).float()[:, None]
        return F.cross_entropy(module.last(module.first(x) * mask), y)

    assert set(forward(step).loss_gradients()) == {"first", "last"}


def test_a_model_under_reentrant_checkpoints_is_refused():
    def step(module, x, y):
        out = checkpoint(lambda h: module.last(module.first(h)), x.requires_grad_(), use_reentrant=True)
        return F.cross_entropy(out, y)

    with pytest.raises(UnsupportedModelError, match=r"outside gradient checkpointing.*\['first', 'last'\]"):
        forward(step)


def test_silent_layers_are_those_that_no_batch_used():
    def step(module, x, y):
        return F.cross_entropy(module.last(x) if len(x) > 1 else module.last(module.first(x)), y)

    module = mute(Module(step))
    run = Forward(find_layers(module))
    run(module, batch(), B)
    assert run.silent == {"first"}
    run(module, batch(1, 3), 1)
    assert run.silent == set()
    run(module, batch(), B)
    assert run.silent == set()


@pytest.mark.parametrize("result", [None, {}, {"loss": None}, 0.5])
def test_a_step_without_a_loss_is_refused(result):
    with pytest.raises(LossCaptureError, match="without a loss tensor; accepted are a scalar tensor"):
        forward(lambda module, x, y: result)


def test_a_dict_with_a_loss_is_accepted():
    assert forward(lambda m, x, y: {"loss": plain(m, x, y), "other": 1}).loss.num_examples == B


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_first_batch_that_is_not_finite_is_refused(value):
    x, y = batch()
    x[2] = value
    with pytest.raises(NonFiniteError, match=r"finite|NaN"):
        forward(plain, (x, y))


def test_manual_optimization_and_iterators_are_refused():
    module = mute(Module(plain))
    module.automatic_optimization = False
    with pytest.raises(UnsupportedModelError, match=r"optimizes manually.*influence_loss\(self, batch\)"):
        Forward(find_layers(module))(module, batch(), B)
    module = mute(Module(plain))
    module.training_step = lambda dataloader_iter: None
    with pytest.raises(UnsupportedModelError, match=r"draws its own batches"):
        Forward(find_layers(module))(module, batch(), B)


@pytest.mark.parametrize("kind", ["only", "keyword", "more", "default", "variadic"])
def test_arguments_of_the_step(kind):
    module = mute(Module(plain))
    seen = []

    def step(batch, *rest):
        seen.append(rest)
        return plain(module, *batch)

    module.training_step = {
        "only": lambda batch: step(batch),
        "keyword": lambda batch, *, other=1: step(batch),
        "more": lambda batch, batch_idx, dataloader_idx: step(batch, batch_idx, dataloader_idx),
        "default": lambda batch, batch_idx=7: step(batch, batch_idx),
        "variadic": lambda *args: step(*args),  # Lightning passes two
    }[kind]
    Forward(find_layers(module))(module, batch(), B)
    expected = {"only": (), "keyword": (), "more": (0, 0), "default": (7,), "variadic": (0,)}
    assert set(seen) == {expected[kind]}


def test_influence_loss_takes_the_place_of_the_step():
    setup = Setup.of("mlp_gelu")
    module = setup.module
    module.automatic_optimization = False
    module.influence_loss = lambda data: 3 * F.cross_entropy(module.model(data[0]), data[1], reduction="none")
    data = (setup.case.x, setup.case.y)
    captured = Forward(setup.plan)(module, data, 12)
    got = setup.layout.dense(captured.loss_gradients())[0]
    torch.testing.assert_close(got, 3 * setup.gradients(), **TIGHT)
    rows = setup.layout.dense(captured.curvature_gradients("exact")).flatten(0, 1)
    torch.testing.assert_close(rows.T @ rows / 12, 3 * setup.ggn(), **TIGHT)
    assert captured.weights.tolist() == [1] * 12


def test_values_of_an_unknown_loss_have_the_curvature_of_their_second_derivative():
    setup = Setup.of("mlp_gelu")
    module = setup.module
    module.influence_loss = lambda data: module.model(data[0]).square().sum(1)
    captured = Forward(setup.plan)(module, (setup.case.x, setup.case.y), 12)
    assert captured.weights.tolist() == [1] * 12
    model, x = setup.case.model, setup.case.x
    parameters = [p for name in setup.case.layers for p in model.get_submodule(name).parameters()]
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(output, parameters, retain_graph=True)])
        for output in model(x).flatten()
    ]
    jacobian = torch.stack(rows)
    columns = setup.layout.dense(captured.curvature_gradients("exact")).flatten(0, 1)
    assert columns.shape == jacobian.shape
    # The layout joins weight and bias row by row, so that only what no order changes can be compared.
    torch.testing.assert_close(
        torch.linalg.eigvalsh(columns @ columns.T), torch.linalg.eigvalsh(2 * jacobian @ jacobian.T), **TIGHT
    )
    gradients = setup.layout.dense(captured.loss_gradients())[0]
    assert gradients.shape == (12, setup.plan.numel)


def test_gradients_that_are_not_finite_are_not_taken_for_coupling():
    def step(module, x, y):
        root = module.first(x).mul(0).sqrt()  # 0 with an infinite slope
        return F.cross_entropy(module.last(root), y)

    gradients = forward(step).loss_gradients()
    assert not torch.isfinite(gradients["first"].dense()).all()


def tied(module, x, y):
    return F.mse_loss(F.linear(torch.tanh(module.first(x)), module.first.weight.T), x)


def tied_bias(module, x, y):
    return F.cross_entropy(module.last(torch.tanh(module.first(x)) + module.first.bias), y)


@pytest.mark.parametrize("step", [tied, tied_bias])
@pytest.mark.parametrize("size", [1, B])
def test_weights_that_are_used_outside_their_layer_as_well(step, size):
    """A layer is called, and its weight or bias taken for something else."""
    module, (x, y) = mute(Module(step)).double(), batch(size, 3)
    found = Forward(find_layers(module))(module, (x.double(), y), size).loss_gradients()["first"]
    layer = find_layers(module).layers["first"]
    for n in range(size):
        loss = step(module, x[n : n + 1].double(), y[n : n + 1])
        expected = torch.autograd.grad(loss, [module.first.weight, module.first.bias])
        torch.testing.assert_close(found.dense()[0, n], layer.from_parameters(*expected))


class Quadratic(nn.Module):
    """No modules at all, and a loss without a name."""

    def __init__(self):
        super().__init__()
        self.linear, self.square = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3, 3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (x @ self.linear + (x @ self.square * x).sum(1) - y).square().mean()


class Members(nn.Module):
    """An ensemble of bare parameters: the rows of its loss are members times examples."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(4, 3, 2))

    def training_step(self, batch, batch_idx):
        outputs = torch.einsum("bi,eio->ebo", batch[0], self.weights)
        return F.cross_entropy(outputs.flatten(0, 1), batch[1].repeat(4))


class Tokens(nn.Module):
    """The mean over all positions of a batch: that of its examples only where these have as many."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def training_step(self, batch, batch_idx):
        x, mask = batch
        return ((x @ self.weight).square() * mask).sum() / mask.sum()


def test_a_later_batch_whose_loss_is_no_mean_of_its_examples_is_refused():
    module, x, mask = mute(Tokens()).double(), torch.randn(4, 6, 3).double(), torch.ones(4, 6).double()
    run = Forward(find_layers(module))
    with pytest.warns(InfluenceWarning, match="run one by one"):
        run(module, (x, mask), 4)
    mask[0, 2:] = 0
    with pytest.raises(UnsupportedModelError, match=r"one in the first batch.*influence_loss"):
        run(module, (x, mask), 4)


def test_rows_of_an_ensemble_are_followed_to_the_examples():
    module, (x, y) = mute(Members()).double(), batch(5, 3)
    x, run = x.double(), Forward(find_layers(module))
    for rows in ([0, 1, 2, 3, 4], [3, 1], [2]):
        captured = run(module, (x[rows], y[rows]), len(rows))
        found = captured.loss_gradients()["weights"].dense()[0] / captured.weights.mean()
        for place, n in enumerate(rows):
            loss = module.training_step((x[n : n + 1], y[n : n + 1]), 0)
            [expected] = torch.autograd.grad(loss, module.weights)
            torch.testing.assert_close(found[place].reshape(4, 3, 2), expected)


def test_examples_are_run_one_by_one_where_nothing_else_tells_whose_rows_are_whose():
    module, (x, y) = mute(Quadratic()).double(), batch(5, 3)
    x, run = x.double(), Forward(find_layers(module))
    with pytest.warns(InfluenceWarning, match="run one by one"):
        run(module, (x, y), 5)
    for rows in ([0, 1, 2, 3, 4], [3, 1], [2]):
        found = run(module, (x[rows], y[rows]), len(rows)).loss_gradients()
        for place, n in enumerate(rows):
            loss = module.training_step((x[n : n + 1], y[n : n + 1]), 0)
            for name, parameter in module.named_parameters():
                expected = torch.autograd.grad(loss, parameter, retain_graph=True)[0]
                dense = found[name].dense()[0, place].reshape(parameter.shape)
                torch.testing.assert_close(dense, expected)


def test_a_penalty_that_the_hook_adds_to_each_loss_is_part_of_it():
    module, (x, y) = mute(Module(plain)).double(), batch()
    x = x.double()
    module.influence_loss = lambda b: (
        F.cross_entropy(module.last(module.first(b[0])), b[1], reduction="none")
        + 0.1 * module.last.weight.square().sum()
    )
    found = Forward(find_layers(module))(module, (x, y), B).loss_gradients()["last"].dense()
    for n in range(B):
        loss = module.influence_loss((x[n : n + 1], y[n : n + 1]))[0]
        expected = torch.autograd.grad(loss, module.last.weight)[0]
        torch.testing.assert_close(found[0, n, 0, :, :-1], expected)


def test_a_hook_of_the_users_on_a_weight_is_no_second_use():
    module = mute(Module(plain))
    module.first.weight.register_hook(lambda grad: 0 * grad)
    assert Forward(find_layers(module))(module, batch(), B).num_examples == B


class Weighed(nn.Module):
    """Two losses weighed by a parameter that nothing else uses (Kendall et al. 2018)."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.log_variance = (
            nn.Linear(3, 3),
            nn.Linear(3, 2),
            nn.Parameter(torch.ones(2)),
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        hidden = self.first(x)
        losses = torch.stack([F.cross_entropy(self.last(hidden), y), F.mse_loss(hidden[:, 0], x[:, 0])])
        return (losses * (-self.log_variance).exp() + self.log_variance).sum()


def test_parameters_of_the_loss_alone_are_covered():
    module, (x, y) = mute(Weighed()).double(), batch()
    run = Forward(find_layers(module))
    found = run(module, (x.double(), y), B).loss_gradients()
    assert not run.silent
    for n in range(B):
        loss = module.training_step((x[n : n + 1].double(), y[n : n + 1]), 0)
        wanted = [module.first.weight, module.log_variance]
        weight, log_variance = torch.autograd.grad(loss, wanted)
        torch.testing.assert_close(found["first"].dense()[0, n, 0, :, :-1], weight)
        torch.testing.assert_close(found["log_variance"].dense()[0, n].reshape(2), log_variance)


def test_parameters_of_the_loss_alone_are_covered_where_the_user_gives_its_values():
    module, (x, y) = mute(Weighed()).double(), batch()

    def values(module, data):
        hidden = module.first(data[0])
        cross = F.cross_entropy(module.last(hidden), data[1], reduction="none")
        square = (hidden[:, 0] - data[0][:, 0]).square()
        return (torch.stack([cross, square]) * (-module.log_variance).exp()[:, None]).sum(
            0
        ) + module.log_variance.sum()

    run = Forward(find_layers(module), values)
    found = run(module, (x.double(), y), B).loss_gradients()
    assert not run.silent
    for n in range(B):
        loss = module.training_step((x[n : n + 1].double(), y[n : n + 1]), 0)
        for name, parameter in (("first", module.first.weight), ("log_variance", module.log_variance)):
            expected = torch.autograd.grad(loss, parameter, retain_graph=True)[0]
            dense = found[name].dense()[0, n, 0]
            torch.testing.assert_close(dense[:, :-1] if name == "first" else dense.reshape(2), expected)


def test_errors_of_the_step_say_where_it_ran():
    def step(module, x, y):
        return module.trainer.optimizers[0]

    with pytest.raises(AttributeError) as info:
        forward(step)
    assert "outside of a fit" in info.value.__notes__[0]
    assert "influence_loss(batch)" in info.value.__notes__[0]


def test_steps_that_fail_in_eval_mode_run_as_in_training():
    """Torch's own modules stay as they are: dropout would draw."""

    class Several(nn.Linear):
        def forward(self, x):
            return super().forward(x) if self.training else torch.cat([super().forward(x)] * 4)

    class Sampled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(Several(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    module, (x, y) = mute(Sampled()).eval(), batch()
    run = Forward(find_layers(module))
    with pytest.warns(InfluenceWarning, match=r"fails in eval mode \(ValueError.*in training mode"):
        found = run(module, (x.double(), y), B).loss_gradients()
    assert not any(part.training for part in module.modules())
    losses = F.cross_entropy(
        module.net[2](F.linear(x.double(), *module.net[0].parameters())), y, reduction="none"
    )
    expected = torch.stack([
        torch.autograd.grad(loss, module.net[2].bias, retain_graph=True)[0] for loss in losses
    ])
    torch.testing.assert_close(found["net.2"].dense()[0, :, 0, :, -1], expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InfluenceWarning)
        run(module, (x.double(), y), B)  # it is said once


def test_what_stands_for_the_curvature_is_said_once():
    def step(module, x, y):
        return F.l1_loss(module.last(module.first(x))[:, 0], y.float())

    module = mute(Module(step))
    run = Forward(find_layers(module))
    with pytest.warns(InfluenceWarning, match="absolute error, whose second derivative is zero"):
        run(module, batch(), B)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InfluenceWarning)
        run(module, batch(), B)


def test_batches_in_which_no_example_counts_have_no_gradient():
    def step(module, x, y):
        return F.cross_entropy(module.last(module.first(x)), torch.full_like(y, -100))

    captured = forward(step)
    assert captured.weights.tolist() == [0] * B
    assert not any(gradient.dense().any() for gradient in captured.loss_gradients().values())


def loop(module, x, y):
    return F.cross_entropy(torch.stack([module.last(module.first(one)) for one in x]), y)


def prototypes(module, x, y):
    shared = module.last(torch.ones(2, 3, dtype=x.dtype))
    return F.cross_entropy(module.first(x) @ module.last.weight.T + shared[0] * shared[1], y)


def experts(module, x, y):
    """Examples are sent to layers by a mask, and some layers get none."""
    chosen, hidden = x[:, 0] > 0, torch.zeros_like(x)
    hidden[chosen] = module.first(x[chosen])
    hidden = hidden.index_add(0, (~chosen).nonzero()[:, 0], module.first(2 * x[~chosen]).relu())
    return F.cross_entropy(module.last(hidden), y)


def scaled(module, x, y):
    """A call of a layer with other weights in place of its own, made of these."""
    weights = {name: p * p for name, p in module.first.named_parameters()}
    return F.cross_entropy(module.last(torch.func.functional_call(module.first, weights, x)), y)


@pytest.mark.parametrize("step", [loop, prototypes, experts, scaled])
def test_layers_that_are_called_otherwise_than_on_the_batch_are_exact(step):
    """On batches of which one sends all examples one way, one all the other, and one some each way."""
    module = mute(Module(step)).double()
    plan = find_layers(module)
    run = Forward(plan)
    for signs in ([1, -1, 1, 1, -1], [1] * 5, [-1] * 5, [-1, -1, 1, -1, -1]):
        x, y = torch.randn(5, 3).double(), torch.randint(2, (5,))
        x[:, 0] = x[:, 0].abs() * torch.tensor(signs)
        found = run(module, (x, y), 5).loss_gradients()
        for n in range(5):
            loss = step(module, x[n : n + 1], y[n : n + 1])
            for name, layer in plan.layers.items():
                expected = torch.autograd.grad(
                    loss, [layer.module.weight, layer.module.bias], retain_graph=True
                )
                torch.testing.assert_close(found[name].dense()[0, n], layer.from_parameters(*expected))


@pytest.mark.parametrize("kind", ["named", "weighted", "sum", "unnamed", "hook"])
def test_losses_alone_are_those_of_the_forward_pass(kind):
    def step(module, x, y):
        outputs = module.last(torch.tanh(module.first(x)))
        values = F.cross_entropy(outputs, y, reduction="none")
        return {
            "named": lambda: F.cross_entropy(outputs, y),
            "weighted": lambda: (values * x[:, 0].exp()).mean(),
            "sum": lambda: 0.5 * values.mean() + F.mse_loss(outputs, torch.ones_like(outputs)),
            "unnamed": lambda: (outputs.logsumexp(1) - outputs[:, 0]).mean(),
            "hook": lambda: values,
        }[kind]()

    module, data = mute(Module(step)), batch()
    if kind == "hook":
        module.influence_loss = lambda data: step(module, *data)
    expected = Forward(find_layers(module))(module, data, B).per_example()
    torch.testing.assert_close(compute_losses(module, data, B), expected.detach())


def test_losses_alone_are_read_as_the_passes_before_found_the_batch_to_be():
    """Class weights in the batch, as many as there are examples by chance, in a loss without a name."""

    def step(module, x, y, weights):
        outputs = module.last(torch.tanh(module.first(x)))
        return (weights[y] * (outputs.logsumexp(1) - outputs.gather(1, y[:, None])[:, 0])).mean()

    module, data = mute(Module(step)), (batch()[0], torch.arange(B) % 2, torch.linspace(0.5, 2, B))
    plan = find_layers(module)
    values = Forward(plan)(module, data, B).per_example().detach()
    outputs = module.last(torch.tanh(module.first(data[0])))
    expected = data[2][data[1]] * F.cross_entropy(outputs, data[1], reduction="none")
    torch.testing.assert_close(values, expected.detach())
    torch.testing.assert_close(compute_losses(module, data, B, verified=plan.verified), values)
