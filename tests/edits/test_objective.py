"""Relabelling lowers the loss over *all* training examples, though most of its steps look at a sample."""

import contextlib

import pytest
import torch
from edit_models import quiet
from torch.utils.data import DataLoader, TensorDataset
from whole_models import line, noisy_classes, regression, retrained

from lightning_influence import InfluenceModule
from lightning_influence.edits import editor
from lightning_influence.edits.request import EditRequest
from lightning_influence.edits.start import set_out
from lightning_influence.linalg.descent import Descent
from lightning_influence.running.loop_runner import LoopRunner
from lightning_influence.support.errors import InfluenceError, InfluenceWarning


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize("make", [regression, noisy_classes])
@pytest.mark.parametrize("seed", range(2))
def test_the_loss_over_all_examples_falls(make, seed):
    """Nearly as far as where every step looks at all of them; by sample alone it rises."""
    model, examples, new = make(seed)
    before, falls = model.total(new), {}
    for name, options in {
        "sample": {},
        "all": {"curvature_examples": None},
        "one shot": {"linearisations": 1},
        "frozen": {"method": "fif"},
    }.items():
        with quiet(), InfluenceModule(model).relabel(examples, new[examples], model.data, **options):
            falls[name] = before - model.total(new)
    assert min(falls.values()) > 0
    assert falls["sample"] > 0.15 * falls["all"]


def test_a_linear_model_is_relabelled_as_retraining_would():
    model = line(1500)
    model.x[:150] *= 3
    model.fit(model.x, model.y, 0.0)
    new = model.y.clone()
    new[:50] += 1
    before, goal = model.vector(), retrained(model, model.x, new)
    edit = InfluenceModule(model).relabel(
        range(50), new[:50], model.data, method="if", damping=0.0, tolerance=1e-8
    )
    with edit:
        assert (model.vector() - goal).norm() < 0.3 * (goal - before).norm()


@contextlib.contextmanager
def started(model, examples, targets):
    """Where a relabelling sets out, on the borrowed module."""
    request = EditRequest(examples, targets=targets)
    with LoopRunner(model) as runner:
        yield set_out(runner, request, request.split(model.data), None)


@pytest.mark.parametrize("make", [regression, noisy_classes])
def test_the_objective_sets_out_with_the_value_and_gradient_of_all(make):
    model, examples, new = make(0)
    value = model.loss(model.net(model.x), new)
    gradients = torch.autograd.grad(value, list(model.net.parameters()))
    with quiet(), started(model, examples, new[examples]) as begun:
        objective = begun.objective
        start = torch.zeros_like(begun.weights.decay)
        found, gradient = objective(start)
        by_name = begun.weights.by_parameter(gradient)
        assert objective.value(start) == found == pytest.approx(float(value), rel=1e-9)
        for (name, _), expected in zip(model.named_parameters(), gradients, strict=True):
            torch.testing.assert_close(by_name[name], expected, rtol=1e-7, atol=1e-10)
        # Elsewhere value and gradient belong together.
        step = torch.randn(len(start), generator=torch.Generator().manual_seed(0)).double()
        at, (_, slope) = 0.1 * step, objective(0.1 * step)
        ahead, behind = (objective.value(at + sign * 1e-5 * step) for sign in (1, -1))
        assert (ahead - behind) / 2e-5 == pytest.approx(float(slope @ step), rel=1e-5)
        begun.weights.restore()


@pytest.mark.parametrize("factor", [30.0, -1.0])
def test_a_change_that_raises_the_loss_over_all_is_shortened_or_refused(monkeypatch, factor):
    model, examples, new = regression(1)
    before, plain = model.total(new), editor.descend

    def astray(*arguments, **options):
        found = plain(*arguments, **options)
        return Descent(factor * found.point, found.objective, found.lengths, found.evaluations)

    monkeypatch.setattr(editor, "descend", astray)
    asked = InfluenceModule(model)
    if factor < 0:
        with pytest.raises(InfluenceError, match="curvature_examples=None"):
            asked.relabel(examples, new[examples], model.data)
        return
    with pytest.warns(InfluenceWarning, match="raises the loss of the training set"):
        edit = asked.relabel(examples, new[examples], model.data)
    with edit:
        assert model.total(new) < before
        assert edit.report.edited.after == pytest.approx(model.total(new, slice(50)), rel=1e-9)
        assert edit.report.kept.after == pytest.approx(model.total(new, slice(50, None)), rel=1e-9)
    assert any("is taken" in note for note in edit.report.notes)


def test_a_given_step_that_raises_the_loss_is_warned_of():
    model, examples, new = regression(0)
    with pytest.warns(InfluenceWarning, match="raises the mean loss of relabelled and kept examples"):
        edit = InfluenceModule(model).relabel(examples, new[examples], model.data, step=5.0, kept_bound=100.0)
    before, after = model.total(new), None
    with edit:
        after = model.total(new)
    assert after > before
    assert any(f"from {before:.4g} to {after:.4g}" in note for note in edit.report.notes)


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize("options", [{}, {"linearisations": 1}])
@pytest.mark.parametrize("loaders", [1, 2])
def test_validation_data_take_the_place_of_the_kept_in_the_search(options, loaders):
    model, examples, new = noisy_classes(0)
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(400, 8, generator=generator).double()
    with torch.no_grad():
        y = (model.net(x) + torch.randn(400, 3, generator=generator)).argmax(1)
    pairs = zip(x.chunk(loaders), y.chunk(loaders), strict=True)
    parts = [DataLoader(TensorDataset(*pair), 50) for pair in pairs]
    held_out = parts[0] if loaders == 1 else parts
    share = len(examples) / len(model.x)

    def total():
        with torch.no_grad():
            kept = float(model.loss(model.net(x), y))
        return share * model.total(new, slice(len(examples))) + (1 - share) * kept

    asked = InfluenceModule(model)
    before = total()
    with quiet():
        plain = asked.relabel(examples, new[examples], model.data, **options)
        edit = asked.relabel(examples, new[examples], model.data, validation=held_out, **options)
    with plain:
        ordinary = total()
    with edit:
        assert total() < min(before, ordinary)
    assert edit.report.kept_origin == "validation"


@pytest.mark.slow
def test_validation_data_are_only_reported_where_nothing_is_searched_for():
    model, examples, new = noisy_classes(0)
    held_out = DataLoader(TensorDataset(model.x[:90], 2 - model.y[:90]), 30)
    asked = InfluenceModule(model)
    ways = ({}, {"validation": held_out})
    options = {"step": 0.5, "linearisations": 2}
    with quiet():
        relabelled = [asked.relabel(examples, new[examples], model.data, **options, **way) for way in ways]
        forgotten = [asked.forget(model.y == 0, model.data, **way) for way in ways]
    for plain, edit in (relabelled, forgotten):
        assert all(torch.equal(plain.changes[n].after, edit.changes[n].after) for n in plain.changes)
        assert edit.report.kept.before != plain.report.kept.before
