"Results of changed files and settings, results that were replaced, and the deviation of one seed."

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import write_experiment
from safetensors.torch import save_file

from vlmadapt.core.files import content_key, write_json
from vlmadapt.data.datasets import BENCHMARKS
from vlmadapt.grid.command import vlmadapt_grid
from vlmadapt.grid.named_files import NAMED_FILES, file_contents, file_hash
from vlmadapt.grid.params import read_runs
from vlmadapt.grid.results import deviation, read_results
from vlmadapt.grid.rows import Rows, row_key
from vlmadapt.grid.runs import execute
from vlmadapt.grid.runs import rows as rows_module
from vlmadapt.reporting.claims import check_claim
from vlmadapt.reporting.figures import shot_panels
from vlmadapt.reporting.plots import gain_bars
from vlmadapt.reporting.reproduction import beside, show_beside
from vlmadapt.reporting.summaries import averages, cells
from vlmadapt.reporting.tables import dataset_table, read_rows, save_frame

PARAMETERS = """dataset = 'mini-digits'  # name in DATASETS
shots = 1  # images per class
methods = ['ZeroShot']
seeds = [1]
trials = 0
prompts = 'template'
bundle = ''
fixed = {}
variants = {}
out = ''"""
BODY = """from vlmadapt.core.files import np_stream
from vlmadapt.grid.rows import Rows
def compute(method, seeds):
    for seed in seeds:
        content = ' '.join(rows.settings.get('file_contents', {}).values())
        yield dict(accuracy=100*np_stream(seed, method, str(trials), content).random(), cost=dict(fit_s=1.))
rows = Rows(out, dataset=dataset, shots=shots, trials=trials, prompts=prompts, bundle=bundle, fixed=fixed, variants=variants)
rows.fill(methods, seeds, compute)"""
SETTINGS = dict(dataset="mini-digits", shots=1, trials=0, prompts="template", fixed={})


@pytest.fixture
def grid(tmp_path, monkeypatch):
    "Execute a tiny experiment, whose accuracies are random numbers from named streams, in this process."
    cells = write_experiment(tmp_path / "tiny.ipynb", PARAMETERS, BODY)
    monkeypatch.chdir(tmp_path)

    def here(notebook, target, parameters, log):
        exec("\n".join(cell.source for cell in cells[1:]), dict(parameters))

    monkeypatch.setattr("vlmadapt.grid.runs.run_notebook", here)

    def write(**parameters):
        parameters = dict(methods=["ZeroShot", "TipAdapter"], seeds=[1]) | parameters
        Path("tiny.yml").write_text(
            json.dumps(dict(experiment="tiny.ipynb", parameters=parameters))
        )
        (run,) = read_runs("tiny.yml")
        return run

    return write


def accuracies(run):
    rows = json.loads((run.folder / "result.json").read_text())["rows"]
    return {(row["method"], row["seed"]): row["accuracy"] for row in rows}


def names(folder):
    return sorted(file.name for file in Path(folder).glob("*.json"))


def saved(folder, settings=SETTINGS, methods=("ZeroShot", "TipAdapter"), seeds=(1,), **more):
    "Rows in `folder`, gathered; the accuracy is 50 and the seed."
    rows = Rows(folder, **settings)
    for method in methods:
        for seed in seeds:
            rows.save(method, seed, dict(accuracy=50.0 + seed, **more))
    rows.gather()
    return rows


# Files behind the settings


def test_changed_descriptions_and_bundle_end_to_end(tmp_path, monkeypatch):
    "The real experiment in a kernel of its own: other features under the same name give other numbers."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLMADAPT_DATA", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "classnames.json").write_text('["a", "b"]')
    axes = torch.eye(2)
    Path("feats.yml").write_text(
        "experiment: features\nparameters: {bundle: mine, methods: [ZeroShot], seeds: [1], trials: 0}\n"
    )
    (run,) = read_runs("feats.yml")
    found = []
    for test in (axes, axes.flip(0)):
        arrays = dict(
            text=axes, train_x=axes, train_y=torch.arange(2), test_x=test, test_y=torch.arange(2)
        )
        save_file(
            {k: v.clone() for k, v in arrays.items()}, tmp_path / "mine" / "features.safetensors"
        )
        with warnings.catch_warnings(record=True):
            assert execute(run) is None
        found.append(accuracies(run)["ZeroShot", 1])
    assert found == [100.0, 0.0]


