"""The steps of recurrent networks are those that the fused functions take."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, TensorDataset
from use_oracle import numbers

from lightning_influence import InfluenceModule
from lightning_influence.model.layers import layer
from lightning_influence.model.uses import Watch, pull_gradients
from lightning_influence.model.uses.operations import recurrent
from lightning_influence.model.uses.recurrent_steps import Stack, run_stack

KINDS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
}
LENGTHS = torch.tensor([6, 5, 5, 2, 1])  # sorted, as packed sequences are


@pytest.mark.parametrize(("kind", "projected"), [*((kind, 0) for kind in KINDS), ("lstm", 2)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_outputs_are_those_of_the_fused_function(kind, bias, packed, projected):
    sizes = {"proj_size": projected} if projected else {}
    model = KINDS[kind](4, 3, num_layers=2, bidirectional=True, bias=bias, **sizes).double()
    widths = (projected or 3, 3) if kind == "lstm" else (3,)
    x, states = numbers(6, 5, 4), [numbers(4, 5, width, seed=seed) for seed, width in enumerate(widths)]
    present = (torch.arange(6)[:, None] < LENGTHS)[:, :, None]
    hx = tuple(states) if kind == "lstm" else states[0]
    given = pack_padded_sequence(x, LENGTHS) if packed else x
    out, final = model(given, hx)
    inputs = x * present if packed else x
    present_steps, weights = present if packed else None, model._flat_weights
    stack = Stack(kind, inputs, present_steps, states, weights, bias, True, bool(projected))
    runs, found = run_stack(stack)
    expected = nn.utils.rnn.pad_packed_sequence(out)[0] if packed else out
    torch.testing.assert_close(found[0], expected, rtol=1e-10, atol=1e-12)
    for state, other in zip(found[1:], final if kind == "lstm" else [final], strict=True):
        torch.testing.assert_close(state, other, rtol=1e-10, atol=1e-12)
    assert [run.first for run in runs] == [number * stack.step_size for number in range(4)]
    if packed:
        for run in runs:
            assert not bool((run.inputs * ~present).any())
            assert not bool((run.states * ~present).any())


class Packed(LightningModule):
    """Rows that are packed stand in the order of the steps, whatever their lengths."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head = nn.GRU(4, 3, batch_first=True).double(), nn.Linear(3, 2).double()

    def training_step(self, batch, batch_idx):
        x, y, lengths = batch
        out, _ = self.rnn(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
        labels = pack_padded_sequence(y, lengths, batch_first=True, enforce_sorted=False)
        return nn.functional.cross_entropy(self.head(out.data), labels.data)


@pytest.mark.parametrize("lengths", [[6] * 5, [6, 2, 4, 6, 1]])
@pytest.mark.filterwarnings("ignore")
def test_packed_batches_keep_the_fast_way(lengths):
    """A reading in the wrong order, which is given up, does not make parameters slow for the right one."""
    module, x, y = Packed(), numbers(5, 6, 4), torch.arange(30).view(5, 6) % 2
    batch = (x, y, torch.tensor(lengths))
    asked = InfluenceModule(module)
    found = asked.scores([batch], [batch], method="identity").scores
    losses = []
    for row, label, length in zip(x, y, lengths, strict=True):
        out = module.head(module.rnn(row[None, :length])[0][0])
        losses.append(nn.functional.cross_entropy(out, label[:length], reduction="sum"))
    parameters = list(module.parameters())
    flat = torch.stack([
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]) for loss in losses
    ])
    expected = flat @ flat.T
    torch.testing.assert_close(found / found[0, 0], expected / expected[0, 0], rtol=1e-8, atol=1e-10)
    assert not any(asked.state.slow.values())


class Words(LightningModule):
    def __init__(self, packed):
        super().__init__()
        torch.manual_seed(0)
        self.frames, self.head = nn.Linear(4, 4).double(), nn.Linear(5, 3).double()
        self.rnn, self.packed = nn.LSTM(4, 5, batch_first=True).double(), packed

    def training_step(self, batch, batch_idx):
        x, y = batch
        lengths = 2 + y  # of which there are several in a batch
        x = self.frames(x).tanh()
        given = pack_padded_sequence(x, lengths, True, False) if self.packed else x
        return nn.functional.cross_entropy(self.head(self.rnn(given)[1][0][0]), y)


@pytest.mark.grid
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("widths", [None, (10, 7)])
@pytest.mark.filterwarnings("ignore")
def test_factors_do_not_depend_on_the_batch_size(packed, widths, monkeypatch):
    """A batch of one example has gradients of the same form as larger ones."""
    if widths is not None:
        monkeypatch.setattr(layer, "DENSE_WIDTH", widths[0])
        monkeypatch.setattr(layer, "MATRIX_WIDTH", widths[1])
    data = TensorDataset(numbers(9, 6, 4), torch.arange(9) % 3)
    options = {"method": "ekfac", "damping": 0.1, "fisher": "exact", "low_rank_tolerance": 0.0}
    found = [
        InfluenceModule(Words(packed)).scores(DataLoader(data, size), DataLoader(data, 3), **options).scores
        for size in (1, 4, 9)
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-8, atol=1e-11)


