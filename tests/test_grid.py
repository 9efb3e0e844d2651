"Grids that are killed, stopped, mistyped, failing, or run twice: what a notebook cell cannot hold."

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import crash_hook
import nbformat
import psutil
import pytest
from conftest import run_command, write_experiment

import vlmadapt
from vlmadapt.grid import cluster as ray_cluster
from vlmadapt.grid import kernels, runner, runs
from vlmadapt.grid.cluster import cluster
from vlmadapt.grid.command import redo
from vlmadapt.grid.params import read_runs
from vlmadapt.grid.report import report_of
from vlmadapt.grid.results import read_run
from vlmadapt.grid.runs import execute
from vlmadapt.grid.signals import STOPPED
from vlmadapt.grid.templates import shipped
from vlmadapt.reporting.checks import requested_datasets, unfinished

HOOKS = Path(__file__).parent / "crash_points"


ROOT = Path(vlmadapt.__file__).resolve().parent.parent
PARAMETERS = """dataset = 'mini-digits'  # name in DATASETS
shots = 1  # images per class
methods = ['ZeroShot']
seeds = [1]
fixed = {}  # method -> hyper-parameters
broken = ''  # a dataset that fails
out = ''"""
BODY = """import os, time
from vlmadapt.core.seeding import np_stream
from vlmadapt.grid.experiments import measure_missing
from vlmadapt.grid.store import ResultStore
if dataset == broken:
    raise ValueError(f'{dataset} is broken')
def measure_seeds(entry, seeds):
    for seed in seeds:
        time.sleep(float(os.environ.get('PAUSE', 0)))
        value = 100 * np_stream(seed, dataset, entry.label).random()
        cost = dict(fit_s=time.time())
        yield dict(metric='accuracy', value=value, predictions='0 1', cost=cost)
settings = dict(dataset=dataset, shots=shots, fixed=fixed, broken=broken)
measure_missing(ResultStore(out, settings, methods, seeds), measure_seeds)"""
TINY = """experiment: tiny.ipynb
grid:
  dataset: [mini-digits, mini-shapes]
parameters:
  methods: [ZeroShot, TipAdapter]
  seeds: [1, 2, 3, 4, 5, 6]
"""
CALL = """import sys
from vlmadapt.cli import main
ray = ["--address", "local"] if "RAY" in sys.argv else []
sys.exit(main(["grid", sys.argv[1], "--out", sys.argv[2], "--workers", "2", *ray]))"""
DEADLINE_S = 300


