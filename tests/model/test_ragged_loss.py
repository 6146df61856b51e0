"""Losses on rows of which examples have different numbers: against torch, and weighed over all batches."""

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from loss_reference import TIGHT, check_against_torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import DataLoader

from lightning_influence import InfluenceModule
from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.plan import find_layers
from lightning_influence.model.losses.ragged import RaggedLoss
from lightning_influence.model.losses.registry import parse
from lightning_influence.support.errors import InfluenceWarning

B, C = 3, 4


def draw_call(name, reduction, rows):
    """A loss function, its outputs `(rows, ...)`, and the rest of its arguments."""
    generator = torch.Generator().manual_seed(rows)
    z = torch.randn(rows, C, dtype=torch.float64, generator=generator)
    labels = torch.randint(C, (rows,), generator=generator)
    weight = torch.rand(C, dtype=torch.float64, generator=generator) + 0.5
    shares = torch.softmax(torch.randn(rows, C, dtype=torch.float64, generator=generator), 1)
    function, options = {
        "labels": (F.cross_entropy, {"target": labels, "weight": weight, "label_smoothing": 0.1}),
        "shares": (F.cross_entropy, {"target": shares}),
        "mse": (F.mse_loss, {"target": shares}),
        "bce": (F.binary_cross_entropy_with_logits, {"target": shares, "weight": weight}),
    }[name]
    return function, z, {**options, "reduction": reduction}


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(["labels", "shares", "mse", "bce"]),
    reduction=st.sampled_from(["mean", "sum"]),
    owners=st.lists(st.integers(0, B - 1), min_size=1, max_size=7),
)
def test_rows_of_examples_add_up(name, reduction, owners):
    function, z, options = draw_call(name, reduction, len(owners))
    row_loss = parse(function, (z.requires_grad_(),), options)
    owners = torch.tensor(owners)
    loss = RaggedLoss.of(row_loss, owners, B)
    (found,) = torch.autograd.grad(loss.per_example().sum(), z, retain_graph=True)
    torch.testing.assert_close(found, row_loss.gradient(), **TIGHT)
    check_against_torch(loss, lambda outputs: function(outputs[loss.slots], **options))
    own = row_loss.per_example()
    for n in range(B):
        torch.testing.assert_close(loss.per_example()[n], own[owners == n].sum(), **TIGHT)
    for other in ("sum", "example_mean", "position_mean"):
        whole = replace(loss, reduction=other)
        values = function(z, **{**options, "reduction": "none"}).sum()
        torch.testing.assert_close(whole.batch_value(), whole.share() * values, **TIGHT)
    if name == "labels":
        assert loss.class_weights is options["weight"]


def test_rows_are_weighed():
    function, z, options = draw_call("labels", "none", 5)
    loss = RaggedLoss.of(parse(function, (z.requires_grad_(),), options), torch.tensor([0, 2, 0, 2, 0]), B)
    weighted = replace(loss.weighted(torch.arange(5.0, dtype=torch.float64)), reduction="sum")
    expected = (function(z, **options) * torch.arange(5)).sum()
    torch.testing.assert_close(weighted.per_example().sum(), expected, **TIGHT)


def test_labels_of_rows_are_measured():
    function, z, options = draw_call("labels", "mean", 5)
    loss = RaggedLoss.of(parse(function, (z,), options), torch.tensor([0, 2, 0, 2, 0]), B)
    scores = z.gather(1, options["target"][:, None])[:, 0]
    torch.testing.assert_close(
        loss.true_score(), torch.stack([scores[[0, 2, 4]].sum(), scores[:0].sum(), scores[[1, 3]].sum()])
    )
    p = F.softmax(z, 1).gather(1, options["target"][:, None])[:, 0]
    odds = (p / (1 - p)).log()
    torch.testing.assert_close(loss.margin()[2], odds[[1, 3]].sum())


# ---------------------------------------------------------------------- models


