import pytest
import torch
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


def resolve(step, batch_size: int = B) -> OutputLoss:
    with LossCapture() as capture:
        batch_loss = step()
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

    def step(use_graph):
        F.cross_entropy(other, target.flip(0))
        loss = F.cross_entropy(logits, target)
        return loss if use_graph else loss * 1

    assert resolve(lambda: step(True)).outputs is logits
    message = refusal(lambda: step(False), "2 different calls have that value")
    assert message.count("F.cross_entropy = ") == 2


@pytest.mark.parametrize("inplace", [False, True])
def test_a_penalty_is_refused(logits, target, inplace):
    def step():
        loss = F.cross_entropy(logits, target)
        if inplace:
            loss += 0.01 * logits.square().sum()
            return loss
        return loss + 0.01 * logits.square().sum()

    message = refusal(step, "no single call of a loss function has that value")
    assert f"1. F.cross_entropy = {F.cross_entropy(logits, target).item():.6g}" in message
    assert "A penalty, a factor or a second term" in message


def test_a_sum_of_losses_is_refused(logits, target):
    def step():
        return F.cross_entropy(logits, target) + F.mse_loss(logits, torch.ones_like(logits))

    message = refusal(step, "sum of several of these calls")
    assert "1. F.cross_entropy" in message
    assert "2. F.mse_loss" in message


def test_a_small_change_is_noticed(logits, target):
    refusal(lambda: F.cross_entropy(logits, target) * (1 + 1e-6), "no single call")
    single = logits.detach().float().requires_grad_()
    assert resolve(lambda: F.cross_entropy(single, target) * (1 + 1e-6)).reduction == "mean"
    refusal(lambda: F.cross_entropy(single, target) * (1 + 1e-3), "no single call")


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
    assert (loss.num_examples, loss.reduction, loss.scale) == (1, "position_mean", 1)


def test_long_lists_of_calls_are_counted(logits, target):
    def step():
        return sum(F.cross_entropy(logits * k, target) for k in range(1, 15)) * 3

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
