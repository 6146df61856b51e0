"""Scores by position of a sequence are those of single outer products, and add up to the scores."""

import copy

import pytest
import torch
from influence_models import Net, queries, train
from position_models import (
    LENGTH,
    Causal,
    Mixture,
    Words,
    by_hand,
    differentiate,
    padded,
    token_data,
    token_loader,
)
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from two_processes import check_script

from lightning_influence import Attributions, InfluenceModule, average_attributions
from lightning_influence.support.errors import UnsupportedModelError

CLOSE = {"rtol": 1e-7, "atol": 1e-12}
EXACTLY = {"low_rank_tolerance": 0.0, "fisher": "empirical", "damping": 0.1}
METHODS = {
    "identity": {},
    "diagonal": EXACTLY,
    "kfac": EXACTLY,
    "ekfac": EXACTLY,
    "exact": {"fisher": "empirical", "damping": 0.1},
    "auto": {**EXACTLY, "max_steps": 0, "tolerance": 1e6},
    "cg": {"damping": 1.0, "tolerance": 1e-11, "max_steps": 3000, "fisher": "empirical"},
}


@pytest.mark.parametrize(
    ("method", "tied"), [*((method, False) for method in METHODS), ("identity", True), ("ekfac", True)]
)
def test_positions_have_their_outer_products(method, tied):
    """By solutions and plain autograd: what each layer's row at a position adds to the score."""
    torch.manual_seed(0)
    model = Causal(tied=tied).double()
    asked = {"method": method, **METHODS[method]}
    module = InfluenceModule(model)
    found = module.scores(token_loader(7), token_loader(3, seed=1), by="position", **asked)
    if method == "identity":
        solutions = differentiate(model, token_data(3, seed=1))
    else:
        solutions, _ = module.ihvp(token_loader(7), token_loader(3, seed=1), **asked)
    expected = by_hand(model, token_data(7), solutions) / 7
    assert found.position_scores.shape == (LENGTH + 1, 3, 7)
    torch.testing.assert_close(found.position_scores, expected, rtol=1e-6, atol=1e-10)
    whole = module.scores(token_loader(7), token_loader(3, seed=1), **asked)
    torch.testing.assert_close(found.scores, whole.scores, **CLOSE)
    torch.testing.assert_close(found.position_scores.sum(0), whole.scores, **CLOSE)
    assert float(found.position_scores[-1].norm()) > 0
    told = found.diagnostics.extra["without_position"]
    assert told["layers"] == ["norm.weight", "norm.bias"]
    assert told["share"] == pytest.approx(float(expected[-1].norm() / whole.scores.norm()))
    assert any("position_scores[-1]" in note for note in found.diagnostics.warnings)


def test_low_rank_answers_have_the_same_positions():
    torch.manual_seed(0)
    module = InfluenceModule(Causal(tied=False).double())
    asked = {"method": "ekfac", "fisher": "empirical", "damping": 0.1, "low_rank_tolerance": 0.1}
    whole = module.scores(token_loader(7), token_loader(3, seed=1), **asked)
    found = module.scores(token_loader(7), token_loader(3, seed=1), by="position", **asked)
    torch.testing.assert_close(found.position_scores.sum(0), whole.scores, **CLOSE)


def test_shorter_examples_have_zeros_behind(monkeypatch):
    """Batches grow longer: each example's positions are those of a batch without anything to fill up."""
    torch.manual_seed(0)
    model = Causal(tied=True).double()
    lengths = [2, 3, 2, 5, 4, 3]
    rows = [(x[:n], y[:n]) for n, (x, y) in zip(lengths, token_data(6), strict=True)]
    asked = {"method": "identity", "by": "position"}
    loader = DataLoader(rows, 2, collate_fn=padded)
    found = InfluenceModule(model).scores(loader, token_loader(3, seed=1), **asked)
    assert found.position_scores.shape == (6, 3, 6)
    for number, length in enumerate(lengths):
        own = found.position_scores[:-1, :, number]
        assert not own[length:].any()
        assert own[:length].any(dim=1).all()
    monkeypatch.setattr("lightning_influence.methods.position_parts._AT_ONCE", 1)
    alone = InfluenceModule(model).scores(
        DataLoader(rows, 1, collate_fn=padded), token_loader(3, seed=1), **asked
    )
    torch.testing.assert_close(alone.position_scores, found.position_scores, **CLOSE)
    whole = InfluenceModule(model).scores(loader, token_loader(3, seed=1), method="identity")
    torch.testing.assert_close(found.position_scores.sum(0), whole.scores, **CLOSE)


def test_heads_on_a_pooled_sequence_have_no_position():
    torch.manual_seed(0)
    model = Words().double()
    loader = DataLoader(TensorDataset(token_data(6)[:][0], torch.arange(6) % 3), 4)
    found = InfluenceModule(model).scores(loader, loader, method="identity", by="position")
    assert found.diagnostics.extra["without_position"]["layers"] == ["head"]
    by_layer = InfluenceModule(model).scores(loader, loader, method="identity", by="layer")
    head = by_layer.layer_scores[by_layer.layer_names.index("head")]
    torch.testing.assert_close(found.position_scores[-1], head, **CLOSE)
    torch.testing.assert_close(found.position_scores.sum(0), by_layer.scores, **CLOSE)


