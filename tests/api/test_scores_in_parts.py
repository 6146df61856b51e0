"""Scores by layer and summed by group of training examples add up to the scores."""

import pytest
import torch
from influence_cases import CONVERGED, EXACTLY, Asked
from influence_models import Net, dataset, fitted, queries, train
from models import CASES, loader
from torch.utils.data import DataLoader, SubsetRandomSampler
from two_processes import BEGIN, check_script

from lightning_influence import Attributions, InfluenceModule, average_attributions
from lightning_influence.methods.method import Solved
from lightning_influence.methods.score_parts import name_blocks
from lightning_influence.methods.scorers import JointScorer
from lightning_influence.methods.scoring_passes import GroupSums
from lightning_influence.support.errors import UnsupportedModelError

CLOSE = {"rtol": 1e-7, "atol": 1e-12}
ITERATED = {"tolerance": 1e-11, "max_steps": 5000}
METHODS = {
    "identity": EXACTLY,
    "diagonal": EXACTLY,
    "kfac": EXACTLY,
    "ekfac": EXACTLY,
    "ekfac in low rank": {"low_rank_tolerance": 0.1, "fisher": "exact"},
    "block_ggn": {},
    "exact": {},
    "hessian": {},
    "auto": {**EXACTLY, "max_steps": 0, "tolerance": 1e6},
    "auto in low rank": {"fisher": "exact", "max_steps": 0, "low_rank_tolerance": 0.1},
    "auto iterated": CONVERGED,
    "cg": ITERATED,
    "minres": {"tolerance": 1e-11, "max_steps": 40, "curvature": "hessian"},
    "astra": ITERATED,
    "lissa": ITERATED,
}
GROUPS = [["web", "book", "code"][n % 3] for n in range(12)]


@pytest.mark.grid
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["tokens_weighted", "conv2d_reflect_groups"])
def test_parts_add_up_to_the_scores(name, method):
    options = {**METHODS[method], "method": method.split()[0], "damping": 0.5}
    asked = Asked(CASES[name])
    whole = asked.scores(**options)
    parts = asked.scores(by="layer", **options)
    assert parts.layer_names == tuple(whole.diagnostics.layers)
    assert parts.layer_scores.shape == (len(parts.layer_names), *whole.scores.shape)
    torch.testing.assert_close(parts.scores, whole.scores, **CLOSE)
    torch.testing.assert_close(parts.layer_scores.sum(0), whole.scores, **CLOSE)
    summed = asked.scores(train_groups=GROUPS, **options)
    expected = torch.stack([whole.scores[:, start::3].sum(1) for start in (1, 2, 0)], dim=1)
    torch.testing.assert_close(summed.scores, expected, **CLOSE)
    assert (summed.train_names, summed.train_counts.tolist()) == (("book", "code", "web"), [4, 4, 4])
    assert summed.train_indices.tolist() == [0, 1, 2]


@pytest.mark.grid
@pytest.mark.parametrize("name", ["mlp_gelu", "conv2d_reflect_groups"])
@pytest.mark.parametrize("method", ["identity", "ekfac", "exact", "cg"])
def test_a_layers_part_is_the_product_of_its_parameters(name, method):
    """By solutions and gradients: inner products over one layer's parameters at a time."""
    asked = Asked(CASES[name])
    options = {**METHODS[method], "method": method, "damping": 0.5}
    parts = asked.scores(by="layer", **options)
    solutions, _ = asked.ihvp(**options)
    gradients = InfluenceModule(asked.module.model).ihvp(
        loader(asked.case, 4), loader(asked.case, 4), method="identity"
    )[0]
    count = len(parts.train_indices)
    for layer, found in zip(parts.layer_names, parts.layer_scores, strict=True):
        own = [p for p in solutions if p.rpartition(".")[0] == layer]
        assert own
        expected = sum(solutions[p].flatten(1) @ gradients[p].flatten(1).T for p in own) / count
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)


