"Notebooks, library and derived files agree; notebooks are clean, small, and run by papermill."

import filecmp
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import derived
import nbformat
import pytest
from conftest import ROOT, run_command
from packaging.requirements import Requirement

from vlmadapt.grid.entries import method_entry
from vlmadapt.grid.params import read_runs
from vlmadapt.reporting.published import (
    AVERAGES,
    BACKBONE_NAMES,
    DATASET_NAMES,
    published,
    readings,
)

NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)


def name(path):
    return str(path.relative_to(ROOT / "nbs")) if path.is_absolute() else str(path)


def files(folder, *suffixes):
    "The files under `folder`, relative to it, without caches."
    return {
        p.relative_to(folder)
        for p in folder.rglob("*")
        if p.suffix in suffixes and p.parent.name != ".ipynb_checkpoints"
    }


def same(a, b, *suffixes):
    "Names of files that are in only one of two folders, or that differ."
    both = files(a, *suffixes) & files(b, *suffixes)
    differ = {p for p in both if not filecmp.cmp(a / p, b / p, shallow=False)}
    return sorted(map(str, differ | (files(a, *suffixes) ^ files(b, *suffixes))))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of what nbdev reads and writes, to run its commands in."
    copy = tmp_path_factory.mktemp("copy")
    for f in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / f, copy)
    for d in ("nbs", "vlmadapt"):
        shutil.copytree(
            ROOT / d, copy / d, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        )
    return copy


def nbdev(command, folder):
    subprocess.run([Path(sys.executable).parent / command], cwd=folder, check=True)


def test_library_is_exported_from_the_notebooks(copy):
    for f in files(copy / "vlmadapt", ".py"):
        (copy / "vlmadapt" / f).write_text("")
    nbdev("nbdev_export", copy)
    assert not same(ROOT / "vlmadapt", copy / "vlmadapt", ".py"), "run `make export`"


def test_notebooks_are_clean(copy):
    nbdev("nbdev_clean", copy)
    assert not same(ROOT / "nbs", copy / "nbs", ".ipynb"), "run `make export`"


def test_notebooks_store_no_state_of_widgets():
    stored = [name(p) for p in NOTEBOOKS if "widgets" in nbformat.read(p, 4).metadata]
    assert not stored, f"remove 'widgets' from the metadata of {stored}"


@pytest.mark.parametrize("made", [derived.readme, derived.environment, derived.badges])
def test_derived_files_agree(made):
    stale = [
        path
        for path, data in made().items()
        if not (ROOT / path).exists() or (ROOT / path).read_bytes() != data
    ]
    assert not stale, "run `make export`"


def test_no_picture_of_an_older_readme():
    assert {
        f"nbs/images/{p.name}" for p in (ROOT / "nbs/images").glob("index_*")
    } <= derived.readme().keys()


def test_notebooks_are_small():
    big = {
        name(p): f"{p.stat().st_size >> 10} kB" for p in NOTEBOOKS if p.stat().st_size > 400 << 10
    }
    assert not big


FENCED = re.compile(r"^```.*?^```", re.M | re.S)  # code, whose comments are no titles


def test_notebooks_begin_with_one_title():
    def titles(path):
        cells = nbformat.read(path, as_version=4).cells
        found = [
            i
            for i, c in enumerate(cells)
            if c.cell_type == "markdown"
            for line in FENCED.sub("", c.source).splitlines()
            if line.startswith("# ")
        ]
        return found == [0] and cells[0].source.splitlines()[1].startswith("> ")

    assert not [name(p) for p in NOTEBOOKS if not titles(p)]


def test_experiments_have_a_parameters_cell():
    def tags(nb):
        cells = [cell for cell in nb.cells if cell.cell_type == "code"]
        return [tag for cell in cells for tag in cell.metadata.get("tags", [])]

    lack = [
        name(p)
        for p in NOTEBOOKS
        if p.parent.name == "experiments"
        and tags(nbformat.read(p, as_version=4)).count("parameters") != 1
    ]
    assert not lack


@pytest.mark.parametrize("file", sorted(p.name for p in (ROOT / "params").glob("*.yml")))
def test_params_files_are_read(file, tmp_path, capsys):
    "Every name and value in them exists."
    assert not run_command("grid", file, dry_run=True, out=str(tmp_path)), capsys.readouterr().err
    assert " measurements missing" in capsys.readouterr().out


def test_every_published_cell_of_hegraph_adapter_has_a_run():
    numbers = readings(published("HeGraphAdapter", ["Table 1", "Table 2", "Table 4"]))
    numbers = numbers[~numbers["dataset"].isin(AVERAGES)]
    planned = set()
    for run in read_runs("hegraph_adapter_coop.yml"):
        given = run.parameters
        datasets = [given["dataset"], *given.get("targets", [])] if "dataset" in given else []
        for dataset, method in product(datasets, given["methods"]):
            label = method_entry(method).label
            shots = str(0 if label == "ZeroShot" else given["shots"])
            where = (DATASET_NAMES[dataset], BACKBONE_NAMES[given["backbone"]])
            planned.add((*where, shots, label))
    cells = numbers[["dataset", "backbone", "shots", "ours"]]
    assert len(numbers) > 250
    assert set(cells.itertuples(index=False, name=None)) <= planned


def test_constraints_lie_within_the_ranges_of_settings():
    pins = [
        Requirement(line)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and line[0] != "#"
    ]
    pins = {r.name.lower(): next(iter(r.specifier)).version for r in pins}
    cfg = derived.settings()
    for key in derived.requirement_keys(cfg):
        for r in map(Requirement, cfg[key].split()):
            assert r.name.lower() in pins, f"{r.name} has no tested version in constraints.txt"
            assert pins[r.name.lower()] in r.specifier, (
                f"constraints.txt has {r.name} {pins[r.name.lower()]}, settings.ini {r}"
            )
