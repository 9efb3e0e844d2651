"Source archive and wheel: they build without network, are complete and small, and work alone."

import ast
import email
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import venv
import zipfile

import pytest
from conftest import ROOT
from derived import settings

IGNORED = shutil.ignore_patterns(
    ".git",
    ".venv*",
    "build",
    "dist",
    "outputs",
    "_docs",
    "_proc",
    "*.egg-info",
    "__pycache__",
    ".ipynb_checkpoints",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "A folder with the source archive of this checkout and the wheel built from that archive."
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=IGNORED)
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, folder / "source"],
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    return next(built.glob("*.whl"))


def away(code, folder, path):
    "What `code` prints, run in `folder` with the package taken from `path` alone."
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        text=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(path)},
    )
    assert not run.returncode, run.stderr[-2000:]
    return run.stdout


def test_wheel_holds_what_it_needs(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())

    def files(folder, pattern):
        return {
            str(p.relative_to(ROOT / folder))
            for p in (ROOT / folder).rglob(pattern)
            if not {".ipynb_checkpoints", "__pycache__"} & set(p.parts)
        }

    need = {
        f"vlmadapt/{p}"
        for pattern in ("*.py", "*.json", "*.safetensors", "*.csv")
        for p in files("vlmadapt", pattern)
    }
    need |= {
        f"vlmadapt/{kind}/{p}"
        for kind in ("experiments", "reports")
        for p in files(f"nbs/{kind}", "*.ipynb")
    }
    need |= {f"vlmadapt/params/{p}" for p in files("params", "*.yml")}
    assert need and not need - held
    assert wheel.stat().st_size < 10 << 20


def inherited(cls, name):
    "What the base classes of `cls` have as `name`."
    found = [getattr(base, name) for base in cls.__mro__[1:] if name in vars(base)]
    return [f for f in (getattr(f, "fget", f) for f in found) if inspect.isroutine(f)]


def returns(node):
    "Does this code return anything? Functions inside of it do not count."
    inner = [
        n for n in ast.iter_child_nodes(node) if not isinstance(n, (ast.FunctionDef, ast.Lambda))
    ]
    return any(isinstance(n, ast.Return) and n.value is not None or returns(n) for n in inner)


def untyped(function, bases):
    """Names of what `function` lacks a type for: parameters (not *args, **kwargs) and 'return'.

    A type in one of its `bases` counts.
    """
    function = inspect.unwrap(function)
    known = [inspect.signature(f) for f in (function, *bases)]
    typed = {n for s in known for n, p in s.parameters.items() if p.annotation is not p.empty} | {
        "self",
        "cls",
    }
    found = [
        n
        for n, p in known[0].parameters.items()
        if n not in typed and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if function.__name__ == "__init__" or any(s.return_annotation is not s.empty for s in known):
        return found
    return found + ["return"] * returns(
        ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    )


def test_public_functions_are_typed(wheel):
    docs = pytest.importorskip("docs")
    import vlmadapt._modidx as index

    def plain(a, b: int, *c, **d):
        return a

    assert "vlmadapt/py.typed" in zipfile.ZipFile(wheel).namelist() and untyped(plain, []) == [
        "a",
        "return",
    ]
    wrong, seen = {}, 0
    for module in index.d["syms"]:
        public = docs.public(module)
        for name, symbol in public.items():
            owner, function = (
                (symbol, vars(symbol).get("__init__"))
                if inspect.isclass(symbol)
                else (public.get(name.rpartition(".")[0]), getattr(symbol, "fget", symbol))
            )
            if not inspect.isroutine(function) or function.__module__ != module:
                continue
            seen += 1
            if found := untyped(
                function, inherited(owner, function.__name__) if inspect.isclass(owner) else []
            ):
                wrong[f"{module}.{name}"] = found
    assert seen > 500 and not wrong, wrong


def test_source_archive_holds_what_builds_it(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    need = {
        "settings.ini",
        "setup.py",
        "pyproject.toml",
        "Makefile",
        "README.md",
        "LICENSE",
        "constraints.txt",
        "tools/docs.py",
        "tools/static/site.css",
        "nbs/index.ipynb",
        "tests/conftest.py",
        "params/mini.yml",
    }
    assert (
        not need - held
        and {
            str(p.relative_to(ROOT))
            for p in (ROOT / "nbs").rglob("*.ipynb")
            if ".ipynb_checkpoints" not in p.parts
        }
        <= held
    )


def test_metadata(wheel):
    name = next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("METADATA"))
    meta, cfg = email.message_from_bytes(zipfile.ZipFile(wheel).read(name)), settings()
    assert (meta["Name"], meta["Version"], meta["Requires-Python"], meta["License-Expression"]) == (
        "vlmadapt",
        cfg["version"],
        f">={cfg['min_python']}",
        "Apache-2.0",
    )
    assert (
        set(meta.get_all("Provides-Extra"))
        == {k.removesuffix("_requirements") for k in cfg if k.endswith("_requirements")}
        >= {"dev", "docs"}
    )
    assert {u.partition(",")[0] for u in meta.get_all("Project-URL")} >= {
        "Documentation",
        "Source",
    } and "# vlmadapt" in meta.get_payload()
    assert all("@" not in r and "file:" not in r for r in meta.get_all("Requires-Dist"))


def test_wheel_works_away_from_the_checkout(wheel, tmp_path):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-index",
            "--target",
            tmp_path / "site",
            wheel,
        ],
        check=True,
    )
    code = """
import json, pkgutil, importlib, vlmadapt
found = [m.name for m in pkgutil.walk_packages(vlmadapt.__path__, "vlmadapt.")]
names = [name for name in found if not name.endswith("_modidx")]
for name in names: importlib.import_module(name)
from vlmadapt.cli import main
assert main(["grid", "mini", "--dry-run"]) == 0
from vlmadapt.problems.few_shot import few_shot
problem = few_shot("mini-digits", backbone="mini", shots=1, seed=1)
print(json.dumps([vlmadapt.__file__, len(problem.class_names)]))
"""
    (tmp_path / "empty").mkdir()
    file, classes = json.loads(away(code, tmp_path / "empty", tmp_path / "site").splitlines()[-1])
    assert file.startswith(str(tmp_path / "site")) and classes == 10


