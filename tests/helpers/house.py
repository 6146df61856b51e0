"""Who imports whom in the package, read from its source."""

import ast
from functools import cache
from pathlib import Path

import lightning_influence

PACKAGE = "lightning_influence"
ROOT = Path(lightning_influence.__file__).parent


def name_module(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([PACKAGE, *(part for part in parts if part != "__init__")])


MODULES = {name_module(path): path for path in sorted(ROOT.rglob("*.py"))}


def name_room(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def find_imports(module, tree=None):
    """The absolute names of the modules that a module imports, inside functions too."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree or ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if not isinstance(node, ast.ImportFrom):
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


@cache
def find_own_imports(module):
    return frozenset(name for name in find_imports(module) if name in MODULES and name != module)


@cache
def _chain_from(module):
    return max(
        ((module, *_chain_from(name)) for name in find_own_imports(module)), key=len, default=(module,)
    )


def find_longest_chain():
    """The longest chain of modules of which each imports the next; there must be no circle."""
    return max(map(_chain_from, MODULES), key=len)
