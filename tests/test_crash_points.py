"""A grid that is killed at any of its writes goes on and ends as if nothing had happened.

`crash_points/crash_hook.py` kills a process at a chosen write, so nothing here depends on time. The processes
are forked from a server that has imported the library; notebooks run in the process itself, except where
a kernel or its driver is what dies.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import nbformat
import psutil
import pytest

HOOKS = Path(__file__).parent / "crash_points"
sys.path.insert(0, str(HOOKS))

import crash_hook  # noqa: E402

from vlmadapt import foundation, grid, runs  # noqa: E402

PARAMETERS = """dataset = 'mini-digits'
methods = ['ZeroShot']
seeds = [1]
out = ''"""
BODY = """from vlmadapt.foundation import np_stream
from vlmadapt.rows import Rows
def compute(method, seeds):
    for seed in seeds:
        yield dict(accuracy=100 * np_stream(seed, dataset, method).random(), predictions='0 1')
Rows(out, dataset=dataset).fill(methods, seeds, compute)"""
GRID = """experiment: tiny.ipynb
grid:
  dataset: [mini-digits, mini-shapes]
parameters:
  methods: [ZeroShot, TipAdapter]
  seeds: [1, 2]
"""
WRITES = 17  # status; in each of two runs params.yml, two of the notebook, four rows and the result
SMALL = GRID.replace(", mini-shapes", "")
DEADLINE_S = 300


@pytest.fixture
def params(tmp_path):
    "The params file of a grid whose rows are random numbers from named streams."
    cells = [
        nbformat.v4.new_code_cell(PARAMETERS, metadata=dict(tags=["parameters"])),
        nbformat.v4.new_code_cell(BODY),
    ]
    kernel = dict(name="python3", display_name="python3", language="python")
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel))
    nbformat.write(notebook, tmp_path / "tiny.ipynb")
    (tmp_path / "tiny.yml").write_text(GRID)
    return tmp_path / "tiny.yml"


def run_here(notebook, target, parameters, log):
    "What `run_notebook` does, without a kernel."
    cells = nbformat.read(notebook, 4).cells
    write = runs._WholeNotebooks().write
    write("begun", target)
    values = {}
    with redirect_stdout(log):
        exec(cells[0].source, values)
        values.update(parameters)
        exec(cells[1].source, values)
    write("ended", target)


def command(file, out, environment, kernels, options):
    "Execute a grid in this process, a fork, one run after another."
    os.environ.update(environment, PYTHONPATH=f"{HOOKS}{os.pathsep}{os.environ['PYTHONPATH']}")
    if environment:
        crash_hook.install(foundation.write_hooks)
    if not kernels:
        grid.run_notebook = runs.run_notebook = run_here
    grid._loopback = lambda: False
    with open(os.devnull, "w") as silent, redirect_stdout(silent):
        sys.exit(grid.vlmadapt_grid(str(file), out=str(out), **options))


@pytest.fixture(scope="module")
def start():
    "Starts `command` in a process of its own; returns the process."
    context = multiprocessing.get_context("forkserver")
    library = Path(runs.__file__).parent.parent
    path = [str(HOOKS.parent), str(library), os.environ.get("PYTHONPATH")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
        context.set_forkserver_preload([__name__])

        def begin(file, out, environment=(), kernels=False, **options):
            arguments = (file, out, dict(environment), kernels, options)
            process = context.Process(target=command, args=arguments)
            process.start()
            return process

        yield begin


@pytest.fixture
def call(start):
    "Runs `command` to its end; returns its exit code, which is negative for a killed process."

    def wait(*arguments, **options):
        process = start(*arguments, **options)
        process.join(DEADLINE_S)
        assert process.exitcode is not None, "the grid hangs"
        return process.exitcode

    return wait


def content(out):
    "All that a grid found, and nothing that should not be there."
    found = {}
    for result in sorted(out.rglob("result.json")):
        kept = json.loads(result.read_text())
        assert kept["failed"] == {}
        rows = {(row["method"], row["seed"]): row["accuracy"] for row in kept["rows"]}
        assert len(rows) == len(kept["rows"]) == len(list((result.parent / "rows").glob("*.json")))
        assert not (result.parent / "rows/superseded").exists()
        assert not (result.parent / "error.txt").exists()
        found[result.parent.name] = rows
    assert not list(out.rglob("*.tmp")), "temporary files stay"
    return found


def stored(out):
    "The rows on disk."
    return {(*path.parts[-3:],): path.read_bytes() for path in out.rglob("rows/*.json")}


@pytest.fixture
def undisturbed(params, tmp_path, call):
    "What the grid finds when nothing happens."
    counter = tmp_path / "writes"
    assert call(params, tmp_path / "whole", crash_hook.choice(counter, 0)) == 0
    found = content(tmp_path / "whole")
    assert counter.stat().st_size == WRITES
    assert [len(rows) for rows in found.values()] == [4, 4]
    return found


@pytest.mark.parametrize("moment", ["before", "after"])
def test_every_write_may_be_the_last(params, tmp_path, call, undisturbed, moment):
    for at in range(1, WRITES + 1):
        out = tmp_path / f"out-{at}"
        point = crash_hook.choice(tmp_path / f"writes-{at}", at, moment)
        assert call(params, out, point) == -signal.SIGKILL, at
        before = stored(out)
        assert call(params, out) == 0, at
        assert content(out) == undisturbed, at
        assert before.items() <= stored(out).items(), at  # no row is computed twice


def test_every_write_of_the_way_on_may_be_the_last(params, tmp_path, call, undisturbed):
    "The grid is killed again and again, each time at its third write."
    out = tmp_path / "out"
    for attempt in range(WRITES):
        before = stored(out)
        point = crash_hook.choice(tmp_path / f"writes-{attempt}", 3, "before")
        code = call(params, out, point)
        assert before.items() <= stored(out).items()
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0 or call(params, out) == 0
    assert content(out) == undisturbed


@pytest.mark.parametrize("moment", ["before", "after"])
def test_redo_may_be_interrupted(params, tmp_path, call, undisturbed, moment):
    "Rows that are redone are kept once in result.old.json, and nothing else changes."
    for at in range(1, 5):
        out = tmp_path / f"out-{at}"
        assert call(params, out) == 0
        point = crash_hook.choice(tmp_path / f"writes-{at}", at, moment)
        assert call(params, out, point, redo="digits:Tip*") == -signal.SIGKILL
        old = out / "tiny/mini-digits/result.old.json"
        assert call(params, out, redo="digits:Tip*") == 0
        assert content(out) == undisturbed
        kept = [row["digest"] for row in json.loads(old.read_text())["rows"]]
        assert len(set(kept)) == len(kept) == 2


def gone(counter):
    "Whether no process of the crash point with `counter` is alive."
    for process in psutil.process_iter():
        try:
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and process.environ().get("CRASH_COUNTER") == str(counter):
                return False
        except psutil.Error:
            continue
    return True


def wait_until(condition):
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    "files, at, moment, code",
    [
        ("*/rows/*.json", 2, "before", 1),  # the kernel
        ("*/result.json", 1, "after", 1),  # the kernel, at its last write
        ("*/run.ipynb", 2, "before", -signal.SIGKILL),  # the driver, while the kernel lives
    ],
)
def test_kernel_or_driver_dies(params, tmp_path, call, undisturbed, files, at, moment, code):
    params.write_text(SMALL)
    out = tmp_path / "out"
    counter = tmp_path / "counter"
    point = crash_hook.choice(counter, at, moment, files)
    assert call(params, out, point, kernels=True) == code
    wait_until(lambda: gone(counter))
    before = stored(out)
    assert call(params, out) == 0
    assert content(out) == {"mini-digits": undisturbed["mini-digits"]}
    assert before.items() <= stored(out).items()
