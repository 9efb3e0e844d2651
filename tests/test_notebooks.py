"Every notebook runs: by nbdev, and experiments and reports by papermill with their defaults."

import os
import subprocess
import sys
import time

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
RUN_TEMPLATE = """
import sys
from vlmadapt.grid.kernels import run_notebook
run_notebook(sys.argv[1], sys.argv[2], {}, sys.stdout)
"""


@pytest.mark.parametrize("notebook", NOTEBOOKS[::-1], ids=name)
def test_notebook(notebook, tmp_path):
    template = notebook.relative_to(ROOT / "nbs").parts[0] in ("experiments", "reports")
    code, argument = (RUN_TEMPLATE, tmp_path / "run.ipynb") if template else (RUN_CELLS, ROOT)
    cwd = tmp_path / "nbs/away"  # without results at ../../outputs reports make small ones
    cwd.mkdir(parents=True)
    began = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", code, notebook, argument],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    print(f"{time.perf_counter() - began:.0f} s")
    assert not run.returncode, "\n".join(run.stdout.splitlines()[-40:])
