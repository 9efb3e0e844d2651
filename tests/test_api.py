"""The names of `import vlmadapt as va`: lazy, documented, typed; and what a user does with them."""

import importlib
import importlib.metadata
import inspect
import logging
import os
import re
import subprocess
import sys
import time
import warnings
from dataclasses import is_dataclass
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT, refused
from PIL import Image
from warm_process import warm_python

import vlmadapt as va

DESIGN = [
    *("list_methods", "method_info", "list_datasets", "few_shot", "from_folder", "from_features"),
    *("load_task", "adapt", "create_method", "fit", "fit_many", "tune", "evaluate", "load_method"),
    *("register_method", "Method", "register_dataset", "DatasetSpec", "show_versions", "cache"),
    *("set_verbosity", "FewShotProblem", "GenerationProblem", "from_dataset"),
    *("list_backbones", "register_backbone"),
]
FUNCTIONS = [name for name in va.__all__ if inspect.isroutine(getattr(va, name))]


def run_warm(code, *arguments):
    "Run code in another process; return what it prints."
    run = warm_python().run(code, *arguments)
    assert not run.returncode, run.stderr[-2000:]
    return run.stdout


def run_new(code, *arguments, **variables):
    "Run code in a new interpreter with further variables of the environment."
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
    )


# --- names


@pytest.mark.parametrize("name", FUNCTIONS)
def test_help_describes_every_parameter(name):
    function = getattr(va, name)
    doc = inspect.getdoc(function)
    for parameter in inspect.signature(function).parameters.values():
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
        assert f"\n{stars.get(parameter.kind, '')}{parameter.name} :" in doc or (
            f"\n{stars.get(parameter.kind, '')}{parameter.name}\n" in doc
        )
    assert doc.count("Parameters\n---") <= 1


def undescribed(doc):
    "Return the parameters of a docstring that have a type but no description."
    lines = doc.partition("Parameters\n---")[2].partition("\n\n")[0].splitlines()[1:]
    pairs = zip(lines, [*lines[1:], ""], strict=False)
    return [a for a, b in pairs if not a.startswith(" ") and not b.startswith(" ")]


@pytest.mark.parametrize("name", va.__all__)
def test_help_explains_every_argument_and_field(name):
    found = getattr(va, name)
    if not callable(found):
        return
    doc = inspect.getdoc(found)
    if isinstance(found, type):
        names = list(inspect.signature(found.__init__).parameters)[1:]
        if is_dataclass(found):
            own = [base for base in found.__mro__ if base.__module__.startswith("vlmadapt")]
            names = [n for base in own for n in vars(base).get("__annotations__", {})]
        assert names and all(re.search(rf"^\**{n} :", doc, re.M) for n in names)
    assert not undescribed(doc)


def test_help_describes_methods_of_classes_and_functions_of_modules():
    assert (
        "on_corrupt : Literal['refuse', 'skip']\n    what to do" in va.Method.predict_table.__doc__
    )
    assert "path : str | Path\n    the file to write" in va.Method.save.__doc__
    assert "Parameters\n" in va.cache.clear.__doc__


def test_every_name_of_the_design_is_there():
    assert set(DESIGN) <= set(va.__all__) <= set(dir(va))
    assert len(set(va.__all__)) == len(va.__all__)


@pytest.mark.parametrize("name", va.__all__)
def test_a_name_resolves_and_is_documented(name):
    found = getattr(va, name)
    assert found is getattr(va, name)
    assert inspect.getdoc(found), name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_has_types(name):
    parameters = inspect.signature(getattr(va, name)).parameters.values()
    # arguments that are passed on have the types of the function that they are passed to
    own = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    assert not [p.name for p in own if p.annotation is p.empty]
    assert inspect.signature(getattr(va, name)).return_annotation is not inspect.Signature.empty


