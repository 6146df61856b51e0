"""The quick part of the tests, and what is beside it: slow ones, and of grids all but a diagonal.

A grid is a product of parameters, as methods times models. Every value of every parameter is in its diagonal:
what breaks one value shows there. What breaks with a combination alone shows in the rest.
"""

from collections import defaultdict

# Marks of tests that are not in the quick part.
SLOW = ("slow", "fuzz", "faults")


def find_beside(items):
    """Return the items that are not in the quick part."""
    beside = {item for item in items if any(item.get_closest_marker(mark) for mark in SLOW)}
    grids = defaultdict(list)
    for item in items:
        if item.get_closest_marker("grid") is not None:
            grids[item.nodeid.partition("[")[0]].append(item)
    for cells in grids.values():
        places = _find_places(cells)
        sizes = [1 + max(numbers) for numbers in zip(*places, strict=True)]
        longest = sizes.index(max(sizes))
        for cell, place in zip(cells, places, strict=True):
            if any(place[k] != place[longest] % size for k, size in enumerate(sizes)):
                beside.add(cell)
    return beside


def _find_places(cells):
    """Return which value each cell of a grid has of every parametrization, by number."""
    seen = defaultdict(dict)
    places = []
    for cell in cells:
        place = []
        for mark in cell.iter_markers("parametrize"):
            names = mark.args[0] if isinstance(mark.args[0], str) else ",".join(mark.args[0])
            value = tuple(id(cell.callspec.params[name.strip()]) for name in names.split(","))
            place.append(seen[names].setdefault(value, len(seen[names])))
        places.append(tuple(place))
    return places
