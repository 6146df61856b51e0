"""The shape of the package: arrows point downwards, the core knows no Lightning, modules stay small."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lightning_influence

PACKAGE = "lightning_influence"
ROOT = Path(lightning_influence.__file__).parent
MOST_LINES = 300

# Every unit (a subpackage, or a module at the top) may import units of its own level and of lower ones.
LEVELS = [
    {"errors"},
    {"losses", "layers", "storage", "host", "settings"},
    {"factors", "passes", "curvature", "measurements", "results", "running"},
    {"solvers", "selection", "evaluation", "attributions"},
    {"methods", "state", "collecting", "plots", "question"},
    {"engine", "ensembles", "loggers", "harness", "edits"},
    {"callback", "session", "editing", "trainer", "module"},
    {"__init__"},
]
LEVEL = {unit: level for level, units in enumerate(LEVELS) for unit in units}
# What has to work without Lightning. `host` and `running` adapt to it, the rest stands above one of them.
CORE = {
    "attributions",
    "collecting",
    "curvature",
    "errors",
    "evaluation",
    "factors",
    "layers",
    "losses",
    "measurements",
    "methods",
    "passes",
    "results",
    "selection",
    "settings",
    "solvers",
    "state",
    "storage",
}


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([PACKAGE, *(part for part in parts if part != "__init__")])


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def unit_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def statements(tree, *, lazy):
    """Yield import statements: those that run with the module, or with ``lazy`` those in functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from statements(node, lazy=lazy)


def imports_of(module, *, lazy=True):
    """Return the absolute names of the modules that a module imports."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in statements(ast.parse(path.read_text()), lazy=lazy):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        source = node.module or ""
        if node.level:
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            source = ".".join([*base, *([source] if source else [])])
        # `from package import module` imports the module, `from module import name` only the module.
        found |= {
            f"{source}.{alias.name}" if f"{source}.{alias.name}" in MODULES else source
            for alias in node.names
        }
    return found


def own_imports(module, *, lazy=True):
    return {name for name in imports_of(module, lazy=lazy) if name in MODULES and name != module}


def reachable(module):
    seen, todo = set(), [module]
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo += own_imports(current)
    return seen


def is_lightning(name):
    return name.split(".")[0] in {"lightning", "pytorch_lightning", "lightning_fabric"}


def test_the_imports_are_read_as_python_does():
    assert f"{PACKAGE}.errors" in own_imports(f"{PACKAGE}.solvers.exact")
    assert f"{PACKAGE}.layers.conv" in own_imports(f"{PACKAGE}.layers")
    assert any(is_lightning(name) for name in imports_of(f"{PACKAGE}.trainer"))
    lazy = own_imports(f"{PACKAGE}.callback") - own_imports(f"{PACKAGE}.callback", lazy=False)
    assert f"{PACKAGE}.trainer" in lazy


def test_every_unit_has_a_level():
    assert {unit_of(module) for module in MODULES} <= LEVEL.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module):
    level = LEVEL[unit_of(module)]
    upwards = {name for name in own_imports(module) if LEVEL[unit_of(name)] > level}
    assert not upwards, f"{module} imports what stands above it: {sorted(upwards)}"


def test_no_cycles():
    graph = {module: own_imports(module, lazy=False) for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports run in a circle: {' -> '.join(error.args[1])}")


def test_units_of_one_level_do_not_import_each_other_in_turn():
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        units = {unit_of(name) for name in own_imports(module, lazy=False)} - {unit_of(module)}
        graph.setdefault(unit_of(module), set()).update(units)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"subpackages import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", [module for module in MODULES if unit_of(module) in CORE])
def test_the_core_knows_no_lightning(module):
    hosts = {name: [i for i in imports_of(name) if is_lightning(i)] for name in reachable(module)}
    bound = {name: found for name, found in hosts.items() if found}
    assert not bound, f"{module} reaches Lightning through {bound}"


@pytest.mark.parametrize("module", MODULES)
def test_modules_say_what_they_are_and_stay_small(module):
    text = MODULES[module].read_text()
    assert ast.get_docstring(ast.parse(text)), f"{module} has no docstring"
    lines = len(text.splitlines())
    assert lines <= MOST_LINES, f"{module} has {lines} lines, the most is {MOST_LINES}: split it at a seam"


def test_only_the_host_touches_what_lightning_keeps_private():
    """Outside ``host``, no underscored attribute of a Trainer or of what hangs on one is read or written."""
    owners = {"trainer", "strategy", "pl_module", "logger"}
    for module, path in MODULES.items():
        if unit_of(module) == "host":
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
