"""When batches are collected: within the budget, spread evenly, reproducibly, and never too late."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence.collecting.schedule import Costs, Schedule
from lightning_influence.collecting.state import Run, Settings

COSTS = Costs(covariances=1.5, squares=2.0, basis=5.0)


def run(schedule: Schedule, until: int, costs: Costs = COSTS) -> list[tuple[int, str]]:
    """Train on batches up to number `until`; what happened, as (batch, event)."""
    events: list[tuple[int, str]] = []
    while schedule.steps < until:
        schedule.steps += 1
        if schedule.starts_window():
            events.append((schedule.steps, "window"))
        if schedule.wants_basis():
            schedule.note_basis()
            events.append((schedule.steps, "basis"))
        if schedule.should_collect():
            schedule.note_costs(costs)
            events.append((schedule.steps, schedule.phase))
            schedule.note_collected()
    return events


numbers = st.floats(0.1, 40, allow_nan=False)


@settings(deadline=None, max_examples=25)
@given(numbers, numbers, st.floats(0, 200), st.floats(0.01, 1.0), st.integers(1, 3000), st.booleans())
def test_never_spends_more_than_the_budget(cov, squares, basis, overhead, total, known) -> None:
    costs = Costs(cov, squares, basis)
    schedule = Schedule(overhead=overhead, horizon=total if known else None)
    while schedule.steps < total:
        run(schedule, schedule.steps + 1, costs)
        # Three batches are free until the budget has grown to them; after that it binds at every step.
        assert schedule.spent <= max(overhead * schedule.steps, 3 * cov) + 1e-9


@pytest.mark.parametrize(("hooks", "left"), [(0.0, 0.85), (0.01, 0.65), (0.03, 0.25), (0.04, 0.2)])
def test_hooks_of_every_step_are_paid_from_the_budget(hooks, left) -> None:
    schedule = Schedule(overhead=0.05, horizon=8000)
    run(schedule, 8000, Costs(0.5, 0.5, 2.0, hooks))
    assert schedule.spent <= left * 0.05 * 8000
    assert schedule.credit == pytest.approx(left * 0.05 * 8000 - schedule.spent)
    if hooks:
        free = Schedule(overhead=0.05, horizon=8000)
        run(free, 8000, Costs(0.5, 0.5, 2.0))
        assert schedule.spent < free.spent


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 2000), st.integers(0, 2000), st.sampled_from([None, 1, 3, 50]))
def test_resumed_schedule_makes_the_same_decisions(total, cut, every) -> None:
    cut = min(cut, total)
    whole = Schedule(every_n_steps=every, horizon=total)
    events = run(whole, total)
    first = Schedule(every_n_steps=every, horizon=total)
    before = run(first, cut)
    second = Schedule.from_state_dict(first.state_dict())
    second.set_horizon(total)  # what a resumed fit of the same length does
    assert before + run(second, total) == events
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("total", [400, 1584, 5096])
def test_planned_run_ends_with_squares_over_its_last_eighth(total) -> None:
    schedule = Schedule(horizon=total)
    events = run(schedule, total)
    windows = [step for step, event in events if event == "window"]
    assert windows[-1] == total - total // 8 + 1
    last = [(step, event) for step, event in events if step > total - total // 8]
    bases = [step for step, event in last if event == "basis"]
    covariances = [step for step, event in last if event == "covariances"]
    squares = [step for step, event in last if event == "squares"]
    assert len(bases) == 1
    assert max(covariances) < bases[0] <= min(squares)
    assert bases[0] <= 0.95 * total
    # Half of what is left after the decomposition goes to each, and nearly all of the budget is used.
    assert abs(len(covariances) - len(squares)) <= 0.3 * len(squares) + 1
    assert schedule.spent >= 0.7 * 0.05 * total


def test_collected_batches_are_spread_evenly() -> None:
    schedule = Schedule(horizon=8000, overhead=0.01)
    events = run(schedule, 8000)
    squares = [step for step, event in events if event == "squares" and step > 7000]
    gaps = [b - a for a, b in itertools.pairwise(squares)]
    assert len(gaps) > 5
    assert max(gaps) <= 1.15 * min(gaps)


def test_first_batch_is_collected_and_costs_are_taken_once() -> None:
    schedule = Schedule(horizon=10)
    assert run(schedule, 1) == [(1, "covariances")]
    schedule.note_costs(Costs(99, 99, 99))
    assert schedule.costs == COSTS


def test_every_n_steps_ignores_the_budget() -> None:
    schedule = Schedule(every_n_steps=7, horizon=200)
    collected = [step for step, event in run(schedule, 200) if event in {"covariances", "squares"}]
    assert collected == list(range(1, 201, 7))
    assert schedule.spent > 0.05 * 200


def test_unknown_end_has_windows_that_double() -> None:
    events = run(Schedule(overhead=0.5), 1024)
    windows = [step for step, event in events if event == "window"]
    assert windows == [9, 17, 33, 65, 129, 257, 513]


def test_longer_run_moves_the_end_of_the_last_window() -> None:
    schedule = Schedule(horizon=400)
    run(schedule, 400)
    schedule.set_horizon(800)
    events = run(schedule, 800)
    assert (401, "window") in events
    assert any(event == "basis" for _, event in events)


def test_expensive_bases_are_left_to_the_last_window() -> None:
    events = run(Schedule(horizon=1600), 1600, Costs(1.5, 2.0, 38.0))
    assert [event for _, event in events].count("basis") == 1
    assert next(step for step, event in events if event == "basis") > 1200


def test_costs_count_products_by_their_size() -> None:
    small = Costs.count([(1, 1, 10, 65)], 32, 650)
    large = Costs.count([(1, 1, 1024, 785), (1, 1, 1024, 1025), (1, 1, 10, 1025)], 128, 1_863_690)
    # A small model pays for launches, about as much as for two steps; a large one for its products.
    assert 1.5 < small.covariances < 2.5
    assert 0.5 < large.covariances < 2
    assert small.basis < 1
    assert 20 < large.basis < 60
    groups = Costs.count([(4, 9, 8, 8)], 16, 256)
    assert groups.squares > groups.covariances


def test_measured_costs_replace_counted_ones_where_they_differ() -> None:
    schedule = Schedule(horizon=400)
    run(schedule, 60)
    spent, costs = schedule.spent, schedule.costs
    schedule.correct(1.05)
    assert (schedule.spent, schedule.costs) == (spent, costs)
    schedule.correct(0.5)
    assert schedule.costs == Costs(0.75, 1.0, 2.5)
    assert schedule.spent == spent / 2
    schedule.correct(4.0)
    assert schedule.costs == Costs(3.0, 4.0, 10.0)
    again = Schedule.from_state_dict(schedule.state_dict())  # a resumed run has them
    assert run(again, 400) == run(schedule, 400)


def test_correction_at_the_start_of_a_window_changes_its_plan() -> None:
    costly, cheap = (Schedule(horizon=800) for _ in range(2))
    for schedule, factor in ((costly, 3.0), (cheap, 0.5)):
        run(schedule, 700)
        schedule.steps += 1
        assert schedule.starts_window()
        schedule.correct(factor)
    assert cheap.planned > 2 * costly.planned


@pytest.mark.parametrize(("total", "batch"), [(320, 32), (120, 32), (100, 8), (1000, 256), (5000, 2)])
def test_last_window_collects_enough_examples(total, batch) -> None:
    schedule = Schedule(overhead=0.2, horizon=total)
    schedule.note_costs(Costs(0.5, 0.8, 2.0), batch)
    events = run(schedule, total)
    last = max(step for step, event in events if event == "window")
    covariances, squares = (
        batch * sum(event == kind and step >= last for step, event in events)
        for kind in ("covariances", "squares")
    )
    enough = min(500, 0.1 * total * batch)
    assert covariances >= enough
    assert squares >= enough / 2


def test_no_eigenvalues_of_too_few_examples() -> None:
    schedule = Schedule(horizon=320)
    schedule.note_costs(Costs(0.6, 1.0, 2.0), 32)
    events = run(schedule, 320)
    assert not [event for _, event in events if event in {"basis", "squares"}]
    last = max(step for step, event in events if event == "window")
    assert sum(step >= last for step, event in events if event == "covariances") == 16


def test_how_many_batches_a_phase_collects_hardly_depends_on_their_cost() -> None:
    planned = set()
    for covariances in (0.50, 0.53, 0.55):
        schedule = Schedule(horizon=3200)
        schedule.note_costs(Costs(covariances, 1.6 * covariances, 2.0), 32)
        planned.add(tuple(event for _, event in run(schedule, 3200) if event == "squares"))
    assert len(planned) == 1


def test_state_of_a_version_that_knew_no_batch_sizes_is_read() -> None:
    schedule = Schedule(horizon=400)
    run(schedule, 60)
    state = schedule.state_dict()
    del state["batch"]
    assert Schedule.from_state_dict(state) == schedule


@pytest.mark.parametrize(("dynamics", "factors"), [("auto", 0.08), (True, 0.1), (False, 0.1)])
def test_unasked_dynamics_are_paid_from_the_overhead(dynamics, factors):
    asked = Settings(overhead=0.1, dynamics=dynamics)
    assert Run.start(asked).schedule.overhead == pytest.approx(factors)
    assert asked.dynamics_share == (pytest.approx(0.02) if dynamics == "auto" else None)
