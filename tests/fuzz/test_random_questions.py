"""Random models, batches, losses, methods and options against a dense reference in float64."""

import logging

import fuzz_judge
import pytest
from fuzz_judge import Tally, simplify
from fuzz_recipes import LOSSES, make_recipe, recipes
from hypothesis import HealthCheck, Phase, given, seed, settings

SHARDS = 8


@pytest.mark.fuzz
@pytest.mark.parametrize("shard", range(SHARDS))
def test_answers_are_right_or_refused_with_a_reason(shard, pytestconfig, count_cases):
    """The same cases in every run; a failure is shown by the simplest case of its kind."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    cases, tally = pytestconfig.getoption("--fuzz-cases") // SHARDS, Tally()

    @seed(shard)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(recipes)
    def ask(recipe):
        tally.add(recipe)

    ask()
    count_cases("random questions", {"wrong": 0, **tally.counts})
    shown = [": ".join(simplify(recipe)) for _, recipe in tally.wrong[:3]]
    assert not tally.wrong, f"{len(tally.wrong)} of {cases} cases are wrong, such as\n" + "\n".join(shown)
    assert tally.counts["right"] > 0.4 * cases  # it does not pass by refusing


def find_recipe(**wanted):
    numbers = (make_recipe(number) for number in range(10_000))
    return next(r for r in numbers if all(getattr(r, name) == value for name, value in wanted.items()))


@pytest.mark.fuzz
@pytest.mark.parametrize("wrong", ["scores", "raw error", "weights", "coupled"])
def test_the_judge_sees_what_is_wrong(wrong, monkeypatch):
    """A library that is a little wrong, in each of the ways that count."""
    recipe = find_recipe(net="mlp", loss="ce", method="exact", ask="scores", via="step", frozen=False)
    assert fuzz_judge.judge(recipe) == "right"
    asked = fuzz_judge._ask

    def ask(problem):
        if wrong == "raw error":
            raise IndexError("list index out of range")
        answer = asked(problem)
        if wrong == "weights":
            next(problem.module.parameters()).data += 1e-9
        if wrong == "scores":
            answer.values.scores[0, 0] *= 1 + 1e-5
        return answer

    monkeypatch.setattr(fuzz_judge, "_ask", ask)
    if wrong == "coupled":
        monkeypatch.setattr(
            LOSSES["ce"], "__class__", type("Coupled", (type(LOSSES["ce"]),), {"coupled": "so"})
        )
        recipe = find_recipe(
            net="mlp", loss="ce", method="exact", ask="scores", via="step", examples=5, batch=5
        )
    with pytest.raises(
        fuzz_judge.WrongError, match=wrong.split()[0] if wrong != "raw error" else "IndexError"
    ):
        fuzz_judge.judge(recipe)
