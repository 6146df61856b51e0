import oracle
import pytest
import torch
from drive import TIGHT, Setup, mute, run
from models import CASES
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_influence.methods.gathering import GradientPass
from lightning_influence.model.layers.gradients import FactoredGradients
from lightning_influence.model.layers.plan import find_layers
from lightning_influence.model.measurements import resolve_measurement
from lightning_influence.support.errors import NonFiniteError

REDUCTIONS = ["mean", "sum", "none"]


@pytest.mark.grid
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", sorted(CASES))
def test_per_example_gradients(name, reduction):
    setup = Setup.of(name, reduction)
    model, loss, x, y, layers = setup.problem
    expected = oracle.per_example_gradients(model, loss, x, y, layers)
    pass_ = setup.run(GradientPass(setup.plan))
    for layer in layers:
        got = pass_.gradients[f"model.{layer}"]
        assert got.dense().shape[0] == 1
        torch.testing.assert_close(got.dense()[0] / setup.wbar, expected[layer], **TIGHT)
    assert pass_.indices.tolist() == list(range(len(x)))


@pytest.mark.parametrize("batch_size", [1, 7, 12])
@pytest.mark.parametrize(
    "name", ["mlp_relu_inplace_weighted", "tokens_weighted", "conv2d_reflect_groups", "mlp_bce"]
)
def test_batches_do_not_matter(name, batch_size):
    setup = Setup.of(name)
    got = setup.layout.dense(setup.run(GradientPass(setup.plan), batch_size).gradients)[0]
    torch.testing.assert_close(got / setup.wbar, setup.gradients(), **TIGHT)


@pytest.mark.parametrize("name", sorted(n for n, c in CASES.items() if c.single_position))
def test_one_position_stays_factored(name):
    setup = Setup.of(name)
    for layer in setup.run(GradientPass(setup.plan)).gradients.values():
        assert isinstance(layer, FactoredGradients)


@pytest.mark.parametrize("measurement", ["margin", "logit"])
@pytest.mark.parametrize("name", ["mlp_gelu", "tokens", "conv2d", "mlp_bce", "segmentation"])
def test_measurements(name, measurement):
    setup = Setup.of(name)
    case = setup.case
    expected = oracle.measurement_gradients(
        case.model, case.loss, case.query_x, case.query_y, case.layers, measurement
    )
    measure = resolve_measurement(measurement, setup.module)
    pass_ = setup.run(GradientPass(setup.plan, measure), batch_size=2, queries=True)
    got = setup.layout.dense(pass_.gradients)[0]
    torch.testing.assert_close(got, oracle.flatten(expected), **TIGHT)


class Branches(nn.Module):
    """A second layer that only batches with a positive first entry use."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(3, 2), nn.Linear(3, 2)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        out = self.always(x)
        return F.mse_loss(out + self.sometimes(x) if x[0, 0] > 0 else out, y)


def test_a_layer_that_some_batches_do_not_use_is_zero_there():
    module = mute(Branches().double())
    x, y = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    x[:2, 0], x[2:, 0] = -1, 1
    pass_ = run(GradientPass(find_layers(module)), module, [(x[:2], y[:2]), (x[2:], y[2:])])
    sometimes, always = (pass_.gradients[name].dense()[0] for name in ("sometimes", "always"))
    assert not sometimes[:2].any()
    torch.testing.assert_close(sometimes[2:], always[2:], **TIGHT)
    assert always[:2].abs().min() > 0


def test_gradients_can_be_kept_in_another_precision():
    setup = Setup.of("mlp_gelu")
    gradients = setup.run(GradientPass(setup.plan, dtype=torch.float32)).gradients
    assert {layer.dense().dtype for layer in gradients.values()} == {torch.float32}


def test_a_measurement_that_is_not_finite_is_refused_with_its_examples():
    setup = Setup.of("mlp_gelu")
    x, y = setup.case.x.clone(), setup.case.y
    x[7, 0] = float("nan")  # not in the first batch, which has a check of its own
    measure = resolve_measurement(lambda module, batch: module.model(batch[0]).sum(1), setup.module)
    with pytest.raises(NonFiniteError, match=r"1 (NaN|examples)"):
        run(GradientPass(setup.plan, measure), setup.module, zip(x.split(5), y.split(5), strict=True))


@pytest.mark.parametrize("name", ["mlp_gelu", "tokens_weighted"])
def test_only_some_examples_are_kept_and_handed_over_once(name):
    setup = Setup.of(name)
    pass_ = setup.run(GradientPass(setup.plan, only=torch.tensor([10, 1, 2])), batch_size=3)
    assert pass_.indices.tolist() == [1, 2, 10]
    got = setup.layout.dense(pass_.collect())[0]
    torch.testing.assert_close(got / setup.wbar, setup.gradients()[[1, 2, 10]], **TIGHT)
    assert pass_.gradients == {}