def test_editors_see_the_same_names():
    import ast

    tree = ast.parse(Path(va.__file__).read_text("utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = set()
    for node in block.body:
        if isinstance(node, ast.ImportFrom):
            seen |= {alias.asname or alias.name for alias in node.names}
        else:
            seen.add(ast.unparse(node.targets[0]))
    assert seen == set(va.__all__)


def test_the_package_is_light_and_quick():
    code = """
import sys
before = set(sys.modules)
import vlmadapt as va
own = len(set(sys.modules) - before)
dir(va), va.__version__
heavy = [m for m in ("torch", "numpy", "pandas", "pydantic", "tqdm") if m in sys.modules]
print(own < 30, heavy, len(va.list_methods()) > 20, "torch" in sys.modules)
"""
    run = run_new(code)
    assert run.stdout.split() == ["True", "[]", "True", "False"], run.stderr[-2000:]


def test_a_misspelt_name():
    with pytest.raises(AttributeError, match="no attribute 'adopt'; did you mean 'adapt'?"):
        va.adopt  # noqa: B018
    with pytest.raises(ImportError):
        exec("from vlmadapt import no_such_name")


def test_the_version_is_that_of_the_settings():
    assert f"version = {va.__version__}\n" in (ROOT / "settings.ini").read_text("utf-8")


def test_the_api_page_lists_every_name_once(tmp_path):
    from docs import api

    page = api(ROOT / "nbs")
    for name in va.__all__:
        if inspect.ismodule(getattr(va, name)):
            assert f"[`va.{name}." in page
        else:
            assert page.count(f"[`va.{name}`]") == 1, name
    assert page.count("[`va.cache.info`]") == page.count("[`va.cache.clear`]") == 1


# --- adaptation


@pytest.fixture(scope="module")
def digits():
    return va.few_shot("mini-digits", backbone="mini", shots=4, seed=1)


@pytest.fixture(scope="module")
def adapted(digits):
    return va.adapt(digits, "TaskRes", trials=2, fixed={"epochs": 3})


def test_adapt_is_tune_and_fit(digits, adapted):
    tuned = va.tune("TaskRes", digits, trials=2, fixed={"epochs": 3})
    selection = adapted.card["selection"]
    assert selection["rule"] == tuned.selection == "few_shot_val"
    assert selection["values"] == dict(tuned) and selection["value"] == tuned.value
    assert selection["trials"] == len(tuned.trials) == 2
    assert adapted.scores(digits.features.test).equal(tuned.method.scores(digits.features.test))
    assert va.evaluate(adapted, digits)["accuracy"] > 20


def test_adapt_does_not_train_the_winner_twice(digits, monkeypatch):
    adaptation = importlib.import_module("vlmadapt.training.adaptation")

    def refused(*arguments, **options):
        raise AssertionError("trained twice")

    monkeypatch.setattr(adaptation, "fit", refused)
    assert type(va.adapt(digits)).__name__ == "AnchoredKernel"
    with pytest.raises(AssertionError, match="trained twice"):  # shots were held out
        y = np.arange(2).repeat(8)
        x = np.eye(2, 6)[y] + 0.01 * np.arange(6)
        va.adapt(va.from_features(["a", "b"], np.eye(2, 6), train=(x, y)), "TaskRes", trials=2)


def test_held_out_shots_take_part_in_the_final_training():
    y = np.arange(2).repeat(8)
    x = np.eye(2, 6)[y] + 0.1 * np.random.default_rng(0).normal(size=(16, 6))
    problem = va.from_features(["a", "b"], np.eye(2, 6), train=(x, y))
    method = va.adapt(problem, "TipAdapter")
    assert method.card["selection"]["rule"] == "held_out_shots"
    assert method.hyper_parameters["alpha"] == method.card["selection"]["values"]["alpha"]
    again = va.fit(va.create_method("TipAdapter", problem, **method.hyper_parameters), problem)
    assert method.scores(x).equal(again.scores(x))


@pytest.mark.parametrize("method", ["BitFit", None])
def test_adapt_generation(method):
    task = va.load_task("mini-entailment", backbone="mini", train=16)
    fitted = va.adapt(task, method, trials=1, fixed={"epochs": 1})
    assert isinstance(fitted, va.GenerationMethod)
    answers = fitted.predict(task.images("val")[:3], "it is red")
    assert len(answers) == 3 and set(answers) <= set(task.candidates)
    for name in ("scores", "predict_proba", "predict_table", "fold", "export_onnx", "class_names"):
        assert not hasattr(fitted, name)
    with pytest.raises(AttributeError, match="generates text and has no scores: use predict"):
        fitted.scores(task.images("val")[:3])
    count = f"{fitted.trainable_parameters():,}"
    assert repr(fitted) == f"{fitted.name}(mini, {count} trainable parameters)"


# --- prediction


def test_predict_gives_class_names(digits, adapted, tmp_path):
    images = digits.images("test")
    x = digits.features.test[:4]
    names = [digits.class_names[k] for k in adapted.scores(x).argmax(1)]
    assert adapted.predict(x) == adapted.predict(x.numpy()) == names
    pixels = np.stack([np.asarray(images[i]) for i in range(4)])
    assert adapted.predict(pixels) == adapted.predict([images[i] for i in range(4)])
    images[0].save(tmp_path / "0.png")
    for one in (tmp_path / "0.png", str(tmp_path / "0.png"), images[0], pixels[0]):
        (name,) = adapted.predict(one)
        assert name == adapted.predict(pixels)[0] and type(name) is str
    probabilities = adapted.predict_proba(x)
    assert probabilities.shape == (4, 10)
    assert torch.allclose(probabilities.sum(1), torch.ones(4))
    assert probabilities.equal(adapted.scores(x).softmax(-1))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (np.ones((3, 7)), "got float64 (3, 7)"),
        (np.ones(96), "one image's features are a row"),
        (np.ones((3, 96), int), "got int64 (3, 96)"),
        ("question", "no such"),
        (7, "got int"),
    ],
)
def test_what_is_neither_features_nor_pictures_is_refused(adapted, given, told):
    for verb in (adapted.predict, adapted.predict_proba, adapted.scores):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            verb(given)
        assert told in str(caught.value) and "\n" not in str(caught.value)


