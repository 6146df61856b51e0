"""What is kept between calls serves the data, loss and buffers that it was computed for, and no others."""

import warnings

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_influence import InfluenceModule
from lightning_influence.curvature.state import InfluenceState
from lightning_influence.model.content import same_mean
from lightning_influence.support.errors import InfluenceWarning


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8, affine=False), nn.Tanh(), nn.Linear(8, 3))
        self.weights = torch.ones(3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1], self.weights)


@pytest.fixture
def data():
    torch.manual_seed(0)
    x = torch.randn(80, 5)
    x[40:] *= torch.tensor([3.0, 0.2, 1.0, 1.0, 1.0])
    return TensorDataset(x, torch.randint(3, (80,)))


@pytest.fixture
def model():
    torch.manual_seed(1)
    return Net().eval()


def loader(data, rows):
    return DataLoader(Subset(data, rows), batch_size=16)


def ask(module, data, rows, method="auto"):
    return module.scores(loader(data, rows), loader(data, range(4)), method=method, damping=0.01)


FIRST, SECOND = range(40), range(40, 80)
AGAIN = r"other training data.*mean loss .* then, .* now"


@pytest.mark.parametrize("method", ["auto", "ekfac", "kfac", "cg"])
def test_other_examples_of_the_same_number(model, data, method):
    module = InfluenceModule(model)
    ask(module, data, FIRST, method)
    with pytest.warns(InfluenceWarning, match=AGAIN):
        found = ask(module, data, SECOND, method)
    fresh = ask(InfluenceModule(model), data, SECOND, method)
    torch.testing.assert_close(found.scores, fresh.scores, rtol=1e-4, atol=1e-7)
    with warnings.catch_warnings():  # and what was computed again is of the new data
        warnings.simplefilter("error", InfluenceWarning)
        passes = [p["name"] for p in ask(module, data, SECOND, method).diagnostics.passes]
    assert passes[-1] == "Influence: scores"
    assert "Influence: covariances" not in passes


def test_self_influence_and_solutions_of_other_examples(model, data):
    for call in (
        lambda module, rows: module.self_influence(loader(data, rows)).scores,
        lambda module, rows: module.ihvp(loader(data, rows), loader(data, range(3)), method="ekfac")[0][
            "net.0.weight"
        ],
    ):
        module = InfluenceModule(model).prepare(loader(data, FIRST), method="ekfac")
        with pytest.warns(InfluenceWarning, match=AGAIN):
            found = call(module, SECOND)
        torch.testing.assert_close(found, call(InfluenceModule(model), SECOND), rtol=1e-4, atol=1e-7)


def test_other_buffers_and_another_loss(model, data):
    module = InfluenceModule(model)
    ask(module, data, FIRST)
    model.net[1].running_var.mul_(9)
    found = ask(module, data, FIRST)
    assert any("for other weights, buffers" in told for told in found.diagnostics.warnings)
    torch.testing.assert_close(found.scores, ask(InfluenceModule(model), data, FIRST).scores)
    model.weights = torch.tensor([1.0, 20.0, 0.05])
    with pytest.warns(InfluenceWarning, match=AGAIN):
        found = ask(module, data, FIRST)
    fresh = ask(InfluenceModule(model), data, FIRST)
    torch.testing.assert_close(found.scores, fresh.scores, rtol=1e-4, atol=1e-7)


def test_batches_of_another_size_are_the_same_data(model, data):
    module = InfluenceModule(model)
    ask(module, data, FIRST)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InfluenceWarning)
        other = DataLoader(Subset(data, FIRST), batch_size=7, shuffle=True)
        module.scores(other, loader(data, range(4)), damping=0.01)


@pytest.mark.parametrize(("dtype", "again"), [(torch.float32, True), (torch.bfloat16, False)])
def test_a_model_in_half_precision_rounds_its_losses(model, data, dtype, again):
    model.to(dtype).weights = torch.ones(3, dtype=dtype)
    data = TensorDataset(data.tensors[0].to(dtype), data.tensors[1])
    module = InfluenceModule(model)
    ask(module, data, FIRST, "ekfac")
    module.state.mean_loss *= 1.005  # as if the loss had another temperature that its settings do not show
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", InfluenceWarning)
        ask(module, data, FIRST, "ekfac")
    assert any("other training data" in str(w.message) for w in caught) is again


