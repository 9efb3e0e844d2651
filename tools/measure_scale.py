"""Measure adaptation and evaluation on ImageNet's size: drawn features, memory-mapped.

    python tools/measure_scale.py --folder /tmp/imagenet --out outputs/measured/imagenet_scale.json

Features of 1.28 million train and 50,000 test images are drawn and written to --folder as float16
(1.3 GB at width 512), a bundle as `vlmadapt.from_bundle` reads it. Each method is then measured in
a process of its own: 16 shots are drawn from the bundle, the method is fitted and evaluated.
--epochs limits the epochs that are run, for a machine where 300 epochs would take too long; the
seconds of the whole recipe are then computed from the seconds of one epoch, and marked as such.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

METHODS = ("ZeroShot", "TipAdapter", "GDA", "LPPlusPlus", "CLAP", "HeGraphAdapter")
TYPES = {"float16": ("F16", np.float16), "float32": ("F32", np.float32)}
BLOCK = 65_536  # rows that are drawn at once


def sizes_of(options) -> dict[str, tuple[int, ...]]:
    "Shapes of the arrays of the bundle."
    K, D = options.classes, options.width
    found = {"text": (K, D), "text_neg": (K, D)}
    for split, N in dict(train=options.train, val=10 * K, test=options.test).items():
        found |= {f"{split}_x": (N, D), f"{split}_y": (N,)}
    return found


def drawn_rows(count: int, centres: np.ndarray, rng) -> np.ndarray:  # (count, D)
    "Draw unit rows around the centre of their class, classes in turn."
    K, D = centres.shape
    x = rng.standard_normal((count, D), dtype=np.float32) / D**0.5
    x += 0.35 * centres[np.arange(count) % K]
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def write_bundle(folder: Path, options):
    "Write the arrays one after another, block by block; nothing whole is ever in memory."
    folder.mkdir(parents=True, exist_ok=True)
    code, dtype = TYPES[options.dtype]
    header, place = {}, 0
    for name, shape in sizes_of(options).items():
        own = ("I64", 8) if name.endswith("_y") else (code, np.dtype(dtype).itemsize)
        size = own[1] * int(np.prod(shape))
        header[name] = dict(dtype=own[0], shape=list(shape), data_offsets=[place, place + size])
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(1)
    K, D = options.classes, options.width
    centres = drawn_rows(K, np.zeros((1, D), np.float32), rng)
    with open(folder / "features.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (rows, *_) in sizes_of(options).items():
            for start in range(0, rows, BLOCK):
                count = min(BLOCK, rows - start)
                if name.endswith("_y"):
                    file.write((np.arange(start, start + count) % K).astype(np.int64).tobytes())
                elif name == "text":
                    file.write((8 * centres).astype(dtype).tobytes())  # CLAP reads their length
                else:
                    shifted = np.roll(centres, -start, axis=0)  # row i belongs to class i % K
                    file.write(drawn_rows(count, shifted, rng).astype(dtype).tobytes())
    names = [f"class {k}" for k in range(K)]
    (folder / "classnames.json").write_text(json.dumps(names))


class Memory(threading.Thread):
    "Sample what the process holds of its own (anonymous) and all that is resident, in MB."

    def __init__(self):
        super().__init__(daemon=True)
        self.peaks = {"RssAnon": 0, "VmRSS": 0}
        self.start_values = self.now()
        self.start()

    def now(self) -> dict[str, float]:
        "Present values."
        lines = Path("/proc/self/status").read_text().splitlines()
        pairs = [line.split(":") for line in lines if line.startswith(("RssAnon", "VmRSS"))]
        return {name: int(value.split()[0]) / 1024 for name, value in pairs}

    def run(self):
        while True:
            for name, value in self.now().items():
                self.peaks[name] = max(self.peaks[name], value)
            time.sleep(0.02)


def clocked(function):
    "Return what a function returns, and seconds of the clock and of the processor."
    clock, processor = time.perf_counter(), time.process_time()
    found = function()
    return found, dict(s=time.perf_counter() - clock, cpu_s=time.process_time() - processor)


def measure_one(folder: Path, name: str, options) -> dict:
    "Measure one method in this process."
    import sklearn.metrics  # noqa: F401, so that `evaluate` is timed without the import

    import vlmadapt as va
    from vlmadapt.methods import METHODS as known
    from vlmadapt.problems.classification import FewShotProblem
    from vlmadapt.training.evaluation import evaluate

    torch.set_num_threads(options.threads)
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # imports what training needs
    cls = known[name]
    memory = Memory()
    problem, problem_time = clocked(
        lambda: FewShotProblem.from_bundle(folder, shots=options.shots, seed=1)
    )
    recipe = cls.recipe.get("epochs", 0)
    epochs = min(recipe, options.epochs or recipe)
    given = {"epochs": epochs} if recipe else {}
    method, build_time = clocked(lambda: va.create_method(name, problem, **given))
    ends = []
    _, fit_time = clocked(
        lambda: va.fit(
            method, problem, seed=1, after_epoch=lambda _: ends.append(time.process_time())
        )
    )
    found, evaluate_time = clocked(lambda: evaluate(method, problem))
    line = dict(method=name, problem=problem_time, build=build_time, fit=fit_time)
    line |= dict(evaluate=evaluate_time, epochs=epochs, epochs_of_recipe=recipe)
    if epochs > 1:
        epoch = (ends[-1] - ends[0]) / (len(ends) - 1)
        line["epoch_cpu_s"] = epoch
        line["whole_fit_cpu_s"] = fit_time["cpu_s"] + epoch * (recipe - epochs)
    time.sleep(0.05)
    for peak, start, label in zip(
        memory.peaks.values(), memory.start_values.values(), ("own_mb", "resident_mb"), strict=True
    ):
        line[f"peak_{label}"] = peak
        line[f"peak_{label}_above_start"] = peak - start
    return line | dict(accuracy=found["accuracy"], tested=found["n"])


def measure_all(options) -> list[dict]:
    "Measure each method in a fresh process."
    rows = []
    for name in options.methods.split(","):
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        row = rows[-1]
        seconds = ", ".join(f"{k} {row[k]['cpu_s']:.1f} s" for k in ("problem", "fit", "evaluate"))
        memory = f"{row['peak_own_mb_above_start']:.0f} MB of its own"
        print(f"{name}: {seconds}; {memory}, {row['peak_resident_mb']:.0f} MB resident", flush=True)
    return rows


def parsed() -> argparse.Namespace:
    "Options of the command line."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for the drawn features")
    parser.add_argument("--out", type=Path, help="JSON file of the measurements")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--train", type=int, default=1_281_167)
    parser.add_argument("--test", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--dtype", choices=TYPES, default="float16")
    parser.add_argument("--epochs", type=int, default=0, help="at most; default: the recipe's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="leave the drawn features there")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    options = parsed()
    if options.only:
        print(json.dumps(measure_one(options.folder, options.only, options)))
        return
    from vlmadapt.core.environment import environment

    if not (options.folder / "features.safetensors").exists():
        write_bundle(options.folder, options)
    try:
        rows = measure_all(options)
    finally:
        if not options.keep:
            for name in ("features.safetensors", "classnames.json"):
                (options.folder / name).unlink()
    if options.out:
        sizes = {n: getattr(options, n) for n in ("train", "test", "classes", "width", "shots")}
        sizes |= dict(dtype=options.dtype, threads=options.threads)
        found = dict(environment=environment(), load=os.getloadavg()[0], sizes=sizes, rows=rows)
        options.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
