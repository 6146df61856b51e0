"""The quick part of the tests has every value of a grid, and none that is slow."""

import pytest

pytest_plugins = ["pytester"]
TESTS = """
import pytest

@pytest.mark.grid
@pytest.mark.parametrize(("a", "b"), [(0, 0), (0, 1), (1, 0)])
@pytest.mark.parametrize("c", ["x", "y"])
@pytest.mark.parametrize("d", [None] + list("pqrs"))
def test_grid(a, b, c, d):
    pass

@pytest.mark.slow
def test_slow():
    pass

@pytest.mark.parametrize("a", range(3))
def test_plain(a):
    pass
"""
CONFTEST = """
from parts import find_beside

def pytest_collection_modifyitems(config, items):
    for item in find_beside(items):
        print("beside", item.name)
"""


@pytest.fixture
def beside(pytester):
    pytester.makeini("[pytest]\nmarkers =\n  grid\n  slow\n")
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TESTS)
    told = pytester.runpytest_inprocess("--collect-only", "-s").outlines
    return {line.removeprefix("beside ") for line in told if line.startswith("beside ")}


def test_a_diagonal_of_a_grid_is_quick(beside):
    cells = {
        f"test_grid[{d}-{c}-{a}-{b}]": (a, b, c, d)
        for d in (None, *"pqrs")
        for c in "xy"
        for a, b in ((0, 0), (0, 1), (1, 0))
    }
    quick = [cells[name] for name in cells.keys() - beside]
    assert len(quick) == 5  # as many as the longest side has values
    assert {cell[3] for cell in quick} == {None, *"pqrs"}
    assert {cell[2] for cell in quick} == set("xy")
    assert {cell[:2] for cell in quick} == {(0, 0), (0, 1), (1, 0)}
    assert beside - cells.keys() == {"test_slow"}