def test_rows_that_are_picked_by_values_are_at_no_position():
    """An expert sees some of the tokens, here as many as there are positions, in an order of their own."""
    torch.manual_seed(0)
    model = Mixture().double()
    found = InfluenceModule(model).scores(token_loader(6), token_loader(3), method="identity", by="position")
    assert {"expert"} <= set(found.diagnostics.extra["without_position"]["layers"])
    whole = InfluenceModule(model).scores(token_loader(6), token_loader(3), method="identity", by="layer")
    torch.testing.assert_close(found.position_scores.sum(0), whole.scores, **CLOSE)
    expert = whole.layer_scores[whole.layer_names.index("expert")]
    assert expert.any()


def test_positions_go_with_groups_and_means():
    torch.manual_seed(0)
    module = InfluenceModule(Causal(tied=False).double())
    asked = {"method": "identity", "by": "position"}
    single = module.scores(token_loader(7), token_loader(3, seed=1), **asked).position_scores
    labels = [n % 2 for n in range(7)]
    found = module.scores(
        token_loader(7), token_loader(3, seed=1), aggregate="mean", train_groups=labels, **asked
    )
    mean = single.mean(1, keepdim=True)
    expected = torch.stack([mean[..., 0::2].sum(-1), mean[..., 1::2].sum(-1)], dim=-1)
    torch.testing.assert_close(found.position_scores, expected, **CLOSE)
    torch.testing.assert_close(found.scores, expected.sum(0), **CLOSE)


def test_queries_in_groups_and_their_results(tmp_path):
    torch.manual_seed(0)
    model = Causal(tied=False)
    module, asked = InfluenceModule(model), {"method": "identity", "by": "position"}
    whole = module.scores(token_loader(7), token_loader(3, seed=1), **asked)
    budget = 2 * 4 * sum(p.numel() for p in model.parameters()) + 64
    found = module.scores(token_loader(7), token_loader(3, seed=1), memory_budget=budget, **asked)
    assert sum("scores" in p["name"] for p in found.diagnostics.passes) == 3
    torch.testing.assert_close(found.position_scores, whole.position_scores)
    again = Attributions.load(found.save(tmp_path / "a.safetensors"))
    torch.testing.assert_close(again.position_scores, found.position_scores)
    one = found.for_query(1)
    torch.testing.assert_close(one.position_scores, found.position_scores[:, 1:2])
    mean = average_attributions([found, whole])
    torch.testing.assert_close(mean.position_scores, (found.position_scores + whole.position_scores) / 2)
    with pytest.raises(ValueError, match="position_scores"):
        Attributions(
            scores=found.scores,
            train_indices=found.train_indices,
            query_indices=found.query_indices,
            diagnostics=found.diagnostics,
            position_scores=found.position_scores[:, :, :2],
        )


def test_positions_that_do_not_fit_are_refused_before_factors_are_fitted():
    module = InfluenceModule(Causal(tied=False))
    with pytest.raises(ValueError, match=r"by='position' for 5 positions and what has none x 3 queries x 7"):
        module.scores(token_loader(7), token_loader(3), by="position", method="ekfac", memory_budget=500)
    assert module.state.factors is None


def test_layers_on_single_rows_are_refused():
    with pytest.raises(UnsupportedModelError, match="by='position', but no layer that is called once"):
        InfluenceModule(Net()).scores(train(), queries(), by="position", method="identity")


def test_sequences_that_come_apart_are_refused():
    """Two inputs are as long in the first batch and are not in the next."""

    class Pair(Words):
        def __init__(self):
            super().__init__()
            self.second = nn.Linear(4, 4)

        def training_step(self, batch, batch_idx):
            x, more, y = batch
            hidden = torch.tanh(self.mix(self.table(x))).mean(1) + self.second(
                self.table(more).detach()
            ).mean(1)
            return functional.cross_entropy(self.head(hidden), y)

    x = token_data(4)[:][0]
    batches = [(x[:2], x[:2], torch.tensor([0, 1])), (x[2:], x[2:, :3], torch.tensor([2, 1]))]
    model = Pair().double()
    with pytest.raises(UnsupportedModelError, match="'mix' has 5 rows an example and layer 'second' has 3"):
        InfluenceModule(model).scores(batches, copy.deepcopy(batches[:1]), by="position", method="identity")


SCRIPT = """
import sys, warnings
import torch
from torch.utils.data import DataLoader
from influence_models import trainer as make
from position_models import Causal, padded, token_data, token_loader
from lightning_influence import InfluenceModule

torch.set_num_threads(1)
warnings.simplefilter("ignore")
torch.manual_seed(0)
module = Causal(tied=True).double()
lengths = [2, 2, 3, 3, 4, 5, 2]
whole = list(token_data(7))
cut = [(x[:n], y[:n]) for n, (x, y) in zip(lengths, whole)]
trainer = make(devices=2, strategy="ddp", default_root_dir=sys.argv[1])
# Factors are also of what fills up, which is more in other batches.
for method, rows in (("identity", cut), ("ekfac", whole)):
    options = {"method": method, "damping": 0.1, "fisher": "empirical", "low_rank_tolerance": 0.0}
    options["by"] = "position"
    loader = lambda size: DataLoader(rows, size, collate_fn=padded)
    ours = trainer.influence(module, loader(2), token_loader(3, seed=1), log=False, **options)
    theirs = InfluenceModule(module).scores(loader(2), token_loader(3, seed=1), **options)
    torch.testing.assert_close(ours.position_scores, theirs.position_scores, rtol=1e-6, atol=1e-10)
"""


@pytest.mark.slow
def test_two_processes_find_the_positions_that_one_does(tmp_path):
    check_script(SCRIPT, tmp_path)
