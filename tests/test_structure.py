"""Imports point down and are light, public names are defined once, code is short."""

import ast
import json
import re
import subprocess
import sys
from collections import defaultdict

import measure_code
import pytest
from conftest import ROOT

PACKAGES = (
    "core",
    "data",
    "models",
    "mini",
    "problems",
    "methods",
    "training",
    "grid",
    "reporting",
    "cli",
)
LIBRARY = ROOT / "vlmadapt"
MODULES = sorted(
    path for path in LIBRARY.rglob("*.py") if path.name != "_modidx.py" and path.parent != LIBRARY
)


def module_name(path):
    """Return the dotted name of a file of the library, such as `vlmadapt.core.files`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def is_type_checking(node):
    """Return whether a node is `if TYPE_CHECKING:`, which never runs."""
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


def running_nodes(tree):
    """Yield all nodes of a tree but those below `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if not is_type_checking(node):
            yield node
            yield from running_nodes(node)


def imported_modules(path):
    """Return the names of the modules of this library that a file imports, inside functions too."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = set()
    for node in running_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            found |= {source} | {f"{source}.{alias.name}" for alias in node.names}
    known = {module_name(module) for module in MODULES}
    return {name for name in found if name in known}


def package_of(name):
    """Return the package of a module, such as `core` of `vlmadapt.core.files`."""
    return name.split(".")[1]


def notebook_of(path):
    """Return the notebook that a module is exported from, as text that sorts in reading order."""
    found = re.search(r"File to edit: (?:\.\./)*nbs/(\S+)\.ipynb", path.read_text("utf-8"))
    return found[1] if found else ""


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down(path):
    own = PACKAGES.index(package_of(module_name(path)))
    above = {m for m in imported_modules(path) if PACKAGES.index(package_of(m)) > own}
    assert not above, f"{module_name(path)} imports from packages above its own"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_notebooks_import_from_smaller_numbers(path):
    notebooks = {module_name(module): notebook_of(module) for module in MODULES}
    own = notebooks[module_name(path)]
    later = {m for m in imported_modules(path) if notebooks[m] > own and own}
    assert not later, f"{own} imports from notebooks that come after it"


def test_notebook_numbers_are_unique():
    numbers = defaultdict(list)
    for path in (ROOT / "nbs").glob("[0-9][0-9]_*/*.ipynb"):
        numbers[path.parent.name, path.name[:2]].append(path.name)
    assert not {key: names for key, names in numbers.items() if len(names) > 1}


def test_a_public_name_is_defined_once():
    places = defaultdict(list)
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.decorator_list:
                places[node.name].append(module_name(path))
    twice = {name: found for name, found in places.items() if len(found) > 1}
    assert not {name: found for name, found in twice.items() if not name.startswith("_")}


TREES = measure_code.modules(ROOT)


def test_modules_are_short():
    assert TREES and not measure_code.long_modules(ROOT, TREES)


def test_functions_are_short():
    assert not measure_code.long_functions(TREES)


def loaded_by(statement):
    """Return the names of all modules that are loaded after a statement ran in a new process."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(run.stdout.splitlines()[-1]))


HEAVY = ("transformers", "ray", "papermill", "IPython", "matplotlib")
WITHOUT_TORCH = (
    "core.texts",
    "core.values",
    "core.files",
    "core.hashing",
    "core.seeding",
    "core.records",
    "core.markup",
    "core.registry",
    "core.environment",
)


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import vlmadapt", ("torch", "pandas", *HEAVY)),
        ("import vlmadapt.methods; vlmadapt.methods.METHODS['TaskRes']", HEAVY),
        ("import vlmadapt.grid.results", ("torch", *HEAVY)),
        ("import vlmadapt.reporting.tables", ("torch", "transformers", "ray", "papermill")),
    ],
)
def test_imports_are_light(statement, absent):
    assert not loaded_by(statement) & set(absent)


def test_files_and_records_load_without_torch():
    assert "torch" not in loaded_by("\n".join(f"import vlmadapt.{name}" for name in WITHOUT_TORCH))


def test_a_benchmark_is_named_without_mini():
    real = """from vlmadapt.data.datasets import DATASETS
from vlmadapt.data.tasks import TASKS
assert "dtd" in DATASETS and "vqav2" in TASKS"""
    mini = 'assert "mini-digits" in DATASETS and "mini-vqa" in TASKS'
    loaded = loaded_by(real)
    assert not [name for name in loaded if name.startswith(("vlmadapt.mini", "vlmadapt.models"))]
    assert "vlmadapt.mini.plugin" in loaded_by(f"{real}\n{mini}")
