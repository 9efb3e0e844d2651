"""Kernels are forks of a process that has imported everything, and as separate as new processes."""

import errno
import os
import sys
import time

import nbformat
import psutil
import pytest

from vlmadapt.grid import kernels
from vlmadapt.grid.logs import Log

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux only")


def printed(folder, *sources):
    "What a notebook of these cells prints."
    cells = [nbformat.v4.new_code_cell("value = 0", metadata=dict(tags=["parameters"]))]
    cells += map(nbformat.v4.new_code_cell, sources)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "cells.ipynb")
    with Log(folder / "log.txt") as log:
        run = kernels.run_notebook(folder / "cells.ipynb", folder / "run.ipynb", {}, log)
    outputs = [output for cell in run.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs).split()


IDENTITY = """
import os, sys, torch
fresh = not hasattr(torch, "left_behind")
torch.left_behind = True
print(os.getpid(), os.getppid(), os.getsid(0), fresh, "vlmadapt.grid.experiments" in sys.modules)
"""


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return printed(tmp_path_factory.mktemp("first"), IDENTITY)


def test_kernels_share_imports_and_nothing_else(first, tmp_path):
    second = printed(tmp_path, IDENTITY)
    (server,) = kernels._servers
    for pid, parent, session, fresh, preloaded in (first, second):
        assert (fresh, preloaded) == ("True", "True")
        assert int(parent) == server.process.pid
        assert session == pid  # an interrupt of the terminal does not reach it
    assert first[0] != second[0]
    assert not psutil.pid_exists(int(first[0]))


def test_a_kernel_has_the_variables_and_the_folder_of_now(first, tmp_path, monkeypatch):
    server = kernels._servers[0]
    monkeypatch.setenv("VLMADAPT_DATA", "/somewhere")
    monkeypatch.chdir(tmp_path)
    found = printed(tmp_path, "import os\nprint(os.environ['VLMADAPT_DATA'], os.getcwd())")
    assert found == ["/somewhere", str(tmp_path)]
    assert kernels._servers == [server]


def test_another_import_time_variable_takes_another_server(first, tmp_path, monkeypatch):
    server = kernels._servers[0]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if os.environ.get("HF_HUB_OFFLINE") != "1" else "0")
    assert server.key != server.key_of(dict(os.environ))


def test_a_changed_library_takes_another_server(first, monkeypatch):
    server = kernels._servers[0]
    env = server.key[2] | dict(RAY_JOB_ID="7")
    assert server.key == server.key_of(env)
    monkeypatch.setattr(kernels, "_library_version", lambda: 0)
    assert server.key != server.key_of(env)


def test_a_dead_server_is_replaced(first, tmp_path):
    server = kernels._servers[0]
    server.process.kill()
    server.process.wait()
    assert printed(tmp_path, "print('again')") == ["again"]
    assert kernels._servers[0] is not server


def test_kernels_end_with_their_server(first, tmp_path):
    printed(tmp_path, "1")  # starts a server where there is none
    server = kernels._servers[0]
    connection = tmp_path / "kernel.json"
    pid = server.fork(["--log-level=CRITICAL", "-f", str(connection)], dict(os.environ), "/")
    kernel = kernels.ForkedProcess(pid)
    end = time.monotonic() + 100
    while not connection.exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert kernel.poll() is None
    server.close()
    while kernel.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    assert kernel.poll() == 0
    with pytest.raises(ProcessLookupError) as caught:
        kernel.terminate()
    assert caught.value.errno == errno.ESRCH  # what jupyter_client passes over


def test_without_a_server_a_kernel_is_a_new_process(first, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError("no server")

    monkeypatch.setattr(kernels, "_forked_kernel", refuse)
    assert printed(tmp_path, "import os\nprint(os.getppid())") == [str(os.getpid())]
