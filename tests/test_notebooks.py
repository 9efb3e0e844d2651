"Every notebook runs: the library's ones as nbdev runs them, experiments and reports through papermill with their defaults."
import os, shutil, subprocess, sys, time
import pytest
from conftest import ROOT
from test_workbook import NOTEBOOKS, name

RUN_CELLS = """
import sys
from pathlib import Path
from nbdev.test import test_nb
ok, seconds = test_nb(Path(sys.argv[1]), skip_flags=["slow"], basepath=sys.argv[2])
sys.exit(not ok)
"""


def templates(path): return path.relative_to(ROOT/"nbs").parts[0] in ("experiments", "reports")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_notebook(notebook, tmp_path):
    if templates(notebook):
        shutil.copytree(ROOT/"outputs", tmp_path/"outputs") if (ROOT/"outputs").is_dir() else None
        command = [sys.executable, "-m", "papermill", notebook, tmp_path/"run.ipynb", "--cwd", tmp_path, "--no-progress-bar"]
    else: command = [sys.executable, "-c", RUN_CELLS, notebook, ROOT]
    began = time.perf_counter()
    run = subprocess.run(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                         env=os.environ | {"PYTHONPATH": str(ROOT)})
    print(f"{time.perf_counter() - began:.0f} s")
    assert not run.returncode, "\n".join(run.stdout.splitlines()[-40:])
