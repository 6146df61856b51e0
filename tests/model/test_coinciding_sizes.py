"""Batches of as many examples as time steps, whose shape does not say which is which, against autograd."""

import warnings

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_influence import InfluenceModule
from lightning_influence.errors import UnsupportedModelError
from lightning_influence.model.batches.forms import assume_layout, note_form, place_examples, read_form
from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.parameter_recorder import ParameterRecorder
from lightning_influence.model.layers.plan import find_layers
from lightning_influence.model.uses.places import Place


class Encoder(LightningModule):
    batch_first = False

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=self.batch_first)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.last(self.encoder(self.first(batch[0])).mean(0)), batch[1])


class ScaledGRU(LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.last, self.scale = nn.GRU(5, 6), nn.Linear(6, 3), nn.Parameter(torch.randn(5))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.last(self.net(batch[0] * self.scale)[1][0]), batch[1])


class Quantiles(LightningModule):
    """A loss without a name."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.scale = nn.Linear(5, 6), nn.Linear(6, 3), nn.Parameter(torch.randn(5))

    def training_step(self, batch, batch_idx):
        hidden = torch.tanh(self.first(batch[0] * self.scale)).mean(0)
        error = F.one_hot(batch[1], 3) - self.last(hidden)
        return torch.maximum(0.3 * error, -0.7 * error).mean()


class WithMask(Encoder):
    """Attention with a mask of time steps in the batch, ``(T, T)``."""

    batch_first = True

    def training_step(self, batch, batch_idx):
        hidden = self.encoder(self.first(batch[0]), src_mask=batch[2])
        return F.cross_entropy(self.last(hidden.mean(1)), batch[1])


class WithPositions(Encoder):
    """Attention with numbers of time steps in the batch, ``(T,)``."""

    batch_first = True

    def __init__(self):
        super().__init__()
        self.positions = nn.Embedding(4, 4)

    def training_step(self, batch, batch_idx):
        hidden = self.encoder(self.first(batch[0]) + self.positions(batch[2]))
        return F.cross_entropy(self.last(hidden.mean(1)), batch[1])


def time_first(items):
    return torch.stack([x for x, _ in items], 1), torch.stack([y for _, y in items])


def masked(items):
    steps = len(items[0][0])
    return [*default_collate(items), torch.ones(steps, steps).triu(1).bool()]


def numbered(items):
    return [*default_collate(items), torch.arange(len(items[0][0]))]


MODELS = [
    (Encoder, time_first),
    (ScaledGRU, time_first),
    (Quantiles, time_first),
    (WithMask, masked),
    (WithPositions, numbered),
]


def make(model, count, steps):
    torch.manual_seed(0)
    return model().double().eval(), TensorDataset(
        torch.randn(count, steps, 5).double(), torch.arange(count) % 3
    )


def differentiate(module, batch):
    grads = torch.autograd.grad(module.training_step(batch, 0), list(module.parameters()))
    return torch.cat([grad.flatten() for grad in grads])


@pytest.mark.parametrize(("model", "collate"), MODELS)
# As many examples as steps in the last batch, in all but the last, in all.
@pytest.mark.grid
@pytest.mark.parametrize(("count", "steps", "size"), [(11, 3, 4), (11, 4, 4), (8, 4, 4)])
def test_scores_are_those_of_each_example_alone(model, collate, count, steps, size):
    module, data = make(model, count, steps)
    alone = torch.stack([differentiate(module, collate([data[n]])) for n in range(count)])

    def load():
        return DataLoader(data, size, collate_fn=collate)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The training loss is linear")
        found = InfluenceModule(module).scores(load(), load(), method="identity").scores
    torch.testing.assert_close(found, alone @ alone.T / count)


def check(captured, module, layers, items, collate):
    found, weights = captured.loss_gradients(), captured.weights.mean()
    for n, item in enumerate(items):
        grads = torch.autograd.grad(module.training_step(collate([item]), 0), list(module.parameters()))
        own = dict(zip((name for name, _ in module.named_parameters()), grads, strict=True))
        for name, layer in layers.items():
            weight, bias = (own.get(f"{name}.{kind}") for kind in ("weight", "bias"))
            expected = own[name][None, None] if weight is None else layer.from_parameters(weight, bias)
            actual = found[name].dense()[0, n] / weights
            torch.testing.assert_close(actual.flatten(), expected.flatten())


def read(model, collate, sizes, *, forgets=False):
    """Run batches of three steps of these sizes; return how often gradients were checked, after each."""
    module, data = make(model, 4, 3)
    plan, checks = find_layers(module), []
    forward, certify = Forward(plan), ParameterRecorder.certify
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ParameterRecorder, "certify", lambda *given: (checks.append(0), certify(*given))[1])
        counts = []
        for size in sizes:
            items = [data[n] for n in range(size)]
            if forgets:  # what batches before have shown
                plan.verified -= {text for text in plan.verified if text.startswith("examples of form")}
            captured = forward(module, collate(items), size)
            check(captured, module, plan.layers, items, collate)
            counts.append(len(checks))
    return counts


@pytest.mark.grid
@pytest.mark.parametrize(("model", "collate"), [pair for pair in MODELS if pair[0] is not Quantiles])
@pytest.mark.parametrize("forgets", [False, True])
def test_a_batch_of_new_sizes_is_checked_once_whatever_is_known_of_its_form(model, collate, forgets):
    first, second, third, *rest = read(model, collate, [4, 4, 3, 4, 3], forgets=forgets)
    assert first == second >= 1
    assert third > second
    if not forgets:
        assert {third} == {*rest}


def test_readings_follow_what_sizes_have_shown():
    verified = set()
    inputs, labels, mask = torch.zeros(3, 4, 2), torch.zeros(4), torch.zeros(3, 3)
    note_form(verified, (inputs, labels, mask), 4)
    square = torch.zeros(3, 3, 2), torch.zeros(3), torch.zeros(3, 3)
    assert read_form(verified, square, 3) == {0: 1, 2: None}
    assert place_examples(verified, square, 3) == {square[0]: Place(1), square[2]: None}
    assert read_form(verified, (inputs, labels), 4) == {}  # a form of its own
    assume_layout(verified, square, 3, {0: 0, 1: 0, 2: 1})
    assert read_form(verified, square, 3) == {2: 1}


def test_other_data_of_the_same_form_are_read_anew():
    verified = set()
    note_form(verified, (torch.zeros(3, 4),), 4)
    note_form(verified, (torch.zeros(4, 3),), 4)
    assert read_form(verified, (torch.zeros(4, 4),), 4) == {}


def test_examples_that_are_coupled_are_refused_also_where_sizes_coincide():
    class Coupled(Encoder):
        def training_step(self, batch, batch_idx):
            hidden = self.encoder(self.first(batch[0])).mean(0)
            return F.cross_entropy(self.last(hidden - hidden.mean(0)), batch[1])

    module, data = make(Coupled, 3, 3)
    with pytest.raises(UnsupportedModelError):
        Forward(find_layers(module))(module, time_first([data[n] for n in range(3)]), 3)
