"What all reports have in common: names of methods, short captions, what has not run, few colours."

import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
import site_pages
from conftest import ROOT

from vlmadapt.methods import METHODS, display_name, method_info
from vlmadapt.reporting.checks import in_words
from vlmadapt.reporting.figures import GREY, look
from vlmadapt.reporting.plots import cost_plot
from vlmadapt.reporting.published import published
from vlmadapt.reporting.reproduction import beside, show_beside
from vlmadapt.reporting.statistics import compare_methods, difference_matrix
from vlmadapt.reporting.tables import axis_table, dataset_table, save_frame, show_frame

WORDS = 30  # of a caption are too many
LABELS = [*METHODS.names("features")[:12], "GDA (alone)", "SSText (plus)"]
DATASETS = [f"mini-{name}" for name in ("digits", "glyphs", "objects", "pairs", "shapes")]


def made_up(datasets=DATASETS, shots=(1, 16), seeds=(1, 2, 3), metric="accuracy"):
    "Results of fourteen methods and variants, as `read_results` returns them."
    lines = []
    for number, label in enumerate(LABELS):
        method, _, variant = label.partition(" (")
        for dataset in datasets:
            for shot in shots:
                for seed in seeds:
                    value = 50.0 + number + seed / 10 if method != "ZeroShot" else 50.0
                    own = {"method": method, "variant": variant.rstrip(")"), "value": value}
                    where = {"evaluated_on": dataset, "dataset": dataset, "shots": shot}
                    lines.append({**own, **where, "seed": seed, "above_zero_shot": value - 50})
    how = {"backbone": "mini", "prompts": "template", "views": 10, "trials": 16, "point": None}
    found = pd.DataFrame(lines).assign(metric=metric, class_split="all", n=1000, grid="g", **how)
    return found.assign(selection=["defaults" if m == "ZeroShot" else "few_shot_val"
                                   for m in found["method"]])  # fmt: skip


# Names


def test_names_of_methods_are_different():
    for kinds in (("features", "prompts", "towers"), ("generation",)):
        names = [name for kind in kinds for name in METHODS.names(kind)]
        shown = [display_name(name) for name in names]
        assert len(set(shown)) == len(names)
        assert all(display_name(name) == name for name in shown if name not in METHODS)


@pytest.mark.parametrize("label", [*METHODS, "TipAdapter (sharp)"])
def test_figures_and_tables_have_one_name(label):
    method, _, variant = label.partition(" (")
    name = display_name(label)
    assert look(method, variant.rstrip(")"))["label"] == name
    assert list(show_frame(pd.DataFrame({"value": [1.0]}, index=[label])).index) == [name]


def test_tables_show_the_names(tmp_path):
    table = dataset_table(made_up(), 16)
    names = [display_name(label) for label in table.mean.index]
    table.save(tmp_path)
    save_frame(table.mean, tmp_path, "frame")
    for name in ("table.md", "frame.md"):
        lines = (tmp_path / name).read_text(encoding="utf-8").splitlines()[2 : 2 + len(names)]
        assert [line.split("|")[1].strip() for line in lines] == names
    for text in (table._repr_html_(), repr(table)):
        assert "Tip-Adapter-F" in text and "TipAdapterF" not in text
    assert "Tip-Adapter-F &" in (tmp_path / "table.tex").read_text(encoding="utf-8")
    for name in ("table.csv", "frame.csv"):  # which programs read
        assert list(pd.read_csv(tmp_path / name, index_col=0).index) == list(table.mean.index)
    lines = in_words(made_up(), 16)
    assert lines[0].startswith(f"mini-digits: {display_name(LABELS[-1])} is best with")
    fig = difference_matrix(compare_methods(made_up(shots=(16,))))
    shown = {text.get_text() for text in fig.axes[0].get_yticklabels()}
    plt.close(fig)
    assert shown == set(names)


def test_the_zoo_and_the_readme_have_the_names():
    for name in ("TipAdapterF", "AnchoredKernel", "GDA"):
        line = site_pages.zoo_line(method_info(name), {})
        assert line.startswith(f"<tr><td>{display_name(name)}")
        assert (f"<code>{name}</code>" in line) == (name != "GDA")
        head = site_pages.facts(method_info(name))
        assert head.startswith(f"**{display_name(name)}**")
        assert (f"in code `{name}`" in head) == (name != "GDA")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = [line.split("|")[1].strip() for line in readme.splitlines() if line.startswith("| ")]
    assert {"Tip-Adapter", "Tip-Adapter-F", "Zero-shot", "Anchored kernel"} <= set(first)
    assert not {name for name in METHODS if display_name(name) != name} & set(first)


