"""A question about the mean of queries: the mean of their answers, from one gradient a group."""

import pytest
import torch
from influence_cases import CONVERGED, EXACTLY, Asked
from influence_models import Net, dataset, fitted, names, queries, train
from models import CASES
from torch.utils.data import DataLoader
from two_processes import BEGIN, check_script

from lightning_influence import Attributions, InfluenceModule, average_attributions
from lightning_influence.methods.aggregating import MeanGradientPass
from lightning_influence.support.errors import NonFiniteError

CLOSE = {"rtol": 1e-8, "atol": 1e-12}
ITERATED = {"tolerance": 1e-12, "max_steps": 5000}
METHODS = {
    "identity": EXACTLY,
    "diagonal": EXACTLY,
    "kfac": EXACTLY,
    "ekfac": EXACTLY,
    "block_ggn": {},
    "exact": {},
    "hessian": {},
    "auto": {**EXACTLY, "max_steps": 0, "tolerance": 1e6},
    "auto iterated": CONVERGED,
    "cg": ITERATED,
    "minres": {**ITERATED, "curvature": "hessian"},
    "astra": ITERATED,
    "lissa": ITERATED,
}
LABELS = ["b", "a", "b"]


def mean_over_groups(rows):
    return torch.stack([rows[1], (rows[0] + rows[2]) / 2])


@pytest.mark.grid
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["mlp_gelu", "tokens_weighted", "conv2d_reflect_groups"])
def test_scores_are_the_mean_scores_of_the_queries(name, method):
    options = {**METHODS[method], "method": method.split()[0], "damping": 0.5}
    asked = Asked(CASES[name])
    single = asked.scores(**options)
    close = {"rtol": 1e-6, "atol": 1e-9} if "tolerance" in options else CLOSE
    whole = asked.scores(aggregate="mean", **options)
    torch.testing.assert_close(whole.scores, single.scores.mean(0, keepdim=True), **close)
    assert (whole.query_names, whole.query_counts.tolist(), whole.query_indices.tolist()) == (
        ("mean",),
        [3],
        [0],
    )
    parts = asked.scores(aggregate=LABELS, **options)
    torch.testing.assert_close(parts.scores, mean_over_groups(single.scores), **close)
    assert (parts.query_names, parts.query_counts.tolist()) == (("a", "b"), [1, 2])
    assert (single.query_names, single.query_counts) == ((), None)


@pytest.mark.grid
@pytest.mark.parametrize("method", ["ekfac", "exact", "auto"])
@pytest.mark.parametrize("measurement", ["margin", "loss"])
def test_scores_are_those_of_the_definition(method, measurement):
    asked = Asked(CASES["mlp_gelu"])
    options = CONVERGED if method == "auto" else {**EXACTLY, "method": method}
    found = asked.scores(aggregate=LABELS, measurement=measurement, **options)
    expected = asked.expected("exact" if method == "auto" else method, measurement=measurement)
    torch.testing.assert_close(found.scores, mean_over_groups(expected), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("method", ["identity", "ekfac", "exact", "cg"])
def test_solutions_are_the_mean_solutions(method):
    asked = Asked(CASES["mlp_gelu"])
    options = {**METHODS[method], "method": method}
    single, _ = asked.ihvp(**options)
    found, facts = asked.ihvp(aggregate=LABELS, **options)
    assert facts.extra["query_counts"] == {"a": 1, "b": 2}
    for name, rows in single.items():
        torch.testing.assert_close(found[name], mean_over_groups(rows), rtol=1e-7, atol=1e-10)


def test_no_gradient_of_a_single_query_is_kept():
    """What the pass holds does not grow with the queries."""
    held = {}
    step = MeanGradientPass.step

    def watched(self, *arguments):
        step(self, *arguments)
        held[len(held)] = sum(mean.nbytes for mean in self.means.values())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MeanGradientPass, "step", watched)
        found = InfluenceModule(Net()).scores(
            train(), queries(30), method="ekfac", damping=0.1, aggregate="mean"
        )
    assert len(held) == 10
    assert set(held.values()) == {4 * sum(found.diagnostics.layers.values())}


