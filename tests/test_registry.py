"Registries: names that are taken, plug-ins that fail, threads, entry points."

import importlib.metadata
import re
import sys
import threading

import pytest

from vlmadapt.core.registry import Registry, UnknownName, choose


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    "Write a plug-in module; its text may use `registry`, which the test puts into `shared`."
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "shared_shapes.py").write_text("")
    for name in ("shared_shapes", "shape_plugin"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def write(text, registry):
        import shared_shapes

        shared_shapes.registry = registry
        (tmp_path / "shape_plugin.py").write_text(f"from shared_shapes import registry\n{text}")

    yield write
    for name in ("shared_shapes", "shape_plugin"):
        sys.modules.pop(name, None)


def test_a_name_that_is_taken():
    shapes = Registry("shape", {"square": 4})
    assert shapes.register("square", 4) == 4  # the same thing again
    with pytest.raises(ValueError, match="shape 'square' is registered already"):
        shapes.register("square", 5)
    assert shapes.register("square", 5, replace=True) == shapes["square"] == 5
    with pytest.raises(ValueError, match="the name of a shape is a text, got 3"):
        shapes.register(3, 3)


def test_what_is_defined_again_takes_its_own_place():
    shapes = Registry("shape")
    for sides in (4, 5):
        definition = {"__name__": "cell"}
        exec(f"def square():\n    return {sides}", definition)
        shapes.register("square", definition["square"])
    assert shapes["square"]() == 5
    with pytest.raises(ValueError, match="registered already"):
        shapes.register("square", len)


def test_a_wrong_name_is_a_key_error_and_a_value_error():
    shapes = Registry("shape", {"square": 4})
    for look_up in (lambda: shapes["squares"], lambda: choose("squares", shapes, "shape")):
        with pytest.raises(UnknownName) as caught:
            look_up()
        assert str(caught.value) == "unknown shape 'squares'; did you mean 'square'?"
        assert isinstance(caught.value, KeyError)
    assert shapes.get("circle") is None and [3] not in list(shapes)


def test_a_plug_in_that_fails_is_imported_again(plugin):
    shapes = Registry("shape", {"square": 4}, plugins=["shape_plugin"])
    plugin("raise ImportError('no such library')", shapes)
    with pytest.raises(ImportError, match="no such library"):
        list(shapes)
    assert shapes["square"] == 4
    plugin("registry.register('circle', 1)", shapes)
    importlib.invalidate_caches()
    assert shapes["circle"] == 1


def test_threads_wait_for_the_plug_in(plugin):
    shapes = Registry("shape", plugins=["shape_plugin"])
    plugin("import time; time.sleep(0.3); registry.register('circle', 1)", shapes)
    found = []
    threads = [threading.Thread(target=lambda: found.append(list(shapes))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert found == [["circle"]] * 4


def test_entry_points_of_installed_packages(monkeypatch):
    entry = importlib.metadata.EntryPoint("tau", "math:tau", "shapes.plugins")
    groups = {"shapes.plugins": [entry]}
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: groups[group])
    shapes = Registry("number", entry_points="shapes.plugins")
    assert list(shapes) == ["tau"]
    assert shapes["tau"] == pytest.approx(6.2832, abs=1e-4)


def test_control_characters_are_escaped():
    with pytest.raises(ValueError) as caught:
        choose("\x1b[31mred", {"cats\x07\n": 1}, "class")
    assert str(caught.value).isprintable()


OWN_METHODS = {"LinearProbe", "AnchoredProbe", "AnchoredKernel", "FullFineTuning", "Frozen"}
WITHOUT_OFFICIAL_CODE = {"HeGraphAdapter"}


def test_every_method_names_its_paper_its_code_and_its_use():
    "Methods of ours and plain fine-tuning have no paper."
    from site_pages import entries

    for info in entries():
        assert info.advice, info.name
        assert bool(info.paper) == bool(info.arxiv) == (info.name not in OWN_METHODS), info.name
        coded = bool(info.paper) and info.name not in WITHOUT_OFFICIAL_CODE
        assert bool(info.source) == coded, info.name
        assert not info.arxiv or re.fullmatch(r"\d{4}\.\d{4,5}", info.arxiv)
        assert not info.source or re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", info.source)


def test_an_item_that_is_put_back_keeps_the_module_that_registered_it(monkeypatch):
    from vlmadapt.data.datasets import DATASETS

    before = DATASETS["mini-digits"], DATASETS.registered_in("mini-digits")
    with monkeypatch.context() as patch:
        patch.setitem(DATASETS, "mini-digits", DATASETS["mini-shapes"])
        assert DATASETS.registered_in("mini-digits") != before[1]
    assert (DATASETS["mini-digits"], DATASETS.registered_in("mini-digits")) == before
