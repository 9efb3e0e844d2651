"""Measure a search of 16 trials trained side by side against the same trials one by one.

    python tools/measure_search.py --out outputs/measured/search.json

Features are random unit rows; the ratio is that of processor seconds (one by one / side by side),
the median of alternating repeats in one process.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch

from vlmadapt.core.environment import environment
from vlmadapt.methods import METHODS
from vlmadapt.reporting.bench_parts import BenchSizes, feature_problem
from vlmadapt.training.batched import fit_many
from vlmadapt.training.tuning import random_candidates

SIZES = {  # K, D, epochs
    "10x64": (10, 64, 30),
    "100x512": (100, 512, 4),
    "1000x512": (1000, 512, 1),
}
NAMES = ["GraphAdapter", "HeGraphAdapter", "TipAdapterF", "TaskRes", "CLIPAdapter", "LinearProbe"]


def spent(function) -> float:
    "Processor seconds of a call."
    start = time.process_time()
    function()
    return time.process_time() - start


def measure(name: str, size: str, trials: int, repeats: int) -> dict:
    "Times of both ways for one method and size."
    K, D, epochs = SIZES[size]
    sizes = BenchSizes(classes=K, width=D, shots=4 if K == 1000 else 16)
    problem = feature_problem(sizes, views=2)
    cls = METHODS[name]
    space = dict(cls.space)
    first = {n: v for n, v in cls.defaults().items() if n in space}
    candidates = random_candidates(space, first, trials, 1)
    runs = [(cls, {**candidate, "epochs": epochs}, problem, 1) for candidate in candidates]
    warm_up = [(cls, {**run[1], "epochs": 1}, problem, 1) for run in runs[:2]]
    fit_many(warm_up, progress=False)  # imports, and what all trials share
    stacked, alone = [], []
    for _ in range(repeats):
        stacked.append(spent(lambda: fit_many(runs, progress=False)))
        alone.append(spent(lambda: [fit_many([run], progress=False) for run in runs]))
    pairs = zip(alone, stacked, strict=True)
    return dict(
        method=name,
        size=size,
        trials=len(runs),
        epochs=epochs,
        side_by_side_s=statistics.median(stacked),
        one_by_one_s=statistics.median(alone),
        ratio=statistics.median(a / s for a, s in pairs),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--methods", default=",".join(NAMES))
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size in options.sizes.split(","):
        for name in options.methods.split(","):
            row = measure(name, size, options.trials, 1 if size == "1000x512" else options.repeats)
            rows.append(row)
            times = f"{row['one_by_one_s']:8.2f} s {row['side_by_side_s']:8.2f} s"
            print(f"{size:9} {name:15} {times} {row['ratio']:6.2f}", flush=True)
    if options.out:
        found = dict(environment=environment(), load=os.getloadavg()[0], rows=rows)
        options.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