def test_texts_are_for_generation(digits, adapted):
    with pytest.raises(ValueError, match="TaskRes classifies images; it takes no texts"):
        adapted.predict(digits.features.test[:1], "what is it?")


def test_pictures_of_a_method_that_reads_images(digits):
    method = va.create_method("VPT", digits)
    images = digits.images("test")
    pixels = np.stack([np.asarray(images[i]) for i in range(2)])
    expected = method.scores(method.inputs(digits, "test"))[:2]
    assert torch.allclose(method.scores(pixels), expected, atol=1e-3)
    assert len(method.predict(torch.from_numpy(pixels).permute(0, 3, 1, 2))) == 2
    with pytest.raises(ValueError, match="reads images, not features"):
        method.predict(digits.features.test[:2])


# --- files


LOAD = """
import sys
import numpy as np
import vlmadapt as va
method = va.load_method(sys.argv[1])
print(type(method).__name__, *method.predict(np.load(sys.argv[2])))
"""


def test_load_in_another_process(digits, adapted, tmp_path):
    x = digits.features.test[:5]
    np.save(tmp_path / "x.npy", x.numpy())
    adapted.save(tmp_path / "m.safetensors")
    told = run_warm(LOAD, tmp_path / "m.safetensors", tmp_path / "x.npy")
    assert told.split() == ["TaskRes", *adapted.predict(x)]


