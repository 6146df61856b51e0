"""What later linearisations of a forgetting do, and curvature of many outputs."""

import pytest
import torch
from edit_models import asked, of_class, quiet, train
from torch import nn
from torch.nn import functional as F
from whole_models import Fitted, line, regression, retrained

from lightning_influence import InfluenceModule

EXACTLY = {"damping": 0.0, "curvature_examples": None, "tolerance": 1e-10, "max_steps": 500}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["if", "second_order", "gif", "fif", "pif"])
def test_steps_of_a_linear_model_converge_to_retraining(method):
    """With half of each Newton step half of what is left is left; after a whole one nothing is."""
    model = line()
    before, goal = model.vector(), retrained(model, model.x[10:], model.y[10:])
    options = {**EXACTLY, "method": method, "ratio": 1.0}
    for step, counts in (("theory", (1, 2, 4)), (0.5, (1, 2, 3))):
        left = []
        for count in counts:
            with quiet():
                edit = InfluenceModule(model).forget(
                    range(10), model.data, step=step, linearisations=count, **options
                )
            with edit:
                left.append(float((model.vector() - goal).norm() / (before - goal).norm()))
        if step == "theory":
            assert left[1] < 1e-6
            assert left[2] < 1e-6
        else:
            assert left[1] == pytest.approx(left[0] / 2, rel=1e-4)
            assert left[2] == pytest.approx(left[0] / 4, rel=1e-4)


@pytest.mark.slow
def test_steps_of_a_network_lower_what_is_trained_on():
    model, examples, _ = regression(0, 400)
    kept = slice(len(examples), None)
    losses = [model.total(model.y, kept)]
    options = {"method": "if", "damping": 1e-2, "curvature_examples": None}
    for count in (1, 2, 4):
        edit = InfluenceModule(model).forget(
            examples, model.data, step="theory", linearisations=count, **options
        )
        with edit:
            losses.append(model.total(model.y, kept))
        assert edit.report.step == [1.0] * count
    assert losses[3] < losses[2] < losses[1] < losses[0]


@pytest.mark.slow
def test_steps_that_are_too_long_are_halved():
    model, examples, _ = regression(0, 400)
    kept = slice(len(examples), None)
    losses = []
    for count in (1, 4):
        edit = InfluenceModule(model).forget(
            examples, model.data, step="theory", linearisations=count, method="if", damping=1e-3
        )
        with edit:
            losses.append(model.total(model.y, kept))
    assert losses[1] < losses[0]
    assert edit.report.step[0] == 1.0
    assert min(edit.report.step) < 1.0


def test_what_is_forgotten_is_not_forgotten_further():
    once, often = (asked().forget(of_class(1), train(), ratio=0.3, linearisations=count) for count in (1, 4))
    assert len(often.report.step) == 1
    assert all(torch.equal(once.changes[n].after, often.changes[n].after) for n in once.changes)


def test_what_cannot_be_forgotten_is_said_with_advice_that_helps():
    with quiet():
        edit = asked().forget(of_class(1), train(), forgotten_loss=1e9, linearisations=2)
    notes = [note for note in edit.report.notes if "forget the edited examples" in note]
    assert len(notes) == 1
    assert "step='theory'" in notes[0]
    assert "linearisations" not in notes[0]


def many(outputs, loss):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 6, generator=generator).double()
    if loss is F.mse_loss:
        y = torch.randn(120, outputs, generator=generator).double()
    else:
        y = torch.randint(0, outputs, (120,), generator=generator)
    torch.manual_seed(0)
    return Fitted(nn.Sequential(nn.Linear(6, outputs)), loss, x, y, 0.0 if loss is F.mse_loss else 0.01)


@pytest.mark.grid
@pytest.mark.parametrize("outputs", [64, 65, 80])
@pytest.mark.parametrize("solver", ["cg", "dense"])
def test_the_curvature_of_many_outputs_is_exact_where_it_is_asked_for(outputs, solver):
    model = many(outputs, F.mse_loss)
    before, goal = model.vector(), retrained(model, model.x[8:], model.y[8:])
    options = EXACTLY if solver == "cg" else {**EXACTLY, "curvature_examples": 256, "solver": "dense"}
    edit = InfluenceModule(model).forget(range(8), model.data, method="if", step="theory", **options)
    assert edit.report.notes == []
    with edit:
        assert (model.vector() - goal).norm() < 1e-4 * (before - goal).norm()


@pytest.mark.slow
def test_many_classes_are_as_the_hessian_of_a_linear_model_has_them():
    model = many(70, F.cross_entropy)
    options = {**EXACTLY, "weight_decay": 0.01, "method": "if", "step": "theory"}
    exact, hessian = (
        InfluenceModule(model).forget(range(8), model.data, curvature=kind, **options)
        for kind in ("ggn", "hessian")
    )
    for name, change in hessian.changes.items():
        torch.testing.assert_close(exact.changes[name].after, change.after, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("relabels", [False, True])
def test_mixtures_of_many_outputs_are_noted(relabels):
    model = many(70, F.cross_entropy)
    ask = InfluenceModule(model)
    for options, expected in (({}, True), ({"curvature_examples": None}, False)):
        with quiet():
            if relabels:
                edit = ask.relabel(range(8), 3, model.data, **options)
            else:
                edit = ask.forget(range(8), model.data, step="theory", **options)
        assert any("random mixtures" in note for note in edit.report.notes) == expected
    assert not any("mixtures" in n for n in asked().forget(of_class(0), train()).report.notes)


class Once(torch.autograd.Function):
    """The identity, without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient


class Opaque(nn.Module):
    def forward(self, x):
        return Once.apply(x)


def test_without_second_derivatives_mixtures_stand_in():
    model = many(70, F.cross_entropy)
    model.net.append(Opaque())
    edit = InfluenceModule(model).forget(range(8), model.data, step="theory", curvature_examples=None)
    assert any("random mixtures" in note for note in edit.report.notes)
