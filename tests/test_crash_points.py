"""A grid that is killed at any of its writes goes on and ends as if nothing had happened.

`crash_points/crash_hook.py` kills a process at a chosen write, so nothing here depends on time.
The processes are forked from a server that has imported the library; notebooks run in the process
itself, except where a kernel or its driver is what dies.
"""

import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import crash_hook
import nbformat
import psutil
import pytest
from conftest import run_command, write_experiment

from vlmadapt.core import files
from vlmadapt.grid import kernels, progress, report, runner, runs
from vlmadapt.grid.results import read_run

HOOKS = Path(__file__).parent / "crash_points"


PARAMETERS = """dataset = 'mini-digits'
methods = ['ZeroShot']
seeds = [1]
out = ''"""
BODY = """from vlmadapt.core.seeding import np_stream
from vlmadapt.grid.experiments import measure_missing
from vlmadapt.grid.store import ResultStore
def measure_seeds(entry, seeds):
    for seed in seeds:
        value = 100 * np_stream(seed, dataset, entry.label).random()
        first = dict(metric='accuracy', value=value, predictions='0 1')
        yield [first, dict(metric='macro_f1', value=value / 2)]
store = ResultStore(out, dict(dataset=dataset), methods, seeds)
measure_missing(store, measure_seeds)"""
GRID = """experiment: tiny.ipynb
grid:
  dataset: [mini-digits, mini-shapes]
parameters:
  methods: [ZeroShot, TipAdapter]
  seeds: [1, 2]
"""
# status, and again after each run; in each of two runs params.yml, two of the notebook, four of
# results and result.json; the page of results
WRITES = 20
SMALL = GRID.replace(", mini-shapes", "")
DEADLINE_S = 300


@pytest.fixture
def params(tmp_path):
    "The params file of a grid whose values are random numbers from named streams."
    write_experiment(tmp_path / "tiny.ipynb", PARAMETERS, BODY)
    (tmp_path / "tiny.yml").write_text(GRID)
    return tmp_path / "tiny.yml"


def run_here(notebook, target, parameters, log, plugins=()):
    "What `run_notebook` does, without a kernel."
    cells = nbformat.read(notebook, 4).cells
    write = kernels.WholeNotebooks().write
    write("begun", target)
    values = {}
    with redirect_stdout(log), redirect_stderr(log):
        exec(cells[0].source, values)
        values.update(parameters)
        exec(cells[1].source, values)
    write("ended", target)


def limit_files(size):
    "Have every write beyond `size` bytes of a file fail, as on a full disk."
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def print_to(told):
    "Have this process print to a pipe, which has no limit."
    os.dup2(told.fileno(), 1)
    os.dup2(told.fileno(), 2)


def command(told, file, out, environment, kernels, limit, options):
    "Execute a grid in this process, a fork, one run after another."
    os.environ.update(environment, PYTHONPATH=f"{HOOKS}{os.pathsep}{os.environ['PYTHONPATH']}")
    if environment:
        crash_hook.install(files.write_hooks)
    if not kernels:
        runs.run_notebook = run_here
    runner.cores = lambda: 1
    progress.PAGE_EVERY_S = float("inf")  # the last page alone
    print_to(told)
    if limit is not None:
        limit_files(limit)
    sys.exit(run_command("grid", file, out=out, **options))


def make_report(told, folder, notebook, limit):
    "Make a report in this process, a fork."
    report.report_of = lambda folder: notebook
    print_to(told)
    if limit is not None:
        limit_files(limit)
    sys.exit(run_command("report", folder.name, out=folder.parent))


@pytest.fixture(scope="module")
def fork():
    "Runs a function in a process of its own; returns its exit code and what it printed."
    context = multiprocessing.get_context("forkserver")
    library = Path(runs.__file__).parent.parent
    path = [str(HOOKS.parent), str(library), os.environ.get("PYTHONPATH")]

    def begin(function, *arguments):
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=function, args=(writer, *arguments))
        process.start()
        writer.close()
        with open(reader.fileno(), closefd=False) as pipe:
            printed = pipe.read()
        process.join(DEADLINE_S)
        assert process.exitcode is not None, "it hangs"
        return process.exitcode, printed

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
        context.set_forkserver_preload(["conftest", __name__, "vlmadapt.grid.experiments"])
        yield begin


