"The direction of imports among packages, and the modules that load without torch."

import ast
import subprocess
import sys

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
CHECKED = ("core", "data")  # packages whose imports are in order
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


def imported_packages(path):
    "The packages of vlmadapt that a module imports anywhere, also inside functions."
    package = path.parent.relative_to(ROOT / "vlmadapt").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        parts = (node.module or "").split(".")
        if node.level == 2:
            found.add(parts[0])
        elif node.level == 1:
            found.update(package)
        elif parts[0] == "vlmadapt" and len(parts) > 1:
            found.add(parts[1])
    return found & set(PACKAGES)


@pytest.mark.parametrize("package", CHECKED)
def test_no_package_imports_a_higher_one(package):
    higher = set(PACKAGES[PACKAGES.index(package) + 1 :])
    for path in sorted((ROOT / "vlmadapt" / package).glob("*.py")):
        assert not imported_packages(path) & higher, path


def test_files_and_records_load_without_torch():
    lines = [f"import vlmadapt.{name}" for name in WITHOUT_TORCH]
    code = "\n".join([*lines, "import sys", "assert 'torch' not in sys.modules"])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_naming_a_benchmark_does_not_load_mini():
    code = """import sys
from vlmadapt.data.datasets import DATASETS
from vlmadapt.data.tasks import TASKS
assert "dtd" in DATASETS and "vqav2" in TASKS
assert not [name for name in sys.modules if name.startswith(("vlmadapt.mini", "vlmadapt.models"))]
assert "mini-digits" in DATASETS and "mini-vqa" in TASKS
assert "vlmadapt.mini.plugin" in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
