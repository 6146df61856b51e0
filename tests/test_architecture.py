"""The shape of the package: rooms on floors, imports that point downwards, a core without Lightning."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from house import MODULES, PACKAGE, find_imports, find_longest_chain, find_own_imports, name_room

# A room may import rooms of lower floors; rooms of one floor do not know each other.
FLOORS = [
    {"support"},
    {"model", "linalg", "results", "running"},
    {"curvature", "evaluation"},
    {"methods", "edits", "collecting"},
    {"api"},
    {"__init__", "__main__", "errors"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in sorted(rooms)}
# What has to work without Lightning, but for the one module that adapts results to its loggers.
CORE = {"support", "model", "linalg", "results", "curvature", "methods"}
MOST_LINES, LONGEST_CHAIN = 500, 15


def is_lightning(name):
    return name.split(".")[0] in {"lightning", "pytorch_lightning", "lightning_fabric"}


def test_imports_are_read_as_python_does():
    assert f"{PACKAGE}.support.errors" in find_own_imports(f"{PACKAGE}.linalg.dense_solve")
    assert f"{PACKAGE}.methods.auto" in find_own_imports(f"{PACKAGE}.methods")
    assert any(is_lightning(name) for name in find_imports(f"{PACKAGE}.api.trainer"))
    inside_a_function = ast.parse("def f():\n    from lightning_influence.api import trainer")
    assert find_imports(f"{PACKAGE}.support", tree=inside_a_function) == {f"{PACKAGE}.api.trainer"}


def test_every_room_has_a_floor():
    assert {name_room(module) for module in MODULES} == FLOOR.keys()


@pytest.mark.parametrize("room", FLOOR)
def test_a_room_imports_lower_floors_only(room):
    inside = [module for module in MODULES if name_room(module) == room]
    found = {(module, name) for module in inside for name in find_own_imports(module)}
    wrong = {
        pair for pair in found if name_room(pair[1]) != room and FLOOR[name_room(pair[1])] >= FLOOR[room]
    }
    assert not wrong, f"imports that do not point downwards: {sorted(wrong)}"


def test_no_circle_not_even_through_imports_inside_functions():
    try:
        TopologicalSorter({module: find_own_imports(module) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"imports run in a circle: {' -> '.join(error.args[1])}")


def test_the_longest_chain_of_importing_files_is_short():
    chain = find_longest_chain()
    assert len(chain) <= LONGEST_CHAIN, " -> ".join(chain)


def test_the_core_knows_no_lightning():
    core = {module for module in MODULES if name_room(module) in CORE} - {f"{PACKAGE}.results.loggers"}
    reached = core.union(*map(find_own_imports, core))
    bound = {module: sorted(filter(is_lightning, find_imports(module))) for module in reached}
    assert not {module: names for module, names in bound.items() if names}


def test_modules_say_what_they_are_and_hold_one_subject():
    for module, path in MODULES.items():
        text = path.read_text()
        assert ast.get_docstring(ast.parse(text)), f"{module} has no docstring"
        lines = len(text.splitlines())
        assert lines <= MOST_LINES, (
            f"{module} has {lines} lines, the most is {MOST_LINES}: split it at a seam"
        )


def test_no_function_takes_more_than_eight_positional_arguments():
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                count = len(node.args.posonlyargs) + len(node.args.args)
                assert count <= 9, f"{module}: {node.name} takes {count} positional arguments"


def test_only_the_host_touches_what_lightning_keeps_private():
    """Outside ``running.host``, no underscored attribute of a Trainer or of what hangs on one is used."""
    owners = {"trainer", "strategy", "pl_module", "logger"}
    for module, path in MODULES.items():
        if module.startswith(f"{PACKAGE}.running.host"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_"):
                continue
            names = {part.id for part in ast.walk(node.value) if isinstance(part, ast.Name)}
            names |= {part.attr for part in ast.walk(node.value) if isinstance(part, ast.Attribute)}
            dunder = node.attr.startswith("__")
            assert dunder or not names & owners, f"{module}:{node.lineno} reads {ast.unparse(node)}"


def test_every_folder_is_a_package():
    """Without ``__init__.py`` a folder is not packaged, and its modules shadow those of the same name."""
    folders = {path.parent for path in MODULES.values()}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").exists()]


def test_tests_mirror_the_rooms():
    rooms = set().union(*FLOORS) - FLOORS[-1]
    folders = {path.name for path in Path(__file__).parent.iterdir() if any(path.glob("test_*.py"))}
    assert rooms <= folders
