"Results of changed files and settings, and results that were superseded."

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from conftest import run_command, write_experiment
from safetensors.torch import save_file

from vlmadapt.core.files import write_json
from vlmadapt.core.hashing import content_key
from vlmadapt.data.benchmarks import BENCHMARKS
from vlmadapt.grid import entries, named_files, store
from vlmadapt.grid.command import redo
from vlmadapt.grid.experiments import measure_missing
from vlmadapt.grid.named_files import NAMED_FILES, file_contents, file_hash
from vlmadapt.grid.params import read_runs
from vlmadapt.grid.results import read_results, read_run
from vlmadapt.grid.runs import execute
from vlmadapt.grid.store import ResultStore

PARAMETERS = """dataset = 'mini-digits'  # name in DATASETS
shots = 1  # images per class
methods = ['ZeroShot']
seeds = [1]
trials = 0
prompts = 'template'
bundle = ''
fixed = {}
out = ''"""
BODY = """from vlmadapt.core.seeding import np_stream
from vlmadapt.grid.experiments import measure_missing
from vlmadapt.grid.store import ResultStore
def measure_seeds(entry, seeds):
    for seed in seeds:
        content = ' '.join(store.settings.get('file_contents', {}).values())
        value = 100 * np_stream(seed, entry.label, str(trials), content).random()
        yield dict(metric='accuracy', value=value, cost=dict(fit_s=1.))
settings = dict(dataset=dataset, shots=shots, trials=trials)
settings |= dict(prompts=prompts, bundle=bundle, fixed=fixed)
store = ResultStore(out, settings, methods, seeds)
measure_missing(store, measure_seeds)"""
SETTINGS = dict(dataset="mini-digits", shots=1, trials=0, prompts="template", fixed={})


@pytest.fixture
def grid(tmp_path, monkeypatch):
    "Execute a tiny experiment with random numbers from named streams, in this process."
    cells = write_experiment(tmp_path / "tiny.ipynb", PARAMETERS, BODY)
    monkeypatch.chdir(tmp_path)

    def here(notebook, target, parameters, log, plugins=()):
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
    return {(result.label, result.seed): result.value for result in read_run(run.folder)}


def names(folder):
    return sorted(file.name for file in Path(folder).glob("*.json"))


METHODS = ("ZeroShot", "TipAdapter")


def opened(folder, methods=METHODS, seeds=(1,), **changes):
    return ResultStore(folder, {**SETTINGS, **changes}, methods, seeds)


def labels(pairs):
    return [(entry.label, seed) for entry, seed in pairs]


def value_of(store, method, seed):
    return store.units[method, "", seed][0].value


def saved(folder, methods=METHODS, seeds=(1,), settings=None, **more):
    "Results in `folder`, collected; the accuracy is 50 and the seed."
    found = opened(folder, methods, seeds, **(settings or {}))
    for entry, seed in found.requested():
        found.save(entry, seed, dict(metric="accuracy", value=50.0 + seed, **more))
    found.collect()
    return found


# Files behind the settings


