import inspect
import math

import pytest
import torch
from loss_reference import check_products
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_influence.model.losses.bce import BinaryCrossEntropyLoss
from lightning_influence.model.losses.capture import LossCapture
from lightning_influence.model.losses.cross_entropy import CrossEntropyLoss
from lightning_influence.model.losses.loss import OutputLoss
from lightning_influence.model.losses.mse import SquaredErrorLoss
from lightning_influence.support.errors import LossCaptureError, NonFiniteError

B, C = 4, 3


@pytest.fixture
def logits() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, C, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def target() -> Tensor:
    return torch.tensor([0, 2, 1, 1])


def resolve(step, batch_size: int = B, *, allows_weights: bool = False) -> OutputLoss:
    with LossCapture() as capture:
        batch_loss = step()
    capture.allows_weights = allows_weights
    return capture.resolve(batch_loss, batch_size)


def refusal(step, match: str, error: type[Exception] = LossCaptureError, batch_size: int = B) -> str:
    with pytest.raises(error, match=match) as info:
        resolve(step, batch_size)
    if error is LossCaptureError:
        assert "influence_loss(batch) -> (B,)" in str(info.value)
    return str(info.value)


def test_functions_and_modules_are_seen(logits, target):
    hot = F.one_hot(target, C).double()
    for step, kind in (
        (lambda: F.cross_entropy(logits, target), CrossEntropyLoss),
        (lambda: nn.CrossEntropyLoss(label_smoothing=0.1)(logits, target), CrossEntropyLoss),
        (lambda: nn.NLLLoss()(logits.log_softmax(1), target), CrossEntropyLoss),
        (lambda: F.nll_loss(input=logits.log_softmax(1), target=target), CrossEntropyLoss),
        (lambda: nn.MSELoss(reduction="sum")(logits, hot), SquaredErrorLoss),
        (lambda: nn.BCEWithLogitsLoss(pos_weight=torch.ones(C))(logits, hot), BinaryCrossEntropyLoss),
    ):
        loss = resolve(step)
        assert isinstance(loss, kind)
        torch.testing.assert_close(loss.batch_value(), step().detach())
        assert loss.num_examples == B
        assert loss.outputs.requires_grad


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_users_own_reduction_is_recognised(logits, target, reduction, weighted):
    weight = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64) if weighted else None
    target[1] = -100
    loss_of = nn.CrossEntropyLoss(weight=weight, reduction=reduction)
    divisor = weight[target[target >= 0]].sum() if weighted else 3
    steps = {
        "sum": lambda: loss_of(logits, target).sum(),
        "mean": lambda: loss_of(logits, target).sum() / divisor,
        "position_mean": lambda: loss_of(logits, target).sum() / B,
    }
    for expected, step in steps.items():
        loss = resolve(step)
        assert loss.reduction == expected
        torch.testing.assert_close(loss.batch_value(), step().detach(), rtol=1e-12, atol=0)


def test_sum_over_positions_and_mean_over_examples():
    pixels = torch.randn(B, 2, 5, dtype=torch.float64, requires_grad=True)
    for step in (
        lambda: F.mse_loss(pixels, torch.zeros_like(pixels), reduction="none").sum((1, 2)).mean(),
        lambda: F.mse_loss(pixels, torch.zeros_like(pixels), reduction="sum") / B,
    ):
        loss = resolve(step)
        assert loss.reduction == "example_mean"
        torch.testing.assert_close(loss.per_example(), pixels.square().sum((1, 2)))
        assert loss.scale == 1


def test_flattened_positions_belong_to_their_example():
    outputs, target = torch.randn(B, 5, C, requires_grad=True), torch.randint(C, (B, 5))
    loss = resolve(lambda: F.cross_entropy(outputs.reshape(-1, C), target.reshape(-1)))
    assert (loss.num_examples, loss.num_columns) == (B, 5 * C)
    expected = F.cross_entropy(outputs.movedim(-1, 1), target, reduction="none").sum(1)
    torch.testing.assert_close(loss.per_example(), expected)


