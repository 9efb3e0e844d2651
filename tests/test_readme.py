"The README shows the committed numbers and names what the library has."

import re
from pathlib import Path

import derived
import front_figures
import nbformat
import pandas as pd
import pytest
from conftest import ROOT

from vlmadapt.methods import display_name

README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = {
    "ImageNet": "clip_vitb32_imagenet",
    "Cars": "clip_vitb32_stanford_cars",
    "WHU-RS19": "clip_vitb32_whurs19",
}


def tables():
    "Return the tables of the README as lists of dictionaries."
    found = []
    for text in re.findall(r"(?:^\|.*\n)+", README, re.M):
        head, _, *lines = [
            [part.strip() for part in line.strip("|").split("|")] for line in text.splitlines()
        ]
        found.append([dict(zip(head, line, strict=True)) for line in lines])
    return found


def table_with(*columns):
    "Return the one table that has these columns."
    (found,) = [table for table in tables() if set(columns) <= set(table[0])]
    return found


def test_real_features():
    table = table_with("rule", "seconds")
    measured = pd.read_parquet(ROOT / "outputs/measured/features.parquet")
    measured = measured[(measured["text"] == "text") & (measured["variant"] == "")]
    columns = [c for c in table[0] if " per class" in c]
    assert len(table) >= 6 and len(columns) == 5
    for line in table:
        own = measured[measured["method"].map(display_name) == line["method"]]
        for column in columns:
            name, shots = re.fullmatch(r"(\S+), (\d+) per class", column).groups()
            cell = own[(own["dataset"] == NAMES[name]) & (own["shots"] == int(shots))]
            assert set(cell["seed"]) == {1, 2, 3}
            assert line[column] == f"{cell['value'].mean():.1f}"
        cars = own[(own["dataset"] == NAMES["Cars"]) & (own["shots"] == 16)]
        rule = {"few_shot_val": "validation", "defaults": "none"}[cars["rule"].iloc[0]]
        assert line["rule"] == rule
        assert line["seconds"] == f"{cars['fit_processor_seconds'].median():.1f}"


@pytest.mark.parametrize("column", ["Average", "mini-digits"])
def test_synthetic_benchmark(column):
    measured = pd.read_csv(ROOT / "outputs/measured/mini.csv")
    measured["method"] = measured["method"].map(display_name)
    measured = measured.set_index(["method", "dataset"])
    for line in table_with("method", column):
        for dataset in line.keys() - {"method"}:
            own = measured.loc[(line["method"], dataset)]
            deviation = f" ± {own['sd']:.1f}" if own["seeds"] > 1 else "†"
            assert line[dataset] == f"{own['mean']:.1f}{deviation}"


def test_the_figure_is_of_the_committed_numbers():
    kept = front_figures.HERO.with_suffix(".sha256").read_text(encoding="utf-8").strip()
    assert kept == front_figures.fingerprint(), "run python tools/front_figures.py"
    assert front_figures.HERO.stat().st_size < 100_000
    (alternative,) = re.findall(r"!\[([^]]+)\]\(nbs/images/hero\.png\)", README)
    assert len(alternative) > 50


def test_readme_names_every_method_grid_and_tutorial():
    from vlmadapt.methods import METHODS

    words = set(re.findall(r"[A-Za-z0-9]+", README))
    assert not set(METHODS) - words
    grids = {p.stem for p in (ROOT / "params").glob("*.yml")}
    assert not grids - set(re.findall(r"[a-z_]+", README))
    tutorials = {p.name for p in (ROOT / "nbs/tutorials").glob("*.ipynb")}
    assert not tutorials - set(re.findall(r"tutorials/(\w+\.ipynb)", README))


def test_links_of_the_readme():
    "Files exist, and so do the headings that are linked to."
    text = derived.CODE.sub("", README)
    headings = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.+)", text, re.M)
    }
    for address in re.findall(r"\]\(([^)\s]+)\)", text):
        if address.startswith("#"):
            assert address[1:] in headings, address
        elif not address.startswith("http"):
            assert (ROOT / address).exists(), address


def test_first_screens():
    "What it is, a picture, install and first lines come before everything else."
    order = ["hero.png", "pip install", "import vlmadapt", "## Three doors", "## Results on real"]
    places = [README.index(part) for part in order]
    assert places == sorted(places)
    assert README[: places[-1]].count("\n") < 70
    assert Path(ROOT / "CITATION.cff").exists() and "@software" in README


def test_the_method_of_the_readme_is_that_of_the_tutorial():
    (source,) = re.findall(r"@va.register_method.*?\n\n(?=# in a notebook)", README, re.S)
    tutorial = nbformat.read(ROOT / "nbs/tutorials/add_a_method.ipynb", as_version=4)
    assert any(source.strip() in cell.source for cell in tutorial.cells)