def test_import_is_light(tmp_path):
    code = """
import sys, time
began = time.perf_counter()
import vlmadapt
print(time.perf_counter() - began, "torch" in sys.modules)
"""
    seconds, torch = away(code, tmp_path, ROOT).split()
    assert float(seconds) < 0.5 and torch == "False"


COMMANDS = [line.partition("=")[0] for line in settings()["console_scripts"].split()]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_installed_and_explain_themselves(command, tmp_path):
    run = subprocess.run(
        [os.path.join(os.path.dirname(sys.executable), command), "--help"],
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert not run.returncode and command in run.stdout, run.stderr[-2000:]


README = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
LINES = next(block for block in README if ".save(" in block)


def test_readme_lines_run(tmp_path):
    began = LINES.splitlines()
    assert 8 <= len([line for line in began if line.strip()]) <= 12
    accuracy = float(away(LINES, tmp_path, ROOT).splitlines()[-1])
    assert 85 < accuracy <= 100 and (tmp_path / "digits.safetensors").stat().st_size < 1 << 20


@pytest.mark.skipif(
    not os.environ.get("VLMADAPT_CLEAN_INSTALL"),
    reason="VLMADAPT_CLEAN_INSTALL=1 installs everything into an empty environment (minutes)",
)
def test_clean_install(wheel, tmp_path):
    "The wheel in an empty environment: README's lines run, commands answer, the import is light."
    venv.create(tmp_path / "env", with_pip=True)
    bin = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}

    def run(*command):
        return subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, env=clean)

    installed = run(
        bin / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel
    )
    assert not installed.returncode, installed.stderr[-2000:]
    assert not run(bin / "python", "-m", "pip", "check").returncode
    lines = run(bin / "python", "-c", LINES)
    assert not lines.returncode, lines.stderr[-2000:]
    print(lines.stdout)
    for command in COMMANDS:
        assert command in run(bin / command, "--help").stdout
    code = """
import time
began = time.perf_counter()
import vlmadapt
print(time.perf_counter() - began, vlmadapt.__file__)
"""
    light = run(bin / "python", "-c", code)
    seconds, file = light.stdout.split()
    print(f"import vlmadapt: {seconds} s")
    assert float(seconds) < 0.5 and file.startswith(str(tmp_path))