def test_metrics_beside_the_loss_do_no_harm(logits, target):
    def step():
        F.mse_loss(logits.softmax(1), F.one_hot(target, C).double())
        F.l1_loss(logits, torch.zeros_like(logits))
        loss = F.cross_entropy(logits, target, label_smoothing=0.1)
        F.cross_entropy(logits, target)
        F.cross_entropy(logits, target, reduction="sum")
        return loss

    assert resolve(step).label_smoothing == 0.1


def test_the_same_loss_twice_is_one(logits, target):
    def step():
        F.cross_entropy(logits * 1, target)
        return 1 * F.cross_entropy(logits * 1, target.clone())

    assert resolve(step).reduction == "mean"


def test_equal_values_are_told_apart_by_the_graph(logits, target):
    other = logits.detach().flip(0).requires_grad_()

    def step():
        F.cross_entropy(other, target.flip(0))
        return F.cross_entropy(logits, target)

    assert resolve(step).outputs is logits
    assert resolve(lambda: step() * 1).outputs is logits
    message = refusal(lambda: step().detach(), "2 different calls have that value")
    assert message.count("F.cross_entropy = ") == 2


def check_gradient(step, loss: OutputLoss, outputs: Tensor) -> None:
    """The loss's seed leads to the gradient of the batch's loss in what the model gave out."""
    (expected,) = torch.autograd.grad(step(), outputs)
    share = loss.scale / loss.weights().sum()
    (found,) = torch.autograd.grad(loss.outputs, outputs, share * loss.gradient())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    (values,) = torch.autograd.grad(share * loss.per_example().sum(), outputs)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_penalty_is_refused(logits, target, inplace):
    def step():
        loss = F.cross_entropy(logits, target)
        if inplace:
            loss += 0.01 * logits.square().sum()
            return loss
        return loss + 0.01 * logits.square().sum()

    message = refusal(step, "no single call of a loss function, nor a sum of several, makes it up")
    assert f"1. F.cross_entropy = {F.cross_entropy(logits, target).item():.6g}" in message
    assert "A second term that depends on the outputs" in message


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-12])
def test_sums_of_losses_are_read_whatever_their_sizes(logits, target, scale):
    """The second term may be a million times smaller in value, and have all of some outputs' gradient."""
    head = torch.randn(B, 2, dtype=torch.float64, requires_grad=True)

    def step():
        small = scale * F.mse_loss(head, torch.ones_like(head), reduction="none").sum(1).mean()
        return 3 * F.cross_entropy(logits, target) + small + F.l1_loss(logits, torch.zeros_like(logits)) / 4

    loss = resolve(step)
    torch.testing.assert_close(loss.batch_value(), step().detach(), rtol=1e-12, atol=0)
    check_gradient(step, loss, logits)
    check_gradient(step, loss, head)
    odds = F.cross_entropy(logits, target, reduction="none").neg().exp().logit()
    torch.testing.assert_close(loss.margin(), odds)
    assert "absolute error" in loss.note


def test_a_sum_has_the_curvature_of_its_terms(logits, target):
    """Two terms on one output, in the parameters behind it, against the Hessian of the batch's loss."""
    weight = torch.randn(C, C, dtype=torch.float64, requires_grad=True)
    x = torch.randn(B, C, dtype=torch.float64)

    def value(w):
        f = x @ w
        return 0.5 * F.cross_entropy(f, target, reduction="sum") + F.mse_loss(f, x, reduction="sum")

    loss = resolve(lambda: value(weight))
    assert (loss.reduction, loss.scale) == ("sum", B)
    check_products(loss)
    hessian = torch.func.hessian(value)(weight.detach()).reshape(C * C, C * C)
    # Column k belongs to one example at a time: its outer products between examples mean nothing.
    jacobian = torch.func.jacrev(lambda w: torch.cat([x @ w, x @ w], 1))(weight.detach()).flatten(2)
    columns = torch.stack([column.reshape(B, -1) for column in loss.columns()])
    pulled = torch.einsum("kbo,bop->kbp", columns, jacobian).flatten(0, 1)
    torch.testing.assert_close(pulled.T @ pulled, hessian)
    moved = loss.with_outputs(torch.zeros_like(loss.outputs)).per_example()
    torch.testing.assert_close(moved, 0.5 * math.log(C) + x.square().sum(1))