def test_changed_descriptions_are_seen_by_dry_run_and_execute(grid, capsys):
    texts = Path("texts.json")
    texts.write_text("{}")
    run = grid(prompts="texts.json")
    execute(run)
    first = accuracies(run)
    vlmadapt_grid("tiny.yml", dry_run=True)
    assert "0 rows missing" in capsys.readouterr().out
    texts.write_text("[]")
    vlmadapt_grid("tiny.yml", dry_run=True)
    shown = capsys.readouterr().out
    assert "2 of 2 rows missing; 2 that are there belong to other settings or files" in shown
    with pytest.warns(UserWarning, match="2 results of other settings or files are superseded"):
        assert execute(run) is None
    second = accuracies(run)
    assert first.keys() == second.keys()
    assert all(first[name] != second[name] for name in first)
    texts.write_text("{}")
    assert run.rows().missing(*run.asked()) == []
    with pytest.warns(UserWarning, match="superseded"):
        assert execute(run) is None
    assert accuracies(run) == first


@pytest.mark.parametrize("change", ["text", "names", "one byte in the middle"])
def test_every_part_of_a_bundle_counts(tmp_path, monkeypatch, change):
    monkeypatch.setenv("VLMADAPT_DATA", str(tmp_path))
    folder = tmp_path / "mine"
    folder.mkdir()
    arrays = dict(text=torch.zeros(4, 2), test_x=torch.zeros(100_000, 2))
    save_file(arrays, folder / "features.safetensors")
    (folder / "classnames.json").write_text('["a", "b"]')
    before = file_contents(dict(bundle="mine"))
    assert file_contents(dict(bundle=str(folder))) == before
    if change == "names":
        (folder / "classnames.json").write_text('["b", "a"]')
    else:
        array = arrays["text" if change == "text" else "test_x"]
        array[len(array) // 2] = 1.0
        save_file(arrays, folder / "features.safetensors")
    assert file_contents(dict(bundle="mine")) != before


@pytest.mark.parametrize(
    "settings",
    [
        dict(prompts="gone.json"),
        dict(bundle="gone"),
        dict(task="jsonl"),
        dict(root="gone"),
        dict(task="vqav2", root="gone"),
    ],
)
def test_missing_files_do_not_stop_a_dry_run(tmp_path, monkeypatch, settings):
    monkeypatch.setenv("VLMADAPT_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert Rows(tmp_path / "run", **settings).missing(["ZeroShot"], [1]) == [("ZeroShot", 1)]


@pytest.mark.parametrize("name", ["{}/own.pt", "ViT-B-32:{}/own.pt", "local-dir:{}"])
def test_own_weights_count_by_content(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "mini").mkdir()
    file = tmp_path / "weights" / "own.pt"
    file.write_bytes(b"first")
    settings = dict(backbone=name.format("./weights"))
    before = file_contents(settings)
    file.write_bytes(b"other")
    assert before.keys() == {"backbone"}
    assert file_contents(settings) != before
    assert file_contents(dict(backbone="mini")) == {}


def test_own_split_counts_whole_and_the_published_one_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("VLMADAPT_DATA", str(tmp_path))
    benchmark = BENCHMARKS["dtd"]
    split = tmp_path / benchmark.folder / benchmark.split
    split.parent.mkdir()
    split.write_text('{"train": []}')
    own = file_contents(dict(dataset="dtd", targets=["dtd", "mini-digits"]))
    assert own.keys() == {"dataset", "targets"}
    split.write_text('{"train": [1]}')
    assert file_contents(dict(dataset="dtd"))["dataset"] != own["dataset"]
    monkeypatch.setitem(
        BENCHMARKS,
        "dtd",
        benchmark.__class__(**{**vars(benchmark), "split_hash": file_hash(split)}),
    )
    assert file_contents(dict(dataset="dtd")) == {}


@pytest.mark.parametrize("changed", ["train.jsonl", "photos/a.png", "photos/new.png"])
def test_own_task_counts_with_its_pictures(tmp_path, monkeypatch, changed):
    monkeypatch.setenv("VLMADAPT_DATA", str(tmp_path))
    (tmp_path / "jsonl" / "photos").mkdir(parents=True)
    (tmp_path / "jsonl" / "train.jsonl").write_bytes(b"first")
    picture = tmp_path / "jsonl" / "photos" / "a.png"
    picture.write_bytes(b"first")
    before = file_contents(dict(task="jsonl"))
    at_another_place = file_contents(dict(task="jsonl", root=str(tmp_path / "jsonl")))
    assert before == at_another_place
    file = tmp_path / "jsonl" / changed
    times = os.stat(picture)
    file.write_bytes(b"other")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_contents(dict(task="jsonl")) != before


def test_a_file_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    read = []
    digest = rows_module.digest
    monkeypatch.setattr(
        rows_module, "digest", lambda path, kind: read.append(path) or digest(path, kind)
    )
    file = tmp_path / "large.bin"
    file.write_bytes(bytes(400_000))
    first = file_hash(file)
    assert file_hash(file) == first
    assert len(read) == 1
    file.write_bytes(bytes(399_999) + b"1")
    assert file_hash(file) != first
    assert len(read) == 2


def test_an_experiment_declares_further_files(tmp_path, monkeypatch):
    monkeypatch.setitem(NAMED_FILES, "table", lambda value, settings: [Path(value)])
    file = tmp_path / "table.csv"
    file.write_text("a")
    rows = saved(tmp_path / "run", dict(dataset="mini-digits", table=str(file)))
    assert rows.settings["file_contents"].keys() == {"table"}
    file.write_text("b")
    assert Rows(tmp_path / "run", dataset="mini-digits", table=str(file)).rows == {}


# Rows of version 0.1


@pytest.mark.parametrize("prompts", ["template", "ensemble", "descriptions"])
def test_rows_of_version_0_1_stay_valid(tmp_path, prompts):
    "The key by the old rule, written out, and the old file name."
    settings = {**SETTINGS, "prompts": prompts, "bundle": "", "variants": {}}
    rest = {k: v for k, v in settings.items() if k not in ("fixed", "variants")}
    cls, fixed = rows_module.method_of("TipAdapter")
    key = content_key(
        settings=rest, method="TipAdapter", fixed=fixed, seed=1, recipe=rows_module._recipe(cls)
    )
    row = dict(accuracy=70.0, method="TipAdapter", seed=1, settings=settings, key=key)
    write_json(tmp_path / "rows" / "TipAdapter-1.json", {**row, "digest": content_key(row=row)})
    rows = Rows(tmp_path, **settings)
    assert rows.missing(["TipAdapter"], [1]) == []
    rows.gather()
    (name,) = names(tmp_path / "rows")
    assert name.startswith("TipAdapter-1-")
    again = Rows(tmp_path, **settings)
    assert again.done(["TipAdapter"], [1])
    assert not again.earlier
    assert read_results(tmp_path)["accuracy"].tolist() == [70.0]


def test_old_names_that_fell_together_are_told_apart(tmp_path):
    "The one file that version 0.1 kept of two variants counts for its own variant only."
    variants = {
        label: dict(method="TaskRes", alpha=a)
        for label, a in (("TaskRes (α)", 1.0), ("TaskRes (β)", 0.1))
    }
    settings = {**SETTINGS, "variants": variants}
    Rows(tmp_path, **settings).save("TaskRes (β)", 1, dict(accuracy=1.0))
    (file,) = (tmp_path / "rows").glob("*.json")
    file.rename(tmp_path / "rows" / "TaskRes_(_)-1.json")
    rows = Rows(tmp_path, **settings)
    assert rows.missing(list(variants), [1]) == [("TaskRes (α)", 1)]
    rows.forget("TaskRes (α)", 1)
    assert Rows(tmp_path, **settings).missing(list(variants), [1]) == [("TaskRes (α)", 1)]


# Superseded results


def test_edited_params_supersede_and_find_again(grid):
    found = []
    for trials in (4, 0, 4):
        run = grid(trials=trials)
        found.append((len(run.rows().missing(*run.asked())), execute(run), accuracies(run)))
    (first, *_, numbers), (second, *_, others), (third, error, again) = found
    assert (first, second, third, error) == (2, 2, 0, None)
    assert again == numbers
    assert all(others[name] != numbers[name] for name in numbers)
    assert "2 rows asked for" not in (run.folder / "log.txt").read_text()
    assert len(names(run.folder / "rows")) == 2
    assert len(names(run.folder / "rows/superseded")) == 2
    assert len(read_results("outputs")) == 2


def test_only_what_changed_is_superseded(grid):
    run = grid(seeds=[1, 2])
    execute(run)
    first = accuracies(run)
    changed = grid(seeds=[1, 2], fixed={"TipAdapter": {"alpha": 2.0}})
    assert changed.rows().missing(*changed.asked()) == [("TipAdapter", 1), ("TipAdapter", 2)]
    execute(changed)
    assert [name.split("-")[0] for name in names(run.folder / "rows/superseded")] == [
        "TipAdapter"
    ] * 2
    back = grid(seeds=[1])
    assert back.rows().missing(*back.asked()) == []
    execute(back)
    assert accuracies(back) == first


def test_grid_counts_superseded_results_and_announces_reports_that_exist(grid, capsys, monkeypatch):
    monkeypatch.setattr("vlmadapt.grid.runner._loopback", lambda: False)
    grid(trials=4)
    vlmadapt_grid("tiny.yml")
    told = capsys.readouterr().out
    assert "1 runs done" in told and "superseded" not in told and "vlmadapt_report" not in told
    grid(trials=0)
    vlmadapt_grid("tiny.yml")
    assert "; 2 superseded results are kept in rows/superseded" in capsys.readouterr().out


@pytest.mark.parametrize("redone", ["mini", ":Tip*", ":ZeroShot"])
def test_redo_computes_again_what_was_found_again(grid, redone, capsys):
    "Rows that come back from superseded ones are redone too."
    for trials in (4, 0, 4):
        run = grid(trials=trials)
        if trials:
            execute(run)
        else:
            run.rows().set_aside()
    run = grid(trials=4)
    gone = run.redo(redone.partition(":")[2] or "*")
    assert len(run.rows().missing(*run.asked())) == gone == (2 if redone == "mini" else 1)
    assert execute(run) is None
    assert run.rows().done(*run.asked())


def test_result_file_alone_is_moved_aside(tmp_path):
    "Only result.json is kept in git; its rows are superseded and found again as well."
    for file in saved(tmp_path, seeds=(1, 2))._files():
        file.unlink()
    other = Rows(tmp_path, **{**SETTINGS, "trials": 4})
    assert (other.outdated, other.rows) == (4, {})
    with pytest.warns(UserWarning, match="4 results of other settings"):
        other.gather()
    back = Rows(tmp_path, **SETTINGS)
    assert back.missing(["ZeroShot", "TipAdapter"], [1, 2]) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back.fill(["ZeroShot", "TipAdapter"], [1, 2], None)
    assert Rows(tmp_path, **SETTINGS).gathered["TipAdapter", 2]["accuracy"] == 52.0
    assert names(back.superseded) == []


def test_changed_weights_keep_both_rows(tmp_path):
    "The key is the same, the provenance is not; the row of either comes back."
    made = dict(backbone_key="old")
    saved(tmp_path, provenance=made)
    for provenance, accuracy in (("new", 1.0), ("old", None), ("new", None)):
        rows = Rows(tmp_path, **SETTINGS)
        with warnings.catch_warnings(record=True):
            rows.forget_other(dict(backbone_key=provenance))
        compute = (
            None
            if accuracy is None
            else lambda m, seeds: [dict(accuracy=1.0, provenance=dict(backbone_key="new"))]
        )
        rows.fill(["ZeroShot", "TipAdapter"], [1], compute)
        assert rows.rows["TipAdapter", 1]["accuracy"] == (1.0 if provenance == "new" else 51.0)
        assert (len(names(rows.superseded)), len(rows._files())) == (2, 2)


@pytest.mark.parametrize("moment", ["superseded", "result"])
def test_interruption_while_moving_loses_nothing(tmp_path, monkeypatch, moment):
    saved(tmp_path, seeds=(1, 2))
    other = Rows(tmp_path, **{**SETTINGS, "trials": 4})
    calls = []

    def stop(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return move(*args)

    if moment == "superseded":
        move = Rows._set_file_aside
        monkeypatch.setattr(Rows, "_set_file_aside", stop)
    else:
        for file in other._files():
            file.unlink()
        move = write_json
        monkeypatch.setattr(rows_module, "write_json", stop)
    with pytest.raises(KeyboardInterrupt), warnings.catch_warnings(record=True):
        other.gather()
    back = Rows(tmp_path, **SETTINGS)
    assert back.missing(["ZeroShot", "TipAdapter"], [1, 2]) == []
    monkeypatch.undo()
    back.fill(["ZeroShot", "TipAdapter"], [1, 2], None)
    assert len(read_rows(tmp_path)) == 4


# Names of files


@pytest.mark.parametrize(
    "labels",
    [
        ("TaskRes (α=1)", "TaskRes (β=1)"),
        ("TaskRes (a/b)", "TaskRes (a:b)"),
        ("TaskRes (AB)", "TaskRes (ab)"),
        (f"TaskRes {'x' * 290}a", f"TaskRes {'x' * 290}b"),
    ],
)
def test_every_variant_has_a_file_of_its_own(tmp_path, labels):
    "Also with the same hyper-parameters, and so with the same key."
    settings = {**SETTINGS, "variants": {label: dict(method="TaskRes") for label in labels}}
    rows = Rows(tmp_path, **settings)
    for number, label in enumerate(labels):
        rows.save(label, 1, dict(accuracy=float(number)))
    files = names(tmp_path / "rows")
    assert len({name.lower() for name in files}) == 2
    assert all(name.startswith("TaskRes_") and len(name) < 100 for name in files)
    assert Rows(tmp_path, **settings).rows.keys() == {(label, 1) for label in labels}


# Damaged and edited results


@pytest.mark.parametrize("damage", ["cut", "edited", "list", "null", "deep", "latin"])
def test_damaged_row_is_named_moved_and_computed_again(tmp_path, damage):
    saved(tmp_path)
    (tmp_path / "result.json").unlink()
    (file,) = (tmp_path / "rows").glob("TipAdapter-*.json")
    text = file.read_text()
    changed = dict(
        cut=text[:80],
        edited=text.replace("51.0", "99.0"),
        list="[1]",
        null="null",
        deep="[" * 100_000,
    )
    file.write_bytes(changed.get(damage, "").encode() or b"\xff\xfe\xe9")
    with pytest.warns(UserWarning, match=f"{file.name}: damaged"):
        rows = Rows(tmp_path, **SETTINGS)
    assert rows.missing(["ZeroShot", "TipAdapter"], [1]) == [("TipAdapter", 1)]
    with pytest.warns(UserWarning, match="damaged"):
        rows.fill(["ZeroShot", "TipAdapter"], [1], lambda method, seeds: [dict(accuracy=60.0)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Rows(tmp_path, **SETTINGS).rows["TipAdapter", 1]["accuracy"] == 60.0
    assert (rows.superseded / f"{file.name}.damaged").exists()


@pytest.mark.parametrize(
    "change, left, message",
    [
        (
            lambda rows: rows[0].update(accuracy=1000.0),
            1,
            "1 of 2 results .* the first is TipAdapter, seed 1",
        ),
        (lambda rows: rows.__setitem__(0, [1, 2]), 1, "1 of 2 results .* the first is no record"),
        (lambda rows: [row.update(seed=3) for row in rows], 0, "2 of 2 results"),
    ],
)
def test_reports_leave_out_edited_results(tmp_path, change, left, message):
    saved(tmp_path)
    found = json.loads((tmp_path / "result.json").read_text())
    change(found["rows"])
    (tmp_path / "result.json").write_text(json.dumps(found))
    with pytest.warns(UserWarning, match=message):
        assert len(read_rows(tmp_path)) == left


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": null}'])
def test_reports_leave_out_damaged_files(tmp_path, text):
    saved(tmp_path / "good")
    saved(tmp_path / "bad")
    (tmp_path / "bad" / "result.json").write_text(text)
    with pytest.warns(UserWarning, match="bad/result.json: damaged"):
        assert len(read_results(tmp_path)) == 2


# The deviation of one seed


def made_up(methods, dataset="mini-digits", shots=(16,)):
    "Results as `read_results` returns them: method -> seeds; the accuracy is 60 and the seed."
    lines = []
    for method, seeds in methods.items():
        for seed in seeds:
            for shot in shots:
                lines.append(
                    dict(
                        dataset=dataset, trained_on=dataset, shots=shot, backbone="RN50", prompts="template", views=10,
                        trials=0, method=method, seed=seed, accuracy=60.0 + seed, above_zero_shot=float(seed), n=1000,
                        selection="defaults", grid="g", point=None, part=None,
                    )
                )  # fmt: skip
    return pd.DataFrame(lines)


ONE = made_up(dict(ZeroShot=[1], TipAdapter=[1]))
MIXED = made_up(dict(ZeroShot=[1, 3], TipAdapter=[1]))


def printed(results):
    table = dataset_table(results, shots=16)
    return [
        repr(table),
        table.markdown(),
        table.latex(),
        table._repr_html_(),
        table.styler().to_html(),
    ]


def test_deviation_by_hand():
    assert deviation([1.0, 3.0, np.nan]) == 1.0
    assert deviation([2.0, 2.0]) == 0.0
    assert all(np.isnan(deviation(values)) for values in ([], [5.0], [5.0, np.nan]))


def test_tables_of_one_seed_print_no_deviation():
    for text in printed(ONE):
        assert "±" not in text and r"\pm" not in text and "nan" not in text
        assert "seed 1, one seed without a standard deviation" in text
    assert cells(ONE)["sd"].isna().all()
    assert averages(ONE)["sd"].isna().all()


def test_mixed_tables_mark_single_seeds():
    table = dataset_table(MIXED, shots=16)
    assert table.text()["mini-digits"].tolist() == ["62.0 ± 1.0", "61.0†"]
    assert "over seeds 1, 3 (none for one seed)." in table.caption
    assert table.caption.endswith("† fewer seeds than the other cells.")


def test_several_equal_seeds_keep_their_zero():
    results = made_up(dict(TipAdapter=[1, 2])).assign(accuracy=70.0)
    assert dataset_table(results, shots=16).text().loc["TipAdapter", "mini-digits"] == "70.0 ± 0.0"


def test_figures_of_one_seed_have_no_bars_and_bands():
    bars = gain_bars(ONE)
    assert not any(np.isfinite(line.get_ydata()).any() for line in bars.axes[0].lines[:-1])
    for ax in shot_panels(made_up(dict(TipAdapter=[1]), shots=(1, 16))).axes:
        for band in ax.collections:
            assert all(
                not len(path.vertices) or np.isnan(path.vertices).all() for path in band.get_paths()
            )


def test_published_comparison_of_one_seed():
    results = made_up(dict(TipAdapterF=[1]), dataset="dtd").assign(prompts="template")
    compared = beside(results).query("mark != 'not run'")
    one = compared.drop_duplicates("method").head(1)
    assert np.isnan(one["sd"]).all() and np.isfinite(one["half_width"]).all()
    html = show_beside(one).to_html()
    assert "61.0 (" in html and "±" not in html and "one seed without a standard deviation" in html


def test_claims_about_one_seed():
    answer = check_claim(
        "TipAdapter, RN50, 16 shots, average 61", made_up(dict(TipAdapter=[1]), dataset="dtd")
    )
    assert (answer.verdict, answer.why) == ("cannot be told", "one seed only")
    assert np.isfinite([answer.low, answer.high]).all()
    uneven = pd.concat(
        [made_up(dict(TipAdapter=[1, 2]), "dtd"), made_up(dict(TipAdapter=[1]), "eurosat")]
    )
    answer = check_claim("TipAdapter, RN50, 16 shots, average 61", uneven)
    assert "nan" not in str(answer) and answer.verdict == "cannot be told"


def test_table_of_a_run_and_of_a_report(tmp_path):
    rows = saved(tmp_path, seeds=(1, 3), methods=("ZeroShot",))
    rows.save("TipAdapter", 1, dict(accuracy=60.0))
    table = rows.table()
    assert table.loc["ZeroShot", "sd"] == 1.0
    assert np.isnan(table.loc["TipAdapter", "sd"])
    save_frame(table, tmp_path / "report", floatfmt=".1f")
    assert "nan" not in (tmp_path / "report" / "table.md").read_text()
