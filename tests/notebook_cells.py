"""Run the cells of a notebook in a process that has the heavy packages loaded already.

A new interpreter needs five seconds of processor time for PyTorch, open_clip and their like; a fork
of a server that has imported them needs none.
"""

import multiprocessing
import os
import sys
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

TESTS = Path(__file__).resolve().parent


def run_cells(notebook, root, folder, log):
    """Run a notebook's cells as nbdev does, in `folder`, with all output in the file `log`."""
    with open(log, "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(folder)
    from nbdev.test import test_nb

    passed, _ = test_nb(Path(notebook), skip_flags=["slow"], basepath=root)
    sys.stdout.flush()
    sys.exit(0 if passed else 1)


@cache
def warm_server(root):
    """Start the server that is forked; return its context."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["heavy_packages"])
    path = os.pathsep.join([str(root), str(TESTS)])
    with mock.patch.dict(os.environ, PYTHONPATH=path):
        forkserver.ensure_running()
    return context


def run_in_fork(notebook, root, folder, log):
    """Run a notebook's cells in a fork of the warm server; return the exit status."""
    process = warm_server(root).Process(target=run_cells, args=(notebook, root, folder, log))
    process.start()
    process.join()
    return process.exitcode
