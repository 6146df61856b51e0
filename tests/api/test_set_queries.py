"""A measurement that is one number for a batch: a question about a set, by autograd of that number."""

import oracle
import pytest
import torch
from influence_cases import CONVERGED, EXACTLY, Asked, gradients, quiet
from influence_models import Net, dataset, fitted, names, queries, train
from models import CASES, loader
from torch.utils.data import DataLoader
from two_processes import BEGIN, check_script

from lightning_influence import Attributions, InfluenceModule
from lightning_influence.support.errors import InfluenceError, NonFiniteError, UnsupportedModelError

ITERATED = {"tolerance": 1e-12, "max_steps": 5000}
METHODS = {
    "identity": EXACTLY,
    "kfac": EXACTLY,
    "ekfac": EXACTLY,
    "exact": {},
    "auto": CONVERGED,
    "cg": ITERATED,
    "lissa": ITERATED,
}
SIZE = 6  # of a set; the cases have two of them


def sizes_of(outputs):
    return outputs.flatten(1).square().mean(1)


def gap(outputs):
    """How far two groups are apart, which is not the sum of anything over the examples."""
    sizes = sizes_of(outputs)
    return (sizes[::2].mean() - sizes[1::2].mean()).abs()


def ratio(outputs):
    sizes = sizes_of(outputs)
    return sizes[:2].sum() / sizes.sum()


def of_outputs(function):
    def measured(module, batch):
        return function(module.model(batch[0]))

    measured.__name__ = function.__name__
    return measured


def expected_gradients(case, function):
    """Of the number of each set in all parameters, by autograd through the flat parameters, ``(sets, P)``."""
    theta = oracle.flat_parameters(case.model, case.layers).requires_grad_()
    rows = []
    for x in case.x.split(SIZE):
        outputs = torch.stack([oracle._forward(case.model, case.layers, theta, x_n) for x_n in x])
        rows.append(torch.autograd.grad(function(outputs), theta)[0])
    return torch.stack(rows)


def expected_scores(asked, method, function):
    case = asked.case
    found, trained = expected_gradients(case, function), gradients(case.name)
    if method == "identity":
        return found @ trained.T / len(trained)
    curvature = asked.curvature({"cg": "exact", "lissa": "exact"}.get(method, method))
    return oracle.influence(curvature, 0.5, found, trained)


def ask(asked, function, method, **options):
    options = {**METHODS[method], "method": method, "damping": 0.5, **options}
    return asked.scores(queries=loader(asked.case, SIZE), measurement=of_outputs(function), **options)