OWN = """
import vlmadapt as va
from vlmadapt.methods.task_res import TaskRes

{decorator}
class Nudge(TaskRes):
    "A residual that is small."
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    "A user's module with a method; the decorator is up to the test."
    monkeypatch.syspath_prepend(tmp_path)

    def write(decorator):
        (tmp_path / "my_methods.py").write_text(OWN.format(decorator=decorator))
        importlib.invalidate_caches()
        return importlib.import_module("my_methods")

    yield write
    sys.modules.pop("my_methods", None)
    from vlmadapt.methods import METHODS

    METHODS._classification.pop("MyNudge", None)


def test_an_own_method_by_its_registered_name(own_module, digits, tmp_path):
    own_module('@va.register_method("MyNudge")')
    assert "MyNudge" in va.list_methods("features")
    assert va.method_info("MyNudge").summary == "A residual that is small."
    fitted = va.adapt(digits, "MyNudge", trials=0, fixed={"epochs": 1})
    fitted.save(tmp_path / "m.safetensors")
    assert type(va.load_method(tmp_path / "m.safetensors")) is type(fitted)
    np.save(tmp_path / "x.npy", digits.features.test[:2].numpy())
    given = tmp_path / "m.safetensors", tmp_path / "x.npy"
    path = f"import sys\nsys.path.append({str(tmp_path)!r})"
    told = run_warm(f"{path}\nimport my_methods\n{LOAD}", *given)
    assert told.split() == ["Nudge", *fitted.predict(digits.features.test[:2])]
    by_name = LOAD.replace("sys.argv[1])", "sys.argv[1], method='my_methods:Nudge')")
    assert run_warm(f"{path}\n{by_name}", *given) == told


def test_an_own_method_by_the_path_of_its_file(digits, tmp_path, monkeypatch):
    (tmp_path / "own_file.py").write_text(OWN.format(decorator=""))
    monkeypatch.chdir(tmp_path)
    method = va.create_method("own_file.py:Nudge", digits)
    assert type(method).__name__ == "Nudge"
    method.save(tmp_path / "m.safetensors")
    loaded = va.load_method(tmp_path / "m.safetensors", method=f"{tmp_path}/own_file.py:Nudge")
    assert type(loaded) is type(method)
    sys.modules.pop(type(method).__module__)


def test_a_file_does_not_decide_what_is_imported(own_module, digits, tmp_path):
    module = own_module("")
    method = va.create_method("my_methods:Nudge", digits)
    assert type(method) is module.Nudge
    method.save(tmp_path / "m.safetensors")
    assert type(va.load_method(tmp_path / "m.safetensors")) is module.Nudge
    del sys.modules["my_methods"]
    with pytest.raises(ValueError) as caught:
        va.load_method(tmp_path / "m.safetensors")
    assert "class Nudge, which is not registered; import my_methods first" in str(caught.value)
    assert "--plugin my_methods)" in str(caught.value)
    assert "method='my_methods:Nudge'" in str(caught.value)
    assert "my_methods" not in sys.modules
    assert type(va.load_method(tmp_path / "m.safetensors", method="my_methods:Nudge")).__name__


@pytest.mark.parametrize("place", ["own_package/inner/methods.py", "my method.py"])
def test_the_plugin_that_a_message_names_exists(digits, tmp_path, monkeypatch, place):
    "A module inside a package is named by its file, where that lies below the working folder."
    from vlmadapt.core.plugins import load_plugin, locate_plugin

    file = tmp_path / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(OWN.format(decorator=""))
    for folder in [f for f in file.parents if f != tmp_path and tmp_path in f.parents]:
        (folder / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    own = load_plugin(locate_plugin(f"{place}:Nudge"))
    va.create_method(own, digits).save("m.safetensors")
    monkeypatch.delitem(sys.modules, own.__module__)
    with pytest.raises(ValueError) as caught:
        va.load_method("m.safetensors")
    shown = place if "/" in place else "FILE.py"
    assert f"(on the command line --plugin {shown})" in str(caught.value)
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(ValueError) as caught:
        va.load_method(tmp_path / "m.safetensors")
    shown = own.__module__ if "/" in place else "FILE.py"
    assert f"(on the command line --plugin {shown})" in str(caught.value)


def test_register_method_refuses(own_module):
    module = own_module("")
    for name, told in (("TaskRes", "registered already"), ("", "is a text"), (3, "takes a name")):
        with pytest.raises(ValueError, match=told):
            va.register_method(name)(module.Nudge)
    with pytest.raises(ValueError, match="is no subclass of Method"):
        va.register_method("MyNudge")(object)
    va.register_method("MyNudge")(module.Nudge)
    again = importlib.reload(module).Nudge
    assert va.register_method("MyNudge")(again) is again  # as when a cell is run twice


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("TaskRess", "did you mean 'TaskRes'?"),
        ("no_such_module:Class", "plug-in no_such_module: ModuleNotFoundError: "),
        (
            "vlmadapt.methods.gda:GDB",
            "unknown name in vlmadapt.methods.gda 'GDB'; did you mean 'GDA'?",
        ),
        ("nowhere/own.py:Class", "no such file: "),
        ("pathlib:Path", "is no subclass of Method"),
        ("LoRA", "LoRA generates text"),
    ],
)
def test_a_wrong_method_is_one_line(digits, name, told):
    for verb in (va.create_method, lambda n, p: va.adapt(p, n), va.tune):
        with pytest.raises(ValueError) as caught:
            verb(name, digits)
        assert told in str(caught.value) and "\n" not in str(caught.value)


WRONG_OBJECTS = {
    "evaluate takes a problem": lambda p, m: va.evaluate(m, "x"),
    "evaluate takes a problem,": lambda p, m: va.evaluate(m, [p]),
    "evaluate takes a method": lambda p, m: va.evaluate(p, m),
    "metrics are names, not 5": lambda p, m: va.evaluate(m, p, 5),
    "fit takes a problem": lambda p, m: va.fit(m, "x"),
    "fit_many takes a list of runs": lambda p, m: va.fit_many(m),
    "adapt takes a problem": lambda p, m: va.adapt(m),
    "tune takes a problem": lambda p, m: va.tune(p, "TaskRes"),
    "compare takes a list of methods": lambda p, m: va.compare(p, 5),
    "a method is built on a problem": lambda p, m: va.create_method("TaskRes", "x"),
    "a method is built on a problem,": lambda p, m: va.create_method("Frozen", None),
    "load_method takes the path": lambda p, m: va.load_method(m),
    "load_task takes a name, a path": lambda p, m: va.load_task(5, backbone="mini"),
    "few_shot takes a dataset": lambda p, m: va.few_shot(None, backbone="mini"),
    "from_folder takes the path": lambda p, m: va.from_folder(5, backbone="mini"),
    "get_model takes a model": lambda p, m: va.get_model("x", "y"),
    "hf_backbone takes a loaded model": lambda p, m: va.hf_backbone("x", "y"),
    "hf_backbone takes the processor": lambda p, m: va.hf_backbone(torch.nn.Linear(1, 1), "y"),
    "register_dataset takes a DatasetSpec": lambda p, m: va.register_dataset("x"),
    "a file is written to a path, not 5": lambda p, m: m.save(5),
}


@pytest.mark.parametrize("message", WRONG_OBJECTS)
def test_another_kind_of_object_is_refused_in_one_line(digits, message):
    method = va.create_method("ZeroShot", digits)
    refused(lambda: WRONG_OBJECTS[message](digits, method), message)


@pytest.mark.parametrize("name", va.list_methods())
def test_method_info(name):
    info = va.method_info(name)
    assert info.name == name and info.summary and info.needs
    assert set(info.hyper_parameters.index) == set(info.cls.declared())
    assert name in repr(info) and info.kind in repr(info)


# --- plug-ins of other packages


@pytest.mark.parametrize("group", ["vlmadapt.methods", "vlmadapt.datasets", "vlmadapt.backbones"])
def test_a_broken_plug_in_is_one_warning(group, monkeypatch):
    from vlmadapt.core.registry import Registry
    from vlmadapt.methods.registry import MethodRegistry

    entries = [
        importlib.metadata.EntryPoint("bad", "no_such_package:Thing", group),
        importlib.metadata.EntryPoint("good", "vlmadapt.methods.gda:GDA", group),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)
    fresh = MethodRegistry(group) if "methods" in group else Registry("thing", entry_points=group)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert list(fresh) == ["good"] and "bad" not in fresh
    (warning,) = [str(w.message) for w in caught]
    assert warning.startswith(f"plug-in 'bad' (no_such_package:Thing, entry point of {group})")
    assert "ModuleNotFoundError" in warning and "\n" not in warning


def test_the_registries_read_their_entry_points():
    from vlmadapt.data.datasets import DATASETS
    from vlmadapt.methods import METHODS
    from vlmadapt.models.backbones import BACKBONES

    list(METHODS)
    groups = {DATASETS._entry_points, BACKBONES._entry_points}
    assert groups == {"vlmadapt.datasets", "vlmadapt.backbones"}


def test_an_own_dataset():
    rng = np.random.default_rng(0)

    def split(n):
        colours = np.arange(n) % 2
        arrays = rng.integers(0, 60, (n, 32, 32, 3), dtype=np.uint8)
        arrays[np.arange(n), :, :, colours * 2] += 150
        return va.Images([Image.fromarray(a) for a in arrays], torch.as_tensor(colours))

    def load():
        splits = {"train": split(16), "val": split(8), "test": split(8)}
        return va.Dataset("two-colours", ["red", "blue"], splits, ["a {} picture."])

    va.register_dataset(va.DatasetSpec("two-colours", load), replace=True)
    assert "two-colours" in va.list_datasets()
    problem = va.few_shot("two-colours", backbone="mini", shots=4)
    assert va.evaluate(va.adapt(problem, "GDA"), problem)["accuracy"] > 60


# --- cache


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLMADAPT_CACHE", str(tmp_path / "cache"))
    from vlmadapt.problems.cache import cached, cached_rows

    x = torch.ones(6, 8)
    for part in ("a", "b"):
        cached(lambda: x, what=part)
    cached_rows(lambda start, stop, size: x[start:stop], 6, lambda: 2, shard=2, what="rows")
    return tmp_path / "cache"


def test_cache_info(own_cache):
    info = va.cache.info()
    assert info.folder == own_cache and info.files == 4
    assert info.table["files"].to_dict() == {"features": 2, "large features": 2, "unfinished": 0}
    own = [p for p in (own_cache / "features").iterdir() if p.is_file()]
    assert info.bytes == info.table["bytes"].sum() == sum(p.stat().st_size for p in own)
    assert str(own_cache) in repr(info) and "4 files" in repr(info)


def test_an_empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLMADAPT_CACHE", str(tmp_path / "none"))
    assert va.cache.info().files == va.cache.info().bytes == 0
    assert va.cache.clear().startswith("0 files")
    assert not (tmp_path / "none").exists()


def test_clear_removes_only_own_files(own_cache, tmp_path):
    features = own_cache / "features"
    outside = tmp_path / "outside"
    outside.mkdir()
    treasure = outside / f"{'a' * 20}.safetensors"
    treasure.write_text("not ours")
    kept = [features / "thesis.txt", features / "notes.safetensors", own_cache / "a.safetensors"]
    for path in kept:
        path.write_text("not ours")
    (features / f"{'b' * 20}.shards").symlink_to(outside)
    (features / f"{'c' * 20}.safetensors").symlink_to(treasure)
    assert va.cache.clear().startswith("4 files")
    assert all(path.read_text() == "not ours" for path in (*kept, treasure))
    assert (features / f"{'c' * 20}.safetensors").is_symlink()
    assert va.cache.info().files == 0


def test_clear_does_not_follow_a_linked_folder(own_cache, tmp_path, monkeypatch):
    (tmp_path / "second").mkdir()
    (tmp_path / "second/features").symlink_to(own_cache / "features")
    monkeypatch.setenv("VLMADAPT_CACHE", str(tmp_path / "second"))
    assert va.cache.clear().startswith("0 files")
    monkeypatch.setenv("VLMADAPT_CACHE", str(own_cache))
    assert va.cache.info().files == 4


def test_clear_by_kind_and_age(own_cache):
    first = sorted((own_cache / "features").glob("*.safetensors"))[0]
    os.utime(first, (time.time() - 10 * 86_400,) * 2)
    assert va.cache.clear(older_than=5, dry_run=True).startswith("1 files")
    assert first.exists()
    assert va.cache.clear("large features", older_than=5).startswith("0 files")
    assert va.cache.clear(older_than=5).startswith("1 files") and not first.exists()
    assert va.cache.clear("features").startswith("1 files")
    assert va.cache.info().files == 2
    with pytest.raises(ValueError, match="unknown kind of stored file 'featurs'"):
        va.cache.clear("featurs")


def test_unfinished_shards_are_removed(own_cache):
    folder = own_cache / "features" / f"{'d' * 20}.shards"
    folder.mkdir()
    (folder / "0.safetensors").write_text("half")
    (folder / "plan.json").write_text("{}")
    assert va.cache.info().table.loc["unfinished", "files"] == 2
    assert va.cache.clear("unfinished").startswith("2 files") and not folder.exists()


HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_clear_refuses_while_a_lock_is_held(own_cache):
    key = sorted((own_cache / "features").glob("*.safetensors"))[0].stem
    command = [sys.executable, "-c", HOLD, own_cache / "locks" / key]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="held by another process.*nothing was removed"):
            va.cache.clear()
        assert va.cache.info().files == 4
    assert va.cache.clear().startswith("4 files")


def test_what_was_cleared_is_computed_again(own_cache):
    from vlmadapt.problems.cache import cached

    va.cache.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cached(lambda: torch.zeros(2), what="a").equal(torch.zeros(2))


# --- messages


def test_show_versions(capsys):
    va.show_versions()
    shown = capsys.readouterr().out
    assert f"vlmadapt         {va.__version__}" in shown
    assert torch.__version__ in shown and sys.executable in shown


@pytest.fixture
def restored_verbosity():
    before = va.verbosity()
    yield
    va.set_verbosity(before)


def test_verbosity(restored_verbosity, caplog):
    y = np.arange(2).repeat(8)
    problem = va.from_features(["a", "b"], np.eye(2, 6), train=(np.eye(2, 6)[y], y))
    for level, n in (("normal", 1), ("quiet", 0), ("debug", 1)):
        va.set_verbosity(level)
        assert va.verbosity() == level
        caplog.clear()
        va.adapt(problem, "TaskRes", trials=1, fixed={"epochs": 1})
        told = [r.getMessage() for r in caplog.records if r.name == "vlmadapt"]
        assert len(told) == n
    assert "no validation data; hyper-parameters are chosen on shots held out" in told[0]
    with pytest.raises(ValueError, match="did you mean 'quiet'?"):
        va.set_verbosity("quit")


BAR = """
import sys
from vlmadapt.core.verbosity import progress_bar, verbosity
for _ in progress_bar(range(3), delay=0, mininterval=0, desc="working"):
    pass
