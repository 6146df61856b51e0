from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from lightning_influence.model.losses.cross_entropy import parse_cross_entropy
from lightning_influence.model.losses.mse import parse_mse_loss
from lightning_influence.model.measurements import resolve_measurement
from lightning_influence.support.errors import LossCaptureError, NonFiniteError, UnsupportedModelError

B, C = 4, 3
PLAIN = SimpleNamespace()


@pytest.fixture
def outputs():
    return torch.randn(B, C, generator=torch.Generator().manual_seed(0), requires_grad=True)


@pytest.fixture
def loss(outputs):
    return parse_cross_entropy(outputs, torch.tensor([0, 1, 2, 0]))


def hooked(outputs):
    return SimpleNamespace(influence_measurement=lambda batch: outputs[:, 0] * batch)


def test_default_is_the_hook_and_without_one_the_loss(outputs):
    assert resolve_measurement(None, PLAIN).name == "loss"
    assert resolve_measurement(None, hooked(outputs)).name == "hook"
    assert resolve_measurement("loss", hooked(outputs)).name == "loss"


@pytest.mark.parametrize("name", ["loss", "margin", "logit"])
def test_names_measure_the_captured_loss(name, loss):
    measurement = resolve_measurement(name, PLAIN)
    assert measurement.needs_loss
    values = measurement(PLAIN, None, loss=loss, batch_size=B, wbar=2.0)
    expected = {"loss": loss.per_example() / 2, "margin": loss.margin(), "logit": loss.true_score()}[name]
    assert torch.equal(values, expected)
    assert values.requires_grad


def test_hook_gets_the_batch(outputs):
    module = hooked(outputs)
    measurement = resolve_measurement("hook", module)
    assert not measurement.needs_loss
    assert torch.equal(measurement(module, 3, loss=None, batch_size=B), 3 * outputs[:, 0])


def test_hook_is_called_on_the_module_given(outputs):
    measurement = resolve_measurement("hook", hooked(outputs))
    other = SimpleNamespace(influence_measurement=lambda batch: outputs[:, 1])
    assert torch.equal(measurement(other, None, loss=None, batch_size=B), outputs[:, 1])


def test_callable_gets_module_and_batch(outputs, loss):
    def second(module, batch):
        return outputs[:, 1] * module.factor * batch

    measurement = resolve_measurement(second, PLAIN)
    assert (measurement.name, measurement.needs_loss) == ("second", False)
    values = measurement(SimpleNamespace(factor=2), 3, loss=loss, batch_size=B)
    assert torch.equal(values, 6 * outputs[:, 1])


def test_loss_without_capture_comes_from_the_hook_for_it(outputs):
    module = SimpleNamespace(influence_loss=lambda batch: outputs.square().sum(1))
    values = resolve_measurement("loss", module)(module, None, loss=None, batch_size=B)
    assert torch.equal(values, outputs.square().sum(1))
    for name in ("loss", "margin"):
        with pytest.raises(LossCaptureError, match=f"measurement='{name}' needs the training loss"):
            resolve_measurement(name, PLAIN)(PLAIN, None, loss=None, batch_size=B)


def test_bad_measurements():
    with pytest.raises(
        ValueError, match=r"measurement='accuracy'; accepted are 'loss', 'margin', 'logit', 'hook'"
    ):
        resolve_measurement("accuracy", PLAIN)
    with pytest.raises(
        ValueError, match=r"SimpleNamespace defines no `influence_measurement\(batch\) -> \(B,\)`"
    ):
        resolve_measurement("hook", PLAIN)
    with pytest.raises(TypeError, match="measurement of type int"):
        resolve_measurement(3, PLAIN)


def test_bad_values_name_their_function(outputs):
    def entropy(module, batch):
        return batch

    measure = resolve_measurement(entropy, PLAIN)
    with pytest.raises(ValueError, match=r"The measurement 'entropy' returned shape \(4, 3\)"):
        measure(PLAIN, outputs, loss=None, batch_size=B)
    with pytest.raises(TypeError, match="The measurement 'entropy' returned NoneType"):
        measure(PLAIN, None, loss=None, batch_size=B)
    with pytest.raises(NonFiniteError, match="4 NaN or infinite values out of 4"):
        measure(PLAIN, outputs[:, 0] / 0, loss=None, batch_size=B)
    module = SimpleNamespace(influence_measurement=lambda batch: outputs.detach()[:, 0])
    with pytest.raises(ValueError, match="influence_measurement returned values without a graph"):
        resolve_measurement(None, module)(module, None, loss=None, batch_size=B)


def test_labels_are_needed_for_margin_and_logit(outputs):
    regression = parse_mse_loss(outputs, F.relu(outputs.detach()))
    for name in ("margin", "logit"):
        with pytest.raises(UnsupportedModelError, match=r"SquaredErrorLoss.* has no labels"):
            resolve_measurement(name, PLAIN)(PLAIN, None, loss=regression, batch_size=B)
