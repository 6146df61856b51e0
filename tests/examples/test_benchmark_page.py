"""The tables of the page of benchmarks are what the script makes of the figures that are kept beside it."""

import json
from pathlib import Path

import pytest
from benchmarks import BENCHMARKS, load_benchmark

write_page = load_benchmark("write_page")
PAGE = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text("utf-8")
MEASURED = json.loads((BENCHMARKS / "measured.json").read_text("utf-8"))


def make_result(contender, task):
    (found,) = [r for r in MEASURED if (r["contender"], r["task"]) == (contender, task)]
    return dict(found)


def test_the_page_is_what_the_script_writes():
    assert write_page.write_page(PAGE, MEASURED) == PAGE


def test_new_figures_replace_old_ones_and_nothing_else():
    results = [make_result(c, "digits_mlp") for c in ("ekfac", "kronfluence")]
    results[0]["lds"] = (0.612, 0.6, 0.62)
    page = write_page.write_page(PAGE, results)
    assert "| `ekfac` | .612 (.600 to .620) |" in page
    assert "digits CNN" not in page.split("<!-- table: cost -->")[0].split("<!-- table: quality -->")[1]
    assert "ResNet" not in page.split("<!-- table: peers -->")[1].split("<!-- /table -->")[0]
    outside = [part.split("<!-- /table -->")[-1] for part in page.split("<!-- table:")]
    assert outside == [part.split("<!-- /table -->")[-1] for part in PAGE.split("<!-- table:")]


def test_small_llamas_have_a_table_of_their_own():
    table = write_page.write_llamas([make_result("ekfac", "digits_mlp"), make_result("ekfac", "llama128")])
    (row,) = table.splitlines()[2:]
    name, factors, scores, both, decompositions = (cell.strip() for cell in row.strip("|").split("|"))
    assert name == "128 x 4, 1,000 words"
    assert float(both) == pytest.approx(float(factors) + float(scores), abs=0.11)
    assert 0 < float(decompositions) < float(factors)
    assert "Llama" not in write_page.write_peers(MEASURED)


def test_failed_runs_are_left_out():
    failed = {"contender": "kronfluence", "task": "digits_mlp", "error": "out of memory"}
    assert "digits MLP" not in write_page.write_cost([make_result("ekfac", "digits_mlp"), failed])


def test_what_is_better_than_ours_is_bold_and_what_is_left_out_says_why():
    def stages(epochs, peak):
        return [{"group": group, "epochs": epochs, "peak_mib": peak} for group in write_page.GROUPS]

    results = [
        {"contender": "ekfac", "task": "resnet10", "stages": stages(2.0, 20), "correlation": 0.5},
        {"contender": "auto", "task": "resnet10", "stages": stages(9.0, 40), "correlation": 0.9},
        {"contender": "dattri-llm", "task": "resnet10", "stages": stages(1.5, 30), "correlation": 0.7},
        {"contender": "bergson", "task": "resnet10", "error": "answers for language models alone"},
    ]
    results[2]["untuned"] = 0.25
    lines = write_page.write_peers(results).splitlines()
    (row,) = [line for line in lines if "dattri-llm" in line]
    assert row.endswith("| **1.5** | **1.5** | **1.5** | 30 | .700 | .250 |")
    (row,) = [line for line in lines if "bergson" in line]
    assert "answers for language models alone" in row
    assert not any("**" in line for line in lines if "`auto`" in line or "`ekfac`" in line)


def test_a_second_run_replaces_the_first_and_keeps_the_rest():
    first = {"contender": "ekfac", "task": "resnet10", "stages": [], "lds": None, "settings": {}}
    other = {**first, "contender": "kfac", "correlation": 0.25}
    again = {**first, "stages": [{"group": "scores", "epochs": 1.23456, "peak_mib": 7.7, "seconds": 3.0}]}
    kept = write_page.join([], [first, other])
    found = {r["contender"]: r for r in write_page.join(kept, [again])}
    assert found["ekfac"]["stages"] == [{"group": "scores", "epochs": 1.235, "peak_mib": 8}]
    assert found["kfac"] == {"contender": "kfac", "task": "resnet10", "correlation": 0.25}


def test_a_page_without_a_place_is_refused():
    with pytest.raises(ValueError, match="no '<!-- table: quality -->'"):
        write_page.write_page("# Benchmarks", [])


def test_every_script_is_on_the_page():
    folder = Path(__file__).parents[2] / "examples" / "benchmarks"
    scripts = [path.name for path in folder.glob("*.py") if "__main__" in path.read_text("utf-8")]
    assert len(scripts) > 20
    assert [name for name in scripts if f"`{name}`" not in PAGE] == []
