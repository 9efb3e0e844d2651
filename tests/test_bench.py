"The benchmark of one machine: parts, reports that survive interruptions, the command line."

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, run_command

from vlmadapt.grid import memory
from vlmadapt.reporting import bench, bench_parts

SMALL = replace(
    bench_parts.BENCH_SIZES["tiny"],
    matmul=(16, 32),
    classes=6,
    width=8,
    shots=2,
    views=(1, 2),
    batch_size=4,
    class_counts=(3,),
    test_images=20,
    tokens=(5,),
    token_width=8,
    extraction_backbones=("mini",),
    image_size=(40, 33),
    most_images=8,
)
JUPYTER = ["IPython", "ipykernel", "ipywidgets", "jupyter_client", "jupyter_core", "nbformat"]
ABSENT = [*JUPYTER, "papermill", "ray", "matplotlib", "seaborn", "transformers"]


@pytest.fixture
def small(monkeypatch):
    "Settings of seconds in place of those of `--tiny`."
    monkeypatch.setitem(bench_parts.BENCH_SIZES, "tiny", SMALL)
    monkeypatch.setattr(bench_parts, "MINIMUM_SECONDS", 0.001)
    return bench_parts.BenchSettings("cpu", SMALL, repeats=2)


@pytest.fixture
def parts(monkeypatch):
    "A registry without parts, to be filled by a test."
    monkeypatch.setattr(bench, "BENCH_PARTS", {})
    return bench.BENCH_PARTS


def measured(**figures):
    "A part that measures nothing."
    return lambda settings: {"measurements": [{"case": {"dtype": "float32"}, **figures}]}


