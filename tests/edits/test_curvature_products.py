"""Fewer and softer columns of the output curvature, and the relabelling that works with them."""

import pytest
import torch
from edit_models import asked, blobs, fitted, of_class, quiet, train
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceModule
from lightning_influence.edits import curvature_products
from lightning_influence.edits.curvature_products import keep_leading_columns, soften
from lightning_influence.model.losses.combined import ScaledLoss
from lightning_influence.model.losses.cross_entropy import CrossEntropyLoss
from lightning_influence.model.losses.mse import SquaredErrorLoss

EVERY = torch.arange(6)


def random_columns(seed, count=5, width=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, width, generator=generator, dtype=torch.float64)


def curvature(columns):
    return torch.einsum("kbi,kbj->bij", columns, columns)


@given(st.integers(0, 1000), st.floats(0.05, 1.0))
@settings(max_examples=40, deadline=None)
def test_what_is_kept_is_the_leading_part_with_the_whole_trace(seed, share):
    columns = random_columns(seed)
    few = keep_leading_columns(columns, EVERY, share)
    whole, part = curvature(columns), curvature(few)
    for full, kept in zip(whole, part, strict=True):
        values, vectors = torch.linalg.eigh(full)
        values, vectors = values.flip(0), vectors.flip(1)
        rank = 5 if share == 1 else int((values.cumsum(0) - values < share * values.sum()).sum())
        expected = vectors[:, :rank] @ torch.diag(values[:rank]) @ vectors[:, :rank].T
        torch.testing.assert_close(kept, expected * values.sum() / values[:rank].sum())


def test_no_column_more_than_the_rows_need():
    columns = random_columns(0)
    columns[1:, 0] = 0
    assert len(keep_leading_columns(columns, torch.tensor([0]), 0.9)) == 1
    assert len(keep_leading_columns(columns, EVERY, 0.999)) > 1
    assert len(keep_leading_columns(columns, EVERY[:0], 0.9)) == 1


def test_an_example_keeps_the_same_whatever_its_batch():
    columns = random_columns(3)
    alone, among = (
        keep_leading_columns(columns[:, 2:3], EVERY[:1], 0.8),
        keep_leading_columns(columns, EVERY, 0.8),
    )
    torch.testing.assert_close(curvature(alone)[0], curvature(among)[2])


def test_examples_without_curvature_stay_without():
    columns = random_columns(1)
    columns[:, 4] = 0
    few = keep_leading_columns(columns, EVERY, 0.5)
    assert bool(torch.isfinite(few).all())
    assert not bool(few[:, 4].any())


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_shares_out_of_range_are_refused(share):
    with pytest.raises(ValueError, match="accepted are numbers above 0"):
        keep_leading_columns(random_columns(0), EVERY, share)


def test_softer_outputs_have_the_curvature_of_a_tempered_softmax():
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(6, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    loss = CrossEntropyLoss(logits, torch.arange(6) % 5, 6, "mean")
    p = (logits.detach() / 3).softmax(1)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    torch.testing.assert_close(curvature(torch.stack(list(soften(loss, 3.0).columns()))), expected)
    scaled = soften(ScaledLoss.of(loss, 2.0), 3.0)
    torch.testing.assert_close(curvature(torch.stack(list(scaled.columns()))), 2 * expected)
    assert not scaled.outputs.requires_grad


def test_squared_error_is_as_soft_as_it_was():
    outputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = SquaredErrorLoss(outputs, torch.zeros_like(outputs), 6, "mean")
    columns = [torch.stack(list(one.columns())) for one in (loss, soften(loss, 3.0))]
    torch.testing.assert_close(*columns)


def test_relabelling_in_several_steps_ends_when_it_no_longer_pays():
    source = fitted()
    with quiet():
        edit = asked(source).relabel(of_class(2)[:5], 0, train(), ratio=0.3, linearisations=64)
        single = asked(source).relabel(of_class(2)[:5], 0, train(), ratio=0.3, linearisations=1)
    assert 1 < len(edit.report.step) < 64
    assert len(single.report.step) == 1
    share = 5 / len(blobs())

    def objective(report):
        return share * report.edited.after + (1 - share) * report.kept.after

    assert objective(edit.report) < objective(single.report)


def test_forgetting_and_given_steps_stay_one_shot():
    source = fitted()
    assert len(asked(source).forget(of_class(0), train(), ratio=0.3).report.step) == 1
    with quiet():
        assert len(asked(source).relabel(of_class(0), 1, train(), step=0.5).report.step) == 1


class Sequences(LightningModule):
    """A linear map of twenty positions, whose factors take more than its matrix, and of one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.each, self.head = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(self.each(batch[0]).tanh().mean(1)), batch[1])


def test_gradients_of_long_sequences_are_kept_in_their_smaller_form(monkeypatch):
    kept, add = [], curvature_products._Part.add_products
    monkeypatch.setattr(
        curvature_products._Part,
        "add_products",
        lambda part, *given: kept.append(part.gradients) or add(part, *given),
    )
    x = torch.randn(12, 20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loader = DataLoader(TensorDataset(x, torch.arange(12) % 2), 4)
    with quiet():
        InfluenceModule(Sequences()).forget([0, 2], loader)
    assert kept
    for gradients in kept:
        for layer in gradients.values():
            whole = layer.num_seeds * layer.num_examples * layer.shape[1] * layer.shape[2]
            assert layer.nbytes <= 8 * whole
