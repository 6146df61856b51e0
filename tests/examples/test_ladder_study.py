"""The ladder study runs as a whole, and its short cuts give what the public methods give."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The benchmark modules, with an empty cache; forgotten afterwards."""
    known, folder = set(sys.modules), tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import ladder
        import ladder_answers
        import ladder_scores
        import ladder_tasks
        import tasks

        patch.setattr(tasks, "CACHE", folder)
        patch.setattr(ladder_tasks, "CACHE", folder)
        patch.setattr(ladder_scores, "DRAWS", 10)
        yield ladder, ladder_answers, ladder_scores, ladder_tasks
    for name in set(sys.modules) - known:
        if getattr(sys.modules[name], "__file__", None) and str(BENCHMARKS) in sys.modules[name].__file__:
            del sys.modules[name]


@pytest.fixture(scope="module")
def figures(bench):
    bench[0].main(["--quick"])
    folder = bench[3].CACHE / "ladder-quick"
    return json.loads((folder / "results.json").read_text("utf-8"))["diabetes"], folder


@pytest.mark.slow
def test_quick_run_fills_every_section(bench, figures):
    found, folder = figures
    assert set(found) == set(bench[0].SECTIONS)
    rungs = {row["rung"] for row in found["scores"]["0.5 loss"]}
    assert rungs == {rung.name for rung in bench[1].rungs_of(bench[0].quick_task())}
    assert len(found["steps"]["0.5 loss"]) == 6
    assert {row["rung"] for row in found["cost"]} == rungs
    assert (folder / "diabetes-0.5-loss.png").stat().st_size > 1000


@pytest.mark.slow
def test_solvers_agree_with_the_dense_matrix_and_with_proximal_responses(bench, figures):
    rows = {row["rung"]: row for row in figures[0]["scores"]["0.5 loss"]}
    for name in ("cg", "lissa", "astra"):
        assert rows[name]["grid"]["auto"] == pytest.approx(rows["ggn"]["grid"]["auto"], abs=0.03)
    agreement = {row["rung"]: row for row in figures[0]["pbrf"]}
    assert agreement["ggn"]["derivative"] > 0.999
    assert agreement["ggn"]["error"] < 0.02
    assert agreement["identity"]["derivative"] < 0.95


@pytest.mark.slow
def test_parts_of_the_gap_add_up(figures):
    for row in figures[0]["target"]:
        assert row["gap"]["value"] == pytest.approx(row["damping_part"] + row["solver_part"], abs=1e-9)


@pytest.mark.slow
def test_decomposition_is_empty_where_a_step_drops_nothing(figures):
    found = figures[0]["decomposition"]
    assert found["ggn/block_ggn"]["off_block"] > 0
    assert found["block_ggn/ekfac"]["off_block"] == pytest.approx(0, abs=1e-12)
    # The last layer has one output: its block is a Kronecker product.
    assert found["block_ggn/kfac"]["layers"][1]["residual"] == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hessian", "ggn", "block_ggn"])
@pytest.mark.parametrize("damping", [0.1, "auto"])
def test_decomposed_matrices_give_the_scores_of_the_public_methods(bench, figures, name, damping):
    entry = bench[0].quick_task()
    one = bench[1].Bench(entry, bench[3].CACHE / "compared")
    rung = next(rung for rung in bench[1].rungs_of(entry) if rung.name == name)
    expected = one.answer(replace(rung, options={"seed": 0}), damping).scores
    if damping == "auto":
        # The public call is kept for "auto" and the loss; the margin and the grid take the short cut.
        found = bench[1].rotated(one.source, name, ("loss",)).scores(one._spread(rung))
    else:
        module = bench[1].InfluenceModule(one.source.module)
        loaders = entry.task.pass_loader(), entry.task.pass_loader(entry.task.queries)
        found, expected = expected, module.scores(*loaders, method=rung.method, damping=damping).scores
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=1e-3, atol=1e-4 * float(expected.abs().max())
    )


def test_paired_difference_of_equal_scores_is_zero(bench):
    entry = bench[0].quick_task()
    truth = entry.truth(0.5, "loss")
    scores = torch.randn(len(entry.task.queries), len(entry.task.train))
    same = bench[2].paired(scores, 2 * scores, truth)
    assert (same.value, same.low, same.high) == pytest.approx((0.0, 0.0, 0.0), abs=1e-9)
    better = bench[2].paired(scores, -scores, truth)
    assert better.value == pytest.approx(2 * bench[2].interval(scores, truth).value)


def test_margin_is_that_of_the_package(bench):
    outputs, targets = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    margins = bench[3].loss_and_margin(outputs, targets)[5:]
    odds = outputs.softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(margins, (odds / (1 - odds)).log(), rtol=1e-4, atol=1e-5)