def run(*arguments, **environment):
    "Run Python with this checkout's library."
    return subprocess.run(
        [sys.executable, *arguments],
        text=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


def test_import_needs_neither_notebooks_nor_schedulers_nor_models():
    done = run("-c", "import sys, vlmadapt.reporting.bench; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert not {*ABSENT, "open_clip"} & set(done.stdout.split())


SMALL_COMMAND = """
import runpy
import sys

from vlmadapt.reporting import bench_parts

bench_parts.BENCH_SIZES["tiny"] = bench_parts.BenchSizes(**{sizes!r})
bench_parts.MINIMUM_SECONDS = 0.001
sys.argv[1:] = {arguments!r}
runpy.run_module("vlmadapt", run_name="__main__")
"""


def test_command_works_without_notebooks_and_schedulers(tmp_path):
    "A folder in front of the path holds modules that refuse to be imported."
    for name in ABSENT:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not there')")
    out = tmp_path / "bench.json"
    arguments = ["bench", "--tiny", "--device", "cpu", "--repeats", "1", "--out", str(out)]
    code = SMALL_COMMAND.format(sizes=asdict(SMALL), arguments=arguments)
    done = run("-c", code, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "share_of_matmul" in done.stdout
    assert {part["status"] for part in json.loads(out.read_text())["parts"].values()} == {"ok"}


@pytest.mark.parametrize("name", bench.BENCH_PARTS)
def test_every_part_is_written(name, small, tmp_path):
    path = tmp_path / "bench.json"
    assert run_command("bench", "--tiny", "--device", "cpu", "--parts", name, "--out", path) == 0
    report = json.loads(path.read_text())
    part = report["parts"][name]
    assert report["schema_version"] == bench.BENCH_SCHEMA_VERSION
    assert part["status"] == "ok"
    assert part["seconds"] > 0
    for measurement in part["measurements"]:
        assert measurement["case"]
        assert len(measurement["repeats_seconds"]) == 3
        figures = [v for k, v in measurement.items() if k != "case" and not isinstance(v, list)]
        assert figures and all(value > 0 for value in figures)


def test_report_names_software_and_device(small, tmp_path):
    path = tmp_path / "bench.json"
    run_command("bench", "--tiny", "--device", "cpu", "--parts", "matmul", "--out", path)
    report = json.loads(path.read_text())
    found = report["environment"]
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cuda"] is None
    assert found["device"] == found["processor"]
    assert report["arguments"]["parts"] == ["matmul"]
    assert report["arguments"]["sizes"]["matmul"] == [16, 32]
    text = path.read_text()
    assert str(tmp_path) not in text
    assert str(ROOT) not in text
    assert os.uname().nodename not in text


def test_graph_parts_get_their_share_of_the_ceiling(small, tmp_path):
    names = ["hegraph_epoch", "matmul"]
    report = bench.run_bench(names, small, tmp_path / "bench.json")
    ceiling = max(m["teraflops_per_second"] for m in report["parts"]["matmul"]["measurements"])
    for measurement in report["parts"]["hegraph_epoch"]["measurements"]:
        speed = measurement["teraflop_per_epoch"] / measurement["seconds_per_epoch"]
        assert measurement["teraflops_per_second"] == pytest.approx(speed)
        assert measurement["share_of_matmul"] == pytest.approx(speed / ceiling)


def test_operations_of_a_hegraph_step_are_those_of_the_equations():
    "The text branch of variant T-P: for two relations a product, and one for its gradient."
    K, D, B = SMALL.classes, SMALL.width, SMALL.batch_size
    problem = bench_parts.feature_problem(SMALL, views=1)
    method = bench_parts.HeGraphAdapter(problem, variant="T-P", batch_size=B)
    relations = 2 * 2 * (2 * K * D * D)
    logits = 2 * (2 * B * K * D)
    counted = bench_parts.training_step_teraflop(method, problem)
    assert round(counted * 1e12) == relations + logits


def test_features_that_do_not_fit_are_skipped_with_the_reason(small, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_parts, "free_memory", lambda device: 4 * SMALL.width * 12 * 4)
    report = bench.run_bench(["graph_adapter_epoch"], small, tmp_path / "bench.json")
    one, two = report["parts"]["graph_adapter_epoch"]["measurements"]
    assert "seconds_per_epoch" in one
    assert "MB are free" in two["skipped"]
    assert two["case"]["views"] == 2


def test_a_failing_part_does_not_stop_the_others(parts, small, tmp_path):
    path = tmp_path / "bench.json"
    seen = {}

    def failing(settings):
        seen.update(json.loads(path.read_text())["parts"])
        raise RuntimeError("no kernel\nfor this device")

    parts.update(first=measured(seconds_per_epoch=1.0), second=failing, third=measured(x=2.0))
    assert run_command("bench", "--tiny", "--device", "cpu", "--out", path) == 1
    assert seen["first"]["status"] == "ok"
    assert seen["first"]["measurements"][0]["seconds_per_epoch"] == 1.0
    assert seen["second"] == {"status": "pending"}
    statuses = {k: part["status"] for k, part in json.loads(path.read_text())["parts"].items()}
    assert statuses == {"first": "ok", "second": "RuntimeError: no kernel", "third": "ok"}


def test_an_interruption_keeps_what_was_measured(parts, small, tmp_path, capsys):
    path = tmp_path / "bench.json"

    def interrupted(settings):
        raise KeyboardInterrupt

    parts.update(first=measured(x=1.0), second=interrupted, third=measured(x=3.0))
    assert run_command("bench", "--tiny", "--device", "cpu", "--out", path) == 130
    statuses = {k: part["status"] for k, part in json.loads(path.read_text())["parts"].items()}
    assert statuses == {"first": "ok", "second": "interrupted", "third": "pending"}
    assert "second: interrupted" in capsys.readouterr().out


def test_an_error_without_a_message_is_named(parts, small, tmp_path):
    def silent(settings):
        raise AssertionError

    parts.update(silent=silent)
    report = bench.run_bench(["silent"], small, tmp_path / "bench.json")
    assert report["parts"]["silent"]["status"] == "AssertionError: no message"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--parts matmull", "unknown part 'matmull'; did you mean 'matmul'?"),
        ("--parts matmul,,extraction", "unknown part ''"),
        ("--device gpu", "--device gpu: unknown device; there are cpu, cuda and cuda:0"),
        ("--device mps", "--device mps: unknown device; there are cpu, cuda and cuda:0"),
        ("--device cpu:1", "--device cpu:1: there is one cpu; write --device cpu"),
        ("--device cuda:99", "GPUs here"),
        ("--repeats 0", "--repeats: input should be greater than or equal to 1"),
        ("--repeats two", "--repeats: input should be a number, got 'two'"),
        ("--repeats 1.5", "--repeats: input should be a valid integer"),
        ("--tyny", "unknown option '--tyny'; did you mean '--tiny'?; --help shows examples"),
        ("--device", "argument --device: expected one argument; --help shows examples"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, message, tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert run_command("bench", "--tiny", *arguments.split(), out=path) == 2
    told = capsys.readouterr()
    assert len(told.err.splitlines()) == 1
    assert message in told.err
    assert not path.exists()


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, capsys):
    assert run_command("bench", "--tiny", "--device", "cpu", "--out", tmp_path) == 2
    told = capsys.readouterr()
    assert told.err == f"--out {tmp_path} cannot be written: Is a directory\n"
    assert "matmul" not in told.out


def test_parts_are_chosen_in_their_given_order_and_once():
    names = bench.chosen_parts("extraction, matmul,hegraph-epoch,matmul")
    assert names == ["extraction", "matmul", "hegraph_epoch"]
    settings = bench_parts.BenchSettings("cpu", bench_parts.BENCH_SIZES["cpu"], 3)
    assert bench.bench_settings("cpu") == settings


def test_help_shows_examples_and_parts(capsys):
    assert run_command("bench", "--help") == 0
    told = capsys.readouterr().out
    assert "vlmadapt bench --tiny" in told
    parts = re.search(r"parts: ((?:\w+,\s+)*\w+)", told)[1]
    assert re.split(r",\s+", parts) == list(bench.BENCH_PARTS)


def test_committed_reports_tell_nothing_about_their_machine():
    reports = sorted((ROOT / "outputs/measured").glob("bench*.json"))
    assert reports
    for path in reports:
        report = json.loads(path.read_text())
        assert report["schema_version"] == bench.BENCH_SCHEMA_VERSION
        assert report["parts"]
        marks = ("/home/", "/Users/", str(Path.home()), str(ROOT), tempfile.gettempdir())
        assert not any(mark in path.read_text() for mark in marks)


def test_peak_memory_is_in_megabytes():
    settings = bench_parts.BenchSettings("cpu", SMALL, 1)
    held = np.ones(64 * 2**20, np.uint8)
    figure = bench_parts.peak_memory(settings)["peak_memory_mb"]
    present = psutil.Process().memory_info().rss / 2**20
    assert held.nbytes / 2**20 < present
    assert present / 2 < figure < psutil.virtual_memory().total / 2**20
    assert memory.peak()["peak_memory_mb"] == pytest.approx(figure, rel=0.5)