@pytest.mark.parametrize(
    "labels",
    [
        torch.arange(8) % 3,
        (torch.arange(8) % 3).numpy(),
        {i: i % 3 for i in range(8)},
        list(torch.arange(8) % 3),
    ],
)
def test_labels_of_any_kind_make_groups_in_the_order_of_integers(labels):
    module = InfluenceModule(Net().double())
    data = double(dataset(8, seed=1))
    options = {"method": "ekfac", "damping": 0.1, "low_rank_tolerance": 0.0}
    single = module.scores(double_train(), DataLoader(data, 3), **options)
    found = module.scores(double_train(), DataLoader(data, 3), aggregate=labels, **options)
    assert (found.query_names, found.query_counts.tolist()) == (("0", "1", "2"), [3, 3, 2])
    expected = torch.stack([single.scores[torch.arange(8) % 3 == group].mean(0) for group in range(3)])
    torch.testing.assert_close(found.scores, expected, **CLOSE)
    # A part of the dataset keeps its indices' labels, and only its groups.
    part = DataLoader(data, sampler=torch.utils.data.SubsetRandomSampler([7, 4, 1]))
    few = module.scores(double_train(), part, aggregate=labels, **options)
    assert (few.query_names, few.query_counts.tolist()) == (("1",), [3])
    torch.testing.assert_close(few.scores[0], single.scores[[1, 4, 7]].mean(0), **CLOSE)


@pytest.mark.parametrize("shuffled", [False, True])
def test_groups_that_do_not_fit_together_are_answered_in_turn(shuffled):
    """A pass over the queries of the groups that fit; also with a sampler whose batches stay whole."""
    torch.manual_seed(0)
    module = InfluenceModule(Net().double())
    data = double(dataset(8, seed=1))
    batches = [[7, 0, 3], [2, 6], [1, 4, 5]]
    loader = DataLoader(data, batch_sampler=batches) if shuffled else DataLoader(data, 3)
    labels = ["x", "y", "z", "z", "y", "x", "x", "w"]
    options = {"method": "ekfac", "damping": 0.1, "low_rank_tolerance": 0.0, "aggregate": labels}
    whole = module.scores(double_train(), loader, **options)
    parts = module.scores(double_train(), loader, memory_budget=1, **options)
    assert names(whole).count("query gradients") == 1
    assert names(parts).count("query gradients") == names(parts).count("scores") == 4
    torch.testing.assert_close(parts.scores, whole.scores, **CLOSE)
    assert whole.query_names == parts.query_names == ("w", "x", "y", "z")
    seen = [p["examples"] for p in parts.diagnostics.passes if "query" in p["name"]]
    # The one example of "w" comes with another, which counts in no group: no pass makes a batch of one.
    assert seen == ([3, 8, 3, 5] if shuffled else [2, 3, 2, 2])


def test_queries_of_several_loaders_are_joined_or_told_apart():
    module = InfluenceModule(Net().double())
    loaders = [DataLoader(double(dataset(count, seed=count)), 2) for count in (4, 3)]
    options = {"method": "ekfac", "damping": 0.1, "low_rank_tolerance": 0.0}
    single = module.scores(double_train(), loaders, **options)
    whole = module.scores(double_train(), loaders, aggregate="mean", **options)
    torch.testing.assert_close(whole.scores[0], single.scores.mean(0), **CLOSE)
    assert whole.query_dataloaders is None
    labels = [["first"] * 4, ["second", "first", "second"]]
    parts = module.scores(double_train(), loaders, aggregate=labels, **options)
    expected = torch.stack([single.scores[[0, 1, 2, 3, 5]].mean(0), single.scores[[4, 6]].mean(0)])
    torch.testing.assert_close(parts.scores, expected, **CLOSE)
    assert parts.query_counts.tolist() == [5, 2]
    few = module.scores(double_train(), loaders, aggregate=labels, memory_budget=1, **options)
    torch.testing.assert_close(few.scores, parts.scores, **CLOSE)


