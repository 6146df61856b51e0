"""A method as a user would add it: with options of its own, from outside of the package."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceModule, InfluenceTrainer
from lightning_influence.methods import Method, Options, register_method
from lightning_influence.methods.method import Solved
from lightning_influence.methods.options import require_count, require_number

GENERATOR = torch.Generator().manual_seed(7)
TRAIN = TensorDataset(
    torch.randn(9, 3, generator=GENERATOR).double(), torch.randint(0, 2, (9,), generator=GENERATOR)
)
QUERIES = TensorDataset(
    torch.randn(4, 3, generator=GENERATOR).double(), torch.randint(0, 2, (4,), generator=GENERATOR)
)


@dataclass(frozen=True)
class SharpenedOptions(Options):
    """Options of the method below."""

    power: int = field(default=1, metadata=require_count(1))
    floor: float = field(default=0.0, metadata=require_number())
    suffix: str = ""


@register_method("sharpened", options=SharpenedOptions)
class Sharpened(Method):
    """Inner products of gradients over a power of the query's norm, which is at least a floor."""

    options: SharpenedOptions

    def prepare(self) -> None:
        if self.options.suffix:
            self.context.notes.add(f"suffix {self.options.suffix}")

    def solve(self, queries):
        solutions, _ = self.solutions(queries)
        return Solved(lambda gradients: solutions @ self.context.layout.dense(gradients)[0].T)

    def solutions(self, queries):
        vectors = self.context.layout.dense(queries)[0]
        norms = vectors.norm(dim=1, keepdim=True).clamp_min(self.options.floor)
        return vectors / norms**self.options.power, None

    def quadratic(self):
        return lambda gradients: self.context.layout.dense(gradients)[0].square().sum(dim=1)


class Line(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 2).double()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.line(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def model() -> Line:
    torch.manual_seed(0)
    return Line()


def gradients(model: Line, data: TensorDataset) -> Tensor:
    """One row an example, by autograd."""
    rows = []
    for x, y in zip(*data.tensors, strict=True):
        loss = F.cross_entropy(model.line(x)[None], y[None])
        weight, bias = torch.autograd.grad(loss, [model.line.weight, model.line.bias])
        rows.append(torch.cat([weight, bias[:, None]], dim=1).flatten())
    return torch.stack(rows)


def trainer() -> InfluenceTrainer:
    return InfluenceTrainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )


def expected(model: Line, power: int, floor: float) -> Tensor:
    queries = gradients(model, QUERIES)
    return (
        queries / queries.norm(dim=1, keepdim=True).clamp_min(floor) ** power @ gradients(model, TRAIN).T / 9
    )


@pytest.mark.parametrize("given", [{}, {"power": 3}, {"power": 2, "floor": 0.9}])
def test_its_options_are_passed_by_name(model, given):
    found = trainer().influence(
        model, DataLoader(TRAIN, 4), DataLoader(QUERIES, 4), method="sharpened", **given
    )
    scores = expected(model, given.get("power", 1), given.get("floor", 0.0))
    torch.testing.assert_close(found.scores, scores, rtol=1e-9, atol=1e-12)
    alone = InfluenceModule(model).scores(
        DataLoader(TRAIN, 4), DataLoader(QUERIES, 4), method="sharpened", **given
    )
    torch.testing.assert_close(alone.scores, scores, rtol=1e-9, atol=1e-12)
    norms = gradients(model, TRAIN).square().sum(1) / 9
    own = InfluenceModule(model).self_influence(DataLoader(TRAIN, 4), method="sharpened", **given)
    torch.testing.assert_close(own.scores, norms, rtol=1e-9, atol=1e-12)


def test_an_option_that_is_not_checked_takes_any_value(model):
    found = InfluenceModule(model).scores(
        DataLoader(TRAIN, 4), DataLoader(QUERIES, 4), method="sharpened", suffix="of mine"
    )
    assert any("suffix of mine" in note for note in found.diagnostics.warnings)


def test_an_unknown_option_names_the_nearest_and_those_of_this_method(model):
    accepted = r"Did you mean 'power'\? Accepted are .*seed, power, floor, suffix with method='sharpened'"
    with pytest.raises(TypeError, match=f"unknown option 'powr'.*{accepted}"):
        trainer().influence(model, DataLoader(TRAIN, 4), DataLoader(QUERIES, 4), method="sharpened", powr=2)
    with pytest.raises(ValueError, match="Got power=0; accepted are integers of at least 1"):
        InfluenceModule(model).scores(TRAIN, QUERIES, method="sharpened", power=0)


def test_options_of_another_method_are_told_to_be_unused(model):
    loaders = DataLoader(TRAIN, 4), DataLoader(QUERIES, 4)
    found = InfluenceModule(model).scores(*loaders, method="sharpened", max_steps=4, blocks="tensor")
    note = "The method 'sharpened' does not use max_steps=4, blocks='tensor'."
    assert note in found.diagnostics.warnings
    other = InfluenceModule(model).scores(*loaders, method="identity", power=2)
    assert "The method 'identity' does not use power=2." in other.diagnostics.warnings
    with pytest.raises(ValueError, match="Got power=-1"):
        InfluenceModule(model).scores(*loaders, method="identity", power=-1)


def test_options_that_are_no_dataclass_of_the_kind_are_refused():
    with pytest.raises(TypeError, match=r"for method 'odd'; accepted is a class derived from .*Options"):
        register_method("odd", options=dict)