@pytest.mark.grid
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("function", [gap, ratio])
@pytest.mark.parametrize("name", ["mlp_gelu", "conv2d_reflect_groups"])
def test_scores_are_those_of_the_numbers_own_gradient(name, function, method):
    asked = Asked(CASES[name])
    found = ask(asked, function, method)
    close = {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(found.scores, expected_scores(asked, method, function), **close)
    assert (found.query_names, found.query_counts.tolist()) == (("batch 0", "batch 1"), [1, 1])
    assert found.query_indices.tolist() == [0, 1]
    assert found.diagnostics.extra["set_sizes"] == [SIZE, SIZE]
    assert "each batch is one query: 2, of 6 examples" in "".join(found.diagnostics.warnings)
    assert found.diagnostics.measurement == function.__name__


@pytest.mark.parametrize("method", ["identity", "ekfac", "exact", "auto"])
def test_sets_are_averaged_summed_and_told_apart_like_other_queries(method):
    asked = Asked(CASES["mlp_gelu"])
    whole = ask(asked, gap, method)
    close = {"rtol": 1e-6, "atol": 1e-10}
    mean = ask(asked, gap, method, aggregate="mean")
    torch.testing.assert_close(mean.scores, whole.scores.mean(0, keepdim=True), **close)
    assert (mean.query_names, mean.query_counts.tolist()) == (("mean",), [2])
    named = ask(asked, gap, method, aggregate=["second", "first"])
    torch.testing.assert_close(named.scores, whole.scores.flip(0), **close)
    assert named.query_names == ("first", "second")
    layers = ask(asked, gap, method, by="layer")
    torch.testing.assert_close(layers.layer_scores.sum(0), whole.scores, **close)
    labels = [number % 3 for number in range(len(asked.case.x))]
    sums = ask(asked, gap, method, train_groups=labels)
    expected = torch.stack([whole.scores[:, start::3].sum(1) for start in range(3)], 1)
    torch.testing.assert_close(sums.scores, expected, **close)
    ends = ask(asked, gap, method, top_k=2)
    torch.testing.assert_close(ends.top_scores, whole.top(2).scores, **close)
    parts = ask(asked, gap, method, memory_budget=1000)
    if method in ("identity", "ekfac"):
        assert names(parts).count("scores") == names(parts).count("query gradients") == 2
        torch.testing.assert_close(parts.scores, whole.scores, **close)


@pytest.mark.parametrize("method", ["identity", "exact"])
def test_solutions_are_those_of_the_numbers_own_gradient(method):
    asked = Asked(CASES["mlp_gelu"])
    case, module = asked.case, asked.module
    with quiet():
        options = {"method": method, "damping": 0.5, "measurement": of_outputs(gap)}
        found, facts = module.ihvp(loader(case, 5), loader(case, SIZE), **options)
    assert facts.extra["query_counts"] == {"batch 0": 1, "batch 1": 1}
    rows = expected_gradients(case, gap)
    if method == "exact":
        matrix = asked.curvature(method)
        rows = torch.linalg.solve(matrix + 0.5 * torch.eye(len(matrix), dtype=rows.dtype), rows.T).T
    squares = sum(part.flatten(1).square().sum(1) for part in found.values())
    torch.testing.assert_close(squares, rows.square().sum(1), rtol=1e-8, atol=0)


def pair():
    inputs, labels = dataset().tensors
    return Net().double(), torch.utils.data.TensorDataset(inputs.double(), labels)


def spread(module, batch):
    """Of the mean example's outputs and the examples' own: layers run on other rows than the batch's."""
    x = batch[0]
    return (module(x.mean(0, keepdim=True)) - module(x).mean(0)).square().sum()


def test_layers_may_run_on_other_rows_than_the_examples():
    module, data = pair()
    with quiet():
        found = InfluenceModule(module).scores(
            DataLoader(data, 5), DataLoader(data, 11), method="identity", measurement=spread
        )
    module.eval()
    rows = torch.nn.functional.cross_entropy(module(data.tensors[0]), data.tensors[1], reduction="none")
    flat = list(module.parameters())
    trained = torch.stack([
        torch.cat([g.flatten() for g in torch.autograd.grad(row, flat, retain_graph=True)]) for row in rows
    ])
    for row, part in zip(found.scores, data.tensors[0].split(11), strict=True):
        own = torch.autograd.grad(spread(module, (part,)), flat)
        torch.testing.assert_close(row, trained @ torch.cat([g.flatten() for g in own]) / 22)


def test_hooks_on_gradients_are_left_out_and_stay():
    module, data = pair()
    loaders = DataLoader(data, 5), DataLoader(data, 11)
    options = {"method": "identity", "measurement": spread}
    plain = InfluenceModule(module).scores(*loaders, **options)
    handle = module.body[0].weight.register_hook(lambda grad: 3 * grad)
    with quiet():
        hooked = InfluenceModule(module).scores(*loaders, **options)
    torch.testing.assert_close(hooked.scores, plain.scores)
    module.body[0].weight.sum().backward()
    assert module.body[0].weight.grad.unique().tolist() == [3.0]
    handle.remove()


def test_several_loaders_and_ready_made_batches_are_sets_too():
    module, data = pair()
    host = InfluenceModule(module)
    x, y = data.tensors
    options = {"method": "ekfac", "damping": 0.1, "low_rank_tolerance": 0.0, "measurement": spread}
    found = host.scores(DataLoader(data, 5), [DataLoader(data, 11), DataLoader(data, 22)], **options)
    assert found.query_names == ("loader 0, batch 0", "loader 0, batch 1", "loader 1, batch 0")
    assert found.query_dataloaders is None
    ready = host.scores(DataLoader(data, 5), [(x[:11], y[:11]), (x[11:], y[11:]), (x, y)], **options)
    torch.testing.assert_close(ready.scores, found.scores)
    labels = [["a", "b"], ["a"]]
    named = host.scores(
        DataLoader(data, 5), [DataLoader(data, 11), DataLoader(data, 22)], aggregate=labels, **options
    )
    torch.testing.assert_close(named.scores[0], found.scores[[0, 2]].mean(0))
    torch.testing.assert_close(named.scores[1], found.scores[1])


def test_what_cannot_be_a_set_is_refused():
    module, data = pair()
    host, trained = InfluenceModule(module), DataLoader(data, 5)

    def ask_with(measurement, asked=None, **options):
        asked = DataLoader(data, 11) if asked is None else asked
        return host.scores(trained, asked, method="identity", measurement=measurement, **options)

    shared = DataLoader(data, batch_sampler=[[0, 1, 2], [2, 3, 4]])
    with quiet(), pytest.raises(InfluenceError, match=r"examples in common.*several loaders"):
        ask_with(spread, shared)
    with pytest.raises(ValueError, match=r"22 labels for a dataset of 2.*each batch is one query"):
        ask_with(spread, aggregate=[0] * 22)

    def missing(module, batch):
        return module(batch[0])[:0].mean()

    with pytest.raises(NonFiniteError, match=r"'missing' is nan for the batch of dataset indices 0, 1"):
        ask_with(missing)
    with pytest.raises(ValueError, match="values without a graph"):
        ask_with(lambda module, batch: module(batch[0]).detach().sum())
    with pytest.raises(TypeError, match=r"returned a tensor of torch.int64.* shape \(\)"):
        ask_with(lambda module, batch: module(batch[0]).argmax())
    with pytest.raises(UnsupportedModelError, match="does not depend on the parameters of any covered"):
        ask_with(lambda module, batch: torch.ones((), dtype=torch.float64, requires_grad=True) * 2)

    def sometimes(module, batch):
        return spread(module, batch) if len(batch[0]) > 7 else module(batch[0])[:, 0]

    uneven = [tuple(t[:15] for t in data.tensors), tuple(t[15:] for t in data.tensors)]
    with pytest.raises(ValueError, match=r"shape \(7,\). Accepted is .* one number for the batch"):
        ask_with(sometimes, uneven)
    for wrong in (lambda module, batch: module(batch[0]), lambda module, batch: module(batch[0])[:3, 0]):
        with pytest.raises(ValueError, match=r"Accepted is a floating-point tensor of shape \(11,\)"):
            ask_with(wrong)


def test_results_name_the_sets(tmp_path):
    torch.manual_seed(0)
    host, module = fitted(logger=[], default_root_dir=tmp_path)
    module.influence_measurement = lambda batch: spread(module, batch)
    found = host.influence(module, query_dataloaders=queries(4))
    assert found.diagnostics.measurement == "hook"
    assert found.query_names == ("batch 0", "batch 1")
    table = repr(found.top(2))
    assert "batch 1" in table
    assert "mean of" not in table
    assert found.__rich__().renderables[0].columns[1]._cells[0].plain == "2"
    assert found.for_query("batch 1").scores.shape == (1, 22)
    page = found.report(tmp_path / "page.html").read_text()
    assert '"batch 1"' in page or "batch 1<" in page
    with pytest.raises(ValueError, match="omit it"):
        found.report(tmp_path / "page.html", query_dataset=dataset(4))
    again = Attributions.load(found.save(tmp_path / "a.safetensors"))
    assert again.query_names == found.query_names
    assert len(host.self_influence(module, train()).scores) == 22


SCRIPT = """
def gap(module, batch):
    sizes = module(batch[0]).square().mean(1)
    return (sizes[::2].mean() - sizes[1::2].mean()).abs()


for method in ("identity", "ekfac", "exact", "auto"):
    for asked in (DataLoader(data, 5), DataLoader(data, 13), [DataLoader(data, 7), DataLoader(data, 13)]):
        options = {"method": method, "damping": 0.1, "fisher": "exact", "measurement": gap}
        options |= {"tolerance": 1e-11, "max_steps": 50, "low_rank_tolerance": 0.0}
        ours = trainer.influence(module, DataLoader(data, 4, shuffle=True), asked, log=False, **options)
        theirs = InfluenceModule(module).scores(DataLoader(data, 13), asked, **options)
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-6, atol=1e-10)
        assert ours.query_names == theirs.query_names
"""


@pytest.mark.slow
def test_two_processes_measure_whole_sets(tmp_path):
    """A set is one process's: gradients of shares of it would not add up to its own."""
    check_script(BEGIN + SCRIPT, tmp_path)