NAMES = {
    "net.blocks.3.attn.qkv": "net.blocks.3",
    "net.blocks.3.ls1.gamma": "net.blocks.3",
    "net.cls_token": "net.cls_token",
    "net.patch_embed.proj": "net.patch_embed",
    "model.layers.11.mlp.experts.4.up": "model.layers.11",
    "lm_head": "lm_head",
}


def test_blocks_are_named_up_to_their_first_number():
    assert name_blocks(NAMES) == NAMES
    plain = ["net.encoder.inner.query", "net.encoder.out", "net.head"]
    assert name_blocks(plain) == dict(zip(plain, ["net.encoder", "net.encoder", "net.head"], strict=True))
    assert name_blocks(["0.weight", "fc"]) == {"0.weight": "0", "fc": "fc"}
    assert name_blocks(["net.head"]) == {"net.head": "net.head"}


class Blocks(Net):
    """Two numbered blocks of two layers each, and a head."""

    def __init__(self):
        super().__init__()
        pairs = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)) for _ in range(2)]
        self.blocks = torch.nn.ModuleList(pairs)
        self.body, self.head = torch.nn.Identity(), torch.nn.Linear(4, 3)

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


@pytest.mark.parametrize("method", ["identity", "ekfac", "exact", "cg"])
def test_a_blocks_part_is_the_sum_of_its_layers(method):
    torch.manual_seed(0)
    module = InfluenceModule(Blocks().double())
    x = dataset()[:][0].double()
    batches = [(x[:12], torch.arange(12) % 3), (x[12:], torch.arange(10) % 3)]
    asked = {**METHODS[method], "method": method, "damping": 0.5}
    layers = module.scores(batches, batches[1:], by="layer", **asked)
    blocks = module.scores(batches, batches[1:], by="block", **asked)
    assert blocks.layer_names == ("blocks.0", "blocks.1", "head")
    for name in blocks.layer_names:
        own = [layers.for_layer(layer).scores for layer in layers.layer_names if layer.startswith(name)]
        torch.testing.assert_close(blocks.for_layer(name).scores, sum(own), **CLOSE)
    torch.testing.assert_close(blocks.scores, layers.scores, **CLOSE)
    with pytest.raises(ValueError, match="by='block' for 3 blocks x 10 queries"):
        module.scores(batches, batches[1:], by="block", memory_budget=100)


def test_everything_can_be_asked_together():
    asked = Asked(CASES["mlp_gelu"])
    options = {**EXACTLY, "method": "ekfac"}
    whole = asked.scores(**options)
    found = asked.scores(aggregate=["b", "a", "b"], train_groups=GROUPS, by="layer", **options)
    groups = torch.stack([whole.scores[:, start::3].sum(1) for start in (1, 2, 0)], dim=1)
    expected = torch.stack([groups[1], (groups[0] + groups[2]) / 2])
    torch.testing.assert_close(found.scores, expected, **CLOSE)
    torch.testing.assert_close(found.layer_scores.sum(0), expected, **CLOSE)
    assert found.layer_scores.shape == (len(found.layer_names), 2, 3)


@pytest.mark.parametrize("budget", [1, 2**30])
def test_queries_in_groups_fill_their_rows(budget):
    """No score by layer is asked where one does not fit, but sums are: queries then come one at a time."""
    module = InfluenceModule(Net())
    labels = torch.arange(22) % 5
    options = {"method": "ekfac", "damping": 0.1, "low_rank_tolerance": 0.0}
    whole = module.scores(train(), queries(), **options)
    found = module.scores(train(), queries(), train_groups=labels, memory_budget=budget, **options)
    expected = torch.stack([whole.scores[:, labels == label].sum(1) for label in range(5)], dim=1)
    torch.testing.assert_close(found.scores, expected)
    assert found.scores.dtype == torch.float32
    assert found.query_indices.tolist() == [0, 1, 2, 3]