# Captions


def words(text):
    return len(text.split())


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "vqa_accuracy", "cider"])
def test_captions_are_short(metric):
    results = made_up(metric=metric)
    last = results["method"] == LABELS[3]
    lacking = results[~(last & (results["seed"] == 2))]
    lacking = lacking[
        ~((lacking["method"] == LABELS[4]) & (lacking["evaluated_on"] == DATASETS[0]))
    ]
    for found in (results, lacking, results[results["seed"] == 1]):
        for table in (
            dataset_table(found, 16, metric=metric),
            dataset_table(found, 16, metric=metric, datasets=["mini-textures"]),
            axis_table(found, metric=metric),
        ):
            assert words(table.caption) < WORDS, table.caption
            assert table.caption in repr(table) and table.notes in repr(table)
    table = dataset_table(lacking, 16, metric=metric)
    assert all(mark in table.caption for mark in ("– not run", "* datasets or", "† fewer seeds"))


def test_captions_beside_published_numbers_are_short():
    numbers = published("HeGraphAdapter", "Table 2")
    results = made_up(["dtd", "eurosat"], (16,)).assign(backbone="RN50", selection="given")
    compared = beside(results[results["variant"] == ""], numbers)
    assert set(compared["mark"]) >= {"not run", "not reproduced"}
    assert words(shown_captions(show_beside(compared).to_html())[0]) < WORDS


def shown_captions(html):
    "The captions of the tables in a page, without what unfolds."
    found = re.findall(r"<caption>(.*?)</caption>", html, re.DOTALL)
    return [re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL) for text in found]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "nbs/reports").glob("*.ipynb")), ids=lambda p: p.stem
)
def test_captions_in_reports_are_short(path: Path):
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", ()):
            for caption in shown_captions(output.get("data", {}).get("text/html", "")):
                assert words(caption) < WORDS, caption


# What has not run


def test_a_dataset_that_has_not_run_has_a_column():
    results = made_up()
    partly = results[(results["shots"] == 1) | (results["evaluated_on"] != "mini-shapes")]
    for table in (
        dataset_table(partly, 16),
        dataset_table(results[results["evaluated_on"] != "mini-shapes"], 16, datasets=DATASETS),
    ):
        assert list(table.mean) == [*DATASETS, "Average"]
        assert set(table.text()["mini-shapes"]) == {"–"}
        assert set(table.marks["Average"]) == {"*"} and table.ranks()["Average"].isna().all()
        assert "– not run. * datasets or seeds missing." in table.caption
        assert "– not run" in table.markdown() and "| –" in table.markdown()
    lines = in_words(partly, 16)
    assert lines[-2:] == ["mini-shapes: not run.", "Average: not complete."]
    whole = dataset_table(results, 16, datasets=DATASETS)
    assert "not run" not in whole.caption and set(whole.marks["Average"]) == {""}


# Costs


def costs():
    found = made_up(shots=(16,)).groupby(["method", "variant"], as_index=False)["value"].mean()
    return found.assign(trainable_parameters=[0, *(10 * 3**i for i in range(len(found) - 1))])


def test_costs_have_five_names_and_no_legend():
    fig = cost_plot(costs())
    ax = fig.axes[0]
    texts = [text for text in ax.texts if text.get_text() != "none"]
    fig.canvas.draw()
    boxes = [text.get_window_extent() for text in texts]
    assert not fig.legends and ax.get_legend() is None and len(texts) == 5
    assert {"Zero-shot", "HeGraphAdapter"} < {text.get_text() for text in texts}
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    points = [line for line in ax.lines if line.get_marker() not in ("", "None")]
    assert len(points) == len(LABELS)
    assert sum(line.get_color() == GREY for line in points) == len(LABELS) - 5
    plt.close(fig)


def test_costs_emphasise_what_is_chosen():
    fig = cost_plot(costs(), emphasised=["GDA (alone)", "TipAdapter"])
    shown = {text.get_text() for text in fig.axes[0].texts} - {"none"}
    plt.close(fig)
    assert shown == {"GDA (alone)", "Tip-Adapter"}
