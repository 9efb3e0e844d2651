"Source archive and wheel: they build without network, are complete and small, and work alone."

import ast
import email
import inspect
import json
import os
import subprocess
import sys
import tarfile
import textwrap
import zipfile

import numpy as np
import pytest
from conftest import ROOT
from derived import settings
from PIL import Image
from requirements import without_extras
from try_wheel import build, offline_blocks


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "A folder with the source archive of this checkout and the wheel built from that archive."
    folder = tmp_path_factory.mktemp("wheel")
    build(folder)
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
        "CHANGELOG.md",
        "CITATION.cff",
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
        == {"workbook", "hf", "graph", "onnx", "dev", "docs"}
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
import sys
before = set(sys.modules)
import vlmadapt
print(len(set(sys.modules) - before), "torch" in sys.modules)
"""
    modules, torch = away(code, tmp_path, ROOT).split()
    assert int(modules) < 30 and torch == "False"


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


BLOCKS = offline_blocks()
ONE_COMMAND = pytest.mark.skipif(
    "vlmadapt" not in COMMANDS, reason="the commands are separate scripts"
)


def test_readme_lines_run(tmp_path):
    lines = next(block for block in BLOCKS if ".save(" in block)
    assert 5 <= len([line for line in lines.splitlines() if line.strip()]) <= 12
    accuracy = float(away(lines, tmp_path, ROOT).split()[-1])
    assert 85 < accuracy <= 100 and (tmp_path / "digits.safetensors").stat().st_size < 1 << 20


@pytest.fixture(scope="module")
def core_only(wheel, tmp_path_factory):
    "Variables with which a process sees the wheel and the core requirements alone."
    site = tmp_path_factory.mktemp("core") / "site"
    install = ["install", "-q", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    path = os.pathsep.join([str(site), str(ROOT / "tests/core_only")])
    return os.environ | without_extras() | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def without(code_or_module, folder, variables):
    "What a line of code, or a module with its arguments, prints without the extras."
    run = subprocess.run(
        [sys.executable, *code_or_module],
        cwd=folder,
        text=True,
        capture_output=True,
        env=variables,
    )
    assert not run.returncode, run.stderr[-2000:]
    return run.stdout


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_readme_lines_run_without_extras(block, core_only, tmp_path):
    assert without(["-c", block], tmp_path, core_only)


def write_photos(folder):
    "Write eight small images of each of three colours, in a folder for each."
    draw = np.random.default_rng(0)
    for channel, color in enumerate(("red", "green", "blue")):
        (folder / color).mkdir(parents=True)
        for number in range(8):
            pixels = draw.integers(0, 60, (40, 40, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(folder / color / f"{number}.png")


@ONE_COMMAND
def test_own_photos_without_extras(core_only, tmp_path):
    "Adapt to a folder, predict and evaluate, each in a process of its own."

    def command(*arguments):
        return without(["-m", "vlmadapt", *arguments], tmp_path, core_only)

    write_photos(tmp_path / "photos")
    options = ["--backbone", "mini", "--method", "TaskRes", "--shots", "2", "--trials", "2"]
    command("adapt", "photos", *options, "--out", "colors.safetensors")
    assert "red" in command("predict", "colors.safetensors", "photos/red/7.png")
    assert "accuracy" in command("evaluate", "colors.safetensors", "photos")


@ONE_COMMAND
@pytest.mark.parametrize("what", ["methods", "datasets", "backbones"])
def test_lists_without_extras(what, core_only, tmp_path):
    assert without(["-m", "vlmadapt", "list", what], tmp_path, core_only).strip()


@ONE_COMMAND
def test_the_benchmark_of_a_machine_runs_without_extras(core_only, tmp_path):
    parts = ["--parts", "matmul,hegraph_epoch,extraction", "--repeats", "1"]
    shown = without(["-m", "vlmadapt", "bench", "--tiny", *parts], tmp_path, core_only)
    assert "report: bench.json" in shown and ": ok, " in shown and "failed" not in shown


@ONE_COMMAND
@pytest.mark.parametrize("arguments", [["grid", "mini.yml"], ["report", "mini"]])
def test_commands_name_the_missing_extra_in_one_line(arguments, core_only, tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "vlmadapt", *arguments],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env=core_only,
    )
    assert run.returncode and len(run.stderr.splitlines()) == 1
    assert "pip install 'vlmadapt[workbook]'" in run.stderr


HIDDEN = """
from importlib import import_module
import vlmadapt
print(vlmadapt.__file__)
for name in ("papermill", "matplotlib", "transformers", "torch_geometric", "IPython"):
    try:
        import_module(name)
        print(name)
    except ModuleNotFoundError:
        pass
"""


def test_without_extras_nothing_of_them_is_found(core_only, tmp_path):
    (file,) = without(["-c", HIDDEN], tmp_path, core_only).splitlines()
    assert file.startswith(core_only["PYTHONPATH"].partition(os.pathsep)[0])
