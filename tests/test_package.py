"The wheel: builds without network, holds what it needs, stays small, and works away from the checkout."
import json, os, shutil, subprocess, sys, zipfile
import pytest
from conftest import ROOT

IGNORED = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "outputs", "_docs", "_proc", "*.egg-info", "__pycache__", ".ipynb_checkpoints")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel of this checkout."
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder/"source", ignore=IGNORED)
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, folder/"source"],
                   check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def away(code, folder, path):
    "What `code` prints, run in `folder` with the package taken from `path` alone."
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, text=True, capture_output=True,
                         env=os.environ | {"PYTHONPATH": str(path)})
    assert not run.returncode, run.stderr[-2000:]
    return run.stdout


def test_wheel_holds_what_it_needs(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    files = lambda folder, pattern: {str(p.relative_to(ROOT/folder)) for p in (ROOT/folder).rglob(pattern)
                                     if not {".ipynb_checkpoints", "__pycache__"} & set(p.parts)}
    need = {f"vlmadapt/{p}" for pattern in ("*.py", "*.json", "*.safetensors", "*.csv") for p in files("vlmadapt", pattern)}
    need |= {f"vlmadapt/{kind}/{p}" for kind in ("experiments", "reports") for p in files(f"nbs/{kind}", "*.ipynb")}
    need |= {f"vlmadapt/params/{p}" for p in files("params", "*.yml")}
    assert need and not need - held
    assert wheel.stat().st_size < 10 << 20


def test_wheel_works_away_from_the_checkout(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", tmp_path/"site", wheel], check=True)
    code = """
import json, pkgutil, importlib, vlmadapt
names = [m.name for m in pkgutil.walk_packages(vlmadapt.__path__, "vlmadapt.") if not m.name.endswith("_modidx")]
for name in names: importlib.import_module(name)
from vlmadapt.problem import few_shot
problem = few_shot("mini-digits", backbone="mini", shots=1, seed=1)
print(json.dumps([vlmadapt.__file__, len(problem.classnames)]))
"""
    (tmp_path/"empty").mkdir()
    file, classes = json.loads(away(code, tmp_path/"empty", tmp_path/"site").splitlines()[-1])
    assert file.startswith(str(tmp_path/"site")) and classes == 10


def test_import_is_light(tmp_path):
    code = """
import sys, time
began = time.perf_counter()
import vlmadapt
print(time.perf_counter() - began, "torch" in sys.modules)
"""
    seconds, torch = away(code, tmp_path, ROOT).split()
    assert float(seconds) < .5 and torch == "False"


@pytest.mark.parametrize("command", ["vlmadapt_grid", "vlmadapt_report", "vlmadapt_claim"])
def test_commands_are_installed_and_explain_themselves(command, tmp_path):
    run = subprocess.run([os.path.join(os.path.dirname(sys.executable), command), "--help"], cwd=tmp_path, text=True, capture_output=True)
    assert not run.returncode and command in run.stdout, run.stderr[-2000:]