def test_terms_that_leave_out_positions_are_normalised_by_their_batch(logits, target):
    target[0] = -100
    step = lambda: F.cross_entropy(logits, target) + F.mse_loss(logits, torch.ones_like(logits))  # noqa: E731
    loss = resolve(step)
    torch.testing.assert_close(loss.batch_value(), step().detach())
    check_gradient(step, loss, logits)


@pytest.mark.parametrize("kind", ["learned", "schedule", "weighted", "masked", "summed"])
def test_factors_of_every_kind_are_derivatives(logits, target, kind):
    weight = torch.tensor([0.2, 0.0, 3.0, 1.0], dtype=torch.float64)
    mask, spread = (weight > 0).double(), torch.zeros((), dtype=torch.float64, requires_grad=True)

    def step():
        values = F.cross_entropy(logits, target, reduction="none")
        return {
            "learned": lambda: torch.exp(-spread) * values.mean() + spread,
            "schedule": lambda: values.mean() * 0.37,
            "weighted": lambda: (values * weight).mean(),
            "masked": lambda: (values * mask).sum() / mask.sum(),
            "summed": lambda: (values * weight).sum(),
        }[kind]()

    if kind == "learned":
        refusal(step, "makes it up")
    loss = resolve(step, allows_weights=kind == "learned")
    torch.testing.assert_close(loss.batch_value(), step().detach())
    check_gradient(step, loss, logits)
    check_products(loss)
    if kind == "masked":
        assert loss.weights().tolist() == mask.tolist()
    if kind in ("weighted", "summed"):
        torch.testing.assert_close(
            loss.per_example(), weight * F.cross_entropy(logits, target, reduction="none")
        )


def test_elements_are_weighed_by_the_users_own_factors(logits):
    weight = torch.rand(B, C, dtype=torch.float64)
    step = lambda: (F.mse_loss(logits, torch.ones_like(logits), reduction="none") * weight).mean()  # noqa: E731
    loss = resolve(step)
    check_gradient(step, loss, logits)
    torch.testing.assert_close(loss.curvature() / B, 2 * weight / weight.numel())
    variance = torch.rand(B, C, dtype=torch.float64).add(0.1).requires_grad_()

    def step():
        values = F.gaussian_nll_loss(logits, torch.ones_like(logits), variance, reduction="none")
        return (values * weight).sum()

    loss = resolve(step)
    check_gradient(step, loss, logits)
    check_gradient(step, loss, variance)


def test_a_function_of_the_loss_is_refused(logits, target):
    for function in (torch.sqrt, torch.square, lambda v: (1 - torch.exp(-v)) * v):
        refusal(lambda: function(F.cross_entropy(logits, target)), "a root")  # noqa: B023
        refusal(lambda: function(F.cross_entropy(logits, target, reduction="none")).mean(), "a root")  # noqa: B023


def test_minus_a_loss_is_refused(logits, target):
    refusal(lambda: -F.cross_entropy(logits, target), "factor of -1; accepted are positive")


def test_a_penalty_on_weights_alone_is_told_apart(target):
    net, x = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, C)).double(), torch.randn(B, 5).double()

    def step():
        return F.cross_entropy(net(x), target) + 0.1 * sum(p.square().sum() for p in net.parameters())

    assert resolve(step).reduction == "mean"

    def on_activations():
        hidden = net[:2](x)
        return F.cross_entropy(net[2](hidden), target) + hidden.square().mean()

    refusal(on_activations, "A second term that depends on the outputs")


def test_a_term_of_value_zero_is_seen_by_its_gradient(target):
    net, x = nn.Linear(5, C).double(), torch.randn(B, 5).double()

    def step():
        outputs = net(x)
        surrogate = outputs.square().mean()
        return F.cross_entropy(outputs, target) + surrogate - surrogate.detach()

    refusal(step, "A second term that depends on the outputs")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_of_exactly_zero_keeps_its_reduction(reduction):
    outputs = torch.ones(B, 2, dtype=torch.float64, requires_grad=True)
    loss = resolve(lambda: F.mse_loss(outputs * 1, torch.ones(B, 2).double(), reduction=reduction))
    assert loss.reduction == reduction
    values = resolve(lambda: F.mse_loss(outputs * 1, torch.ones(B, 2).double(), reduction="none").mean())
    torch.testing.assert_close(values.curvature(), torch.ones(B, 2).double())


