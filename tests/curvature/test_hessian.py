import lightning
import oracle
import pytest
import torch
from drive import TIGHT, Setup, mute, run
from models import CASES
from torch import nn
from torch.nn import functional as F

from lightning_influence.curvature import differentiation
from lightning_influence.curvature.gauss_newton import CurvatureProductPass, DenseCurvaturePass
from lightning_influence.curvature.hessian import DenseHessianPass, HessianProductPass
from lightning_influence.model.layers.plan import find_layers
from lightning_influence.support.errors import NonFiniteError, UnsupportedModelError

SOME = ["mlp_softplus_weighted_smoothing", "mlp_bce", "mlp_mse", "tokens_weighted", "shared_conv"]


def draw(setup, count=4):
    return torch.randn(count, setup.layout.numel, dtype=torch.float64)


def hessian(setup):
    return oracle.hessian(*setup.problem)


@pytest.mark.parametrize("name", sorted(CASES))
def test_products_and_matrix(name):
    setup = Setup.of(name)
    H, vectors = hessian(setup), draw(setup)
    pass_ = setup.run(HessianProductPass(setup.plan, vectors))
    torch.testing.assert_close(pass_.result(), vectors @ H, **TIGHT)
    assert pass_.count.examples == 12
    found = setup.run(DenseHessianPass(setup.plan)).result()
    torch.testing.assert_close(found, H, **TIGHT)
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("name", sorted(CASES))
def test_gauss_newton_products_through_autograd(name, monkeypatch):
    """The exact way for many outputs gives what columns give."""
    setup = Setup.of(name)
    monkeypatch.setattr(CurvatureProductPass, "_autograd_is_cheaper", lambda self, captured: True)
    vectors = draw(setup)
    pass_ = setup.run(CurvatureProductPass(setup.plan, vectors, fisher="exact"))
    torch.testing.assert_close(pass_.result(), vectors @ setup.ggn(), **TIGHT)
    assert not pass_.estimated


@pytest.mark.grid
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("name", SOME)
def test_other_reductions(name, reduction):
    setup = Setup.of(name, reduction)
    vectors = draw(setup)
    got = setup.run(HessianProductPass(setup.plan, vectors)).result()
    torch.testing.assert_close(got, vectors @ hessian(setup), **TIGHT)


@pytest.mark.grid
@pytest.mark.parametrize("batch_size", [1, 7, 12])
@pytest.mark.parametrize("name", SOME)
def test_batches_do_not_matter(name, batch_size):
    setup = Setup.of(name)
    got = setup.run(DenseHessianPass(setup.plan), batch_size).result()
    torch.testing.assert_close(got, hessian(setup), **TIGHT)


@pytest.mark.parametrize("limit", [1, 2**12])
def test_vectors_in_chunks_and_rows(monkeypatch, limit):
    monkeypatch.setattr(differentiation, "_BATCHED_BYTES", limit)
    monkeypatch.setattr("lightning_influence.curvature.hessian._ROWS", 7)
    setup = Setup.of("tokens_class_first")
    vectors = draw(setup, 5)
    got = setup.run(HessianProductPass(setup.plan, vectors)).result()
    torch.testing.assert_close(got, vectors @ hessian(setup), **TIGHT)
    torch.testing.assert_close(setup.run(DenseHessianPass(setup.plan)).result(), hessian(setup), **TIGHT)


@pytest.mark.parametrize("make", [HessianProductPass, CurvatureProductPass])
def test_the_sum_over_processes_is_what_is_averaged(make):
    setup = Setup.of("mlp_relu_inplace_weighted")
    case, vectors = setup.case, draw(setup)
    matrix = hessian(setup) if make is HessianProductPass else setup.ggn()
    passes = [
        run(make(setup.plan, vectors), setup.module, [(case.x[part], case.y[part])])
        for part in (slice(0, 5), slice(5, 12))
    ]
    [theirs] = getattr(passes[1], "_sums", None) or [passes[1]._sum]
    others = [theirs, torch.tensor([7.0, passes[1].count.normaliser], dtype=torch.float64)]
    total = passes[0].result(lambda own: own + others.pop(0))
    torch.testing.assert_close(total, vectors @ matrix, **TIGHT)