def test_top_k_of_groups_is_the_top_of_their_scores():
    options = {"method": "ekfac", "damping": 0.1, "aggregate": LABELS}
    asked = Asked(CASES["mlp_gelu"])
    whole, ends = asked.scores(**options), asked.scores(top_k=2, **options)
    torch.testing.assert_close(ends.top_scores, whole.top(2).scores)
    assert ends.bottom_indices.tolist() == whole.bottom(2).indices.tolist()
    assert ends.query_names == ("a", "b")


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ("median", ValueError, "aggregate='median'; accepted are 'mean'"),
        (3, TypeError, "aggregate=3; accepted is a list"),
        (["a"] * 5, ValueError, "5 labels for a dataset of 4"),
        ({0: "a", 1: "b", 2: "a"}, ValueError, r"no label for 1 examples \(dataset indices \[3\]\)"),
        (["a", "b", None, "a"], TypeError, "gives None to dataset index 2"),
        ([torch.arange(2)] * 4, TypeError, r"gives tensor\(\[0, 1\]\) to dataset index 0"),
        (torch.zeros(4, 2), TypeError, r"gives \[0.0, 0.0\] to dataset index 0"),
        ([0.5, 1.5, 0.5, 1.5], TypeError, "gives 0.5 to dataset index 0"),
        ([1, "1", 2, 2], ValueError, "aggregate has both 1 and '1'"),
    ],
)
def test_labels_that_cannot_be_are_refused_before_a_pass(labels, error, message):
    host = Net()
    with pytest.raises(error, match=message):
        InfluenceModule(host).scores(train(), queries(4), aggregate=labels)


def test_integers_come_first_and_true_is_not_one():
    found = InfluenceModule(Net()).scores(train(), queries(4), method="identity", aggregate=["a", 10, 9, "0"])
    assert found.query_names == ("9", "10", "0", "a")
    found = InfluenceModule(Net()).scores(train(), queries(4), method="identity", aggregate=[True, 1, 1, 0])
    counts = dict(zip(found.query_names, found.query_counts.tolist(), strict=True))
    assert counts == {"0": 1, "1": 2, "True": 1}


def test_labels_of_one_loader_are_refused_for_two():
    with pytest.raises(ValueError, match="for 2 loaders; accepted is a list with"):
        InfluenceModule(Net()).scores(train(), [queries(4), queries(4)], aggregate=[0, 1, 0, 1])


def test_a_query_that_is_not_finite_is_named():
    batch = (torch.full((2, 4), float("nan")), torch.tensor([0, 1]))
    with pytest.raises(NonFiniteError):
        InfluenceModule(Net()).scores(train(), [batch], method="identity", aggregate="mean")


def test_results_say_what_their_rows_are(tmp_path):
    torch.manual_seed(0)
    host, module = fitted(logger=[], default_root_dir=tmp_path)
    found = host.influence(module, query_dataloaders=queries(4), aggregate=["cat", "dog", "cat", "cat"])
    table = repr(found.top(2))
    assert "cat" in table
    assert "mean of 3" in table
    assert "dog" in table
    rows = found.top(1).rows()
    assert found.top(1).columns()[:2] == ["query", "queries"]
    assert [row[:2] for row in rows] == [["cat", 3], ["dog", 1]]
    assert "4 in 2 groups" in found.__rich__().renderables[0].columns[1]._cells[0].plain
    frame = found.to_pandas()
    assert frame["query"].tolist() == ["cat"] * 22 + ["dog"] * 22
    one = found.for_query("dog")
    assert (one.query_names, one.query_counts.tolist(), one.query_indices.tolist()) == (("dog",), [1], [1])
    torch.testing.assert_close(one.scores, found.scores[1:])
    with pytest.raises(ValueError, match="query_names are cat, dog"):
        found.for_query("cow")
    again = Attributions.load(found.save(tmp_path / "a.safetensors"))
    assert (again.query_names, again.query_counts.tolist()) == (("cat", "dog"), [3, 1])
    torch.testing.assert_close(again.scores, found.scores)
    mean = average_attributions([found, again])
    assert mean.query_names == found.query_names
    with pytest.raises(ValueError, match="query_names"):
        average_attributions([found, host.influence(module, query_dataloaders=queries(4), aggregate="mean")])