def test_layers_of_queries_in_groups_and_of_joint_scorers():
    module = InfluenceModule(Net())
    parameters, width = 43, 4
    options = {"method": "identity", "by": "layer"}
    whole = module.scores(train(), queries(), **options)
    found = module.scores(train(), queries(), memory_budget=2 * 3 * width * parameters + 64, **options)
    assert sum("scores" in p["name"] for p in found.diagnostics.passes) == 2
    torch.testing.assert_close(found.layer_scores, whole.layer_scores)


class Constant:
    def __init__(self, rows, value):
        self.rows, self.value = rows, value

    def by_layer(self, gradients):
        return {name: torch.full((self.rows, 2), self.value) for name in list(gradients)[: int(self.value)]}


def test_joint_scorers_put_layers_into_the_queries_order():
    parts = [(torch.tensor([2, 0]), Constant(2, 1.0)), (torch.tensor([1]), Constant(1, 2.0))]
    found = JointScorer(parts).by_layer({"a": None, "b": None})
    assert found["a"][:, 0].tolist() == [1.0, 2.0, 1.0]
    assert found["b"][:, 0].tolist() == [0.0, 2.0, 0.0]


def test_no_matrix_of_single_scores_is_held(monkeypatch):
    """Sums are all that a pass keeps: the sink's tensor has a column a group."""
    shapes = []
    update = GroupSums.update

    def watched(self, scores, indices):
        shapes.append(tuple(self._scores.shape))
        update(self, scores, indices)

    monkeypatch.setattr(GroupSums, "update", watched)
    InfluenceModule(Net()).scores(train(), queries(), method="identity", train_groups=["a", "b"] * 11)
    assert set(shapes) == {(4, 2)}
    assert len(shapes) == 5


def test_groups_are_those_of_the_examples_that_are_visited():
    part = DataLoader(dataset(), 3, sampler=SubsetRandomSampler([20, 4, 5, 11]))
    module = InfluenceModule(Net())
    labels = {4: 1, 5: 1, 11: 0, 20: 1}
    single = module.scores(part, queries(), method="identity")
    found = module.scores(part, queries(), method="identity", train_groups=labels)
    assert single.train_indices.tolist() == [4, 5, 11, 20]
    expected = torch.stack([single.scores[:, 2], single.scores[:, [0, 1, 3]].sum(1)], dim=1)
    torch.testing.assert_close(found.scores, expected)
    assert (found.train_names, found.train_counts.tolist()) == (("0", "1"), [1, 3])


def test_layers_that_do_not_fit_are_refused_before_a_pass():
    module = InfluenceModule(Net())
    with pytest.raises(ValueError, match=r"2 layers x 4 queries x 22 training examples.*aggregate="):
        module.scores(train(), queries(), by="layer", memory_budget=1000)
    assert module.state.factors is None
    fits = module.scores(
        train(), queries(), method="identity", by="layer", memory_budget=1000, aggregate="mean"
    )
    assert fits.layer_scores.shape == (2, 1, 22)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "token"}, "by='token'; accepted are 'layer', 'block', 'position'"),
        ({"by": "layer", "top_k": 2}, "top_k=2 with by='layer'"),
        ({"by": "position", "top_k": 2}, "top_k=2 with by='position'"),
        ({"train_groups": [0] * 22, "top_k": 2}, "top_k=2 with train_groups"),
        ({"train_groups": [0] * 21}, "train_groups has 21 labels for a dataset of 22"),
    ],
)
def test_what_cannot_be_asked_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        InfluenceModule(Net()).scores(train(), queries(), **options)


def test_a_scorer_that_knows_no_layers_is_refused(monkeypatch):
    monkeypatch.setattr(
        "lightning_influence.methods.closed_form.ClosedForm.solve",
        lambda self, queries: Solved(lambda gradients: torch.zeros(4, 5)),
    )
    with pytest.raises(UnsupportedModelError, match="give the method's scorer by_layer"):
        InfluenceModule(Net()).scores(train(), queries(), method="identity", by="layer")


