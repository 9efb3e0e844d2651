"""Measure the table of processor seconds that `vlmadapt grid --dry-run` estimates from.

    python tools/measure_timings.py --out vlmadapt/grid/timings.csv
    python tools/measure_timings.py --check outputs/measured/features.parquet --out FILE.json

Each line is one measurement (search, fit, evaluation on drawn features) with few epochs, on one
thread. --check compares the estimates with measured results and writes the factors between them.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from vlmadapt.core.verbosity import at_verbosity
from vlmadapt.grid.entries import method_entry
from vlmadapt.grid.measurement import measure
from vlmadapt.grid.timings import CALIBRATION, Work, calibration_seconds, shipped_seconds, work_of
from vlmadapt.methods import METHODS
from vlmadapt.methods.requirements import offers
from vlmadapt.problems.classification import FewShotProblem
from vlmadapt.problems.few_shot import few_shot
from vlmadapt.reporting.bench_parts import random_unit_rows

SIZES = [(10, 1, 64), (10, 16, 64), (20, 16, 512), (100, 4, 256), (100, 16, 512)]  # K, S, D
EPOCHS = {0: 3, 3: 1}  # trials -> epochs of each fit
LONG = {(10, 16, 64): 30, (20, 16, 512): 12}  # size -> epochs: what a step costs beside a start
TOWERS = ["CoOp", "CoCoOp", "VPT", "MaPLe", "MuDPT"]  # on the mini backbone
COLUMNS = ["method", "backbone", *Work.__dataclass_fields__, "seconds"]


def drawn_problem(K: int, S: int, D: int) -> FewShotProblem:
    "A problem of random features with two prompts for each class."
    labels = torch.arange(K)

    def split(count, name):
        x = random_unit_rows(K * count, D, name=name)
        return x + 0.3 * text.repeat_interleave(count, 0), labels.repeat_interleave(count)

    text = random_unit_rows(K, D, name="text")
    return FewShotProblem.from_features(
        [f"class {k}" for k in range(K)],
        8 * text,
        train=split(S, "support"),
        val=split(min(S, 4), "validation"),
        test=split(20, "test"),
        text_neg=random_unit_rows(K, D, name="negative"),
        text_all=8 * text + random_unit_rows(2, K, D, name="prompts"),
    )


def measured_line(name, problem, run, backbone="", epochs=None):
    "Measure a method once; None where the problem lacks what it needs."
    cls = METHODS[name]
    if not all(offers(problem, need) for need in cls.required(cls.completed({}))):
        return None
    epochs = epochs or EPOCHS[run["trials"]]
    given = {n: epochs for n in ("epochs", "max_iter") if n in cls.defaults()}
    entry = method_entry(
        dict(method=name, variant="short", hyper_parameters=given) if given else name
    )
    work = work_of(run, entry)
    problem.provenance.setdefault("dataset", "drawn")
    start = time.process_time()
    list(measure(entry, [problem], [1], trials=run["trials"]))
    seconds = time.process_time() - start
    return dict(method=name, backbone=backbone, **asdict(work), seconds=round(seconds, 4))


def measured_lines():
    "Yield the lines of the table."
    yield dict.fromkeys(COLUMNS, 0) | dict(
        method=CALIBRATION, backbone="", seconds=round(calibration_seconds(), 5)
    )
    features = METHODS.names("features")
    for (K, S, D), epochs in LONG.items():
        problem = drawn_problem(K, S, D)
        sized.update(classes=K, width=D)
        for name in features:
            if {"epochs", "max_iter"} & set(METHODS[name].defaults()):
                yield measured_line(name, problem, dict(shots=S, trials=0), epochs=epochs)
    for K, S, D in SIZES:
        problem = drawn_problem(K, S, D)
        sized.update(classes=K, width=D)
        for trials in EPOCHS:
            for name in features:
                yield measured_line(name, problem, dict(shots=S, trials=trials))
    for shots in (1, 4):
        problem = few_shot("mini-digits", shots=shots)
        sized.update(classes=10, width=64)
        for name in TOWERS:
            yield measured_line(name, problem, dict(shots=shots, trials=0), "mini")


sized = dict(classes=0, width=0)  # of the problem that is measured


def measure_table(path: Path):
    "Write the table, line after line."
    from vlmadapt.grid import timings

    timings.problem_size = lambda parameters: (sized["classes"], sized["width"])
    warm = drawn_problem(3, 4, 8)
    list(measure("TaskRes", [warm], [1], trials=0))  # imports
    lines = []
    for line in measured_lines():
        if line is None:
            continue
        lines.append(line)
        size = {k: line[k] for k in ("classes", "support", "width", "epochs", "candidates")}
        print(f"{line['method']:20} {line['seconds']:8.3f} s {size}", flush=True)
        pd.DataFrame(lines, columns=COLUMNS).to_csv(path, index=False)


def check(path: Path) -> dict:
    "Compare the estimate of every measured result with what it took."
    import yaml

    from vlmadapt.grid import timings

    params = yaml.safe_load(Path("params/features.yml").read_text())["parts"]
    fixed = {**params["imagenet"]["parameters"]["fixed"]}
    sizes = dict(
        clip_vitb32_imagenet=(1000, 512),
        clip_vitb32_stanford_cars=(196, 512),
        clip_rn50_whurs19=(19, 1024),
        clip_vitb32_whurs19=(19, 512),
        clip_vitl14_whurs19=(19, 768),
    )
    timings.problem_size = lambda parameters: sizes[parameters["dataset"]]
    results = pd.read_parquet(path).dropna(subset=["fit_processor_seconds"])
    lines = []
    for row in results.itertuples():
        given = dict(fixed.get(row.method) or {}) if "imagenet" in row.dataset else {}
        entry = method_entry(row.method).model_copy(update={"hyper_parameters": given})
        run = dict(dataset=row.dataset, shots=row.shots, trials=row.trials)
        estimate = shipped_seconds(row.method, work_of(run, entry))
        if estimate is not None:
            lines.append(dict(method=row.method, dataset=row.dataset, estimate=estimate))
            lines[-1]["measured"] = row.fit_processor_seconds
    table = pd.DataFrame(lines)
    factors = table["estimate"] / table["measured"].clip(lower=0.05)
    by_data = table.groupby("dataset")[["estimate", "measured"]].sum()
    long = table["measured"] >= 1
    logs = np.abs(np.log(factors[long]))
    return dict(
        results=len(table),
        results_of_a_second_or_more=int(long.sum()),
        median_factor=float(factors[long].median()),
        share_within_factor_2=float((logs <= np.log(2)).mean()),
        share_within_factor_4=float((logs <= np.log(4)).mean()),
        sum_estimated_s=float(table["estimate"].sum()),
        sum_measured_s=float(table["measured"].sum()),
        sums_by_dataset=(by_data["estimate"] / by_data["measured"]).to_dict(),
        median_factor_by_method=factors[long].groupby(table["method"]).median().to_dict(),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--check", type=Path, help="a table of measured results, .parquet")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with at_verbosity("quiet"):
        if options.check:
            found = check(options.check)
            options.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        else:
            measure_table(options.out)


if __name__ == "__main__":
    main()
