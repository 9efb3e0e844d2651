"Many results, and results of version 0.1: what would take too long in a notebook."

import json
import time
import warnings
from pathlib import Path

import pytest

from vlmadapt.grid.results import read_results, read_run
from vlmadapt.grid.schema import Result, to_record

OLD = Path(__file__).parent / "pinned/results_0_1"  # written by version 0.1


def test_ten_thousand_files_in_five_seconds(tmp_path, capsys):
    "One result on 2,500 images in each of 10,000 files; seconds are those of the processor."
    predictions = " ".join(str(i % 100) for i in range(2500))
    for i in range(10_000):
        result = Result(
            method="TipAdapter",
            seed=i,
            dataset=f"d{i % 11}",
            evaluated_on=f"d{i % 11}",
            shots=2 ** (i % 5),
            backbone="RN50",
            prompts="template",
            settings=dict(trials=16, views=10),
            key="k",
            metric="accuracy",
            value=50.0 + i % 7,
            n=2500,
            selection=dict(rule="few_shot_val", trials=100, value=50.0),
            trainable_parameters=5,
            predictions=predictions,
            correct="01" * 1250,
            per_class=[50.0] * 100,
            hyper_parameters=dict(alpha=1.0, beta=2.0),
            cost=dict(fit_s=3.0, evaluate_s=0.1, encode_s=1.0, peak_memory_mb=300.0),
            provenance=dict(backbone_key="ab", split="s", transform="t", prompt_set="p"),
            environment=dict(commit="c0ffee", device="cpu", versions={"torch": "2", "numpy": "2"}),
        )
        run = tmp_path / f"run{i}"
        (run / "results").mkdir(parents=True)
        (run / "result.json").write_text(json.dumps(dict(results=[to_record(result)], failed={})))
    start, clock = time.process_time(), time.perf_counter()
    results = read_results(tmp_path)
    spent, wall = time.process_time() - start, time.perf_counter() - clock
    with capsys.disabled():
        print(f"10,000 result files: {spent:.1f} s of the processor, {wall:.1f} s by the clock")
    assert len(results) == 10_000 and results["value"].mean() > 52
    assert "predictions" not in results
    assert spent < 5


@pytest.fixture
def old():
    "The results of version 0.1 by run, method, variant, seed, data, classes, point and metric."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame = read_results(OLD)
    columns = ["run", "method", "variant", "seed", "evaluated_on", "class_split", "point", "metric"]
    return frame.assign(point=frame["point"].fillna("")).set_index(columns).sort_index()


def test_every_kind_of_old_measurement_is_a_result(old):
    "Seeds, variants, new classes, other datasets, points of a hyper-parameter and other metrics."
    digits = "mini-digits"
    expected = [
        ("few_shot", "TipAdapter", "", 2, digits, "all", "", "accuracy", 76.5568),
        ("few_shot", "HeGraphAdapter", "T", 1, digits, "all", "", "macro_f1", 72.0599),
        ("base_to_new", "ZeroShot", "", 1, digits, "base", "", "accuracy", 81.3869),
        ("base_to_new", "ZeroShot", "", 1, digits, "new", "", "accuracy", 86.3971),
        ("shifts", "TipAdapter", "", 1, "mini-shapes-sketch", "all", "", "accuracy", 48.5),
        ("sensitivity", "HeGraphAdapter", "T", 1, digits, "all", "alpha_vp=0", "accuracy", 70.8791),
        ("released", "TipAdapterF", "", 1, digits, "all", "", "accuracy_as_released", 70.8791),
        ("tasks", "PAdapter", "residual", 1, "mini-captions", "all", "", "cider", 102.5082),
        ("tasks", "Frozen", "", 1, "mini-captions", "all", "", "bleu4", 0.0),
    ]
    assert len(old) == 39
    for *place, value in expected:
        assert old.loc[tuple(place), "value"] == pytest.approx(value, abs=1e-4)


def test_selection_of_old_results(old):
    "The rule, the number of candidates and the best validation value are fields."
    searched = old.loc[("tasks", "PAdapter")].iloc[0]
    assert (searched["selection"], searched["candidates"]) == ("val", 2)
    assert searched["validation_value"] == pytest.approx(101.0343, abs=1e-4)
    assert old.loc[("sensitivity", "HeGraphAdapter"), "selection"].unique() == ["given"]
    point = old.xs("alpha_vp=0", level="point").iloc[0]
    assert point["hyper_parameters"]["alpha_vp"] == 0


def test_old_results_that_were_edited_are_left_out(tmp_path):
    "The digest of version 0.1 is checked before anything is converted."
    run = tmp_path / "run"
    run.mkdir()
    text = (OLD / "shifts/result.json").read_text()
    (run / "result.json").write_text(text.replace('"accuracy": 48.5', '"accuracy": 98.5'))
    with pytest.warns(UserWarning, match="1 of 2 results are left out, the first is TipAdapter"):
        assert {result.method for result in read_run(run)} == {"ZeroShot"}


def test_old_copies_count_once(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_bytes((OLD / "tasks/result.json").read_bytes())
    with pytest.warns(UserWarning, match="6 of 6 results are copies of others"):
        assert len(read_results(tmp_path)) == 6
