"Many results: what would take too long in a notebook."

import json
import time

from vlmadapt.core.hashing import content_key
from vlmadapt.reporting.tables import read_results


def test_ten_thousand_files_in_five_seconds(tmp_path, capsys):
    "One row in each of 10,000 result files, of the size that a row on a test set of 2,500 images has; seconds are those of the processor."
    predictions = " ".join(str(i % 100) for i in range(2500))
    for i in range(10_000):
        settings = dict(
            dataset=f"d{i % 11}",
            shots=2 ** (i % 5),
            backbone="RN50",
            prompts="template",
            trials=16,
            views=10,
            fixed={},
        )
        row = dict(
            method="TipAdapter",
            seed=i,
            settings=settings,
            key="k",
            accuracy=50 + i % 7,
            macro_f1=50.0,
            n=2500,
            selection="few_shot_val",
            trainable_parameters=5,
            family="TipAdapter",
            above_zero_shot=1.0,
            predictions=predictions,
            correct="01" * 1250,
            per_class=[50.0] * 100,
            hyper_parameters=dict(alpha=1.0, beta=2.0),
            log=dict(entries=0),
            cost=dict(fit_s=3.0, evaluate_s=0.1, encode_s=1.0, peak_memory_mb=300.0),
            provenance=dict(backbone_key="ab", split="s", transform="t", prompt_set="p"),
            environment=dict(commit="c0ffee", device="cpu", versions={"torch": "2", "numpy": "2"}),
        )
        row["digest"] = content_key(row=row)
        run = tmp_path / f"run{i}"
        run.mkdir()
        (run / "rows").mkdir()
        (run / "result.json").write_text(json.dumps(dict(settings=settings, rows=[row], failed={})))
    began, clock = time.process_time(), time.perf_counter()
    results = read_results(tmp_path)
    spent, wall = time.process_time() - began, time.perf_counter() - clock
    with capsys.disabled():
        print(f"10,000 result files: {spent:.1f} s of the processor, {wall:.1f} s by the clock")
    assert (
        len(results) == 10_000 and results["accuracy"].mean() > 52 and "predictions" not in results
    )
    assert spent < 5