def test_a_process_without_examples_adds_nothing():
    setup = Setup.of("mlp_mse")
    P = setup.layout.numel
    full = setup.run(DenseHessianPass(setup.plan))
    others = [full._sum, torch.tensor([12.0, 12.0], dtype=torch.float64)]
    got = DenseHessianPass(setup.plan).result(lambda own: own + others.pop(0))
    torch.testing.assert_close(got, hessian(setup), **TIGHT)
    assert HessianProductPass(setup.plan, torch.zeros(0, P)).result().shape == (0, P)


def test_no_vectors():
    setup = Setup.of("mlp_mse")
    none = torch.zeros(0, setup.layout.numel, dtype=torch.float64)
    for make in (HessianProductPass, CurvatureProductPass):
        assert setup.run(make(setup.plan, none)).result().shape == none.shape


def test_a_spoiled_sum_is_refused():
    setup = Setup.of("mlp_mse")
    pass_ = setup.run(DenseHessianPass(setup.plan))
    pass_._sum[0, 1] = float("inf")
    with pytest.raises(NonFiniteError, match="curvature of the training loss is not finite"):
        pass_.result()


@pytest.mark.parametrize("autograd", [False, True])
@pytest.mark.parametrize("make", [HessianProductPass, CurvatureProductPass])
def test_float32_and_vectors_of_another_precision(make, autograd, monkeypatch):
    monkeypatch.setattr(CurvatureProductPass, "_autograd_is_cheaper", lambda self, captured: autograd)
    setup = Setup.of("mlp_gelu", dtype=torch.float32)
    case, vectors = setup.case, draw(setup)
    kind = {} if make is HessianProductPass else {"fisher": "exact"}
    got = run(make(setup.plan, vectors, **kind), setup.module, [(case.x.float(), case.y)]).result()
    assert got.dtype == torch.float64
    matrix = hessian(setup) if make is HessianProductPass else setup.ggn()
    torch.testing.assert_close(got, vectors @ matrix, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------- models with kernels of their own


class Step(lightning.LightningModule):
    """A network before a linear layer and a cross-entropy, as a user would write it."""

    def __init__(self, body, width):
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


class Attention(nn.Module):
    """Fused attention, which has no second derivative, between two linear layers."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        heads = [t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v)]
        return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2).mean(1)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.first, self.rnn = nn.Linear(4, 5), kind(5, 4, batch_first=True)

    def forward(self, x):
        return self.rnn(self.first(x))[0][:, -1]


def by_finite_differences(module, x, y, vectors, plan):
    """H v as the central difference of the loss's gradient; independent of double backward."""
    own = dict(module.named_parameters())
    groups = [
        [own[name]] if name in own else [own[f"{name}.weight"], own[f"{name}.bias"]] for name in plan.layers
    ]

    def gradient():
        loss = F.cross_entropy(module(x), y)
        parts = [torch.autograd.grad(loss, group, retain_graph=True) for group in groups]
        return torch.cat([
            torch.cat([part[0].flatten(1), part[1][:, None]], dim=1).flatten()
            if len(part) == 2
            else part[0].flatten()
            for part in parts
        ])  # fmt: skip

    def shift(vector):
        parts = vector.split([sum(p.numel() for p in group) for group in groups])
        with torch.no_grad():
            for part, group in zip(parts, groups, strict=True):
                if len(group) == 1:
                    group[0] += part.view_as(group[0])
                else:
                    matrix = part.view(len(group[1]), -1)
                    group[0] += matrix[:, :-1]
                    group[1] += matrix[:, -1]

    result, step = [], 1e-5
    for vector in vectors:
        shift(step * vector)
        up = gradient()
        shift(-2 * step * vector)
        down = gradient()
        shift(step * vector)
        result.append((up - down) / (2 * step))
    return torch.stack(result)


def flags():
    backends = torch.backends
    return (
        backends.mkldnn.enabled,
        getattr(backends.mkldnn, "allow_tf32", None),
        backends.cudnn.enabled,
        torch.backends.cuda.flash_sdp_enabled(),
    )


@pytest.mark.parametrize("body", [Attention, lambda: Recurrent(nn.LSTM), lambda: Recurrent(nn.GRU)])
def test_fused_kernels_are_replaced(body):
    torch.manual_seed(0)
    before = flags()
    layer = body()
    module = mute(Step(layer, 8 if isinstance(layer, Attention) else 4).double())
    plan = find_layers(module)
    x, y = torch.randn(6, 5, 4, dtype=torch.float64), torch.randint(3, (6,))
    vectors = torch.randn(2, plan.numel, dtype=torch.float64)
    got = run(HessianProductPass(plan, vectors), module, [(x[:4], y[:4]), (x[4:], y[4:])]).result()
    expected = by_finite_differences(module, x, y, vectors, plan)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)
    assert flags() == before


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


