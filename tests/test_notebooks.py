"Every notebook runs: by nbdev, and experiments and reports by papermill with their defaults."

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from notebook_cells import run_in_fork
from test_workbook import NOTEBOOKS, name

TEMPLATES = ("experiments", "reports")
SLOW = (*TEMPLATES, "tutorials")
RUN_TEMPLATE = """
import sys
from vlmadapt.grid.kernels import run_notebook
run_notebook(sys.argv[1], sys.argv[2], {}, sys.stdout)
"""


def folder_of(notebook):
    return notebook.relative_to(ROOT / "nbs").parts[0]


def run_template(notebook, folder, log):
    """Run an experiment or a report with its defaults; return the exit status."""
    with open(log, "w") as output:
        return subprocess.run(
            [sys.executable, "-c", RUN_TEMPLATE, notebook, folder / "run.ipynb"],
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        ).returncode


@pytest.mark.parametrize(
    "notebook",
    [
        pytest.param(path, marks=pytest.mark.slow if folder_of(path) in SLOW else ())
        for path in NOTEBOOKS[::-1]
    ],
    ids=name,
)
def test_notebook(notebook, tmp_path):
    folder = tmp_path / "nbs/away"  # without results at ../../outputs reports make small ones
    folder.mkdir(parents=True)
    log = tmp_path / "log.txt"
    if folder_of(notebook) in TEMPLATES:
        status = run_template(notebook, folder, log)
    else:
        status = run_in_fork(notebook, ROOT, folder, log)
    lines = log.read_text(errors="replace").splitlines()
    assert status == 0, "\n".join(lines[-40:])