@pytest.fixture
def params(tmp_path):
    "Write a params file beside a tiny experiment with random numbers from named streams."
    write_experiment(tmp_path / "tiny.ipynb", PARAMETERS, BODY)

    def write(text=TINY, name="tiny.yml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def numbers(runs):
    "What a grid found, wall-clock fields aside."
    found = {}
    for run in runs:
        for result in read_run(run.folder):
            key = (run.name, result.label, result.seed)
            assert key not in found
            found[key] = (result.value, result.predictions, result.key)
    return found


def files(out):
    return {f: f.stat().st_mtime_ns for f in Path(out).rglob("results/*.json")}


def default_signals():
    "Undo what the tests' own shell ignores: Python leaves an ignored signal ignored."
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(file, out, *arguments, **environment):
    "A grid in a process of its own."
    path = os.pathsep.join(filter(None, [str(HOOKS), str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-c", CALL, file, out, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
        preexec_fn=default_signals,
    )


def wait_for(condition, process=None):
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(marker):
    "Processes that have `marker`, a pair of name and value, in their environment."
    name, value = marker
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize(
    "mode, files_that_count, at, who, code",
    [
        ("RAY", "*/status.txt", 2, "self", -signal.SIGKILL),  # the driver
        ("RAY", "*/results/*.json", 3, "everything", -signal.SIGKILL),
        ("RAY", "*/run.ipynb", 2, "self", 0),  # a worker of Ray, which starts the run again
        ("", "*/status.txt", 2, "self", -signal.SIGKILL),
        ("", "*/run.ipynb", 3, "self", -signal.SIGKILL),
        ("", "*/results/*.json", 3, "everything", -signal.SIGKILL),
    ],
)
def test_killed_grid_goes_on(params, tmp_path, mode, files_that_count, at, who, code):
    file = params()
    out = tmp_path / "outputs"
    point = crash_hook.choice(tmp_path / "counter", at, "before", files_that_count, who)
    process = start(file, out, mode, **point)
    told, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == code, told
    assert (tmp_path / "counter").stat().st_size >= at
    wait_for(lambda: not alive(("CRASH_COUNTER", point["CRASH_COUNTER"])))
    kept = files(out)
    if code:
        assert run_command("grid", file, out=str(out), workers=2) == 0
    assert kept.items() <= files(out).items()  # results that were there are the same files
    assert len(files(out)) == 24
    assert not list(out.rglob("*.tmp"))
    undisturbed = read_runs(file, tmp_path / "undisturbed")
    assert [execute(run) for run in undisturbed] == [None, None]
    assert numbers(read_runs(file, out)) == numbers(undisturbed)


@pytest.mark.parametrize(
    "mode, number", [("RAY", signal.SIGHUP), ("", signal.SIGTERM), ("", signal.SIGINT)]
)
def test_signal_ends_the_grid_and_all_its_processes(params, tmp_path, mode, number):
    marker = ("GRID_OF_TEST", str(tmp_path))
    process = start(params(), tmp_path / "outputs", mode, PAUSE="1000", GRID_OF_TEST=str(tmp_path))

    def in_kernel():
        logs = (tmp_path / "outputs").rglob("log.txt")
        return any("measurements requested" in log.read_text() for log in logs)

    wait_for(in_kernel, process)
    process.send_signal(number)
    told, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 128 + number
    assert told.splitlines()[-1] == STOPPED and "Traceback" not in told
    assert not alive(marker)
    assert not list((tmp_path / "outputs").rglob("error.txt"))  # stopped is not failed


def test_local_grid_listens_on_loopback_only():
    driver = psutil.Process()
    before = set(driver.children(recursive=True))  # other tests of this process may have left some
    with cluster(workers=1) as ray:
        assert ray.get(ray.remote(lambda: 1).remote()) == 1
        family = [driver, *(set(driver.children(recursive=True)) - before)]
        listening = []
        for process in family:
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    listening.append(connection.laddr.ip.removeprefix("::ffff:"))
        assert len(family) > 4 and listening
        assert [ip for ip in listening if ip != "::1" and not ip.startswith("127.")] == []
    assert ray_cluster._LOOPBACK_VARIABLE not in os.environ
    wait_for(lambda: not [p for p in family[1:] if p.is_running()])


def test_a_cluster_leaves_what_belongs_to_the_caller_alone():
    def fail():
        return 1 / 0

    with cluster(workers=1) as ray:
        own = subprocess.Popen(["sleep", "600"])
        with pytest.raises(ValueError, match="already in use"), cluster(workers=1):
            pass
        with pytest.raises(ValueError, match="already in use"), cluster("127.0.0.1:1"):
            pass
        assert ray.is_initialized()
        with pytest.raises(ZeroDivisionError):  # a failed task is no lost Ray
            ray.get(ray.remote(fail).options(max_retries=0).remote())
    try:
        assert own.poll() is None
    finally:
        own.kill()
        own.wait()


@pytest.mark.parametrize("before", [None, "0", "1", "yes", "2"])
def test_the_loopback_variable_and_constant_get_their_former_values(monkeypatch, before):
    from ray._private import ray_constants as constants

    name = ray_cluster._LOOPBACK_VARIABLE
    if before is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, before)
    monkeypatch.setattr(constants, "ENABLE_RAY_CLUSTER", before == "yes")
    with pytest.raises(KeyboardInterrupt), ray_cluster._loopback_only():
        assert os.environ[name] == "0" and constants.ENABLE_RAY_CLUSTER is False
        raise KeyboardInterrupt
    assert os.environ.get(name) == before
    assert (before == "yes") == constants.ENABLE_RAY_CLUSTER


def test_only_the_loss_of_ray_or_of_a_machine_is_reported_as_one(monkeypatch):
    from ray import exceptions

    @contextmanager
    def joined(address):
        yield SimpleNamespace()

    monkeypatch.setattr(ray_cluster, "_joined_cluster", joined)
    lost = exceptions.RaySystemError("the server is gone")
    with pytest.raises(ConnectionError, match="the server is gone") as caught, cluster("a:1"):
        raise lost
    assert caught.value.__cause__ is lost
    for error in (exceptions.RayTaskError("f", "traceback", ValueError("x")), ValueError("own")):
        with pytest.raises(type(error)), cluster("a:1"):
            raise error


def test_wrong_address_is_one_line(params, tmp_path, capsys, monkeypatch):
    def nothing_found(*arguments):
        raise ConnectionError

    # Ray may run on this machine, for example in a test beside this one
    monkeypatch.setattr("ray._private.services.get_ray_address_from_environment", nothing_found)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    file = str(params())
    for address, told in (
        (f"127.0.0.1:{port}", "Connection refused"),
        ("auto", "no Ray runs on this machine"),
        ("127.0.0.1", "give HOST:PORT, "),
        ("no.such.host.invalid:6379", ""),
        ("x" * 300 + ":1", ""),
    ):
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        assert run_command("grid", file, out=tmp_path / "outputs", address=address) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and line.startswith("address ") and told in line


def test_server_on_loopback_that_ray_would_look_for_elsewhere_is_one_line(params, tmp_path, capsys):
    if ray_cluster._resolve_loopback("127.0.0.1") == "127.0.0.1":
        pytest.skip("this machine has no address but the loopback one")
    settings = b"\0\0\0\4\0\0\0\0\0"  # an empty HTTP/2 frame, as a server of Ray begins
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def serve():
            connection, _ = server.accept()
            connection.sendall(settings)

        threading.Thread(target=serve, daemon=True).start()
        address = f"127.0.0.1:{port}"
        assert run_command("grid", params(), out=tmp_path / "outputs", address=address) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"address {address}: ") and line.count("\n") == 1


@pytest.mark.parametrize(
    "answer", [b"", b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 400 Bad\r\n\r\n", None]
)
def test_server_that_is_no_ray_is_one_line(params, tmp_path, capsys, monkeypatch, answer):
    monkeypatch.setattr(ray_cluster, "_ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            if answer is not None:  # None: silent
                connection.sendall(answer)
                connection.close()
            held.append(connection)

        held = []
        thread = threading.Thread(target=serve)
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        code = run_command("grid", params(), out=tmp_path / "outputs", address=address)
        thread.join()
    line = capsys.readouterr().err
    assert code == 2 and line.count("\n") == 1 and line.startswith(f"address {address}: ")


def refused(capsys, file, code=2, **options):
    "The one line with which a grid is refused."
    assert run_command("grid", file, **options) == code
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "Traceback" not in told.err + told.out
    return told.err


@pytest.fixture
def alone(monkeypatch):
    "One run after another, and the notebook in this process."
    monkeypatch.setattr(runner, "cores", lambda: 1)


@pytest.mark.parametrize("kind", ["file", "below", "proc", "long", "deep", "status"])
def test_folder_of_results_that_cannot_be(params, tmp_path, capsys, alone, kind):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "outputs/tiny/status.txt").mkdir(parents=True)
    out = dict(
        file=tmp_path / "file",
        below=tmp_path / "file/out",
        proc="/proc/none",
        long=tmp_path / ("x" * 300),
        deep=tmp_path / "/".join(["x" * 200] * 30),
        status=tmp_path / "outputs",
    )[kind]
    line = refused(capsys, params(), out=str(out))
    assert line.startswith(("--out ", f"{out}/tiny")) and len(line) < 400
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "file",
        "outputs",
        "tiny.ipynb",
        "tiny.yml",
    ]
    assert not list(tmp_path.rglob("*.tmp"))


def test_read_only_folder_of_results(params, tmp_path, capsys, alone):
    out = tmp_path / "outputs"
    out.mkdir()
    (out / "there").touch()
    if os.geteuid():
        out.chmod(0o500)
    elif subprocess.run(["mount", "--bind", "-o", "ro", out, out], capture_output=True).returncode:
        pytest.skip("cannot make a folder that root cannot write")
    try:
        assert "Read-only" in refused(capsys, params(), out=str(out)) or os.geteuid()
        assert [p.name for p in out.iterdir()] == ["there"]
    finally:
        if os.geteuid():
            out.chmod(0o700)
        else:
            subprocess.run(["umount", out], check=True)


@pytest.mark.parametrize("name", ["status.txt", "report", "x" * 300])
def test_names_that_no_run_can_have(params, tmp_path, capsys, name):
    part = "".join(f"    {line}\n" for line in TINY.splitlines())
    line = refused(capsys, params(f"parts:\n  {name}:\n{part}"), out=str(tmp_path / "outputs"))
    assert name[:40] in line
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("name", ["..", ".", "report", "x" * 300])
def test_values_that_name_no_run(params, tmp_path, capsys, name):
    text = TINY.replace("dataset: [mini-digits, mini-shapes]", f"broken: ['{name}']")
    refused(capsys, params(text), out=str(tmp_path / "outputs"))
    assert not (tmp_path / "outputs").exists()


def small(params):
    return params(TINY.replace(", mini-shapes", "").replace("[1, 2, 3, 4, 5, 6]", "[1]"))


@pytest.mark.parametrize(
    "name", ["params.yml", "result.json", "log.txt", "error.txt", ".lock", "run.ipynb"]
)
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_nothing_hangs_on_a_pipe_or_a_folder(params, tmp_path, capfd, monkeypatch, name, kind):
    def run_here(notebook, target, parameters, log, plugins=()):
        kernels.WholeNotebooks().write("text", target)
        exec(f"{PARAMETERS}\n", values := {})
        exec(BODY, {**values, **parameters})

    monkeypatch.setattr(runs, "run_notebook", run_here)
    monkeypatch.setattr(runner, "cores", lambda: 1)
    (run,) = read_runs(small(params), tmp_path / "outputs")
    run.folder.mkdir(parents=True)
    place = run.folder / name
    os.mkfifo(place) if kind == "pipe" else place.mkdir()
    own = dict(out=tmp_path / "outputs")
    assert run_command("grid", tmp_path / "tiny.yml", dry_run=True, **own) == 0
    code = run_command("grid", tmp_path / "tiny.yml", out=tmp_path / "outputs")
    told = "".join(capfd.readouterr())
    assert code in (0, 1) and "Traceback" not in told
    assert code == 0 or name in told
    if place.is_dir():
        place.rmdir()
    elif place.is_fifo():
        place.unlink()
    assert run_command("grid", tmp_path / "tiny.yml", out=tmp_path / "outputs") == 0
    assert len(numbers([run])) == 2 and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    "data, told",
    [
        (b"", "valid dictionary"),
        (b"[1]", "valid dictionary"),
        (b"a: 1", "report: field required"),
        (b"report: [1]", "report: input should be a valid string, got [1]"),
        (b"\xff\xfe", "not UTF-8"),
        (b"a: [1", "is not YAML"),
        (b"[" * 5000, "nested too deeply"),
        (b"report: none", "unknown report 'none'"),
    ],
)
def test_damaged_params_of_a_run_are_named_by_the_report(tmp_path, capsys, data, told):
    run = tmp_path / "tiny/run"
    run.mkdir(parents=True)
    (run / "params.yml").write_bytes(data)
    assert run_command("report", "tiny", out=str(tmp_path)) == 2
    line = capsys.readouterr().err
    assert told in line and line.count("\n") == 1
    assert "params.yml" in line or "unknown report" in line
    (run / "params.yml").unlink()
    os.mkfifo(run / "params.yml")
    with pytest.raises(ValueError, match="a pipe, socket or device, not a file"):
        report_of(tmp_path / "tiny")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"results": 1}', '{"results": [1]}', '{"rows": 1}', "{}", "", None]
)
def test_damaged_old_results_stop_redo(params, tmp_path, capsys, alone, text):
    (run,) = read_runs(small(params), tmp_path / "outputs")
    store = run.results()
    for entry, seed in store.missing():
        store.save(entry, seed, dict(metric="accuracy", value=50.0))
    store.collect()
    old = run.folder / "result.old.json"
    os.mkfifo(old) if text is None else old.write_text(text)
    line = refused(capsys, tmp_path / "tiny.yml", out=str(tmp_path / "outputs"), redo=":Tip*")
    assert "result.old.json" in line and run.results().is_complete()