@pytest.fixture
def call(fork):
    "Executes a grid; returns the exit code."

    def begin(file, out, environment=(), kernels=False, limit=None, told=None, **options):
        found = fork(command, file, out, dict(environment), kernels, limit, options)
        if told is not None:
            told.append(found[1])
        return found[0]

    return begin


def content(out):
    "All that a grid found, and nothing that should not be there."
    found = {}
    for result in sorted(out.rglob("result.json")):
        assert json.loads(result.read_text())["failed"] == {}
        results = read_run(result.parent)
        values = {(r.method, r.seed): r.value for r in results if r.metric == "accuracy"}
        units = list((result.parent / "results").glob("*.json"))
        assert 2 * len(values) == len(results) == 2 * len(units)
        assert not (result.parent / "results/superseded").exists()
        assert not (result.parent / "error.txt").exists()
        found[result.parent.name] = values
    assert not list(out.rglob("*.tmp")), "temporary files stay"
    return found


def stored(out):
    "The results on disk."
    return {(*path.parts[-3:],): path.read_bytes() for path in out.rglob("results/*.json")}


@pytest.fixture
def undisturbed(params, tmp_path, call):
    "What the grid finds when nothing happens."
    counter = tmp_path / "writes"
    assert call(params, tmp_path / "whole", crash_hook.choice(counter, 0)) == 0
    found = content(tmp_path / "whole")
    assert counter.stat().st_size == WRITES
    assert [len(values) for values in found.values()] == [4, 4]
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
        assert before.items() <= stored(out).items(), at  # nothing is measured twice


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
    "Results that are redone are kept once in result.old.json, and nothing else changes."
    for at in range(1, 5):
        out = tmp_path / f"out-{at}"
        assert call(params, out) == 0
        point = crash_hook.choice(tmp_path / f"writes-{at}", at, moment)
        assert call(params, out, point, redo="digits:Tip*") == -signal.SIGKILL
        old = out / "tiny/mini-digits/result.old.json"
        assert call(params, out, redo="digits:Tip*") == 0
        assert content(out) == undisturbed
        kept = [result["digest"] for result in json.loads(old.read_text())["results"]]
        assert len(set(kept)) == len(kept) == 4


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
        ("*/results/*.json", 2, "before", 1),  # the kernel
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


@pytest.mark.parametrize("limit", [0, 50, 100, 200, 300, 500, 1000])
def test_full_disk(params, tmp_path, call, undisturbed, limit):
    "Whatever file does not fit: lines without a traceback, nothing left behind, and the way on."
    out = tmp_path / "out"
    told = []
    assert call(params, out, limit=limit, told=told) in (1, 2)
    assert "Traceback" not in told[0] and "Errno" not in told[0]
    assert "cannot be written: File too large" in told[0]
    table = ("dataset ", "ZeroShot ", "TipAdapter ")  # of the results that fitted
    assert sum(not line.startswith(table) for line in told[0].splitlines()) <= 9
    assert not list(out.rglob("*.tmp"))
    for file in out.rglob("result.json"):
        json.loads(file.read_text())
    assert call(params, out) == 0
    assert content(out) == undisturbed


def test_report_on_a_full_disk(tmp_path, fork):
    "What lies there as report.ipynb is a whole notebook."
    parameters = nbformat.v4.new_code_cell(
        "folder = ''\nsave = ''", metadata=dict(tags=["parameters"])
    )
    long = nbformat.v4.new_code_cell("print('x' * 50_000)")
    nbformat.write(nbformat.v4.new_notebook(cells=[parameters, long]), tmp_path / "own.ipynb")
    folder = tmp_path / "tiny"
    folder.mkdir()
    page = folder / "report/report.ipynb"
    code, told = fork(make_report, folder, tmp_path / "own.ipynb", 20_000)
    assert code == 2 and "report.ipynb cannot be written: File too large" in told
    assert len(told.splitlines()) == 1
    assert not list(folder.rglob("*.tmp")) and not (folder / "report/report.html").exists()
    assert len(nbformat.read(page, 4).cells) == 3
    code, told = fork(make_report, folder, tmp_path / "own.ipynb", None)
    assert code == 0
    assert "x" * 50_000 in page.read_text() and (folder / "report/report.html").exists()