def test_steps_are_taken_once_for_all_seeds(monkeypatch):
    taken = []
    monkeypatch.setattr(recurrent, "run_stack", lambda stack: taken.append(stack) or run_stack(stack))
    model, x = nn.GRU(4, 3, batch_first=True).double(), numbers(5, 6, 4)
    with Watch(dict(model.named_parameters()), x, 5) as watch:
        losses = model(x)[0].square().sum((1, 2))
    first, second = (pull_gradients(watch, losses, [scale * torch.ones_like(losses)]) for scale in (1.0, 2.0))
    assert len(taken) == 1
    for name, gradient in first.gradients.items():
        torch.testing.assert_close(second.gradients[name].dense(), 2 * gradient.dense())


CELLS = {
    "LSTM": nn.LSTMCell,
    "GRU": nn.GRUCell,
    "tanh": nn.RNNCell,
    "relu": lambda *a, **k: nn.RNNCell(*a, nonlinearity="relu", **k),
}


class Steps(nn.Module):
    """A cell that is called position by position, all of whose states count."""

    def __init__(self, kind, bias=True, learned=False):
        super().__init__()
        torch.manual_seed(0)
        self.cell = CELLS[kind](4, 3, bias=bias)
        self.start = nn.Parameter(torch.randn(3)) if learned else None
        self.double()

    def forward(self, examples):
        states, total, x = None, 0.0, examples.flatten(0, 1)
        if self.start is not None:
            states = (self.start.expand(len(x), -1), x.new_zeros(len(x), 3))
        for position in x.unbind(1):
            states = self.cell(position, states)
            every = states if isinstance(states, tuple) else (states,)
            total = total + sum((1 + n) * state.square().sum(1) for n, state in enumerate(every))
        return total.view(examples.shape[:2]).sum(1)


def differentiate_cells(model, x):
    """Return the gradients with two seeds, and those of each example's own call."""
    with Watch(dict(model.named_parameters()), x, len(x)) as watch:
        losses = model(x)
    weights = [torch.ones_like(losses), torch.arange(1.0, 1 + len(x), dtype=torch.float64)]
    found = pull_gradients(watch, losses, weights).gradients
    parameters = list(model.parameters())
    own = [torch.autograd.grad(model(one).sum(), parameters) for one in x.split(1)]
    expected = [torch.stack(column) for column in zip(*own, strict=True)]
    scaled = [torch.stack([w.view(-1, *[1] * (g.ndim - 1)) * g for w in weights]) for g in expected]
    return found, dict(zip(dict(model.named_parameters()), scaled, strict=True))


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_cells_take_one_step_for_all_examples(kind, bias, rows, monkeypatch):
    monkeypatch.setattr(recurrent, "pull_in_loop", None)  # nothing goes example by example
    found, expected = differentiate_cells(Steps(kind, bias), numbers(6, rows, 5, 4))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.dense(), expected[name], rtol=1e-9, atol=1e-12)
        assert gradient.product() is not None or "bias" in name


def test_a_cell_from_a_learned_state_goes_example_by_example():
    found, expected = differentiate_cells(Steps("LSTM", learned=True), numbers(6, 1, 5, 4))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.dense(), expected[name], rtol=1e-9, atol=1e-12)


def test_a_cell_on_the_only_example_of_a_batch():
    found, expected = differentiate_cells(Steps("GRU"), numbers(1, 3, 5, 4))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.dense(), expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_projections_keep_factors(bias, packed, monkeypatch):
    """With biases and without, the projection stands behind the other weights of its layer and direction."""
    monkeypatch.setattr(recurrent, "pull_in_loop", None)
    monkeypatch.setattr(recurrent, "_pull_packed", None)
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    model, x = nn.LSTM(4, 3, proj_size=2, bias=bias, **options).double(), numbers(5, 6, 4)

    def sum_squares(x):
        out = model(pack_padded_sequence(x, [6] * len(x), batch_first=True) if packed else x)[0]
        out = nn.utils.rnn.pad_packed_sequence(out, batch_first=True)[0] if packed else out
        return out.square().sum((1, 2))

    with Watch(dict(model.named_parameters()), x, len(x)) as watch:
        losses = sum_squares(x)
    found = pull_gradients(watch, losses.sum(), [None]).gradients
    own = [torch.autograd.grad(sum_squares(one).sum(), list(model.parameters())) for one in x.split(1)]
    for name, column in zip(dict(model.named_parameters()), zip(*own, strict=True), strict=True):
        torch.testing.assert_close(found[name].dense()[0], torch.stack(column), rtol=1e-9, atol=1e-12)
        assert found[name].product() is not None or "bias" in name