def test_damaged_error_file_is_told_in_the_list(params, tmp_path, capsys):
    (run,) = read_runs(small(params), tmp_path / "outputs")
    for data, told in (
        (b"", ": \n"),
        (b"\xff\n", "error.txt, line 1: not UTF-8"),
        (b"why\nx", ": why\n"),
    ):
        run.write_error("x")
        run.error_file.write_bytes(data)
        run_command("grid", tmp_path / "tiny.yml", dry_run=True, out=tmp_path / "outputs")
        assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    "only, found",
    [
        ("digits", 1),
        ("mini-*", 2),
        ("*", 2),
        ("mini-[ds]*", 0),
        ("mini-digit?", 0),
        ("[", 0),
        ("DIGITS", 0),
    ],
)
def test_only_a_star_is_special(params, tmp_path, capsys, only, found):
    code = run_command(
        "grid", str(params()), dry_run=True, only=only, out=str(tmp_path / "outputs")
    )
    told = capsys.readouterr()
    if found:
        assert f"{found} runs, " in told.out and code == 0
    else:
        assert code == 2 and told.err.endswith(f"tiny.yml: no run matches --only {only}\n")


def test_redo_of_labels_with_brackets(params, tmp_path, capsys):
    text = TINY.replace(", mini-shapes", "").replace("fixed", "x")
    (run,) = read_runs(params(text), tmp_path / "outputs")
    variant = dict(method="TipAdapter", variant="[1]", hyper_parameters=dict(alpha=2.0))
    run.parameters["methods"] = ["TipAdapter", variant]
    store = run.results()
    for entry in store.entries:
        store.save(entry, 1, dict(metric="accuracy", value=50.0))
    assert redo(run, "TipAdapter ([1])") == 1
    assert list(run.results().units) == [("TipAdapter", "", 1)]