def test_what_was_prepared_is_of_the_data_it_was_prepared_on(model, data):
    for method in ("ekfac", "auto"):
        module = InfluenceModule(model).prepare(loader(data, FIRST), method=method, damping=0.01)
        kept = module.state.factors
        with warnings.catch_warnings():
            warnings.simplefilter("error", InfluenceWarning)
            ask(module, data, FIRST, method)
        assert module.state.factors.layers["net.0"].inputs is kept.layers["net.0"].inputs


class Head(LightningModule):
    """At a head of zeros every example has the same loss, whatever it is."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        nn.init.zeros_(self.net[2].weight)
        nn.init.zeros_(self.net[2].bias)
        self.smoothing = 0.0

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1], label_smoothing=self.smoothing)


def shuffled_units(model):
    """The same function, its hidden units in another order."""
    order = torch.tensor([3, 0, 1, 2, 7, 6, 5, 4])
    with torch.no_grad():
        model.net[0].weight.copy_(model.net[0].weight[order])
        model.net[0].bias.copy_(model.net[0].bias[order])
        model.net[2].weight.copy_(model.net[2].weight[:, order])


@pytest.mark.parametrize("method", ["auto", "ekfac", "cg"])
def test_other_examples_of_the_same_mean_loss(data, method):
    model = Head()
    module = InfluenceModule(model)
    ask(module, data, FIRST, method)
    with pytest.warns(InfluenceWarning, match=AGAIN):
        found = ask(module, data, SECOND, method)
    fresh = ask(InfluenceModule(model), data, SECOND, method)
    torch.testing.assert_close(found.scores, fresh.scores, rtol=1e-4, atol=1e-7)


def test_one_label_of_one_example_and_a_setting_of_the_loss_of_the_same_mean_loss(data):
    model = Head()
    module = InfluenceModule(model)
    ask(module, data, FIRST)
    data.tensors[1][17] = (data.tensors[1][17] + 1) % 3
    with pytest.warns(InfluenceWarning, match=AGAIN):
        ask(module, data, FIRST)
    model.smoothing = 0.3
    with pytest.warns(InfluenceWarning, match=AGAIN):
        ask(module, data, FIRST)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InfluenceWarning)
        ask(module, data, FIRST)


@pytest.mark.parametrize("method", ["auto", "ekfac"])
def test_hidden_units_that_traded_places(data, method):
    torch.manual_seed(2)
    model = Head()
    nn.init.normal_(model.net[2].weight)
    module = InfluenceModule(model)
    ask(module, data, FIRST, method)
    shuffled_units(model)
    found = ask(module, data, FIRST, method)
    assert any("for other weights, buffers" in told for told in found.diagnostics.warnings)
    fresh = ask(InfluenceModule(model), data, FIRST, method).scores
    torch.testing.assert_close(found.scores, fresh, rtol=1e-3, atol=1e-6)


def test_methods_that_keep_nothing_do_not_care(model, data):
    module = InfluenceModule(model)
    ask(module, data, FIRST)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InfluenceWarning)
        ask(module, data, SECOND, "identity")
        ask(module, data, FIRST)


def test_the_mean_loss_is_stored_with_what_it_belongs_to(model, data):
    module = InfluenceModule(model)
    ask(module, data, FIRST)
    stored = module.state.stored_results(module.state.factors)
    assert (stored["mean_loss"], stored["content"]) == (module.state.mean_loss, module.state.content)
    state = InfluenceState()
    state.take_results(stored)
    with pytest.warns(InfluenceWarning, match=AGAIN):
        ask(InfluenceModule(model, state=state), data, SECOND)


@pytest.mark.parametrize(
    ("one", "other", "dtype", "same"),
    [
        (1.0, 1.0005, torch.float32, True),
        (1.0, 1.002, torch.float32, False),
        (1.0, 1.002, torch.bfloat16, True),
        (0.0, 5e-8, torch.float32, True),
        (0.0, 1e-3, torch.float32, False),
    ],
)
def test_means_that_agree(one, other, dtype, same):
    assert same_mean(one, other, dtype) is same
