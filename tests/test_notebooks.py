"Every notebook runs: the library's ones as nbdev runs them, experiments and reports through papermill with their defaults."
import os, subprocess, sys, time
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


def papermill(notebook, folder):
    "The command that runs a template away from the checkout, in the same place relative to the results."
    cwd = folder/"nbs"/notebook.parent.name
    cwd.mkdir(parents=True)
    if notebook.parent.name == "reports" and (ROOT/"outputs").is_dir(): (folder/"outputs").symlink_to(ROOT/"outputs")
    return [sys.executable, "-m", "papermill", notebook, folder/"run.ipynb", "--cwd", cwd, "--no-progress-bar"]


@pytest.mark.parametrize("notebook", NOTEBOOKS[::-1], ids=name)
def test_notebook(notebook, tmp_path):
    template = notebook.relative_to(ROOT/"nbs").parts[0] in ("experiments", "reports")
    command = papermill(notebook, tmp_path) if template else [sys.executable, "-c", RUN_CELLS, notebook, ROOT]
    began = time.perf_counter()
    run = subprocess.run(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                         env=os.environ | {"PYTHONPATH": str(ROOT)})
    print(f"{time.perf_counter() - began:.0f} s")
    assert not run.returncode, "\n".join(run.stdout.splitlines()[-40:])