def test_long_folder_for_temporary_files(params, tmp_path, monkeypatch):
    long = tmp_path / ("t" * 113)
    long.mkdir()
    monkeypatch.setattr(kernels.tempfile, "tempdir", str(long))
    assert kernels.short_folder(30) in ("/tmp", "/var/tmp", "/dev/shm")
    (run,) = read_runs(small(params), tmp_path / "outputs")
    assert execute(run) is None
    assert list(long.iterdir()) == []


def test_temporaries_of_killed_writers_are_removed(params, tmp_path, monkeypatch):
    (run,) = read_runs(small(params), tmp_path / "outputs")
    (run.folder / "results").mkdir(parents=True)
    ours = [run.folder / f".params.yml.{'0' * 12}.tmp", run.folder / f"results/.x.{'a' * 12}.tmp"]
    others = [run.folder / ".mine.tmp", run.folder / f"x.{'0' * 12}.tmp"]
    for file in (*ours, *others):
        file.touch()
    monkeypatch.setattr(runs, "run_notebook", lambda *arguments: None)
    execute(run)
    assert [file.exists() for file in ours] == [False, False]
    assert all(file.exists() for file in others)


def test_damaged_result_and_added_method(params, tmp_path):
    run = read_runs(params(), tmp_path / "outputs")[0]
    execute(run)
    first, result = files(run.folder), numbers([run])
    (row,) = (run.folder / "results").glob("TipAdapter-3-*.json")
    row.write_text(row.read_text()[:200])
    (run.folder / "result.json").write_text("{")
    more = read_runs(
        params(TINY.replace("TipAdapter]", "TipAdapter, LinearProbe]")), tmp_path / "outputs"
    )[0]
    with pytest.warns(UserWarning, match="TipAdapter-3-.*json: damaged"):
        assert execute(more) is None
    changed = {f.stem.rpartition("-")[0] for f, t in files(run.folder).items() if first.get(f) != t}
    assert changed == {"TipAdapter-3", *(f"LinearProbe-{s}" for s in range(1, 7))}
    assert numbers([run]).items() >= result.items()


