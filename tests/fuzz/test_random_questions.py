"""Random models, batches, losses, methods and options against a dense reference in float64."""

import logging
import random
from dataclasses import replace

import fuzz_judge
import pytest
from fuzz_judge import Tally, simplify
from fuzz_recipes import make_recipe

from lightning_influence import InfluenceError

SHARDS = 4


@pytest.mark.fuzz
@pytest.mark.parametrize("shard", range(SHARDS))
def test_answers_are_right_or_refused_with_a_reason(shard, pytestconfig, count_cases):
    """The same cases in every run; a failure is shown by the simplest case of its kind."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    cases, tally = pytestconfig.getoption("--fuzz-cases") // SHARDS, Tally()
    # Hypothesis mixes constants of the modules that happen to be imported into what it draws.
    numbers = random.Random(shard)
    for _ in range(cases):
        tally.add(make_recipe(numbers.getrandbits(40)))
    count_cases("random questions", {"wrong": 0, **tally.counts})
    shown = [": ".join(simplify(recipe)) for _, recipe in tally.wrong[:3]]
    assert not tally.wrong, f"{len(tally.wrong)} of {cases} cases are wrong, such as\n" + "\n".join(shown)
    assert tally.counts["right"] > 0.4 * cases  # it does not pass by refusing


PLAIN = replace(
    make_recipe(0),
    net="mlp",
    loss="ce",
    reduction="mean",
    classes=False,
    ignored=False,
    via="step",
    loader="loader",
    examples=5,
    batch=5,
    frozen=False,
    layers="default",
    ask="scores",
    method="exact",
    options={"damping": 0.3},
    measurement=None,
    step="plain",
    fit="none",
)


@pytest.mark.fuzz
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("scores", "scores of exact off by"),
        ("raw error", "IndexError: list index"),
        ("weights", "asking changed the weights"),
        ("coupled", "answered although the loss couples"),
        ("refusal", "refused although it is documented"),
    ],
)
def test_the_judge_sees_what_is_wrong(wrong, message, monkeypatch):
    """A library that is a little wrong, in each of the ways that count."""
    assert fuzz_judge.judge(PLAIN) == "right"
    asked = fuzz_judge._ask

    def ask(problem, trainer=None):
        if wrong == "raw error":
            raise IndexError("list index out of range")
        if wrong == "refusal":
            raise InfluenceError("This is not accepted, for a reason that is not to be seen.")
        answer = asked(problem)
        if wrong == "weights":
            next(problem.module.parameters()).data += 1e-9
        if wrong == "scores":
            answer.values.scores[0, 0] *= 1 + 1e-5
        if wrong == "coupled":
            problem.kind = replace(problem.kind, coupled="for a test")
        return answer

    monkeypatch.setattr(fuzz_judge, "_ask", ask)
    with pytest.raises(fuzz_judge.WrongError, match=message):
        fuzz_judge.judge(PLAIN)


def test_a_wrong_case_is_made_simpler(monkeypatch):
    asked = fuzz_judge._ask

    def ask(problem, trainer=None):
        answer = asked(problem)
        answer.values.scores[:, 0] += 1
        return answer

    monkeypatch.setattr(fuzz_judge, "_ask", ask)
    found, shown = simplify(replace(PLAIN, packing="dataclass", factor=30.0))
    assert found.startswith("scores of identity off")
    assert "packing='tuple'" in shown
    assert "factor=1.0" in shown
