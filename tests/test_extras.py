"""The core works without the extras; a missing extra is named in one line where it is needed."""

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
from functools import lru_cache

import pytest
from conftest import ROOT
from requirements import extras, plain, requirements, with_dependencies, without_extras

from vlmadapt.core.extras import MissingExtra, require

LIBRARY = ROOT / "vlmadapt"
MODULES = sorted(path for path in LIBRARY.rglob("*.py") if path.name != "_modidx.py")
OWNERS = importlib.metadata.packages_distributions()
USER_EXTRAS = [name for name in extras() if name not in ("dev", "docs")]
# installed with a requirement that cannot do without them
GUARANTEED = {"requests": "pooch", "urllib3": "requests", "timm": "open_clip_torch"}
CORE = requirements() | set(GUARANTEED)


def module_name(path):
    """Return the dotted name of a file of the library, such as `vlmadapt.core.files`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def distributions(module):
    """Return the names of the distributions that bring a module, such as {"scikit_learn"}."""
    return {plain(name) for name in OWNERS.get(module.partition(".")[0], [module])}


@lru_cache
def packages_of(extra):
    """Return the names of all distributions that an extra brings."""
    return with_dependencies(requirements(extra))


def imported(node):
    """Return the names of the foreign modules that one statement imports."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and not node.level:
        names = [node.module]
    else:
        return []
    own = {"vlmadapt", *sys.stdlib_module_names}
    return [name for name in names if name.partition(".")[0] not in own]


def required(node):
    """Return module and extra of a call of `require` with literal arguments, or None."""
    if not isinstance(node, ast.Call) or getattr(node.func, "id", "") != "require":
        return None
    module, extra = node.args[:2]
    return getattr(module, "value", None), getattr(extra, "value", None)


def nodes_with_scope(tree, functions=()):
    """Yield (node, functions around it, the outermost first) for all nodes of a module."""
    for node in ast.iter_child_nodes(tree):
        yield node, functions
        inner = (*functions, node) if isinstance(node, ast.FunctionDef) else functions
        yield from nodes_with_scope(node, inner)


def unguarded_imports(path):
    """Return imports of packages outside of the core that no `require` goes before."""
    nodes = list(nodes_with_scope(ast.parse(path.read_text(encoding="utf-8"))))
    calls = [(required(node)[1], node.lineno, scope) for node, scope in nodes if required(node)]
    found = []
    for node, functions in nodes:
        for name in imported(node):
            before = {
                extra
                for extra, line, scope in calls
                if line < node.lineno and scope == functions[: len(scope)]
            }
            owners = distributions(name)
            brought = {extra for extra in USER_EXTRAS if owners & packages_of(extra)}
            if not owners & CORE and not brought & before:
                found.append(name)
    return found


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_are_of_the_core_or_required(path):
    assert not unguarded_imports(path)


def test_an_import_without_require_is_found(tmp_path):
    module = tmp_path / "module.py"
    body = "def draw():\n    {}import matplotlib.pyplot as plt\n"
    module.write_text(body.format(""))
    assert unguarded_imports(module) == ["matplotlib.pyplot"]
    module.write_text(body.format('require("statsmodels", "hf", "tests")\n    '))
    assert unguarded_imports(module) == ["matplotlib.pyplot"]
    module.write_text(body.format('require("matplotlib", "workbook", "figures")\n    '))
    assert not unguarded_imports(module)


def test_every_required_module_comes_with_its_extra():
    seen = 0
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = required(node)
            if call and path.name != "extras.py":
                module, extra = call
                seen += 1
                assert extra in USER_EXTRAS, f"{module_name(path)}: no extra {extra!r}"
                if module is not None:
                    assert distributions(module) & packages_of(extra), f"{module}: not in {extra}"
    assert seen > 10


@pytest.mark.parametrize(("name", "source"), GUARANTEED.items())
def test_some_packages_come_with_a_requirement(name, source):
    assert name in with_dependencies({source})
    assert source in CORE


WALK = """
import importlib, json, pkgutil, sys
import vlmadapt
missing = {}
for module in pkgutil.walk_packages(vlmadapt.__path__, "vlmadapt."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        missing[module.name] = [type(error).__name__, str(error)]
print(json.dumps([missing, sorted(sys.modules)]))
"""


def test_the_core_is_imported_without_extras():
    """Parts of grid and reporting, torch-geometric's form and peft's methods miss something."""
    hidden = without_extras()
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/core_only")])
    run = subprocess.run(
        [sys.executable, "-c", WALK],
        env=os.environ | hidden | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert not run.returncode, run.stderr[-2000:]
    missing, loaded = json.loads(run.stdout.splitlines()[-1])
    assert not {m.partition(".")[0] for m in loaded} & set(hidden["HIDDEN_PACKAGES"].split(","))
    assert {kind for kind, _ in missing.values()} == {"MissingExtra"}
    elsewhere = {m for m in missing if m.split(".")[1] not in ("grid", "reporting")}
    models = ("hf_layers", "hf_adapters", "hf_models", "hf_encoders", "hf_backbones")
    names = ("methods.hegraph_pyg", *(f"models.{name}" for name in models))
    assert elsewhere == {f"vlmadapt.{name}" for name in names}
    needed = "grid.results reporting.tables reporting.claims reporting.published reporting.bench"
    assert not {f"vlmadapt.{name}" for name in needed.split()} & set(missing)
    message = "vlmadapt needs papermill for executing notebooks: pip install 'vlmadapt[workbook]'"
    assert missing["vlmadapt.grid.kernels"][1] == message


def test_a_broken_package_keeps_its_error(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('no such operator')")
    (tmp_path / "lacking_package.py").write_text("import absent_dependency.part")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="no such operator"):
        require("broken_package", "graph", "drawing graphs")
    with pytest.raises(MissingExtra, match="needs absent_dependency for drawing graphs"):
        require("lacking_package", "graph", "drawing graphs")
