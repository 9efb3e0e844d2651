"""Methods, datasets, experiments and reports from outside the package, in grids and reports.

The texts between the rulers are what a user writes; each has at most 30 lines.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_command, write_experiment
from PIL import Image
from safetensors.torch import save_file

from vlmadapt.core import plugins
from vlmadapt.core.plugins import load_plugin, locate_plugin
from vlmadapt.core.user_code import Code
from vlmadapt.grid import runner
from vlmadapt.grid.entries import method_entry, result_key
from vlmadapt.grid.params import read_runs
from vlmadapt.grid.params_files import parse_changes
from vlmadapt.grid.report import report_of
from vlmadapt.grid.results import read_results, varied_parameters
from vlmadapt.grid.runner import execute_all
from vlmadapt.grid.runs import execute
from vlmadapt.grid.store import ResultStore
from vlmadapt.methods import METHODS
from vlmadapt.reporting.figures import STYLE, looks
from vlmadapt.reporting.tables import dataset_table

# ------------------------------------------------------------------------- a method of one's own
METHOD = """
import torch
from torch.nn.functional import normalize

from vlmadapt.methods.base import Method


class NearestMean(Method):
    "The class whose support images have the most similar mean."

    weight = 1.0

    def constants(self, problem):
        x, y = normalize(problem.features.train, dim=-1), problem.labels["train"]
        means = torch.stack([x[y == k].mean(0) for k in range(problem.K)])
        return {"means": normalize(means, dim=-1)}

    def logits(self, batch):
        return self.weight * self.logit_scale * normalize(batch.x, dim=-1) @ self.means.T
"""
# ------------------------------------------------------------------------ a dataset of one's own
DATASET = """
import numpy as np

from vlmadapt.data.datasets import Dataset, DatasetSpec, register_dataset
from vlmadapt.data.images import Images


def stripes():
    rng = np.random.default_rng(0)
    splits = {}
    for split, n in (("train", 8), ("val", 4), ("test", 20)):
        labels = np.arange(n) % 2
        wave = np.sin(np.arange(32) * 0.9 + rng.uniform(0, 6, (n, 1))) * 100 + 120
        pixels = np.broadcast_to(wave[:, None, :, None], (n, 32, 32, 3)).copy()
        pixels[labels == 1] = pixels[labels == 1].transpose(0, 2, 1, 3)
        splits[split] = Images(pixels.astype(np.uint8), labels)
    return Dataset("my-stripes", ["upright stripes", "level stripes"], splits, ["a photo of {}."])


register_dataset(DatasetSpec("my-stripes", stripes))
"""
PARAMS = """
plugins: [./my_data.py]
experiment: few_shot
grid: {dataset: [my-stripes], shots: [1, 4]}
parameters:
  backbone: mini
  methods: [ZeroShot, "./my_method.py:NearestMean"]
  seeds: [1]
"""
# ------------------------------------------------------------------ an experiment of one's own
EXPERIMENT_PARAMETERS = """
methods = ["ZeroShot"]
seeds = [1]
dataset = "mini-digits"
backbone = "mini"
shots = 1
out = ""
"""
EXPERIMENT = """
from vlmadapt.grid.experiments import run_methods
from vlmadapt.problems.few_shot import few_shot

settings = dict(dataset=dataset, shots=shots, backbone=backbone)
run_methods(out, settings, methods, seeds, lambda seed: few_shot(dataset, backbone, shots, seed))
"""
REPORT = """
from pathlib import Path

from vlmadapt.grid.report import report_of
from vlmadapt.grid.results import read_results, varied_parameters

