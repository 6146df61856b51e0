import pytest
import torch
from drive import TIGHT
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lightning_influence.model.finite import check_finite
from lightning_influence.model.layers import recorder as recorder_module
from lightning_influence.model.layers.gradients import DenseGradients, FactoredGradients, compact
from lightning_influence.model.layers.plan import LayerPlan, find_layers
from lightning_influence.model.layers.recorder import Recorder
from lightning_influence.support.errors import NonFiniteError, UnsupportedModelError

B = 4


def check(net: nn.Module, x: Tensor, include=None, forward=None) -> dict[str, Tensor]:
    """Per-example gradients against one backward pass for each example, with the model as it is."""
    forward = forward or net
    plan = find_layers(net, include)
    with Recorder(plan.layers) as recorder:
        values = forward(x).square().reshape(len(x), -1).sum(1)
    got = {name: g.dense()[0] for name, g in recorder.gradients(values.sum(), [None], len(x)).items()}
    for n in range(len(x)):
        value = forward(x[n : n + 1]).square().sum()
        for name, matrices in got.items():
            layer = plan.layers[name]
            bias = layer.module.bias if layer.has_bias else None
            wanted = [layer.module.weight] + ([] if bias is None else [bias])
            grads = torch.autograd.grad(value, wanted, retain_graph=True, materialize_grads=True)
            expected = (
                layer.from_parameters(*grads) if bias is not None else layer.from_parameters(*grads, None)
            )
            torch.testing.assert_close(matrices[n], expected, **TIGHT)
    check_parts(plan, forward, x, got)
    return got


