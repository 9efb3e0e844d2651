"""Run the cells of a notebook in a process that has the heavy packages loaded already."""

import sys
from pathlib import Path

from warm_process import warm_python

CODE = "import notebook_cells; notebook_cells.run_cells({notebook!r}, {root!r}, {skip_flags!r})"


def run_cells(notebook, root, skip_flags):
    """Run a notebook's cells as nbdev does; exit with 1 if one fails."""
    from nbdev.test import test_nb

    passed, _ = test_nb(Path(notebook), skip_flags=skip_flags, basepath=root)
    sys.exit(0 if passed else 1)


def run_in_fork(notebook, root, skip_flags=()):
    """Run a notebook's cells in a fork, in the present folder; return its status and output."""
    code = CODE.format(notebook=str(notebook), root=str(root), skip_flags=[*skip_flags])
    return warm_python().run(code)