methods = sorted(read_results(folder)["method"].unique())
Path(save, "table.md").write_text(", ".join(methods))
"""
# -----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    "After a test the plug-ins and their modules are forgotten."
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(plugins, "_FILES", {**plugins._FILES})
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def own(tmp_path, monkeypatch):
    "A folder with the files of a user, which is not the working folder."
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "my_method.py").write_text(METHOD)
    (folder / "my_data.py").write_text(DATASET)
    (folder / "my_grid.yml").write_text(PARAMS)
    write_experiment(folder / "my_experiment.ipynb", EXPERIMENT_PARAMETERS, EXPERIMENT)
    write_experiment(folder / "my_report.ipynb", 'folder = ""\nsave = ""', REPORT)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


def params(folder, text, name="grid.yml"):
    (folder / name).write_text(text)
    return folder / name


def refusal(call):
    with pytest.raises(ValueError) as refused:
        call()
    text = str(refused.value)
    assert len(text.splitlines()) == 1
    return text


def executed(runs):
    assert {run.name: execute(run) for run in runs} == {run.name: None for run in runs}


@pytest.mark.parametrize("text", [METHOD, DATASET, PARAMS, EXPERIMENT_PARAMETERS + EXPERIMENT])
def test_a_plug_in_takes_few_lines(text):
    assert len(text.strip().splitlines()) <= 30


def test_own_method_and_dataset_in_a_grid_and_its_report(own, capsys):
    runs = read_runs(own / "my_grid.yml")
    assert [run.name for run in runs] == ["my-stripes_shots4", "my-stripes_shots1"]
    assert runs[0].parameters["methods"] == ["ZeroShot", "NearestMean"]
    executed(runs)
    results = read_results("outputs/my_grid")
    assert set(results["method"]) == {"ZeroShot", "NearestMean"}
    assert set(results["evaluated_on"]) == {"my-stripes"}
    (first, *_) = runs[0].results().units["NearestMean", "", 1]
    made = first.provenance["method"]
    assert made["module"] == "my_method" and len(made["source"]) == 20
    assert (
        first.value >= 50
        and "method" not in runs[0].results().units["ZeroShot", "", 1][0].provenance
    )
    assert run_command("report", "my_grid") == 0
    report = Path("outputs/my_grid/report")
    assert "| NearestMean" in capsys.readouterr().out
    assert "NearestMean" in (report / "table.tex").read_text()
    assert "NearestMean" in (report / "report.html").read_text()
    assert (report / "gains.svg").exists() or list(report.glob("gains.*"))


@pytest.mark.slow
def test_own_method_and_dataset_in_workers_of_ray(own, capsys):
    pytest.importorskip("ray")
    runs = read_runs(own / "my_grid.yml")
    assert execute_all(runs, workers=1) == {}
    told = capsys.readouterr().out
    assert "one run after another" not in told, told
    for run in runs:
        assert run.results().is_complete() and run.results().units["NearestMean", "", 1]
    results = read_results("outputs/my_grid")
    assert set(results["method"]) == {"ZeroShot", "NearestMean"}
    assert set(results["evaluated_on"]) == {"my-stripes"}


def test_a_changed_method_is_measured_again(own):
    def missing():
        run = read_runs(own / "my_grid.yml", smoke=True)[0]
        return [entry.label for entry, _ in run.results().missing()]

    (run,) = read_runs(own / "my_grid.yml", smoke=True)
    measured = dict(metric="accuracy", value=50.0)
    store = run.results()
    for entry, seed in store.missing():
        store.save(entry, seed, measured)
    store.collect()
    assert missing() == []
    (own / "my_method.py").write_text(METHOD.replace("weight = 1.0", "weight = 2.0"))
    assert missing() == ["NearestMean"]
    (own / "my_method.py").write_text(METHOD)
    assert missing() == []


@pytest.mark.slow
def test_the_base_class_of_a_method_counts(own):
    (own / "my_base.py").write_text(METHOD)
    (own / "my_other.py").write_text(
        "from my_base import NearestMean\nclass Other(NearestMean):\n    pass\n"
    )
    code = (
        "from vlmadapt.core.plugins import load_plugin, source_of_class\n"
        f"print(source_of_class(load_plugin({str(own / 'my_other.py:Other')!r}))['source'])"
    )

    def source():
        return subprocess.check_output([sys.executable, "-c", code], text=True)

    before = source()
    (own / "my_base.py").write_text(METHOD.replace("weight = 1.0", "weight = 2.0"))
    assert source() != before


@pytest.mark.slow
def test_own_experiment_and_report_by_path(own, capsys):
    text = "experiment: ./my_experiment.ipynb\nreport: ./my_report.ipynb\n"
    text += "parameters: {methods: [ZeroShot, './my_method.py:NearestMean'], seeds: [1]}\n"
    executed(read_runs(params(own, text)))
    cells = json.loads(Path("outputs/grid/run/run.ipynb").read_text())["cells"]
    assert "register_plugins" in "".join(cells[0]["source"])
    assert run_command("report", "grid") == 0
    assert "NearestMean, ZeroShot" in capsys.readouterr().out


@pytest.mark.slow
def test_a_report_is_added_to_a_grid_that_is_finished(own, capsys, monkeypatch):
    "And Ray cannot share GPUs out: the status file counts all the same."
    monkeypatch.setattr(runner, "has_loopback", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    text = "experiment: ./my_experiment.ipynb\nparameters: {methods: [ZeroShot], seeds: [1, 2]}\n"
    file = params(own, text)
    with pytest.warns(UserWarning, match="no loopback network"):
        assert run_command("grid", file) == 0
    status = Path("outputs/grid/status.txt").read_text()
    assert status.startswith("2 of 2 measurements, 1 of 1 runs, 0 failed")
    capsys.readouterr()
    assert run_command("report", "grid") == 0
    told = capsys.readouterr().out
    assert "| Zero-shot |" in told and "results.csv" in told and "report.html" in told
    results = Path("outputs/grid/run/result.json").read_bytes()
    params(own, f"report: ./my_report.ipynb\n{text}")
    assert run_command("grid", file, only_methods="ZeroShot") == 0
    assert Path("outputs/grid/run/result.json").read_bytes() == results
    assert run_command("report", "grid") == 0
    assert "ZeroShot" in capsys.readouterr().out


def test_a_file_of_prompts_lies_beside_the_params_file(own):
    (own / "texts.json").write_text("{}")
    text = "experiment: few_shot\ngrid: {shots: [1]}\nparameters: "
    text += "{methods: [ZeroShot], dataset: mini-digits, seeds: [1], prompts: %s}\n"
    (run,) = read_runs(params(own, text % "texts.json"))
    assert run.parameters["prompts"] == str(own / "texts.json")
    assert run.results().settings["prompts"] == "texts.json"
    told = refusal(lambda: read_runs(params(own, text % "none.json")))
    assert f"no such file: {own}/none.json" in told
    grid = "experiment: few_shot\ngrid: {prompts: [template, texts.json]}\nparameters: "
    grid += "{methods: [ZeroShot], dataset: mini-digits, seeds: [1]}\n"
    names = [run.name for run in read_runs(params(own, grid))]
    assert sorted(names) == ["template", "texts.json"]


@pytest.mark.slow
def test_an_experiment_that_stores_other_settings_names_them(own):
    cell = EXPERIMENT.replace("shots=shots, ", "")
    write_experiment(own / "my_experiment.ipynb", EXPERIMENT_PARAMETERS, cell)
    (run,) = read_runs(params(own, "experiment: ./my_experiment.ipynb"))
    assert "the settings of its store and its parameters differ in shots" in execute(run)


INSTALLED = {
    "my_package/__init__.py": "",
    "my_package/my_module.py": METHOD,
    "my_package-1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: my-package\nVersion: 1.2\n",
    "my_package-1.2.dist-info/top_level.txt": "my_package\n",
    "my_package-1.2.dist-info/entry_points.txt": (
        "[vlmadapt.methods]\nMean = my_package.my_module:NearestMean\n"
        "[vlmadapt.experiments]\nmy_experiment = my_package\n"
    ),
}
IN_A_PROCESS = """
import json
from vlmadapt.grid.params import read_runs
from vlmadapt.grid.runs import execute
(run,) = read_runs("grid.yml")
assert execute(run) is None
print(json.dumps(run.results().units["Mean", "", 1][0].provenance["method"]))
"""


@pytest.mark.slow
def test_methods_and_experiments_of_an_installed_package(tmp_path):
    for name, text in INSTALLED.items():
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_text(text)
    notebook = tmp_path / "site/my_package/my_experiment.ipynb"
    write_experiment(notebook, EXPERIMENT_PARAMETERS, EXPERIMENT)
    params(tmp_path, "experiment: my_experiment\nparameters: {methods: [Mean], seeds: [1]}\n")
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    assert (made["module"], made["class"]) == ("my_package.my_module", "NearestMean")
    assert (made["distribution"], made["version"]) == ("my-package", "1.2")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("my_method.py:NearestMean", "my_method.py:NearestMeen", "did you mean 'NearestMean'?"),
        ("my_method.py:", "my_metod.py:", "no such file: "),
        ("my_method.py:", "my_metod.py:", "did you mean 'my_method.py'?"),
        ("./my_data.py", "./my_dat.py", "did you mean 'my_data.py'?"),
        ("./my_data.py", "my_dta", "no module 'my_dta' to import, and no file"),
        ("[./my_data.py]", "./my_data.py", "plugins takes a list"),
        ("[./my_data.py]", "[3]", "each of plugins takes text, not 3"),
        ("my-stripes", "my-stripe", "did you mean 'my-stripes'?"),
        ("my-stripes", "./nowhere", "dataset: no such folder: "),
        ("plugins:", "plugin:", "unknown entry 'plugin'; did you mean 'plugins'?"),
        ("few_shot", "./none.ipynb", "no such file: "),
    ],
)
def test_what_is_not_there_is_named(own, old, new, told):
    text = refusal(lambda: read_runs(params(own, PARAMS.replace(old, new))))
    assert text.startswith(f"{own}/grid.yml: ") and told in text


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("x = (", "my_method.py: line 1: SyntaxError"),
        ("\nimport no_such_library", "my_method.py: line 2: ModuleNotFoundError"),
        ("raise SystemExit(3)", "my_method.py: line 1: SystemExit: 3"),
        ("class NearestMean: pass", "is no method, which is a subclass of"),
        (METHOD.replace("weight = 1.0", "name = 'TaskRes'"), "there is another method 'TaskRes'"),
    ],
)
def test_a_file_that_fails_is_named_with_its_line(own, source, told):
    (own / "my_method.py").write_text(source)
    assert told in refusal(lambda: read_runs(own / "my_grid.yml"))


def test_two_classes_of_one_name_are_refused(own):
    (own / "other.py").write_text(METHOD)
    text = PARAMS.replace("ZeroShot,", "./other.py:NearestMean,")
    assert "are both called 'NearestMean'" in refusal(lambda: read_runs(params(own, text)))


def test_a_method_is_called_as_it_calls_itself(own):
    (own / "my_method.py").write_text(METHOD.replace("weight = 1.0", "name = 'Nearest mean'"))
    text = PARAMS + "  fixed: {'./my_method.py:NearestMean': {}}\n"
    run = read_runs(params(own, text))[0]
    assert run.parameters["methods"] == ["ZeroShot", "Nearest mean"]
    assert run.parameters["fixed"] == {"Nearest mean": {}}
    assert run.plugins == [f"{own}/my_data.py", f"{own}/my_method.py:NearestMean"]


def test_a_class_in_the_place_of_a_name_elsewhere(own):
    entry = method_entry(f"{own}/my_method.py:NearestMean")
    assert entry.method == "NearestMean" and METHODS["NearestMean"].__module__ == "my_method"


def test_a_file_hides_no_module_and_sees_its_neighbours(own):
    (own / "random.py").write_text("import my_method\nclass A:\n    pass\n")
    found = load_plugin(locate_plugin("./random.py:A", own))
    assert found.__module__ == "plugin_random"
    import random

    assert hasattr(random, "Random")


# Folders and bundles


def write_images(folder, seed=0):
    rng = np.random.default_rng(seed)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


FOLDER = """
experiment: few_shot
grid: {dataset: ["./my <b>images</b>"], shots: [2]}
parameters: {backbone: mini, methods: [ZeroShot], seeds: [1], views: 2}
"""


@pytest.mark.slow
def test_a_folder_of_images_is_a_dataset(own):
    images = own / "my <b>images<" / "b>"
    write_images(images)
    (run,) = read_runs(params(own, FOLDER))
    assert run.parameters["dataset"] == str(images) and run.name == "b_shots2"
    executed([run])
    (line, *_) = read_results("outputs/grid").to_dict("records")
    assert line["evaluated_on"] == line["dataset"] == "b"
    assert run.results().is_complete()
    Image.new("RGB", (16, 16)).save(images / "cat/new.png")
    assert len(read_runs(own / "grid.yml")[0].results().missing()) == 1


def key_of(file):
    (run,) = read_runs(file)
    return result_key(run.results().settings, method_entry("ZeroShot"), 1)


@pytest.mark.slow
def test_a_table_and_a_bundle_are_datasets(own):
    write_images(own / "photos")
    rows = [f"photos/{name}/{i}.png,{name}" for name in ("cat", "dog") for i in range(8)]
    (own / "pets.csv").write_text("\n".join(["path,label", *rows]))
    (own / "features").mkdir()
    x, y = torch.eye(3, 8), torch.arange(3)
    arrays = dict(text=x, train_x=x.repeat(4, 1), train_y=y.repeat(4), test_x=x + 0, test_y=y)
    save_file(arrays, own / "features/features.safetensors")
    (own / "features/classnames.json").write_text('["a", "b", "c"]')
    text = FOLDER.replace('"./my <b>images</b>"', "pets.csv, ./features")
    runs = read_runs(params(own, text))
    assert [run.name for run in runs] == ["pets_shots2", "features_shots2"]
    executed(runs)
    found = read_results("outputs/grid").query("metric == 'accuracy'").set_index("evaluated_on")
    assert found["backbone"].to_dict() == {"pets": "mini", "features": "features"}
    Image.new("RGB", (9, 9)).save(own / "photos/cat/1.png")
    assert [len(run.results().missing()) for run in read_runs(own / "grid.yml")] == [1, 0]
    told = refusal(lambda: read_runs(own / "grid.yml", changes=parse_changes(["methods=[CoOp]"])))
    assert "methods: CoOp needs a backbone's text tower, which features lacks" in told


def test_a_folder_may_move(own):
    write_images(own / "photos")
    text = FOLDER.replace("./my <b>images</b>", "./photos")
    key = key_of(params(own, text))
    (own / "data").mkdir()
    (own / "photos").rename(own / "data/photos")
    assert key_of(params(own, text.replace("./photos", "data/photos"))) == key


@pytest.mark.parametrize(
    ("dataset", "told"),
    [
        ("./empty", "neither a folder per class nor features"),
        ("./my_data.py", "neither a folder nor a table (.csv, .parquet)"),
        ("./half", "a bundle of features needs features.safetensors"),
    ],
)
def test_folders_that_hold_no_data_are_refused(own, dataset, told):
    (own / "empty").mkdir()
    (own / "half").mkdir()
    (own / "half/classnames.json").write_text('["a", "b"]')
    text = FOLDER.replace("./my <b>images</b>", dataset)
    assert told in refusal(lambda: read_runs(params(own, text)))


def test_images_of_ones_own_need_a_backbone(own):
    write_images(own / "photos")
    text = FOLDER.replace("./my <b>images</b>", "./photos").replace("backbone: mini, ", "")
    told = refusal(lambda: read_runs(params(own, text)))
    assert "dataset: photos: name the backbone for images of your own" in told


def test_two_folders_of_one_name_are_refused(own):
    for parent in ("a", "b"):
        write_images(own / parent / "photos")
    text = FOLDER.replace('"./my <b>images</b>"', "a/photos, b/photos")
    assert "several runs would be called photos_shots2" in refusal(
        lambda: read_runs(params(own, text))
    )


# Changes for one call


def names_of(run):
    return [method_entry(method).label for method in run.parameters["methods"]]


def changed(*texts, file="mini.yml", **options):
    return read_runs(file, changes=parse_changes(texts), **options)


def test_values_of_a_shipped_file_are_changed():
    runs = changed("methods=[TaskRes,TipAdapter]", "trials=0", "shots=[1,4]", "dataset=mini-digits")
    assert [run.name for run in runs if run.name.startswith("features")] == [
        "features/mini-digits_shots4_mini",
        "features/mini-digits_shots1_mini",
    ]
    assert all(names_of(run) == ["TaskRes", "TipAdapter"] for run in runs)
    assert {run.parameters["trials"] for run in runs} == {0}
    (run, *_) = changed("views=[2, 3]", "shots=1", "dataset=[mini-digits]")
    assert run.name == "features/mini-digits_shots1_mini_views2"
    (run, *_) = changed("fixed={TaskRes: {alpha: 0.5}}")
    assert run.parameters["fixed"] == {"TaskRes": {"alpha": 0.5}}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("method=[TaskRes]", "--set: unknown parameter 'method'; did you mean 'methods'?"),
        ("methods=[TaskRas]", "unknown method 'TaskRas'; did you mean 'TaskRes'?"),
        ("out=elsewhere", "--set: unknown parameter 'out'"),
        ("trials=many", "trials takes a whole number, not 'many'"),
        ("methods", "--set takes name=value, not 'methods'"),
        ("seeds=[1", "--set seeds: line 1 is not YAML"),
        ("seeds=", "seeds takes a list, not None"),
        ("dataset=./nowhere", "dataset: no such folder: "),
    ],
)
def test_changes_that_cannot_be_are_refused(text, told):
    assert told in refusal(lambda: changed(text))
    assert "given twice" in refusal(lambda: parse_changes(["a=1", "a=2"]))


def test_changes_name_things_in_the_working_folder(own):
    (Path.cwd() / "here.py").write_text(METHOD)
    write_images(Path.cwd() / "photos")
    (run, *_) = changed("dataset=./photos", "methods=[./here.py:NearestMean]")
    assert names_of(run) == ["NearestMean"] and run.parameters["dataset"] == f"{Path.cwd()}/photos"


def test_a_file_is_restricted_to_some_methods():
    runs = changed(only_methods=["TaskRes", "CoOp"])
    assert {tuple(names_of(run)) for run in runs} == {("TaskRes",), ("CoOp",)}
    runs = changed(file="features.yml", only_methods=["GDA (alone)"])
    assert names_of(runs[0]) == ["GDA (alone)"]
    (run, *_) = changed(file="features.yml", only_methods=["GDA"], smoke=True)
    assert names_of(run) == ["GDA", "GDA (alone)"]
    told = refusal(lambda: changed(only_methods=["TaskRas"]))
    assert "unknown method of this file 'TaskRas'; did you mean 'TaskRes'?" in told


def test_a_restricted_space_keeps_what_is_searched(own):
    cell = EXPERIMENT_PARAMETERS + "space = {}"
    write_experiment(own / "my_experiment.ipynb", cell, EXPERIMENT)
    text = "experiment: ./my_experiment.ipynb\nparameters: {methods: [CLIPAdapter, TaskRes], "
    text += "seeds: [1], space: {lr: [0.1], ratio: [0.5]}}\n"
    (run,) = read_runs(params(own, text), only_methods=["TaskRes"])
    assert run.parameters["space"] == {"lr": [0.1]}


def test_results_of_other_methods_stay(own):
    text = "experiment: arithmetic\nparameters:\n  seeds: [1]\n  methods:\n    - TaskRes\n"
    text += "    - {method: TaskRes, variant: half, hyper_parameters: {alpha: 0.25}}\n"
    executed(read_runs(params(own, text)))
    (run,) = read_runs(own / "grid.yml")
    run.results().remove(("TaskRes", "", 1))
    executed(read_runs(own / "grid.yml", only_methods=["TaskRes"]))
    (run,) = read_runs(own / "grid.yml")
    assert run.results().is_complete()


# What is edited is measured again

BACKBONE = """
from vlmadapt.models.backbones import BackboneSpec, register_backbone

