"""Every notebook runs: by nbdev, and experiments and reports by papermill with their defaults.

`make test` leaves out the cells that begin with `#| slow`, and the folders and notebooks below;
`make test-slow` runs them, and the notebooks with such cells as a whole.
"""

import pytest
from conftest import ROOT
from notebook_cells import run_in_fork
from test_workbook import NOTEBOOKS, name

TEMPLATES = ("experiments", "reports")
SLOW_FOLDERS = (*TEMPLATES, "tutorials")
SLOW_NOTEBOOKS = ("07_grid/25_runner.ipynb",)  # starts Ray


def folder_of(notebook):
    return notebook.relative_to(ROOT / "nbs").parts[0]


def is_slow(notebook):
    return folder_of(notebook) in SLOW_FOLDERS or name(notebook) in SLOW_NOTEBOOKS


def has_slow_cells(notebook):
    return '"#| slow\\n"' in notebook.read_text(encoding="utf-8")


def run_template(notebook, folder):
    """Run an experiment or a report with its defaults, in a kernel of this process's server."""
    from vlmadapt.grid.kernels import run_notebook
    from vlmadapt.grid.logs import Log

    with Log(folder / "log.txt") as log:
        run_notebook(notebook, folder / "run.ipynb", {}, log)


def run_cells(notebook, skip_flags=()):
    """Run the cells of a notebook; show the end of what they print if one fails."""
    done = run_in_fork(notebook, ROOT, skip_flags)
    lines = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 0, "\n".join(lines[-40:])


@pytest.fixture
def away(tmp_path, monkeypatch):
    "Work in a folder without results at ../../outputs, where reports make small ones."
    folder = tmp_path / "nbs/away"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    "notebook",
    [
        pytest.param(path, marks=pytest.mark.slow if is_slow(path) else ())
        for path in NOTEBOOKS[::-1]
    ],
    ids=name,
)
def test_notebook(notebook, away):
    if folder_of(notebook) in TEMPLATES:
        run_template(notebook, away)
    else:
        run_cells(notebook, skip_flags=["slow"])


@pytest.mark.slow
@pytest.mark.parametrize("notebook", [*filter(has_slow_cells, NOTEBOOKS)], ids=name)
def test_notebook_with_its_slow_cells(notebook, away):
    run_cells(notebook)
