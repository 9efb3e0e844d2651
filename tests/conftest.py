"""What all tests share: the root of the checkout, one thread per worker, caches of their own."""

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
TEST_DATA = Path(os.environ.get("VLMADAPT_TEST_DATA", ROOT.parent / "shared"))
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests/crash_points")]


def pytest_configure(config):
    if os.environ.get("PYTEST_XDIST_WORKER"):
        os.environ["OMP_NUM_THREADS"] = "1"


SLOW_FILES = (
    "test_cluster.py",
    "test_crash_points.py",
    "test_docs.py",
    "test_grid.py",
    "test_hostile_archives.py",
    "test_lab.py",
    "test_package.py",
)


def pytest_collection_modifyitems(items):
    "Leave whole grids, the built package and the site in a browser to `make test-slow`."
    for item in items:
        if item.path.name in SLOW_FILES:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def scratch(tmp_path_factory, worker_id):
    "A folder of this test run, the same for all its workers."
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session", autouse=True)
def own_caches(scratch):
    "Share encoded features among the notebooks of this test run, outside of the user's cache."
    os.environ["VLMADAPT_CACHE"] = str(scratch / "cache")
    os.environ["MPLBACKEND"] = "agg"


@pytest.fixture(autouse=True)
def nothing_stays_registered():
    "Forget after each test what it has registered; a test that loads no registry keeps it so."
    modules = [
        ("vlmadapt.data.datasets", "DATASETS"),
        ("vlmadapt.data.tasks", "TASKS"),
        ("vlmadapt.models.backbones", "BACKBONES"),
    ]
    registries = [getattr(sys.modules[name], item) for name, item in modules if name in sys.modules]
    tables = []
    for registry in registries:
        registry.load_plugins()  # what registers when it is first asked is there before the test
        tables += [registry._items, registry._modules, registry._first]
    if "vlmadapt.methods" in sys.modules:
        methods = sys.modules["vlmadapt.methods"].METHODS
        assert len(methods)
        tables += [methods._classification, methods._generation]
    with ExitStack() as stack:
        for table in tables:
            stack.enter_context(mock.patch.dict(table))
        yield


def shared_data(*parts):
    "Return the path of a file or folder of the data for tests; skip where it is not at hand."
    path = TEST_DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no {path}: set VLMADAPT_TEST_DATA")
    return path


def write_experiment(path, parameters, body):
    "Write a notebook with a cell of parameters and a cell of code; return its cells."
    cells = [
        nbformat.v4.new_code_cell(parameters, metadata=dict(tags=["parameters"])),
        nbformat.v4.new_code_cell(body),
    ]
    kernel = dict(name="python3", display_name="python3", language="python")
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel))
    nbformat.write(notebook, path)
    return cells


def run_command(*arguments, **options):
    "Run `vlmadapt` in this process with `options` as flags; return its exit status."
    from vlmadapt.cli import main

    flags = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            flags.append(flag)
        elif value is not None and value is not False:
            flags += [flag, str(value)]
    return main([*map(str, arguments), *flags])


def refused(function, *parts, error=ValueError):
    "Check that `function` is refused in one line that holds `parts`; return the line."
    with pytest.raises(error) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message
