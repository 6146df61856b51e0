"""Answers about a model in half precision say how far rounding takes them, as float32 tells."""

from dataclasses import dataclass

import pytest
import torch
from influence_models import trainer
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceModule, InfluenceWarning, influence
from lightning_influence.model.layers.plan import find_layers
from lightning_influence.model.rounding import take_in_float32

pytestmark = pytest.mark.filterwarnings("ignore:.*tolerance", "ignore:.*answer of", "ignore:.*limit")
METHODS = ["identity", "ekfac", "auto", "cg", "exact"]


class Net(LightningModule):
    def __init__(self, converts=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16, affine=False), nn.Tanh(), nn.Linear(16, 3)
        )
        self.converts = converts

    def training_step(self, batch, batch_idx):
        x = batch[0] if self.converts is None else batch[0].to(self.converts)
        return F.cross_entropy(self.net(x), batch[1])


@pytest.fixture(scope="module")
def trained():
    model, (x, y) = Net(), examples()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        model.training_step((x.float(), y), 0).backward()
        optimizer.step()
    return model.state_dict()


def examples(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(100, 6, generator=generator).to(dtype)
    return x, (x.float() @ torch.randn(6, 3, generator=generator)).argmax(1)


def model_in(trained, dtype, **options):
    model = Net(**options)
    model.load_state_dict(trained)
    return model.to(dtype)


def told(result):
    return [note for note in result.diagnostics.warnings if "rounds its gradients" in note]


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.filterwarnings("ignore:The model is in")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("damping", [0.1, 1e-4])
def test_the_error_that_is_told_is_of_the_size_of_the_true_one(trained, method, dtype, damping):
    x, y = examples(dtype)
    options = {"method": method, "damping": damping}
    options |= (
        {"tolerance": 1e-6, "max_steps": 400 if method == "cg" else 60} if method in {"auto", "cg"} else {}
    )
    rounded, exact = (
        InfluenceModule(model_in(trained, precision)).scores(
            [(x.to(precision), y)], [((x[:9] + 0.25).to(precision), y[:9])], **options
        )
        for precision in (dtype, torch.float32)
    )
    true = float((rounded.scores - exact.scores).norm() / exact.scores.norm())
    assert true > 1e-4
    assert len(told(rounded)) == 1
    assert told(exact) == []
    found = rounded.diagnostics.extra["rounding"]
    assert true / 8 < found < 3 * true  # examples' share of it; seldom less than a third
    if rounded.diagnostics.residuals is not None:
        assert bool((rounded.diagnostics.residuals >= 0.999 * found).all())
        assert float(rounded.diagnostics.residuals.max()) < found + 0.1


@pytest.mark.filterwarnings("ignore:The model is in")
@pytest.mark.parametrize("method", ["ekfac", "auto", "exact"])
def test_self_influence(trained, method):
    x, y = examples()
    rounded, exact = (
        InfluenceModule(model_in(trained, precision)).self_influence(
            [(x.to(precision), y)], method=method, damping=0.01
        )
        for precision in (torch.bfloat16, torch.float32)
    )
    true = float((rounded.scores - exact.scores).norm() / exact.scores.norm())
    assert true / 8 < rounded.diagnostics.extra["rounding"] < 3 * true
    assert len(told(rounded)) == 1
    assert told(exact) == []


def test_a_trainer_that_converts_the_model(trained):
    x, y = examples(torch.float32)
    model = model_in(trained, torch.float32)
    loader = DataLoader(TensorDataset(x, y), batch_size=20)
    with pytest.warns(InfluenceWarning, match="The model is in bfloat16, which rounds its gradients: with"):
        found = influence(trainer(precision="bf16-true"), model, loader, loader, method="identity", log=False)
    assert 1e-4 < found.diagnostics.extra["rounding"] < 0.1
    assert model.net[0].weight.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_a_model_that_does_not_run_in_float32_is_told_so(trained):
    x, y = examples()
    model = InfluenceModule(model_in(trained, torch.bfloat16, converts=torch.bfloat16))
    with pytest.warns(InfluenceWarning, match="how far, is not known"):
        found = model.scores([(x, y)], [(x[:3], y[:3])], method="exact", damping=0.1)
    assert found.diagnostics.extra["rounding"] is None
    assert float(found.diagnostics.residuals.max()) < 1e-6


@dataclass
class Batch:
    x: torch.Tensor
    y: torch.Tensor

    def __getitem__(self, number):
        return (self.x, self.y)[number]


@pytest.mark.parametrize("make", [lambda *parts: list(parts), Batch, lambda *parts: dict(enumerate(parts))])
def test_weights_and_buffers_come_back_to_the_bit(trained, make):
    model = model_in(trained, torch.bfloat16).eval()
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    x, y = examples()
    batch = make(x, y)
    gradients = take_in_float32(find_layers(model), model, batch, len(x))
    assert {layer.dense().dtype for layer in gradients.values()} == {torch.float32}
    assert {layer.num_examples for layer in gradients.values()} == {16}
    assert batch[0] is x
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor.dtype == before[name][1].dtype
        assert torch.equal(tensor, before[name][1])
    assert all(p is before[name][0] for name, p in model.named_parameters())
    expected = model_in(trained, torch.bfloat16).float().eval()
    exact = take_in_float32(find_layers(expected), expected, [x.float(), y], len(x))
    for name, layer in gradients.items():
        torch.testing.assert_close(layer.dense(), exact[name].dense())


class Slotted:
    """A batch that is no container and has no ``__dict__``."""

    __slots__ = ("x", "y")

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __getitem__(self, number):
        return (self.x, self.y)[number]


def test_batches_that_are_objects_are_taken_in_float32_too(trained):
    x, y = examples()
    model = model_in(trained, torch.bfloat16).eval()
    plan = find_layers(model)
    found, expected = (take_in_float32(plan, model, batch, len(x)) for batch in (Slotted(x, y), (x, y)))
    assert found is not None
    for name, layer in expected.items():
        torch.testing.assert_close(found[name].dense(), layer.dense())
    assert x.dtype == torch.bfloat16
