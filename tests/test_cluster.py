"A grid on two Ray nodes: a node is lost, the driver is killed, and a run always fails."

import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest
from test_grid import TINY, files, numbers, params, wait_for  # noqa: F401

from vlmadapt.grid.params import read_runs
from vlmadapt.grid.runs import execute

CALL = """import sys
from vlmadapt.cli import main
sys.exit(main(["grid", sys.argv[1], "--out", sys.argv[2], "--address", sys.argv[3]]))"""
AGENTS = (
    "metrics_agent_port",
    "metrics_export_port",
    "dashboard_agent_listen_port",
    "runtime_env_agent_port",
)
GRID = TINY.replace("mini-shapes]", "mini-shapes, mini-objects]") + "  broken: mini-objects\n"


class SlowClock:
    "Ray's clock while it starts a node: its limit of 30 seconds lasts ten times as long."

    time, sleep = time.time, time.sleep

    @staticmethod
    def monotonic():
        return time.monotonic() / 10


def ports():
    "Free ports for a node's agents: given in advance, nobody waits for them."
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in AGENTS]
        return dict(zip(AGENTS, [s.getsockname()[1] for s in sockets], strict=True))


@pytest.fixture
def two_nodes(monkeypatch):
    "A cluster of two nodes on this machine, and the second node."
    monkeypatch.setenv("PAUSE", "0.3")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray._private import node as ray_node
    from ray.cluster_utils import Cluster

    monkeypatch.setattr(ray_node, "time", SlowClock)

    def node():
        return dict(num_cpus=1, object_store_memory=80 * 2**20, **ports())

    cluster = persistent(
        lambda: Cluster(
            initialize_head=True, head_node_args=dict(include_dashboard=False, **node())
        )
    )
    try:
        yield cluster, persistent(lambda: cluster.add_node(**node()))
    finally:
        cluster.shutdown()


def persistent(begin, times=5):
    "Try again: the parts of a Ray node wait 20 seconds for each other, too short if busy."
    for left in reversed(range(times)):
        try:
            return begin()
        except Exception:
            if not left:
                raise
    raise AssertionError("no attempt")


def start(file, out, cluster):
    return subprocess.Popen(
        [sys.executable, "-c", CALL, file, out, cluster.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_lost_node_and_killed_driver(params, tmp_path, two_nodes):  # noqa: F811
    cluster, second = two_nodes
    file = params(GRID)
    out = tmp_path / "outputs"
    runs = read_runs(file, out)
    grid = start(file, out, cluster)
    wait_for(lambda: len(files(out)) >= 3, grid)
    kept = files(out)
    grid.send_signal(signal.SIGKILL)
    grid.wait()  # the driver; its runs end with it
    assert kept.items() <= files(out).items()
    goal = len(files(out)) + 2
    grid = start(file, out, cluster)
    wait_for(lambda: len(files(out)) >= goal, grid)
    kept = files(out)
    cluster.remove_node(second, allow_graceful=False)  # a machine, with what runs on it
    assert grid.wait(timeout=300) == 1, grid.stdout.read()
    told = grid.stdout.read()
    assert "mini-objects: ValueError: mini-objects is broken" in told, told
    assert kept.items() <= files(out).items() and len(files(out)) == 24
    undisturbed = read_runs(params(GRID, "alone.yml"), tmp_path / "undisturbed")
    assert [execute(run) for run in undisturbed if "objects" not in run.name] == [None, None]

    def whole(runs):
        return numbers([run for run in runs if "objects" not in run.name])

    assert whole(runs) == whole(undisturbed)
    (broken,) = (run for run in runs if "objects" in run.name)
    assert (
        "Traceback" in broken.error_file.read_text()
        and not broken.results().result_file.exists()
        and "mini-objects" in (out / "tiny/status.txt").read_text()
    )