def test_changed_descriptions_and_bundle_end_to_end(tmp_path, monkeypatch):
    "The real experiment in a kernel: other features of the same name give other numbers."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLMADAPT_DATA", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "classnames.json").write_text('["a", "b"]')
    axes = torch.eye(2)
    Path("feats.yml").write_text(
        "experiment: features\n"
        "parameters: {bundle: mine, methods: [ZeroShot], seeds: [1], trials: 0}\n"
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
    run_command("grid", "tiny.yml", dry_run=True)
    assert "0 measurements missing" in capsys.readouterr().out
    texts.write_text("[]")
    run_command("grid", "tiny.yml", dry_run=True)
    shown = capsys.readouterr().out
    assert (
        "2 of 2 measurements missing; 2 that are there belong to other settings or files" in shown
    )
    with pytest.warns(UserWarning, match="2 results of other settings or files are superseded"):
        assert execute(run) is None
    second = accuracies(run)
    assert first.keys() == second.keys()
    assert all(first[name] != second[name] for name in first)
    texts.write_text("{}")
    assert run.results().missing() == []
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
    missing = ResultStore(
        tmp_path / "run", settings, ["Frozen" if "task" in settings else "ZeroShot"], [1]
    ).missing()
    assert len(missing) == 1


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
    hash_file = named_files.hash_file

    def counted(path, kind):
        read.append(path)
        return hash_file(path, kind)

    monkeypatch.setattr(named_files, "hash_file", counted)
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
    found = saved(tmp_path / "run", settings=dict(table=str(file)))
    assert found.settings["file_contents"].keys() == {"table"}
    file.write_text("b")
    assert opened(tmp_path / "run", table=str(file)).units == {}


# Results of version 0.1


@pytest.mark.parametrize("prompts", ["template", "ensemble", "descriptions"])
def test_results_of_version_0_1_stay_valid(tmp_path, prompts):
    "The key by the old rule, written out, and the old file name and form."
    settings = {**SETTINGS, "prompts": prompts, "bundle": ""}
    rest = {k: v for k, v in settings.items() if k != "fixed"}
    cls = entries.METHODS["TipAdapter"]
    recipe = repr([sorted(part.items()) for part in (cls.defaults(), cls.space, cls.posthoc)])
    key = content_key(settings=rest, method="TipAdapter", fixed={}, seed=1, recipe=recipe)
    old = dict(accuracy=70.0, method="TipAdapter", seed=1, key=key)
    old["settings"] = {**settings, "variants": {}}
    write_json(tmp_path / "rows" / "TipAdapter-1.json", {**old, "digest": content_key(row=old)})
    found = opened(tmp_path, ["TipAdapter"], **settings)
    assert found.missing() == []
    found.collect()
    assert names(tmp_path / "rows") == []
    (name,) = names(tmp_path / "results")
    assert name.startswith("TipAdapter-1-")
    again = opened(tmp_path, ["TipAdapter"], **settings)
    assert again.is_complete() and not again.restorable
    assert read_results(tmp_path)["value"].tolist() == [70.0]


def test_superseded_results_of_version_0_1_come_back(tmp_path):
    found = saved(tmp_path, ["TipAdapter"])
    (file,) = found.files()
    old_folder = tmp_path / "rows/superseded"
    old_folder.mkdir(parents=True)
    file.rename(old_folder / f"{file.stem}-01234567.json")
    found.result_file.unlink()
    back = opened(tmp_path, ["TipAdapter"])
    assert back.missing() == [] and back.restore() == 1
    assert names(old_folder) == [] and value_of(opened(tmp_path), "TipAdapter", 1) == 51.0


# Superseded results


def test_edited_params_supersede_and_find_again(grid):
    found = []
    for trials in (4, 0, 4):
        run = grid(trials=trials)
        found.append((len(run.results().missing()), execute(run), accuracies(run)))
    (first, *_, numbers), (second, *_, others), (third, error, again) = found
    assert (first, second, third, error) == (2, 2, 0, None)
    assert again == numbers
    assert all(others[name] != numbers[name] for name in numbers)
    assert "2 measurements requested, 0 missing" not in (run.folder / "log.txt").read_text()
    assert len(names(run.folder / "results")) == 2
    assert len(names(run.folder / "results/superseded")) == 2
    assert len(read_results("outputs")) == 2


def test_only_what_changed_is_superseded(grid):
    run = grid(seeds=[1, 2])
    execute(run)
    first = accuracies(run)
    changed = grid(seeds=[1, 2], fixed={"TipAdapter": {"alpha": 2.0}})
    assert labels(changed.results().missing()) == [("TipAdapter", 1), ("TipAdapter", 2)]
    execute(changed)
    assert [name.split("-")[0] for name in names(run.folder / "results/superseded")] == [
        "TipAdapter"
    ] * 2
    back = grid(seeds=[1])
    assert back.results().missing() == []
    execute(back)
    assert accuracies(back) == first


def test_grid_counts_superseded_results_and_announces_its_report(grid, capsys, monkeypatch):
    monkeypatch.setattr("vlmadapt.grid.runner.cores", lambda: 1)
    grid(trials=4)
    run_command("grid", "tiny.yml")
    told = capsys.readouterr().out
    assert "1 runs done" in told and "superseded" not in told
    assert "vlmadapt report tiny makes a report" in told
    grid(trials=0)
    run_command("grid", "tiny.yml")
    assert "; 2 superseded results are kept in results/superseded" in capsys.readouterr().out


def test_a_grid_that_goes_on_says_what_was_done_before(grid, capsys, monkeypatch):
    "Progress counts the runs that were left; the last line tells the two numbers apart."
    monkeypatch.setattr("vlmadapt.grid.runner.cores", lambda: 1)
    grid()
    parameters = dict(methods=["ZeroShot"], seeds=[1])
    content = dict(experiment="tiny.ipynb", grid=dict(shots=[1, 2]), parameters=parameters)
    Path("tiny.yml").write_text(json.dumps(content))
    run_command("grid", "tiny.yml", only="*shots1*")
    assert "1 runs done, results in" in capsys.readouterr().out
    run_command("grid", "tiny.yml")
    told = capsys.readouterr().out
    assert "[1/1]" in told
    assert "2 runs done (1 done before), results in" in told


@pytest.mark.parametrize("redone", ["mini", ":Tip*", ":ZeroShot"])
def test_redo_computes_again_what_was_found_again(grid, redone, capsys):
    "Results that come back from superseded ones are redone too."
    for trials in (4, 0, 4):
        run = grid(trials=trials)
        if trials:
            execute(run)
        else:
            run.results().supersede()
    run = grid(trials=4)
    gone = redo(run, redone.partition(":")[2] or "*")
    assert len(run.results().missing()) == gone == (2 if redone == "mini" else 1)
    assert execute(run) is None
    assert run.results().is_complete()


def test_result_file_alone_is_moved_aside(tmp_path):
    "Only result.json is kept in git; its results are superseded and found again as well."
    for file in saved(tmp_path, seeds=(1, 2)).files():
        file.unlink()
    other = opened(tmp_path, seeds=(1, 2), trials=4)
    assert (other.outdated, other.units) == (4, {})
    with pytest.warns(UserWarning, match="4 results of other settings"):
        other.collect()
    back = opened(tmp_path, seeds=(1, 2))
    assert back.missing() == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure_missing(back, None)
    assert opened(tmp_path, seeds=(1, 2)).collected["TipAdapter", "", 2][0].value == 52.0
    assert names(back.superseded) == []


def test_changed_weights_keep_both_results(tmp_path):
    "The key is the same, the provenance is not; the result of either comes back."
    saved(tmp_path, provenance=dict(backbone_key="old"))

    def measure_new(entry, seeds):
        return [dict(metric="accuracy", value=1.0, provenance=dict(backbone_key="new"))]

    for key, measure in (("new", measure_new), ("old", None), ("new", None)):
        found = opened(tmp_path)
        with warnings.catch_warnings(record=True):
            found.supersede_other(dict(backbone_key=key))
        measure_missing(found, measure)
        assert value_of(found, "TipAdapter", 1) == (1.0 if key == "new" else 51.0)
        assert (len(names(found.superseded)), len(found.files())) == (2, 2)


@pytest.mark.parametrize("moment", ["superseded", "result"])
def test_interruption_while_moving_loses_nothing(tmp_path, monkeypatch, moment):
    saved(tmp_path, seeds=(1, 2))
    other = opened(tmp_path, seeds=(1, 2), trials=4)
    calls = []

    def stop(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return move(*args)

    if moment == "superseded":
        move = ResultStore._move_aside
        monkeypatch.setattr(ResultStore, "_move_aside", stop)
    else:
        for file in other.files():
            file.unlink()
        move = write_json
        monkeypatch.setattr(store, "write_json", stop)
    with pytest.raises(KeyboardInterrupt), warnings.catch_warnings(record=True):
        other.collect()
    back = opened(tmp_path, seeds=(1, 2))
    assert back.missing() == []
    monkeypatch.undo()
    measure_missing(back, None)
    assert len(read_run(tmp_path)) == 4


# Names of files


@pytest.mark.parametrize(
    "variants",
    [
        ("α=1", "β=1"),
        ("a/b", "a:b"),
        ("AB", "ab"),
        (f"{'x' * 290}a", f"{'x' * 290}b"),
    ],
)
def test_every_variant_has_a_file_of_its_own(tmp_path, variants):
    "Also with the same hyper-parameters, and so with the same key."
    own = [dict(method="TaskRes", variant=v, hyper_parameters=dict(alpha=1.0)) for v in variants]
    found = opened(tmp_path, own)
    for number, entry in enumerate(found.entries):
        found.save(entry, 1, dict(metric="accuracy", value=float(number)))
    files = names(tmp_path / "results")
    assert len({name.lower() for name in files}) == 2
    assert all(name.startswith("TaskRes_") and len(name) < 100 for name in files)
    assert opened(tmp_path, own).units.keys() == {("TaskRes", v, 1) for v in variants}


# Damaged and edited results


@pytest.mark.parametrize("damage", ["cut", "edited", "list", "null", "deep", "latin", "dropped"])
def test_damaged_result_is_named_moved_and_measured_again(tmp_path, damage):
    found = opened(tmp_path)
    fields = [dict(metric="accuracy", value=51.0), dict(metric="macro_f1", value=50.0)]
    for entry, seed in found.requested():
        found.save(entry, seed, fields)
    (file,) = (tmp_path / "results").glob("TipAdapter-*.json")
    text = file.read_text()
    changed = dict(
        cut=text[:80],
        edited=text.replace("51.0", "99.0"),
        list="[1]",
        null="null",
        deep="[" * 100_000,
    )
    if damage == "dropped":  # one of two results of the unit
        content = json.loads(text)
        content["results"].pop()
        write_json(file, content)
    else:
        file.write_bytes(changed.get(damage, "").encode() or b"\xff\xfe\xe9")
        with pytest.warns(UserWarning, match=f"{file.name}: "):
            opened(tmp_path)
    with warnings.catch_warnings(record=True):
        again = opened(tmp_path)
        assert labels(again.missing()) == [("TipAdapter", 1)]
        measure_missing(again, lambda entry, seeds: [dict(metric="accuracy", value=60.0)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert value_of(opened(tmp_path), "TipAdapter", 1) == 60.0
    assert (again.superseded / f"{file.name}.damaged").exists()


@pytest.mark.parametrize(
    "change, left, message",
    [
        (
            lambda results: results[0].update(value=1000.0),
            1,
            "1 of 2 results .* the first is TipAdapter, seed 1",
        ),
        (
            lambda results: results.__setitem__(0, [1, 2]),
            1,
            "1 of 2 results .* the first is no record",
        ),
        (lambda results: [result.update(seed=3) for result in results], 0, "2 of 2 results"),
    ],
)
def test_reports_leave_out_edited_results(tmp_path, change, left, message):
    saved(tmp_path)
    found = json.loads((tmp_path / "result.json").read_text())
    change(found["results"])
    (tmp_path / "result.json").write_text(json.dumps(found))
    with pytest.warns(UserWarning, match=message):
        assert len(read_run(tmp_path)) == left


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": null}', '{"results": null}'])
def test_reports_leave_out_damaged_files(tmp_path, text):
    saved(tmp_path / "good")
    saved(tmp_path / "bad")
    (tmp_path / "bad" / "result.json").write_text(text)
    with pytest.warns(UserWarning, match="bad/result.json: damaged"):
        assert len(read_results(tmp_path)) == 2