def test_batches_without_weight_have_no_gradient_and_no_weight(logits, target):
    loss = resolve(lambda: F.cross_entropy(logits, torch.full_like(target, -100)))
    assert loss.weights().tolist() == [0] * B
    assert not loss.gradient().any()
    assert not torch.stack(list(loss.columns())).any()


def test_a_small_change_is_a_factor(logits, target):
    loss = resolve(lambda: F.cross_entropy(logits, target) * (1 + 1e-6))
    assert loss.factor == pytest.approx(1 + 1e-6, rel=1e-12)
    single = logits.detach().float().requires_grad_()
    assert resolve(lambda: F.cross_entropy(single, target) * (1 + 1e-6)).reduction == "mean"
    assert resolve(lambda: F.cross_entropy(single, target) * (1 + 1e-3)).factor == pytest.approx(1.001)


@pytest.mark.parametrize("name", ["soft_margin_loss", "multilabel_soft_margin_loss", "hinge_embedding_loss"])
def test_unknown_losses_are_named(logits, name):
    message = refusal(
        lambda: getattr(F, name)(logits, torch.ones_like(logits)), f"F.{name} has no known output curvature"
    )
    assert (
        "Accepted are F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.cross_entropy" in message
    )


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
def test_every_named_loss_is_found_under_its_reductions(logits):
    p, half, log_p = logits.sigmoid(), torch.full_like(logits, 0.5), logits.log_softmax(1)
    calls = {
        F.l1_loss: (logits, half),
        F.huber_loss: (logits, half),
        F.smooth_l1_loss: (logits, half),
        F.binary_cross_entropy: (p, half),
        F.poisson_nll_loss: (logits, half),
        F.gaussian_nll_loss: (logits, half, p),
        F.kl_div: (log_p, half / half.sum(1, keepdim=True)),
    }
    for function, arguments in calls.items():
        for reduction in ("mean", "sum"):
            loss = resolve(lambda: function(*arguments, reduction=reduction))  # noqa: B023
            assert loss.reduction == reduction
        for step in (Tensor.mean, Tensor.sum):
            value = step(function(*arguments, reduction="none"))
            found = resolve(lambda: step(function(*arguments, reduction="none")))  # noqa: B023
            torch.testing.assert_close(found.batch_value(), value.detach())


def test_ctc_loss_is_named():
    rows = torch.randn(6, 2, C, requires_grad=True)
    lengths = torch.tensor([6, 6]), torch.tensor([2, 2])
    step = lambda: F.ctc_loss(rows.log_softmax(2), torch.ones(2, 2, dtype=torch.long), *lengths)  # noqa: E731
    refusal(step, "F.ctc_loss has no known output curvature", batch_size=2)


def test_no_loss_seen(logits):
    message = refusal(lambda: logits.square().mean(), "no loss function was seen")
    assert "torch.compile" in message


def test_calls_without_gradient_are_not_recorded(logits, target):
    with LossCapture() as capture:
        F.cross_entropy(logits.detach(), target)
        with torch.no_grad():
            F.cross_entropy(logits, target)
    assert capture.calls == []


def test_nothing_is_recorded_outside(logits, target):
    with LossCapture() as capture:
        pass
    F.cross_entropy(logits, target)
    assert capture.calls == []
    with capture:
        F.cross_entropy(logits, target)
    assert len(capture.calls) == 1
    with capture:
        pass
    assert capture.calls == []


def test_resolving_inside_records_nothing(logits, target):
    with LossCapture() as capture:
        value = F.cross_entropy(logits, target, reduction="none").mean()
        capture.resolve(value, B)
        assert len(capture.calls) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_loss(logits, target, value):
    refusal(lambda: F.cross_entropy(logits, target) * value, "training loss is (nan|inf)", NonFiniteError)


