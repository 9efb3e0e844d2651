"Many results, and results of version 0.1: what would take too long in a notebook."

import json
import warnings
import weakref
from collections import Counter
from pathlib import Path

import pytest

from vlmadapt.grid import results
from vlmadapt.grid.results import read_results, read_run
from vlmadapt.grid.schema import Result, to_record

OLD = Path(__file__).parent / "pinned/results_0_1"  # written by version 0.1


def write_runs(folder, runs, each=4):
    "Write `runs` runs of `each` results on 2,500 images."
    for run in range(runs):
        records = []
        for seed in range(each):
            result = Result(
                method="TipAdapter",
                seed=seed,
                dataset=f"d{run}",
                evaluated_on=f"d{run}",
                shots=2 ** (run % 5),
                backbone="RN50",
                settings=dict(trials=16, views=10),
                key="k",
                metric="accuracy",
                value=50.0 + seed,
                predictions=" ".join(str(i % 100) for i in range(2500)),
                correct="01" * 1250,
                per_class=[50.0] * 100,
                cost=dict(fit_s=3.0, evaluate_s=0.1, encode_s=1.0, extra_s=2.0),
                environment=dict(commit="c0ffee", device="cpu", versions={"torch": "2"}),
            )
            records.append(to_record(result))
        (folder / f"run{run}").mkdir()
        (folder / f"run{run}/result.json").write_text(json.dumps(dict(results=records)))


@pytest.mark.parametrize("runs", [5, 10])
def test_reading_is_linear_and_keeps_one_run_in_memory(tmp_path, monkeypatch, runs):
    "Each file is opened and each record checked once; predictions of earlier runs are dropped."
    write_runs(tmp_path, runs)
    counts, made, most = Counter(), [], []
    read, check = results.read_result_file, results.from_record

    def counted_read(path):
        counts["files"] += 1
        file = read(path)
        made.append(weakref.ref(file))
        most.append(sum(known() is not None for known in made))
        return file

    def counted_check(record):
        counts["records"] += 1
        return check(record)

    monkeypatch.setattr(results, "read_result_file", counted_read)
    monkeypatch.setattr(results, "from_record", counted_check)
    frame = read_results(tmp_path)
    assert counts == dict(files=runs, records=4 * runs)
    assert max(most) <= 2
    assert len(frame) == 4 * runs
    assert "predictions" not in frame
    assert set(frame["extra_s"]) == {2.0}
    assert set(frame["versions"]) == {"torch 2"}
    assert frame.groupby("seed")["value"].mean().tolist() == [50.0, 51.0, 52.0, 53.0]


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