print(verbosity())
"""


@pytest.mark.parametrize(
    ("given", "level", "bars"),
    [("quiet", "quiet", False), ("DEBUG", "debug", True), ("", "normal", True)],
)
def test_the_verbosity_of_the_environment(given, level, bars):
    run = run_new(BAR, VLMADAPT_VERBOSITY=given)
    assert run.stdout.strip() == level and ("working" in run.stderr) == bars


def test_a_wrong_verbosity_of_the_environment_is_one_warning():
    code = "import vlmadapt as va; print(va.verbosity())"
    run = run_new(code, VLMADAPT_VERBOSITY="loud")
    assert run.stdout.strip() == "normal"
    assert run.stderr.count("VLMADAPT_VERBOSITY: unknown verbosity 'loud'") == 1


def test_messages_appear_once():
    code = """
import logging, sys
from vlmadapt.core.verbosity import LOGGER
if sys.argv[1] == "configured":
    logging.basicConfig(level=logging.INFO)
LOGGER.info("for your information")
"""
    for given in ("plain", "configured"):
        run = run_new(code, given)
        assert run.stderr.count("for your information") == 1, given
    assert logging.getLogger("vlmadapt").propagate


def test_every_bar_is_a_progress_bar():
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        if path.name == "11_verbosity.ipynb":
            continue
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code" and cell.source.startswith("#| export"):
                assert "tqdm" not in cell.source, path


def test_a_method_says_what_it_is():
    problem = va.few_shot("mini-digits", backbone="mini", shots=1)
    method = va.create_method("TaskRes", problem)
    assert repr(method) == "TaskRes(mini, 10 classes, 960 trainable parameters)"


@pytest.mark.parametrize("name", ["HeGraphAdapter", "LayerNormTuning"])
def test_a_method_of_modules_says_what_it_is_in_one_line(name):
    method = va.create_method(name, va.few_shot("mini-digits", backbone="mini", shots=1))
    count = f"{method.trainable_parameters():,}"
    assert repr(method) == f"{name}(mini, 10 classes, {count} trainable parameters)"


def test_a_method_on_features_says_so():
    rows = torch.eye(4)
    problem = va.from_features(["a", "b"], rows[:2], train=(rows, [0, 1, 0, 1]))
    method = va.create_method("ZeroShot", problem)
    assert repr(method) == "ZeroShot(features, 2 classes, 0 trainable parameters)"