def check_parts(plan: LayerPlan, forward, x: Tensor, whole: dict[str, Tensor]) -> None:
    """The same in runs of three examples, where inputs are unfolded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder_module, "_PART_BYTES", 1)
        patch.setattr(recorder_module, "_PART_EXAMPLES", 3)
        with Recorder(plan.layers) as recorder:
            values = forward(x).square().reshape(len(x), -1).sum(1)
        parts = list(recorder.gradient_parts(values.sum(), None, len(x)))
    for name, matrices in whole.items():
        joined = torch.cat([part[name].dense()[0] for part in parts])
        torch.testing.assert_close(joined, matrices, **TIGHT)


@pytest.mark.parametrize(("count", "sizes"), [(4, [3, 1]), (3, [3]), (1, [1])])
def test_convolutions_come_in_runs(monkeypatch, count, sizes):
    monkeypatch.setattr(recorder_module, "_PART_BYTES", 1)
    monkeypatch.setattr(recorder_module, "_PART_EXAMPLES", 3)
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(32, 2)).double()
    with Recorder(find_layers(net).layers) as recorder:
        total = net(draw(count, 1, 4, 4)).sum()
    parts = list(recorder.gradient_parts(total, None, count))
    assert [part["0"].num_examples for part in parts] == sizes
    assert [part["2"].num_examples for part in parts] == sizes


def test_layers_that_unfold_nothing_come_at_once(monkeypatch):
    monkeypatch.setattr(recorder_module, "_PART_BYTES", 1)
    monkeypatch.setattr(recorder_module, "_PART_EXAMPLES", 1)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    with Recorder(find_layers(net).layers) as recorder:
        total = net(draw(B, 3)).sum()
    (part,) = recorder.gradient_parts(total, None, B)
    assert part["0"].num_examples == B


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    "activation", [nn.ReLU(inplace=True), nn.SELU(inplace=True), nn.Hardtanh(inplace=True)]
)
def test_in_place_activations(activation):
    check(nn.Sequential(nn.Linear(3, 5), activation, nn.Linear(5, 2)).double(), draw(B, 3))


def test_in_place_addition_to_the_output():
    net = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]).double()

    def forward(x: Tensor) -> Tensor:
        h = net[0](x)
        h += x
        h *= 2
        return net[1](torch.tanh(h))

    check(net, draw(B, 3), forward=forward)


def test_a_layer_called_in_two_shapes():
    net = nn.ModuleList([nn.Linear(3, 3)]).double()

    def forward(x: Tensor) -> Tensor:  # (B, 3), then the same rows as two further positions
        h = torch.tanh(net[0](x))
        return net[0](torch.stack([h, 2 * h], dim=1)).sum(1) + h

    got = check(net, draw(B, 3), forward=forward)
    assert got["0"].shape == (B, 1, 3, 4)


def test_rows_folded_into_the_batch():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Conv2d(1, 2, 2)).double()

    def forward(x: Tensor) -> Tensor:  # (B, 5, 3): each position is a row, then an image
        h = net[1](net[0](x.flatten(0, 1)))
        return net[2](h.reshape(-1, 1, 2, 2)).reshape(len(x), -1)

    check(net, draw(B, 5, 3), forward=forward)


@pytest.mark.parametrize("name", ["Conv1d", "Conv2d", "Conv3d"])
def test_unbatched_convolution(name):
    net = getattr(nn, name)(2, 4, 2, groups=2).double()
    x = draw(1, 2, *([4, 3, 2][: int(name[4])]))
    check(net, x, forward=lambda x: net(x[0]).unsqueeze(0))


def test_input_passed_by_keyword():
    net = nn.ModuleList([nn.Linear(3, 2)]).double()
    check(net, draw(B, 3), forward=lambda x: net[0](input=x))


def test_hooks_of_the_user_are_part_of_what_follows_the_layer():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    net[0].register_forward_hook(lambda module, args, out: torch.tanh(out) * 3)
    net[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    check(net, draw(B, 3))


def test_layers_without_a_gradient():
    net = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)]).double()
    plan = find_layers(net)
    with Recorder(plan.layers) as recorder:
        with torch.no_grad():
            net[1](draw(B, 3))
        out = net[0](draw(B, 3))
        net[2](draw(B, 3))  # recorded, but not in what is differentiated
    assert recorder.silent == ["1"]
    gradients = recorder.gradients(out.sum(), [None], B)
    assert sorted(gradients) == ["0", "2"]
    assert gradients["0"].dense().any()
    assert gradients["2"].dense().shape == (1, B, 1, 3, 4)
    assert not gradients["2"].dense().any()


def test_one_unused_call_of_two():
    net = nn.ModuleList([nn.Linear(3, 3)]).double()

    def forward(x: Tensor) -> Tensor:
        net[0](x + 1)
        return net[0](x)

    check(net, draw(B, 3), forward=forward)


def test_several_seeds_share_a_forward_pass():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with Recorder(find_layers(net).layers) as recorder:
        out = net(draw(B, 3))
    seeds = [draw(B, 2) for _ in range(3)]
    together = recorder.gradients(out, seeds, B)
    for k, seed in enumerate(seeds):
        for name, alone in recorder.gradients(out, [seed], B).items():
            assert torch.equal(together[name].dense()[k], alone.dense()[0])
    parts = recorder.gradient_groups(out, [seeds[:1], seeds[1:]], B)
    for name, layer in together.items():
        first, others = (part[name] for part in parts)
        assert (first.num_seeds, others.num_seeds) == (1, 2)
        assert first.inputs is others.inputs
        assert torch.equal(torch.cat([first.dense(), others.dense()]), layer.dense())
    recorder.clear()
    assert recorder.inputs(B) == {}


@pytest.mark.parametrize("early", [True, False])
def test_non_reentrant_checkpoints(early):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def forward(x: Tensor) -> Tensor:
        with set_checkpoint_early_stop(early):
            return net[2](checkpoint(net[:2], x, use_reentrant=False))

    check(net, draw(B, 3), forward=forward)


def test_reentrant_checkpoints_leave_their_layers_silent():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    with Recorder(find_layers(net).layers) as recorder:
        net[1](checkpoint(net[0], draw(B, 3).requires_grad_(), use_reentrant=True))
    assert recorder.silent == ["0"]


def test_hooks_are_gone_after_the_block_and_after_an_error():
    net = nn.Linear(3, 2)
    with pytest.raises(ZeroDivisionError), Recorder(find_layers(net).layers):
        raise ZeroDivisionError
    assert not net._forward_hooks
    with Recorder(find_layers(net).layers) as recorder:
        net(torch.ones(B, 3))
    net(torch.ones(B, 3))
    assert recorder.inputs(B)[""].shape == (1, B, 1, 4)
    assert not net._forward_hooks


def test_rows_that_are_no_multiple_of_the_examples_are_refused():
    net = nn.Linear(3, 2)
    with Recorder(find_layers(net).layers) as recorder:
        out = net(torch.ones(6, 3))
    with pytest.raises(
        UnsupportedModelError, match=r"'' was called with a tensor of shape \(6, 3\).*4 examples"
    ):
        recorder.gradients(out.sum(), [None], B)


def test_half_precision_is_recorded_in_float32():
    net = nn.Linear(3, 2).bfloat16()
    with Recorder(find_layers(net).layers) as recorder:
        out = net(torch.ones(B, 3, dtype=torch.bfloat16))
    gradients = recorder.gradients(out, [torch.ones(B, 2)], B)[""]
    assert gradients.inputs.dtype == gradients.outputs.dtype == torch.float32
    assert torch.equal(gradients.dense(), torch.ones(1, B, 1, 2, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["inputs", "outputs", "matrices"])
def test_non_finite_gradients_are_refused_by_name(value, side):
    tensors = {"inputs": torch.ones(1, 2, 3, 4), "outputs": torch.ones(1, 1, 2, 3, 5)}
    good = FactoredGradients(**tensors)
    check_finite({"good": good, "dense": DenseGradients(good.dense())})
    if side == "matrices":
        matrices = good.dense()
        matrices[0, 1, 0, 2, 3] = value
        bad = DenseGradients(matrices)
    else:
        tensors[side] = tensors[side].clone()
        tensors[side].view(-1)[-1] = value
        bad = FactoredGradients(**tensors)
    with pytest.raises(NonFiniteError, match=r"in layers \['bad'\]; nothing was stored"):
        check_finite({"good": good, "bad": bad})
    check_finite({})


def test_compact_form():
    one = FactoredGradients(draw(1, B, 1, 3), draw(2, 1, B, 1, 4))
    assert compact(one) is one
    several = FactoredGradients(draw(2, B, 3, 3), draw(2, 2, B, 3, 4))
    assert isinstance(compact(several), DenseGradients)
    torch.testing.assert_close(compact(several).dense(), several.dense(), **TIGHT)


class Residual(nn.Module):
    """Writes to the output of a linear layer, which is a view of a matrix where it has positions."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        y = self.first(x)
        y += x
        y.relu_()
        return self.last(y)


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4), (5, 2, 3, 4)])
def test_writing_to_an_output_with_positions(shape):
    torch.manual_seed(0)
    model, x = Residual().double(), torch.randn(shape, dtype=torch.float64)
    recorder = Recorder(find_layers(model).layers)
    with recorder:
        losses = model(x).flatten(1).square().sum(1)
    gradients = recorder.gradients(losses, [torch.ones_like(losses)], len(x))
    for n in range(len(x)):
        loss = model(x[n : n + 1]).square().sum()
        for name in ("first", "last"):
            layer = model.get_submodule(name)
            weight, bias = torch.autograd.grad(loss, [layer.weight, layer.bias], retain_graph=True)
            expected = torch.cat([weight, bias[:, None]], dim=1)
            torch.testing.assert_close(gradients[name].dense()[0, n, 0], expected, rtol=1e-10, atol=1e-12)