def test_pictures_and_pages_show_groups_by_name(tmp_path):
    from lightning_influence.results.plots import montage

    found = Asked(CASES["mlp_gelu"]).scores(method="identity", aggregate=LABELS)
    page = found.report(tmp_path / "page.html").read_text()
    assert "a: mean of" not in page
    assert "b: mean of 2 queries" in page
    with pytest.raises(ValueError, match="omit it"):
        found.report(tmp_path / "page.html", query_dataset=[0, 1, 2])
    figure = montage(found, {n: torch.rand(4, 4) for n in range(12)}, None, k=1)
    assert figure.axes[0].texts[0].get_text() == "a"


def test_loggers_count_queries_and_groups(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    host, module = fitted(logger=logger, default_root_dir=tmp_path)
    host.influence(module, query_dataloaders=queries(4), aggregate=[0, 1, 0, 0])
    folder = tmp_path / "lightning_logs" / "version_0"
    table = (folder / "metrics.csv").read_text()
    assert "influence/query_groups" in table
    lines = (folder / "influence" / "attributions.csv").read_text().splitlines()
    assert lines[0].split(",")[:3] == ["end", "query", "queries"]
    assert lines[1].split(",")[:3] == ["top", "0", "3"]


def double(data):
    return torch.utils.data.TensorDataset(*(t.double() if t.is_floating_point() else t for t in data.tensors))


def double_train():
    return DataLoader(double(dataset()), 5)


SCRIPT = """
asked = [DataLoader(TensorDataset(x[:5], y[:5]), 2), DataLoader(TensorDataset(x[5:6], y[5:6]))]
labels = [["a", "b", "a", "c", "a"], ["b"]]
for number, method in enumerate(("identity", "ekfac", "exact", "auto", "cg")):
    # Each method with both ways, and one of them within a budget that nothing fits.
    for aggregate, budget in zip(("mean", labels), (2**30, 4000)[:: 1 - 2 * (number % 2)]):
        options = {"method": method, "damping": 0.1, "fisher": "exact", "aggregate": aggregate}
        options |= {"tolerance": 1e-11, "max_steps": 50, "low_rank_tolerance": 0.0}
        options["memory_budget"] = budget
        ours = trainer.influence(module, DataLoader(data, 4, shuffle=True), asked, log=False, **options)
        theirs = InfluenceModule(module).scores(DataLoader(data, 13), asked, **options)
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-6, atol=1e-10)
        assert ours.query_names == theirs.query_names
        assert ours.query_counts.tolist() == theirs.query_counts.tolist()


class Drawn(torch.utils.data.Sampler):
    def __iter__(self):
        generator = torch.Generator().manual_seed(trainer.global_rank)
        return iter(torch.randperm(5, generator=generator)[:3].tolist())

    def __len__(self):
        return 3


drawn = DataLoader(TensorDataset(x[:5], y[:5]), 2, sampler=Drawn())
ours = trainer.influence(module, DataLoader(data, 4), drawn, method="identity", log=False, aggregate="mean")
single = trainer.influence(module, DataLoader(data, 4), drawn, method="identity", log=False)
torch.testing.assert_close(ours.scores[0], single.scores.mean(0))
"""


@pytest.mark.slow
def test_two_processes_average_as_one_does(tmp_path):
    check_script(BEGIN + SCRIPT, tmp_path)
