"""Values changed at random, as damaged or foreign software would leave them behind sound checksums."""

import copy

ODD = [None, True, -1, 0, 2.5, float("nan"), 10**30, "", "x", [], {}, [1], {"a": 1}, ["x"], [[1, 2], [3]]]


def find_places(value, path=()):
    """The paths of all entries of nested tables and lists."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*path, key)
            yield from find_places(item, (*path, key))


def mutate(value, draw):
    """A copy in which one entry is another value, missing, or new."""
    changed = copy.deepcopy(value)
    *parents, last = draw.choice([*find_places(value)])
    owner = changed
    for key in parents:
        owner = owner[key]
    how = draw.random()
    if how < 0.7:
        owner[last] = draw.choice(ODD)
    elif how < 0.9:
        del owner[last]
    elif isinstance(owner, dict):
        owner["foreign"] = draw.choice(ODD)
    return changed
