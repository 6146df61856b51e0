"""The tables of the page of benchmarks are what the script makes of the results of ``peers.py``."""

from pathlib import Path

import pytest
from benchmarks import load_benchmark

write_page = load_benchmark("write_page")
PAGE = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text("utf-8")
# What the page says, as `peers.py` would have written it: LDS with interval, epochs of ours and of the
# reference for factors, scores and self-influence, and peaks.
LDS = {
    "digits_mlp": {
        "auto": (0.713, 0.701, 0.724),
        "kfac": (0.590, 0.575, 0.605),
        "ekfac": (0.573, 0.557, 0.588),
        "kronfluence": (0.544, 0.528, 0.560),
    },
    "digits_cnn": {
        "auto": (0.541, 0.525, 0.557),
        "kfac": (0.429, 0.411, 0.449),
        "ekfac": (0.434, 0.416, 0.454),
        "kronfluence": (0.455, 0.438, 0.472),
    },
}
COSTS = {
    "digits_mlp": ((1617, 180), (9.3, 20, 3.9), (62, 19, 90), (29, 111)),
    "digits_cnn": ((1617, 180), (9.7, 9.8, 2.4), (11, 6.6, 46), (82, 148)),
    "large_mlp": ((10_000, 500), (5.2, 44, 1.5), (201, 18, 1490), (522, 1783)),
    "transformer": ((400, 50), (4.8, 2.4, 1.7), (1.3, 1.2, 4.3), (411, 422)),
}


def make_result(contender, task):
    (train, queries), epochs, times, peaks = COSTS[task]
    if contender == "kronfluence":
        epochs = [own * ratio for own, ratio in zip(epochs, times, strict=True)]
    stages = [
        {"group": group, "epochs": value, "peak_mib": peaks[contender == "kronfluence"]}
        for group, value in zip(write_page.GROUPS, epochs, strict=True)
    ]
    lds = LDS.get(task, {}).get(contender)
    sizes = {"num_train": train, "num_queries": queries}
    return {"contender": contender, "task": task, "stages": stages, "lds": lds, **sizes}


def test_the_page_is_what_the_script_writes():
    results = [make_result(c, t) for t in COSTS for c in ("ekfac", "kfac", "auto", "kronfluence")]
    assert write_page.write_page(PAGE, results) == PAGE


def test_new_figures_replace_old_ones_and_nothing_else():
    results = [make_result(c, "digits_mlp") for c in ("ekfac", "kronfluence")]
    results[0]["lds"] = (0.612, 0.6, 0.62)
    page = write_page.write_page(PAGE, results)
    assert "| `ekfac` | .612 (.600 to .620) |" in page
    assert "digits CNN" not in page.split("<!-- table: cost -->")[0].split("<!-- table: quality -->")[1]
    outside = [part.split("<!-- /table -->")[-1] for part in page.split("<!-- table:")]
    assert outside == [part.split("<!-- /table -->")[-1] for part in PAGE.split("<!-- table:")]


def test_failed_runs_are_left_out():
    failed = {"contender": "kronfluence", "task": "digits_mlp", "error": "out of memory"}
    assert "digits MLP" not in write_page.write_cost([make_result("ekfac", "digits_mlp"), failed])


def test_a_page_without_a_place_is_refused():
    with pytest.raises(ValueError, match="no '<!-- table: quality -->'"):
        write_page.write_page("# Benchmarks", [])


def test_every_script_is_on_the_page():
    folder = Path(__file__).parents[2] / "examples" / "benchmarks"
    scripts = [path.name for path in folder.glob("*.py") if "__main__" in path.read_text("utf-8")]
    assert len(scripts) > 20
    assert [name for name in scripts if f"`{name}`" not in PAGE] == []