class Tagger(LightningModule):
    """A GRU on packed sequences, its head on the padded or the packed rows."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embedding, self.gru = nn.Embedding(6, 3), nn.GRU(3, 3, batch_first=True)
        self.head, self.kind = nn.Linear(3, C), kind

    def training_step(self, batch, batch_idx):
        x, lengths, y = batch
        packed = pack_padded_sequence(self.embedding(x), lengths, batch_first=True, enforce_sorted=False)
        own = pack_padded_sequence(y, lengths, batch_first=True, enforce_sorted=False).data
        rows, _ = self.gru(packed)
        if self.kind == "packed":
            return F.cross_entropy(self.head(rows.data), own)
        if self.kind == "packed_mse":
            return F.mse_loss(self.head(rows.data)[:, 0], own.double())
        padded, _ = nn.utils.rnn.pad_packed_sequence(rows, batch_first=True)
        z, mask = self.head(padded), y >= 0
        if self.kind == "masked_mse":
            return F.mse_loss(z[mask], F.one_hot(y[mask], C).double())
        if self.kind == "two":
            return F.cross_entropy(z[mask], y[mask]) + 0.1 * F.mse_loss(z[:, 0, 0], lengths.double())
        if self.kind == "divided":
            return F.cross_entropy(z[mask], y[mask], reduction="none").sum() / mask.sum()
        return F.cross_entropy(z[mask], y[mask])


def collate(items):
    xs, ys = zip(*items, strict=True)
    lengths = torch.tensor([len(x) for x in xs])
    return pad_sequence(xs, batch_first=True), lengths, pad_sequence(ys, batch_first=True, padding_value=-1)


def draw_sentences(lengths):
    torch.manual_seed(0)
    return [(torch.randint(6, (n,)), torch.randint(C, (n,))) for n in lengths]


@pytest.mark.parametrize("kind", ["packed", "packed_mse", "masked", "masked_mse", "divided"])
def test_rows_weigh_the_same_in_all_batches(kind):
    """The first batch has as many rows of each example, the others have not."""
    lengths = (4, 4, 4, 2, 3, 1, 5)
    items = draw_sentences(lengths)
    module = Tagger(kind).double().eval()
    train, query = (DataLoader(items, size, collate_fn=collate) for size in (3, 7))
    found = InfluenceModule(module).scores(train, query, method="identity").scores.double()
    rows = []
    for item in items:
        value = module.training_step(collate([item]), 0) * len(item[0])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(module.parameters()))]))
    gradients = torch.stack(rows) / (sum(lengths) / len(lengths))
    torch.testing.assert_close(found, gradients @ gradients.T / len(items), rtol=1e-9, atol=1e-12)


def test_packed_rows_of_as_many_steps_as_examples_are_read_at_once():
    """By examples, in their order, without another reading or a word about noise."""
    count = 8
    batch = collate(draw_sentences([count] * count))
    module = Tagger("packed").double().eval()
    plan = find_layers(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InfluenceWarning)
        captured = Forward(plan)(module, batch, count)
    assert isinstance(captured.loss, RaggedLoss)
    own = [module.training_step(collate([item]), 0) * count for item in draw_sentences([count] * count)]
    torch.testing.assert_close(captured.per_example(), torch.stack(own))


def test_a_sum_that_picked_rows_are_a_term_of_has_shares_of_its_batch():
    items = draw_sentences((4, 2, 3))
    module = Tagger("two").double().eval()
    with pytest.warns(InfluenceWarning, match="Weights count as shares of their batch"):
        captured = Forward(find_layers(module))(module, collate(items), 3)
    assert captured.weights.tolist() == [1.0] * 3
    for n, item in enumerate(items):
        x, lengths, y = collate([item])
        z = module.head(module.gru(module.embedding(x))[0])
        own = F.cross_entropy(z[0], y[0], reduction="sum") * 3 / 9
        own = own + 0.1 * F.mse_loss(z[:, 0, 0], lengths.double())
        torch.testing.assert_close(captured.per_example()[n], own)


def test_kept_factors_serve_other_batches_of_the_same_rows():
    """Of a sentence of one word alone, no rows are picked; all are padded to one length."""

    def pad(items):
        x, lengths, y = collate(items)
        return F.pad(x, (0, 4 - x.shape[1])), lengths, F.pad(y, (0, 4 - y.shape[1]), value=-1)

    items = draw_sentences((4, 1, 3, 2))
    module, options = InfluenceModule(Tagger("packed").double().eval()), {"method": "ekfac", "damping": 0.1}
    for size in (4, 1):
        loaders = [DataLoader(items, size, collate_fn=pad) for _ in range(2)]
        found = module.scores(*loaders, **options)
    assert not any("other training data" in note for note in found.diagnostics.warnings)
    assert [one["name"] for one in found.diagnostics.passes] == [
        "Influence: query gradients",
        "Influence: scores",
    ]
