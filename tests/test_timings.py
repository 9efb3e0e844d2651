"The estimate of a grid before anything of it has been measured."

import pandas as pd
import pytest
from conftest import ROOT, run_command

from vlmadapt.grid import command, costs, timings
from vlmadapt.grid.entries import method_entry
from vlmadapt.grid.params import read_runs
from vlmadapt.methods import METHODS

TINY = """experiment: few_shot
grid: {{dataset: [mini-digits, mini-shapes], shots: [1, 4], backbone: [mini]}}
parameters: {{methods: [{methods}], seeds: [1, 2], trials: 4}}
"""


@pytest.fixture
def params(tmp_path, monkeypatch):
    "A params file, on a machine that is twice as slow as that of the table."
    monkeypatch.setattr(command, "slowness", lambda: 2.0)

    def write(methods="ZeroShot, TaskRes"):
        text = TINY.format(methods=methods)
        (tmp_path / "tiny.yml").write_text(text)
        return tmp_path / "tiny.yml"

    return write


def forecast(capsys, tmp_path, name="tiny.yml"):
    "The last line of a dry run."
    assert run_command("grid", tmp_path / name, dry_run=True, out=tmp_path / "outputs") == 0
    return capsys.readouterr().out.splitlines()[-1]


def test_the_table_has_every_feature_method_and_only_positive_seconds():
    table = timings.shipped_timings()
    lacking = {"AMUTuning", "ProLIP"}  # which need what drawn features lack
    assert set(METHODS.names("features")) - lacking <= set(table["method"])
    assert (table["seconds"] > 0).all()
    assert table["method"].eq(timings.CALIBRATION).sum() == 1


def test_the_first_dry_run_estimates(params, tmp_path, capsys):
    params()
    line = forecast(capsys, tmp_path)
    assert "core hours" in line and "shipped timings scaled to this machine" in line
    assert "nothing" not in line


def test_a_slower_machine_takes_longer(params, tmp_path):
    runs = read_runs(params(), tmp_path / "outputs")
    one = costs.estimate_seconds(runs, {}, 1.0)
    two = costs.estimate_seconds(runs, {}, 2.0)
    start = len(runs) * costs.START_S
    assert two.seconds - start == pytest.approx(2 * (one.seconds - start))
    assert one.shipped == ["ZeroShot", "TaskRes"]
    assert costs.estimate_seconds(runs, {}).unknown == ["ZeroShot", "TaskRes"]


def test_results_of_a_smoke_run_count_and_are_scaled_to_the_size(params, tmp_path, capsys):
    file = params()
    (smoke,) = read_runs(file, tmp_path / "outputs", smoke=True)
    store = smoke.results()
    entry = store.entries[1]
    cost = dict(fit_s=100.0)
    store.save(entry, 1, dict(metric="accuracy", value=50.0, cost=cost, trainable_parameters=1))
    line = forecast(capsys, tmp_path)
    assert "from 1 measurements that exist and shipped timings" in line
    assert line.endswith("of ZeroShot") or "of ZeroShot;" in line
    runs = read_runs(file, tmp_path / "outputs")
    measured = costs.measured_costs([*runs, smoke])
    found = costs.estimate_seconds(runs, measured)
    # 8 units of TaskRes take at least as long as the smallest, which took 100 s
    assert found.seconds > 8 * 100
    larger = timings.work_of(runs[-1].parameters, entry), timings.work_of(smoke.parameters, entry)
    seconds = [timings.shipped_seconds("TaskRes", work) for work in larger]
    assert seconds[0] > seconds[1]


def test_a_method_that_no_table_knows_is_named(params, tmp_path, capsys):
    params("ZeroShot, AMUTuning")
    assert "nothing is known of AMUTuning" in forecast(capsys, tmp_path)


@pytest.mark.parametrize("larger", [dict(shots=16), dict(trials=16), dict(dataset="imagenet")])
def test_more_work_takes_longer(larger):
    run = dict(dataset="dtd", backbone="ViT-B-16", shots=4, trials=0)
    entry = method_entry("TaskRes")
    small, large = (timings.work_of(r, entry) for r in (run, run | larger))
    assert timings.shipped_seconds("TaskRes", small) < timings.shipped_seconds("TaskRes", large)


def test_a_bundle_tells_its_size_without_being_read(tmp_path, monkeypatch):
    import torch
    from safetensors.torch import save_file

    save_file({"text": torch.ones(7, 5)}, tmp_path / "features.safetensors")
    assert timings.problem_size(dict(dataset=str(tmp_path))) == (7, 5)
    monkeypatch.setenv("VLMADAPT_DATA", str(tmp_path.parent))
    assert timings.problem_size(dict(bundle=tmp_path.name)) == (7, 5)
    assert timings.problem_size(dict(bundle="absent")) is None


def test_the_calibration_row_is_that_of_the_workload(monkeypatch):
    table = pd.DataFrame([dict(method=timings.CALIBRATION, seconds=0.5)])
    monkeypatch.setattr(timings, "shipped_timings", lambda: table)
    monkeypatch.setattr(timings, "calibration_seconds", lambda limit: 1.5)
    timings.slowness.cache_clear()
    assert timings.slowness() == 3.0
    timings.slowness.cache_clear()


def test_the_table_is_package_data():
    assert (ROOT / "vlmadapt/grid/timings.csv").is_file()
    assert '"*.csv"' in (ROOT / "setup.py").read_text()


def test_a_grid_of_unknown_methods_has_no_estimate(params, tmp_path, capsys):
    params("AMUTuning")
    assert "no estimate" in forecast(capsys, tmp_path)


@pytest.mark.parametrize(
    "seconds, text", [(30, "0.5 minutes"), (7200, "2.0 hours"), (864_000, "10.0 days")]
)
def test_times_have_the_unit_of_their_size(seconds, text):
    assert command._duration(seconds) == text
