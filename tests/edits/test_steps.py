"""Line searches on known curves, and the searches of real edits."""

import copy
import math

import pytest
import torch
from edit_models import accuracy, asked, blobs, fitted, of_class, quiet, train
from hypothesis import given, settings
from hypothesis import strategies as st
from influence_models import Net
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence.edits.steps import Point, search_forgetting, search_objective


def ramp(where, spread=0.0):
    """Examples whose loss crosses the mark at steps around `where`."""
    thresholds = where * (1 + spread * torch.linspace(-1, 1, 21, dtype=torch.float64))
    return lambda step: Point(step - thresholds, 0.0)


@given(st.floats(1e-3, 1e4))
@settings(max_examples=60, deadline=None)
def test_the_smallest_sufficient_step_is_found(where):
    found = search_forgetting(ramp(where))
    assert found.reached
    assert where <= found.step <= where * 2 ** (1 / 8) * (1 + 1e-9)
    assert found.evaluations <= 20


def test_the_spread_of_the_examples_is_allowed_for():
    step = search_forgetting(ramp(10.0, spread=0.5)).step
    deviation = 5.0 * float(torch.linspace(-1, 1, 21).std(correction=0))
    assert step >= 10.0 + 2.326 * deviation


def test_what_cannot_be_forgotten_comes_as_close_as_possible():
    def bump(step):
        return Point(torch.tensor([-1.0, 0.5 if 3 < step < 9 else -0.5]), 0.0)

    found = search_forgetting(bump)
    assert not found.reached
    assert 3 < found.step < 9


def test_a_short_interval_between_the_doublings_is_found():
    found = search_forgetting(
        lambda step: Point(torch.tensor([1.0 if 5 < step < 6 else -abs(step - 5.5)]), 0.0)
    )
    assert found.reached
    assert 5 < found.step < 6


def test_losses_that_overflow_end_the_search():
    found = search_forgetting(lambda step: None if step > 10 else Point(torch.tensor([step - 20]), 0.0))
    assert not found.reached
    assert 8 < found.step < 10
    assert search_forgetting(lambda step: None).step == 0.0


@given(st.floats(-9, 9))
@settings(max_examples=40, deadline=None)
def test_the_lowest_objective_is_found(exponent):
    best = 2.0**exponent

    def valley(step):
        return Point(torch.zeros(1), (step / best - 1) ** 2 if step else 1.0)

    found = search_objective(valley, 1.0)
    assert found.reached
    assert valley(found.step).objective < 0.03
    assert 0.8 * best < found.step < 1.25 * best


def test_a_quadratic_is_met_from_above_too():
    found = search_objective(lambda step: Point(torch.zeros(1), math.inf if step > 0.1 else -step), 0.0)
    assert found.step == pytest.approx(0.0625)


def test_no_step_helps():
    found = search_objective(lambda step: Point(torch.zeros(1), 1 + step), 1.0)
    assert (found.step, found.reached) == (0.0, False)


@pytest.fixture(scope="module")
def source():
    return fitted()


@pytest.mark.parametrize("method", ["gif", "fif", "pif", "if", "second_order"])
def test_a_class_is_forgotten_and_the_others_are_kept(source, method):
    edit = asked(source).forget(of_class(1), train(), ratio=0.3, method=method)
    fresh = blobs(300, seed=5)
    with edit:
        assert accuracy(source, 1, fresh) < 0.05  # 20 training examples tell the spread of a class roughly
        assert min(accuracy(source, label, fresh) for label in (0, 2)) > 0.95
    assert edit.report.edited.after > math.log(3) > edit.report.edited.before
    assert accuracy(source, 1, fresh) > 0.97


@pytest.mark.parametrize("solver", ["lissa", "dense"])
def test_solvers_agree_on_the_edit(source, solver):
    options = {"ratio": 0.3, "tolerance": 1e-5, "max_steps": 5000, "damping": 0.01, "step": 20.0}
    plain, other = (asked(source).forget(of_class(0), train(), solver=s, **options) for s in ("cg", solver))
    assert plain.report.norm > 0.05
    for name, change in plain.changes.items():
        torch.testing.assert_close(other.changes[name].after, change.after, rtol=1e-2, atol=2e-3)


def test_given_steps_are_taken(source):
    half, whole = (asked(source).forget(of_class(0), train(), step=step) for step in (0.5, "theory"))
    assert (half.report.step, whole.report.step) == ([0.5], [1.0])
    assert half.report.norm == pytest.approx(0.5 * whole.report.norm, rel=1e-5)


def test_relabelling_teaches_the_new_label(source):
    examples = of_class(2)[:5]
    before = source.eval()(blobs().tensors[0][examples]).argmax(1)
    assert before.tolist() == [2] * 5
    with quiet():
        edit = asked(source).relabel(of_class(2), 0, train(), ratio=0.3, linearisations=4)
    fresh = blobs(300, seed=5).tensors
    with edit, torch.no_grad():
        found = source.eval()(fresh[0]).argmax(1)
        assert float((found[fresh[1] == 2] == 0).float().mean()) > 0.95
        assert float((found[fresh[1] == 1] == 1).float().mean()) > 0.95
    assert len(edit.report.step) == 4
    assert edit.report.edited.after < 0.1 < edit.report.edited.before
    assert edit.report.edited.predicted is None


def test_validation_data_stand_for_the_kept(source):
    x, y = blobs(30, seed=9).tensors
    held_out = DataLoader(TensorDataset(x[y != 0], y[y != 0]), 8)
    edit = asked(source).forget(of_class(0), train(), validation=held_out)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(source.eval()(x[y != 0]), y[y != 0])
    assert edit.report.kept.before == pytest.approx(float(expected), rel=1e-4)
    assert edit.report.kept_origin == "validation"
    asked(source).relabel(of_class(0)[:3], 1, train(), validation=held_out)


def test_ready_made_batches_are_edited_alike(source):
    """Batches of the user's own cannot be cut: their other examples are left out of every sum."""
    x, y = blobs().tensors
    x, module = x.double(), copy.deepcopy(source).double()
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 60, 16)]
    options = {"ratio": 0.3, "tolerance": 1e-12, "max_steps": 300, "curvature_examples": 20, "damping": 0.1}
    for ask in ("generalized_influence", "relabel"):
        found = []
        for data in (batches, DataLoader(TensorDataset(x, y), 7, shuffle=True)):
            if ask == "relabel":
                edit = asked(module).relabel(of_class(0), 2, data, **options)
                found.append({name: change.after for name, change in edit.changes.items()})
            else:
                found.append(asked(module).generalized_influence(of_class(0), data, **options))
        for name in found[1]:
            torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-5, atol=1e-8)


def test_without_memory_products_are_passes(source):
    few = asked(source).forget(of_class(0), train(), memory_budget=0)
    many = asked(source).forget(of_class(0), train())
    for name, change in many.changes.items():
        torch.testing.assert_close(few.changes[name].after, change.after, rtol=1e-3, atol=1e-4)


def test_the_same_seed_gives_the_same_edit(source):
    for rule in ("random", "exclusive_outputs"):
        first, second, other = (
            asked(source).forget(of_class(0), train(), rule=rule, ratio=0.3, step="theory", seed=seed)
            for seed in (0, 0, 1)
        )
        assert all(torch.equal(first.changes[n].after, second.changes[n].after) for n in first.changes)
        assert any(
            n not in other.changes or not torch.equal(first.changes[n].index, other.changes[n].index)
            for n in first.changes
        )


def test_an_untrained_model_can_be_asked_too():
    edit = asked(Net(8)).forget([0], train(), step="theory")
    assert edit.report.touched > 0
