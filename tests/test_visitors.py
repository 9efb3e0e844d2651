"Tutorials, reports and method notebooks open in Colab and Binder, and install what they need."

import importlib.util
import os
import subprocess

import pytest
import visitors
import yaml
from conftest import ROOT


def test_every_notebook_for_visitors_has_its_cells():
    found = visitors.notebooks()
    names = {path.relative_to(ROOT / "nbs").as_posix() for path in found}
    assert {
        "tutorials/own_images.ipynb",
        "reports/features.ipynb",
        "05_methods/50_generation.ipynb",
    } <= names
    stale = [path.name for path in found if visitors.with_cells(path) != path.read_text("utf-8")]
    assert not stale, "run `make export`"


@pytest.mark.parametrize("path", visitors.notebooks()[::9], ids=lambda path: path.stem)
def test_links_lead_to_the_notebook(path):
    place = path.relative_to(ROOT).as_posix()
    text = visitors.links(path)
    assert f"/github/vlmadapt/vlmadapt/blob/main/{place})" in text
    assert f"?labpath={place})" in text


@pytest.mark.parametrize("installed", [True, False])
def test_the_first_cell_installs_where_the_library_is_missing(installed, monkeypatch):
    commands, folders = [], []
    spec = importlib.util.find_spec("os") if installed else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr(os, "chdir", folders.append)
    exec(visitors.install(ROOT / "nbs/tutorials/adapters_for_hf.ipynb"), {})
    if installed:
        assert not commands and not folders
        return
    clone, pip = commands
    assert clone[:2] == ["git", "clone"] and clone[-1] == "repository"
    assert pip[-1] == "./repository[workbook,hf]"
    assert folders == ["repository/nbs/tutorials"]


def test_binder_installs_the_library_with_torch_for_processors():
    environment = yaml.safe_load((ROOT / "binder/environment.yml").read_text("utf-8"))
    (pip,) = [part["pip"] for part in environment["dependencies"] if isinstance(part, dict)]
    assert pip[0].startswith("--extra-index-url") and pip[0].endswith("/whl/cpu")
    assert pip[1] == "-c ../constraints.txt" and pip[-1] == "-e .."
    assert (ROOT / "binder" / pip[1].split()[1]).resolve() == ROOT / "constraints.txt"
    assert any(line.startswith("jupyterlab") for line in pip)
