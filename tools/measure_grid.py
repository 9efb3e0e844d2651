"""Measure a grid from its command to its last result: processor seconds and the first result.

    python tools/measure_grid.py params/demo.yml --out outputs/measured/demo.json

Processor seconds are those of the command and of all processes that it starts. On a loaded machine
they tell more than seconds on the clock; `two_cores_s` is half of them, what two idle cores need at
least.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from vlmadapt.core.environment import environment


class Spent:
    "Processor seconds of a process and of its descendants, also of those that have ended."

    def __init__(self, pid: int):
        self.root = psutil.Process(pid)
        self.seconds: dict[tuple, float] = {}

    def read(self) -> float:
        for process in self._family():
            try:
                times = process.cpu_times()
                key = process.pid, process.create_time()
                self.seconds[key] = times.user + times.system
            except psutil.Error:
                continue
        return sum(self.seconds.values())

    def _family(self):
        try:
            return [self.root, *self.root.children(recursive=True)]
        except psutil.Error:
            return []


def measure(arguments: list[str], folder: Path) -> dict:
    "Run a grid command and follow it."
    began = time.monotonic()
    command = [sys.executable, "-m", "vlmadapt", "grid", *arguments, "--out", str(folder)]
    process = subprocess.Popen(command)
    spent = Spent(process.pid)
    found: dict = {}
    while process.poll() is None:
        seconds = spent.read()
        if "first_result" not in found and any(folder.rglob("results/*.json")):
            clock = time.monotonic() - began
            found["first_result"] = dict(
                processor_seconds=seconds, clock_s=clock, two_cores_s=seconds / 2
            )
        time.sleep(0.1)
    seconds = spent.read()
    found["all_results"] = dict(
        processor_seconds=seconds, clock_s=time.monotonic() - began, two_cores_s=seconds / 2
    )
    found["results"] = sum(1 for _ in folder.rglob("results/*.json"))
    found["exit_status"] = process.returncode
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("params")
    parser.add_argument("--only", default="")
    parser.add_argument("--workers", default="2")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    arguments = [options.params, "--workers", options.workers]
    if options.only:
        arguments += ["--only", options.only]
    with tempfile.TemporaryDirectory() as folder:
        load = os.getloadavg()[0]
        found = measure(arguments, Path(folder) / "outputs")
    text = " ".join(["vlmadapt grid", *arguments])
    found = dict(environment=environment(), load=load, command=text, **found)
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