register_backbone("my-backbone", BackboneSpec("my-model", build="my_weights:build"), replace=True)
"""
TASK = """
from vlmadapt.data.tasks import TaskSpec, register_task


def read(folder=None):
    raise AssertionError("the data are not needed")


register_task("my-task", TaskSpec(None, read, "accuracy", ("yes", "no")), replace=True)
"""
ROW = """
from dataclasses import replace

from vlmadapt.data.benchmarks import BENCHMARKS
from vlmadapt.data.datasets import benchmark_spec, register_dataset

row = replace(BENCHMARKS["dtd"], folder="my_dtd", template="a photo of a {}.")
register_dataset(benchmark_spec("my-dtd", row), replace=True)
"""
OWN_PLUGINS = dict(data=DATASET, backbone=BACKBONE, task=TASK, row=ROW)
NAMED = dict(
    data="experiment: few_shot\nparameters: {dataset: my-stripes, methods: [ZeroShot], ",
    backbone="experiment: few_shot\nparameters: {dataset: mini-digits, backbone: my-backbone, "
    "methods: [ZeroShot], ",
    task="experiment: tasks\nparameters: {task: my-task, methods: [Frozen], ",
    row="experiment: few_shot\nparameters: {dataset: my-dtd, backbone: RN50, methods: [ZeroShot], ",
    notebook="experiment: ./my_experiment.ipynb\nparameters: {methods: [ZeroShot], ",
)


@pytest.fixture
def edited(own):
    "Write a params file of a kind, with the plug-ins of all kinds, and results of it."
    for kind, text in OWN_PLUGINS.items():
        (own / f"my_{kind}.py").write_text(text)
    (own / "my_weights.py").write_text("def build(model):\n    return 1\n")
    (own / "my_helper.py").write_text("tone = 120\n")

    def run_of(kind, seeds="[1, 2]"):
        files = ", ".join(f"./my_{name}.py" for name in OWN_PLUGINS)
        text = f"plugins: [{files}]\n{NAMED[kind]}seeds: {seeds}}}\n"
        (run,) = read_runs(params(own, text))
        return run

    return run_of


def write_params(run, content):
    (run.folder / "params.yml").write_text(json.dumps(content))


def measured(run):
    "Store results of a run as its notebook would, without measuring anything."
    store = run.results()
    for entry, seed in store.missing():
        store.save(entry, seed, dict(metric="accuracy", value=50.0 + seed))
    store.collect()
    assert run.results().is_complete()


def outdated(run):
    store = run.results()
    return len(store.missing()), store.outdated, store.changes


EDITS = [
    ("data", "my_data.py", "upright stripes", "vertical stripes", "code of my-stripes"),
    ("data", "my_data.py", "a photo of {}.", "a drawing of {}.", "code of my-stripes"),
    ("data", "my_data.py", "* 100 + 120", "* 90 + 120", "code of my-stripes"),
    ("data", "my_helper.py", "tone = 120", "tone = 130", "code of my-stripes"),
    ("backbone", "my_backbone.py", "my-model", "my-other-model", "code of my-backbone"),
    ("backbone", "my_weights.py", "return 1", "return 2", "code of my-backbone"),
    ("task", "my_task.py", '"yes", "no"', '"no", "yes"', "code of my-task"),
    ("row", "my_row.py", "a photo of a {}.", "a texture, {}.", "code of my-dtd"),
    (
        "notebook",
        "my_experiment.ipynb",
        "shots, seed)",
        "shots, seed + 1)",
        "code of the experiment",
    ),
]


@pytest.mark.parametrize(("kind", "file", "old", "new", "named"), EDITS)
def test_what_is_edited_is_measured_again(edited, own, capsys, kind, file, old, new, named):
    "And found again when the file is as it was."
    data = (own / "my_data.py").read_text()
    (own / "my_data.py").write_text(f"import my_helper\n{data}")
    run = edited(kind)
    measured(run)
    text = (own / file).read_text()
    assert text.count(old) == 1
    (own / file).write_text(text.replace(old, new))
    run = edited(kind)
    assert outdated(run) == (2, 2, [named])
    assert run_command("grid", own / "grid.yml", dry_run=True) == 0
    told = capsys.readouterr().out
    assert f"2 that are there belong to other settings or files (changed: {named})" in told
    with pytest.warns(UserWarning, match=f"2 results .* superseded .changed: {named}.; they stay"):
        measured(run)
    assert len(read_results("outputs/grid")) == 2
    assert len(list(run.results().superseded.glob("*.json"))) == 2
    (own / file).write_text(text)
    assert edited(kind).results().missing() == []


@pytest.mark.parametrize(
    ("kind", "file", "old", "new"),
    [
        ("data", "my_data.py", "def stripes():", "def stripes():  # of two kinds"),
        ("data", "my_data.py", "* 100 + 120", "* 100 + \\\n        120"),
        ("data", "my_backbone.py", "my-model", "my-other-model"),
        ("data", "my_method.py", "weight = 1.0", "weight = 2.0"),
        ("data", "my_helper.py", "tone = 120", "tone = 130"),  # which nothing imports here
        ("task", "my_data.py", "upright stripes", "vertical stripes"),
        ("notebook", "my_data.py", "upright stripes", "vertical stripes"),
        ("notebook", "my_experiment.ipynb", "settings = dict", "# a comment\\nsettings = dict"),
        ("notebook", "my_experiment.ipynb", "seeds = [1]", "seeds = [1, 2, 3]"),
    ],
)
def test_other_edits_leave_results_valid(edited, own, kind, file, old, new):
    measured(edited(kind))
    text = (own / file).read_text()
    assert text.count(old) == 1
    (own / file).write_text(text.replace(old, new))
    assert outdated(edited(kind)) == (0, 0, [])


def test_edited_prompts_folders_and_tables_are_named(own):
    "The content of what a parameter names by its path counts as it did before."
    photos = own / "photos"
    for name in ("a", "b"):
        (photos / name).mkdir(parents=True)
        (photos / name / "1.png").write_bytes(b"first")
    table = own / "photos.csv"
    table.write_text("path,label\nphotos/a/1.png,a\nphotos/b/1.png,b\n")
    (own / "texts.json").write_text("{}")
    changes = [
        ("dataset: ./photos, prompts: template", photos / "a/1.png", "files of dataset photos"),
        ("dataset: ./photos.csv, prompts: template", table, "files of dataset photos"),
        ("dataset: mini-digits, prompts: texts.json", own / "texts.json", "files of prompts texts"),
    ]
    for given, file, named in changes:
        text = (
            "experiment: few_shot\nparameters: {methods: [ZeroShot], seeds: [1], backbone: RN50, "
        )
        (run,) = read_runs(params(own, f"{text}{given}}}\n"))
        measured(run)
        file.write_bytes(file.read_bytes() + b"\n\n")
        assert outdated(run)[:2] == (1, 1)
        assert outdated(run)[2][0].startswith(named), outdated(run)
        run.results().supersede(lambda results: True)
        run.results().result_file.unlink()


def test_what_a_method_imports_counts(own):
    (own / "my_scale.py").write_text("scale = 1.0\n")
    (own / "my_method.py").write_text(f"from my_scale import scale\n{METHOD}")

    def run():
        return read_runs(own / "my_grid.yml", smoke=True)[0]

    measured(run())
    (own / "my_scale.py").write_text("scale = 2.0\n")
    assert [entry.label for entry, _ in run().results().missing()] == ["NearestMean"]
    (own / "my_scale.py").write_text("scale = 1.0  # again\n")
    assert run().results().missing() == []


@pytest.mark.parametrize("kind", ["data", "notebook"])
@pytest.mark.parametrize("edit", ["before", "after"])
def test_results_from_before_code_was_recorded(edited, own, kind, edit):
    "They stay valid where the code is older than they are, and are superseded where it is not."
    run = edited(kind)
    store = run.results()
    old_settings = {k: v for k, v in store.settings.items() if k != "file_contents"}
    old = ResultStore(run.folder, old_settings, ["ZeroShot"], [1, 2], experiment=Code(""))
    old.settings = old_settings
    (entry,) = run.results().entries
    for seed in (1, 2):
        key = result_key(old_settings, entry, seed, with_code=False)
        with mock.patch.object(ResultStore, "_key", lambda *_, key=key, **__: key):
            old.save(entry, seed, dict(metric="accuracy", value=60.0))
    files = [own / "my_data.py", own / "my_experiment.ipynb"]
    now = old.files()[0].stat().st_mtime_ns
    for file in files:
        moment = now + (10**9 if edit == "after" else -(10**9))
        os.utime(file, ns=(moment, moment))
    run = edited(kind)
    named = "code of my-stripes" if kind == "data" else "code of the experiment"
    if edit == "after":
        assert outdated(run) == (2, 2, [f"{named}, which was not recorded"])
        return
    assert outdated(run) == (0, 0, [])
    measured(run)
    assert {result.value for own in run.results().units.values() for result in own} == {60.0}
    assert not run.results().superseded.exists()
    for file in files:
        os.utime(file, ns=(now + 10**9, now + 10**9))
    assert edited(kind).results().is_complete()


def test_a_file_that_a_parameter_of_ones_own_names(own):
    "The content counts, whatever the parameter is called; a folder may hold what the run writes."
    cell = EXPERIMENT_PARAMETERS + "table = ''\nfolder = ''"
    write_experiment(own / "my_experiment.ipynb", cell, EXPERIMENT)
    Path("rows.csv").write_text("a")
    Path("cache").mkdir()
    text = "experiment: ./my_experiment.ipynb\nparameters: {methods: [ZeroShot], seeds: [1], "
    file = params(own, f"{text}table: rows.csv, folder: ./cache}}\n")
    (run,) = read_runs(file)
    measured(run)
    Path("cache/new.txt").write_text("written")
    assert run.results().is_complete()
    Path("rows.csv").write_text("b")
    assert outdated(run) == (1, 1, ["content of table"])


def test_a_plug_in_takes_the_place_of_a_dataset(own):
    "A name of this library has a key of its own where it stands for something else."
    text = (
        "experiment: few_shot\nparameters: {dataset: mini-digits, methods: [ZeroShot], seeds: [1]}"
    )
    (run,) = read_runs(params(own, text))
    measured(run)
    (own / "my_data.py").write_text(
        DATASET.replace("my-stripes", "mini-digits").replace("stripes))", "stripes), replace=True)")
    )
    (run,) = read_runs(params(own, f"plugins: [./my_data.py]\n{text}"))
    assert outdated(run) == (1, 1, ["code of mini-digits, which was not recorded"])


@pytest.mark.slow
def test_an_edited_experiment_and_dataset_in_a_kernel(own):
    "The notebook stores its results under the key that the grid looks for."
    text = "plugins: [./my_data.py]\nexperiment: ./my_experiment.ipynb\n"
    text += "parameters: {methods: [ZeroShot], seeds: [1], dataset: my-stripes}\n"
    file = params(own, text)
    values = []
    for old, new in (("", ""), ("level stripes", "a photo"), ("level stripes", "level stripes")):
        (own / "my_data.py").write_text(DATASET.replace(old, new) if old else DATASET)
        (run,) = read_runs(file)
        expected = 0 if values and new == "level stripes" else 1
        assert len(run.results().missing()) == expected
        executed([run])
        result, *_ = run.results().units["ZeroShot", "", 1]
        assert set(result.settings["file_contents"]) == {
            "code of my-stripes",
            "code of the experiment",
        }
        values.append(result.key)
    assert values[0] == values[2] != values[1]
    write_experiment(own / "my_experiment.ipynb", EXPERIMENT_PARAMETERS, EXPERIMENT + "done = 1\n")
    (run,) = read_runs(file)
    assert outdated(run) == (1, 1, ["code of the experiment"])
    executed([run])


# Reports


@pytest.mark.slow
def test_an_experiment_without_a_report_gets_the_overview(own, capsys):
    "A line for each method and dataset, a column for each number of shots."
    text = "experiment: ./my_experiment.ipynb\ngrid: {dataset: [mini-digits, mini-shapes], "
    text += "shots: [4, 1]}\nparameters: {methods: [ZeroShot, TipAdapter], seeds: [1, 2]}\n"
    runs = read_runs(params(own, text))
    for run in runs:
        measured(run)
    assert varied_parameters("outputs/grid") == []  # no notebook has been executed
    for run in runs:
        write_params(run, dict(run.parameters, report="my_experiment", experiment="my_experiment"))
    assert varied_parameters("outputs/grid") == ["dataset", "shots"]
    assert run_command("report", "grid") == 0
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert re.findall(r"[\w ]*\w", header) == [" method", " dataset", " shots 1", " shots 4"]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:4]]
    assert ["Zero-shot", "mini-digits", "51.5 ± 0.5", "51.5 ± 0.5"] in cells
    assert len({tuple(cell[:2]) for cell in cells}) == 4


def test_what_belongs_to_no_experiment_is_no_report(tmp_path):
    (tmp_path / "params.yml").write_text("experiment: mine\nreport: mine\n")
    assert report_of(tmp_path).stem == "overview"
    (tmp_path / "params.yml").write_text("experiment: few_shot\nreport: few_shot\n")
    assert report_of(tmp_path).stem == "few_shot"
    (tmp_path / "params.yml").write_text("experiment: mine\nreport: few_shto\n")
    assert "did you mean 'few_shot'?" in refusal(lambda: report_of(tmp_path))


def unknown_results():
    lines = []
    for method, value in {"Mine": 70.0, "<b>": 60.0, "ZeroShot": 50.0, "TaskRes": 55.0}.items():
        line = dict(method=method, variant="", value=value, above_zero_shot=value - 50, seed=1)
        line |= dict(metric="accuracy", evaluated_on="x", shots=1, backbone="mini")
        lines.append(line | dict(selection="defaults", prompts="template"))
    return pd.DataFrame(lines)


def test_reports_of_methods_that_they_do_not_know():
    results = unknown_results()
    table = dataset_table(results, 1)
    assert list(table.mean.index) == ["ZeroShot", "TaskRes", "<b>", "Mine"]
    assert [line.split()[0] for line in repr(table).splitlines()[2:6]][::3] == ["Zero-shot", "Mine"]
    styles = looks(results)
    colors = {label: (style["color"], style["marker"]) for label, style in styles.items()}
    assert len(set(colors.values())) == 4 and colors["Mine"] not in STYLE.values()


def test_units_of_variants_that_are_not_requested(tmp_path):
    half = dict(method="TaskRes", variant="half", hyper_parameters=dict(alpha=0.25))
    settings = dict(dataset="mini-digits", fixed={})
    store = ResultStore(tmp_path, settings, [half], [1])
    store.save(store.entries[0], 1, dict(metric="accuracy", value=50.0))
    assert not ResultStore(tmp_path, settings, ["TaskRes"], [1]).units
    assert ResultStore(tmp_path, settings, ["TaskRes"], [1], others=[half]).units