def test_bad_requests(logits, target):
    refusal(
        lambda: F.cross_entropy(logits, target, reduction="none"),
        r"shape \(4,\); accepted is a single number",
    )
    refusal(lambda: F.cross_entropy(logits, target), "batch_size=0", ValueError, batch_size=0)


def test_rows_must_be_a_multiple_of_the_batch(logits, target):
    message = refusal(
        lambda: F.cross_entropy(logits, target), "4 rows .* no multiple of the batch size 3", batch_size=3
    )
    assert "ignore_index" in message


def test_arguments_that_do_not_fit_are_explained(logits, target):
    refusal(lambda: F.mse_loss(logits, logits.flip(0)), "target that requires a gradient")
    refusal(lambda: F.nll_loss(logits, target), "not log-probabilities")


def test_outputs_changed_in_place_are_noticed(logits, target):
    def step():
        outputs = logits * 1
        loss = F.cross_entropy(outputs, target)
        with torch.no_grad():
            outputs.zero_()
        return loss

    refusal(step, "changed in place after the call")


def test_last_batch_of_one(logits, target):
    loss = resolve(lambda: F.cross_entropy(logits[:1], target[:1], reduction="none"), batch_size=1)
    assert (loss.num_examples, loss.scale) == (1, 1)
    assert loss.per_example().tolist() == [F.cross_entropy(logits[:1], target[:1]).item()]


def test_long_lists_of_calls_are_counted(logits, target):
    def step():
        return sum(F.cross_entropy(logits * k, target) for k in range(1, 15)).sqrt()

    message = refusal(step, "no single call")
    assert "  10. F.cross_entropy" in message
    assert "  and 4 more" in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precision_of_the_users_model(dtype, target):
    outputs = torch.randn(B, C).to(dtype).requires_grad_()
    loss = resolve(lambda: F.cross_entropy(outputs, target))
    assert loss.per_example().dtype == torch.float32
    assert resolve(lambda: F.cross_entropy(outputs, target, reduction="none").mean()).outputs is outputs


def test_autocast(target):
    net, x = nn.Linear(5, C), torch.randn(B, 5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = resolve(lambda: F.cross_entropy(net(x), target))
    assert loss.outputs.dtype == torch.bfloat16
    assert loss.gradient().dtype == torch.float32


def test_compiled_submodule_upstream(target):
    compiles = []

    def backend(graph, inputs):
        compiles.append(graph)
        return graph.forward

    torch._dynamo.reset()
    net, x = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, C)).double(), torch.randn(B, 5).double()
    fast = torch.compile(net, backend=backend)
    plain = torch.autograd.grad(F.cross_entropy(fast(x), target), net[0].weight)[0]
    for _ in range(4):  # each capture is a new object: the compiler must not start again for it
        loss = resolve(lambda: F.cross_entropy(fast(x), target))
        pulled = torch.autograd.grad(loss.outputs, net[0].weight, loss.gradient() / B)[0]
        torch.testing.assert_close(pulled, plain, rtol=1e-12, atol=1e-14)
    assert len(compiles) <= 2  # without and with a capture
    torch._dynamo.reset()


def test_loss_inside_a_compiled_function_is_explained(target):
    torch._dynamo.reset()
    net, x = nn.Linear(5, C), torch.randn(B, 5)
    fast = torch.compile(lambda a, y: F.cross_entropy(net(a), y), backend="aot_eager")
    refusal(lambda: fast(x, target), "compile the network and not its loss")
    torch._dynamo.reset()


@pytest.mark.skipif(
    "weight" not in inspect.signature(F.l1_loss).parameters, reason="l1_loss of torch 2.4 takes no weight"
)
def test_a_weight_that_torch_loses_on_the_way_is_given_back(logits):
    """Torch leaves out the weight of F.l1_loss where a mode looks on; watching must not change the loss."""
    target, weight = torch.zeros_like(logits), torch.rand(B, C, dtype=torch.float64)
    expected = F.l1_loss(logits, target, weight=weight)
    with LossCapture() as capture:
        value = F.l1_loss(logits, target, weight=weight)
    assert torch.equal(value, expected)
    loss = capture.resolve(value, B)
    torch.testing.assert_close(loss.batch_value(), expected.detach())