class Idle(Net):
    """Has a layer that no step uses."""

    def __init__(self):
        super().__init__()
        self.idle = torch.nn.Linear(2, 2)


@pytest.mark.parametrize("method", ["identity", "ekfac", "exact"])
@pytest.mark.filterwarnings("ignore:.*took no part")
def test_layers_that_take_no_part_have_none_in_the_scores(method):
    found = InfluenceModule(Idle()).scores(train(), queries(), method=method, damping=0.1, by="layer")
    assert found.layer_names == tuple(found.diagnostics.layers) == ("body.0", "body.3")
    assert found.layer_scores.shape == (2, 4, 22)
    assert found.layer_scores.abs().amax(dim=(1, 2)).min() > 0


def test_results_keep_and_show_the_parts(tmp_path):
    from lightning_influence.results.plots import montage

    torch.manual_seed(0)
    host, module = fitted(default_root_dir=tmp_path)
    labels = [["web", "code"][n % 2] for n in range(22)]
    asked = {"query_dataloaders": queries(), "method": "ekfac", "by": "layer"}
    found = host.influence(module, train_groups=labels, **asked)
    assert "web" in repr(found.top(1))
    assert "code" in repr(found.top(2))
    assert {row[2] for row in found.top(2).rows()} == {"web", "code"}
    assert set(found.to_pandas()["train"]) == {"web", "code"}
    again = Attributions.load(found.save(tmp_path / "a.safetensors"))
    for name in ("train_names", "layer_names", "query_names"):
        assert getattr(again, name) == getattr(found, name)
    torch.testing.assert_close(again.layer_scores, found.layer_scores)
    assert again.train_counts.tolist() == [11, 11]
    one = found.for_query(2)
    torch.testing.assert_close(one.layer_scores, found.layer_scores[:, 2:3])
    layer = found.for_layer("body.3")
    torch.testing.assert_close(layer.scores, found.layer_scores[1])
    assert (layer.layer_names, layer.layer_scores) == ((), None)
    with pytest.raises(ValueError, match=r"layer_names are body.0, body.3"):
        found.for_layer("head")
    with pytest.raises(ValueError, match="by='layer'"):
        layer.for_layer("body.0")
    other = host.influence(module, train_groups=labels, damping=1.0, **asked)
    mean = average_attributions([found, other])
    torch.testing.assert_close(mean.layer_scores, (found.layer_scores + other.layer_scores) / 2)
    with pytest.raises(ValueError, match="differ in train_indices, train_names"):
        average_attributions([found, host.influence(module, **asked)])
    page = found.report(tmp_path / "page.html", k=2).read_text()
    assert '"web"' in page
    with pytest.raises(ValueError, match="Got dataset"):
        found.report(tmp_path / "page.html", dataset(), k=2)
    with pytest.raises(ValueError, match="omit train_groups"):
        montage(found, {}, {}, k=1)


SCRIPT = """
asked = DataLoader(TensorDataset(x[:5], y[:5]), 2)
labels = ["a", "b", "a", "c", "a", "b", "d", "d", "a", "a", "a", "b", "b"]
for method in ("identity", "ekfac", "exact", "auto"):
    for further in ({"by": "layer"}, {"train_groups": labels}, {"by": "layer", "train_groups": labels}):
        options = {"method": method, "damping": 0.1, "fisher": "exact", "low_rank_tolerance": 0.0, **further}
        options |= {"tolerance": 1e-11, "max_steps": 50}
        ours = trainer.influence(module, DataLoader(data, 4, shuffle=True), asked, log=False, **options)
        theirs = InfluenceModule(module).scores(DataLoader(data, 13), asked, **options)
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-6, atol=1e-10)
        if "by" in further:
            torch.testing.assert_close(ours.layer_scores, theirs.layer_scores, rtol=1e-6, atol=1e-10)
        assert ours.train_names == theirs.train_names
"""


@pytest.mark.slow
def test_two_processes_answer_in_parts_as_one_does(tmp_path):
    check_script(BEGIN + SCRIPT, tmp_path)