def test_changed_setting_computes_again(params, tmp_path):
    run = read_runs(params(), tmp_path / "outputs")[0]
    store = run.results()
    for entry, seed in store.missing():
        store.save(entry, seed, dict(metric="accuracy", value=50.0))
    store.collect()
    assert run.results().is_complete()
    for extra in ("  broken: mini-shapes\n", "  fixed: {TipAdapter: {alpha: 2.0}}\n"):
        other = read_runs(params(TINY + extra), tmp_path / "outputs")[0]
        assert not other.results().is_complete()
    assert len(other.results().missing()) == 6  # what is fixed for one method leaves the other
    broken = read_runs(params(TINY + "  broken: mini-digits\n"), tmp_path / "outputs")[0]
    assert (
        "is broken" in execute(broken) and not broken.results().result_file.exists()
    )  # no report can take the old results for new ones


def test_failing_run_leaves_the_others(params, tmp_path, capsys):
    assert (
        run_command(
            "grid",
            str(params(TINY + "  broken: mini-shapes\n")),
            out=str(tmp_path / "outputs"),
            workers=2,
        )
        == 1
    )
    told = capsys.readouterr().out
    assert (
        "1 of 2 runs failed" in told
        and "mini-shapes: ValueError: mini-shapes is broken" in told
        and "mini-shapes/log.txt" in told
    )
    assert (tmp_path / "outputs/tiny/mini-digits/result.json").exists() and not (
        tmp_path / "outputs/tiny/mini-shapes/result.json"
    ).exists()
    assert "Traceback" in (tmp_path / "outputs/tiny/mini-shapes/log.txt").read_text()