class _Unbatched(torch.autograd.Function):
    """Twice differentiable, but through NumPy, which no batched backward pass can see."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 2)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0] + 0 * grad.sum().item()


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.function = nn.Linear(4, 5), function

    def forward(self, x):
        return self.function.apply(self.first(x))


def batch():
    return torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))


def once():
    torch.manual_seed(0)
    module = mute(Step(Applied(_Once), 5).double())
    plan = find_layers(module)
    return module, plan, torch.randn(2, plan.numel, dtype=torch.float64)


def test_a_model_without_second_derivatives_has_no_hessian():
    module, plan, vectors = once()
    with pytest.raises(UnsupportedModelError, match=r"needs second derivatives.*once_diff.*'exact'"):
        run(HessianProductPass(plan, vectors), module, [batch()])


def test_a_model_without_second_derivatives_has_columns(monkeypatch):
    module, plan, vectors = once()
    x, y = batch()
    split = [(x[:2], y[:2]), (x[2:], y[2:])]
    expected = run(CurvatureProductPass(plan, vectors, fisher="exact"), module, split).result()
    monkeypatch.setattr("lightning_influence.curvature.gauss_newton._FEW_COLUMNS", -9)
    got = run(CurvatureProductPass(plan, vectors, fisher="exact"), module, split)
    torch.testing.assert_close(got.result(), expected, **TIGHT)
    assert not got.estimated
    monkeypatch.setattr("lightning_influence.curvature.gauss_newton.MAX_COLUMNS", 2)
    with pytest.raises(UnsupportedModelError, match=r"needs second derivatives.*fisher='mixed'"):
        run(CurvatureProductPass(plan, vectors, fisher="exact"), module, split)


def test_operations_that_cannot_be_batched_take_one_vector_at_a_time():
    module = mute(Step(Applied(_Unbatched), 5).double())
    plan, (x, y) = find_layers(module), batch()
    vectors = torch.randn(3, plan.numel, dtype=torch.float64)
    got = run(HessianProductPass(plan, vectors), module, [(x, y)]).result()
    expected = by_finite_differences(module, x, y, vectors, plan)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


# ------------------------------------------------------------------------------ losses of the user's own


class Hooked(Step):
    def influence_loss(self, batch):
        return (self(batch[0]) - F.one_hot(batch[1], 3)).square().sum(1).sqrt()


def test_a_hand_written_loss_has_a_hessian_and_the_curvature_of_its_outputs():
    torch.manual_seed(3)
    module = mute(Hooked(nn.Linear(4, 5), 5).double())
    plan, (x, y) = find_layers(module), batch()
    found = run(DenseHessianPass(plan), module, [(x[:2], y[:2]), (x[2:], y[2:])]).result()

    def objective(flat):
        first, second = flat[:25].reshape(5, 5), flat[25:].reshape(3, 6)
        hidden = x @ first[:, :-1].T + first[:, -1]
        outputs = hidden @ second[:, :-1].T + second[:, -1]
        return (outputs - F.one_hot(y, 3)).square().sum(1).sqrt().mean()

    def matrix(layer):
        return torch.cat([layer.weight, layer.bias[:, None]], dim=1).flatten()

    flat = torch.cat([matrix(module.body), matrix(module.head)]).detach()
    torch.testing.assert_close(found, torch.func.hessian(objective)(flat), **TIGHT)
    by_outputs = run(DenseCurvaturePass(plan, fisher="exact"), module, [(x, y)])
    assert not by_outputs.estimated

    def outputs_of(flat):
        first, second = flat[:25].reshape(5, 5), flat[25:].reshape(3, 6)
        hidden = x @ first[:, :-1].T + first[:, -1]
        return hidden @ second[:, :-1].T + second[:, -1]

    jacobian, outputs = torch.func.jacrev(outputs_of)(flat), outputs_of(flat)
    bend = torch.func.vmap(torch.func.hessian(lambda f, target: (f - target).square().sum().sqrt()))
    inner = bend(outputs, F.one_hot(y, 3).to(outputs))
    expected = torch.einsum("ncp,ncd,ndq->pq", jacobian, inner, jacobian) / len(x)
    torch.testing.assert_close(by_outputs.result(), expected, **TIGHT)


def test_layers_that_take_no_part_are_constants():
    module = Step(nn.Linear(4, 5), 5).double()
    module.idle = nn.Linear(2, 2).double()
    plan, (x, y) = find_layers(mute(module)), batch()
    matrix = run(DenseHessianPass(plan), module, [(x, y)]).result()
    assert not matrix[-6:].any()
    alone = run(DenseHessianPass(find_layers(module, ["body", "head"])), module, [(x, y)]).result()
    torch.testing.assert_close(matrix[:-6, :-6], alone, **TIGHT)


@pytest.mark.parametrize(("batches", "groups"), [([1], 1), ([1], 2), ([3], 1), ([3, 3, 1, 1, 3], 1)])
def test_batched_passes_that_torch_gets_wrong_are_noticed(batches, groups):
    """The backward pass of group_norm reads sizes off its tensors: wrong, or failing, under batching."""

    class Normed(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            parts = nn.Conv1d(2, 4, 3, padding=1), nn.GroupNorm(groups, 4), nn.Tanh(), nn.Flatten()
            self.net = nn.Sequential(*parts, nn.Linear(16, 2)).double()

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    examples = sum(batches)
    module, x, y = Normed(), torch.randn(examples, 2, 4, dtype=torch.float64), torch.arange(examples) % 2
    plan = find_layers(module)
    parts = list(zip(x.split(batches), y.split(batches), strict=True))
    found = run(DenseHessianPass(plan), module, parts).result()
    net = module.net
    own = [[net[0].weight, net[0].bias], [net[1].weight], [net[1].bias], [net[4].weight, net[4].bias]]
    tensors = [p for group in own for p in group]
    first = torch.autograd.grad(module.training_step((x, y), 0), tensors, create_graph=True)

    def flat(parts):
        w, b, scale, shift, v, c = parts
        rows = [torch.cat([w.flatten(1), b[:, None]], 1), scale, shift, torch.cat([v, c[:, None]], 1)]
        return torch.cat([row.flatten() for row in rows])

    rows = [flat(torch.autograd.grad(entry, tensors, retain_graph=True)) for entry in flat(first)]
    torch.testing.assert_close(found, torch.stack(rows), **TIGHT)


@pytest.mark.parametrize(
    ("count", "zeros", "checks"), [(2, 0, 0), (3, 0, 2), (9, 0, 2), (3, 3, 3), (3, 6, 4)]
)
def test_batched_passes_are_checked_once_for_each_size(monkeypatch, count, zeros, checks):
    """Inputs that are zero have products that are zero, which show nothing of later ones."""
    module = Step(nn.Linear(4, 5), 5).double()
    x, y = torch.randn(14, 4, dtype=torch.float64), torch.arange(14) % 3
    x[:zeros] = 0
    sizes = [3, 3, 3, 3, 2]
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
    plan = find_layers(mute(module))
    vectors = torch.randn(count, plan.numel, dtype=torch.float64)
    exact = run(DenseHessianPass(plan), module, parts).result()
    check, checked = differentiation._adds_up, []
    monkeypatch.setattr(differentiation, "_adds_up", lambda *args: checked.append(args) or check(*args))
    found = run(HessianProductPass(plan, vectors), module, parts).result()
    torch.testing.assert_close(found, vectors @ exact, **TIGHT)
    assert len(checked) == checks