def test_two_at_once_share_the_work(params, tmp_path):
    call = """import sys
from vlmadapt.grid.params import read_runs
from vlmadapt.grid.runs import execute
sys.exit(execute(read_runs(*sys.argv[1:])[0]))"""
    file = params()
    both = [
        subprocess.Popen(
            [sys.executable, "-c", call, file, tmp_path / "outputs"],
            env={**os.environ, "PAUSE": "0.1"},
        )
        for _ in range(2)
    ]
    assert [p.wait() for p in both] == [0, 0]
    run = read_runs(file, tmp_path / "outputs")[0]
    assert (
        len(numbers([run])) == 12
        and (run.folder / "log.txt").read_text().count("measurements requested") == 1
    )


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("dataset:", "datasets:", "unknown parameter 'datasets'; did you mean 'dataset'?"),
        ("mini-shapes", "mini-shape", "unknown dataset 'mini-shape'; did you mean 'mini-shapes'?"),
        ("TipAdapter", "TipAdaptor", "unknown method 'TipAdaptor'; did you mean 'TipAdapter'?"),
        ("seeds: [1,", "seeds: [one,", "each of seeds takes a whole number, not 'one'"),
        ("grid:", "gird:", "unknown entry 'gird'; did you mean 'grid'?"),
        ("tiny.ipynb", "few_shto", "unknown experiment 'few_shto'; did you mean 'few_shot'?"),
    ],
)
def test_typing_errors_are_refused_in_one_line(params, tmp_path, capsys, old, new, message):
    code = run_command("grid", str(params(TINY.replace(old, new))), out=tmp_path / "outputs")
    told = capsys.readouterr().err
    assert code == 2 and message in told and "tiny.yml: " in told and told.count("\n") == 1
    assert not (tmp_path / "outputs").exists()


@pytest.mark.skipif(not (ROOT / "nbs").exists(), reason="needs a checkout")
def test_parameters_cells_survive_cleaning(tmp_path):
    notebooks = [
        *(ROOT / "nbs/experiments").glob("*.ipynb"),
        *(ROOT / "nbs/reports").glob("*.ipynb"),
    ]
    assert shipped("experiments", "few_shot.ipynb") in notebooks
    for notebook in notebooks:
        copy = tmp_path / notebook.name
        copy.write_bytes(notebook.read_bytes())
        subprocess.run(
            [
                sys.executable,
                "-c",
                "from nbdev.clean import nbdev_clean; nbdev_clean(fname=__import__('sys').argv[1])",
                copy,
            ],
            cwd=ROOT,
            check=True,
        )
        for file in (notebook, copy):
            assert any(
                "parameters" in c.metadata.get("tags", []) for c in nbformat.read(file, 4).cells
            ), file


def test_a_grid_that_stops_early_leaves_the_parameters_of_all_runs(params, tmp_path, monkeypatch):
    "So a report knows which datasets have not run, and a complete run keeps its file."
    monkeypatch.setattr("vlmadapt.grid.command.execute_all", lambda runs, address, **options: {})
    out = tmp_path / "outputs"
    assert run_command("grid", params(), out=out) == 0
    lacking = unfinished(out / "tiny")
    assert len(lacking) == 2 and set(lacking["error"]) == {"not started"}
    assert lacking["missing"].tolist() == [12, 12]
    assert requested_datasets(out / "tiny") == ["mini-digits", "mini-shapes"]
    assert requested_datasets(out / "tiny", shots=4) == []
    before = {file: file.stat().st_mtime_ns for file in out.rglob("params.yml")}
    assert len(before) == 2 and run_command("grid", params(), out=out) == 0
    assert {file: file.stat().st_mtime_ns for file in out.rglob("params.yml")} == before
