"""Parts of the site made of registry and results: the head of a method, the zoo, llms.txt."""

import html
import re
from functools import cache
from pathlib import Path

import front_figures
import nbformat
import pandas as pd

import vlmadapt as va
from vlmadapt.methods import METHODS, display_name, method_info

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("features", "prompts", "towers", "generation")
SHOTS = 16
MANY = 4  # methods of a page that are listed in a table
REAL = {"clip_vitb32_stanford_cars": "Cars", "clip_vitb32_whurs19": "WHU-RS19"}
OTHER_FILES = {"AMUTuning": "amu_tuning", "prompts": "towers", "towers": "towers"}
SMALL = "mini-digits"
INPUTS = {
    "features": "image and text features (no image files)",
    "prompts": "image files and a backbone",
    "towers": "image files and a backbone",
    "generation": "images with texts, and a backbone that generates text",
}
ZOO_HEAD = """# Method zoo

> Every method in one table: inputs, trained parameters, costs, accuracy, and its paper.

A click on a heading sorts the table. Accuracy is in percent with 16 labelled images per class,
means over three seeds (°: one seed), hyper-parameters selected without test data: on frozen CLIP
ViT-B/32 features of Stanford Cars and WHU-RS19, and on mini-digits with the small CLIP of the
package. Trained parameters and processor seconds of search and fit were measured on WHU-RS19
(19 classes of width 512), for prompts and towers on mini-digits; parameters of other methods are
counted on mini-digits and mini-vqa, and shown in italics. HeGraphAdapter on real features is its
variant T-P, which needs no negative texts. The reports on [features](reports/features.ipynb) and
[towers](reports/towers.ipynb) have all datasets, errors and protocols; `va.method_info(name)`
describes the hyper-parameters of a method."""


def entries() -> list:
    "Return the description of every registered method, in the order of the registry."
    found = []
    for kind in KINDS:
        found += [method_info(name, kind) for name in METHODS.names(kind)]
    return found


def links(info) -> list[str]:
    "Return links to the paper and the official code of a method."
    found = []
    if info.arxiv:
        found.append(f"[arXiv {info.arxiv}](https://arxiv.org/abs/{info.arxiv})")
    if info.source:
        found.append(f"[official code]({info.source})")
    return found


def rule(info) -> str:
    "Return in words how hyper-parameters are chosen."
    return "defaults" if info.validation_free else "validation data"


@cache
def measured(info_name: str, kind: str) -> pd.DataFrame:
    "Return committed means of a method: dataset, shots, mean, seeds, parameters, seconds."
    if kind == "generation":
        return front_figures.measured().iloc[:0]
    name = OTHER_FILES.get(info_name, OTHER_FILES.get(kind, "features"))
    table = front_figures.measured(name)
    return table[table["method"] == info_name]


def best_result(info) -> str:
    "Return the largest gain over zero-shot that was measured, as a sentence, or nothing."
    own = measured(info.name, info.kind)
    places = [SMALL] if info.kind in ("prompts", "towers") else list(front_figures.PANELS)
    own = own[own["dataset"].isin(places)]
    three = own[own["seeds"] >= front_figures.SEEDS]
    few = ", one seed" if three.empty else ""
    found = []
    for line in (own if three.empty else three).itertuples():
        level = front_figures.level(line.dataset, line.shots, info.kind)
        if level is not None:
            found.append((line.mean - level, line.dataset, line.shots, line.mean, level))
    if not found or info.name == "ZeroShot":
        return ""
    gain, dataset, shots, mean, level = max(found)
    name = front_figures.NAMES.get(dataset, dataset)
    report = "towers" if info.kind in ("prompts", "towers") else "features"
    images = "image" if shots == 1 else "images"
    return (
        f"**Best result**: {mean:.1f} % on {name} with {shots} {images} per class, {gain:+.1f} "
        f"points over zero-shot{few} ([report](../reports/{report}.ipynb))."
    )


def facts(info) -> str:
    "Return what a method's page says of one method: links, use, costs, best result."
    training = "Trains nothing" if info.training_free else "Trained"
    name = display_name(info.name)
    in_code = [] if name == info.name else [f"in code `{info.name}`"]
    title = " · ".join([f"**{name}**", *in_code, *links(info)])
    lines = [title + (f"<br>{info.paper}" if info.paper else "")]
    lines.append(
        f"**When to use it**: {info.advice}. {training}; reads {INPUTS[info.kind]}; "
        f"hyper-parameters: {rule(info)}."
    )
    return "\n\n".join(filter(None, [*lines, best_result(info)]))


def example(name: str, kind: str) -> str:
    "Return three lines of use."
    problem = 'va.from_folder("my_images/", backbone="ViT-B-16")'
    if kind == "generation":
        problem = 'va.load_task("mini-vqa", backbone="mini")'
    value = "" if kind == "generation" else '["accuracy"]'
    code = [f"problem = {problem}", f'method = va.adapt(problem, "{name}")']
    code.append(f"va.evaluate(method, problem){value}")
    return "```python\n" + "\n".join(code) + "\n```"


def method_table(infos: list) -> str:
    "Return the methods of a page that has many, one a line."
    lines = ["| method | paper | when to use it |", "|---|---|---|"]
    for info in infos:
        paper = " · ".join([part for part in [info.paper.partition(":")[0], *links(info)] if part])
        name = display_name(info.name)
        if name != info.name:
            name += f" (`{info.name}`)"
        lines.append(f"| {name} | {paper} | {info.advice} |")
    return "\n".join(lines)


def method_head(infos: list, pictures: dict[str, str]) -> str:
    "Return what a method's page begins with; `pictures` are of methods."
    first = infos[0]
    if len(infos) > MANY:
        return "\n\n".join([method_table(infos), example("PAdapter", first.kind)])
    parts = [facts(first), example(first.name, first.kind)]
    parts += [facts(info) for info in infos[1:]]
    shown = [info.name for info in infos if info.name in pictures]
    if shown:
        names = " and ".join(map(display_name, shown))
        text = f"Accuracy of {names} over labelled images per class, among all methods"
        parts.append(f"![{text}]({pictures[shown[0]]})")
    return "\n\n".join(parts)


def pictures(stage: Path) -> dict[str, str]:
    "Draw the accuracy of each page's methods among all others; return the files by method."
    (stage / "05_methods/figures").mkdir(parents=True, exist_ok=True)
    pages, found = {}, {}
    for info in entries():
        if info.kind == "features" and len(measured(info.name, info.kind)):
            pages.setdefault(info.cls.__module__, []).append(info.name)
    for module, names in pages.items():
        name = f"figures/{module.rpartition('.')[2]}.png"
        drawn = tuple(dict.fromkeys([*names, "ZeroShot"]))
        (stage / "05_methods" / name).write_bytes(front_figures.png(drawn))
        found |= dict.fromkeys(names, name)
    return found


def counted(info) -> int | None:
    "Return the trained parameters of a method that was not measured, on a problem of `mini`."
    generates = info.kind == "generation"
    problem = task() if generates else few_shot()
    try:
        return info.cls(problem).trainable_parameters()
    except ValueError:  # it needs what the problem lacks
        return None


@cache
def task():
    return va.load_task("mini-vqa", backbone="mini")


@cache
def few_shot():
    return va.few_shot(SMALL, backbone="mini", shots=SHOTS)


def number(value, form: str, mark: str = "") -> str:
    "Return a cell of the zoo that is sorted by `value`."
    if value is None or pd.isna(value):
        return "<td></td>"
    return f'<td data-sort="{float(value):.6f}">{form.format(value)}{mark}</td>'


def small_benchmark(name: str) -> pd.DataFrame:
    "Return the result of a method on the dataset of the small benchmark, if there is one."
    table = pd.read_csv(ROOT / "outputs/measured/mini.csv")
    return table[(table["method"] == name) & (table["dataset"] == SMALL)]


def accuracies(name: str, own: pd.DataFrame) -> list[str]:
    "Return the cells of the zoo with accuracies."
    cells = []
    for dataset in (*REAL, SMALL):
        there = own[(own["dataset"] == dataset) & (own["shots"] == SHOTS)]
        if there.empty and dataset == SMALL:
            there = small_benchmark(name)
        if there.empty:
            cells.append("<td></td>")
            continue
        line = there.iloc[0]
        few = line["seeds"] < front_figures.SEEDS and line["method"] != "ZeroShot"
        cells.append(number(line["mean"], "{:.1f}", "°" if few else ""))
    return cells


def costs(info, own: pd.DataFrame) -> list[str]:
    "Return the cells of the zoo with trained parameters and processor seconds."
    place = "clip_vitb32_whurs19" if info.kind == "features" else SMALL
    there = own[(own["dataset"] == place) & (own["shots"] == SHOTS)]
    if len(there):
        line = there.iloc[0]
        return [number(line["parameters"], "{:,.0f}"), number(line["seconds"], "{:.1f}")]
    return [number(counted(info), "<em>{:,.0f}</em>"), "<td></td>"]


def zoo_line(info, pages: dict[str, str]) -> str:
    "Return the line of one method."
    module = info.cls.__module__
    name = html.escape(display_name(info.name))
    if module in pages:
        name = f'<a href="{pages[module]}">{name}</a>'
    if display_name(info.name) != info.name:
        name += f"<br><code>{html.escape(info.name)}</code>"
    own = measured(info.name, info.kind)
    paper = html.escape(info.paper.partition(":")[0])
    if info.arxiv:
        paper = f'<a href="https://arxiv.org/abs/{info.arxiv}">{paper}</a>'
    cells = [f"<td>{name}</td>", f"<td>{info.kind}</td>", *costs(info, own)]
    cells += [*accuracies(info.name, own), f"<td>{rule(info)}</td>", f"<td>{paper}</td>"]
    return f"<tr>{''.join(cells)}</tr>"


def zoo(pages: dict[str, str]) -> str:
    "Return the page with all methods in one table; `pages` are by module."
    heads = ["method", "kind", "parameters", "seconds", *REAL.values(), SMALL]
    heads += ["values from", "paper"]
    head = "<tr>" + "".join(f"<th>{text}</th>" for text in heads) + "</tr>"
    lines = [zoo_line(info, pages) for info in entries()]
    table = ["<table class='sortable'>", f"<thead>{head}</thead>", "<tbody>", *lines]
    body = "\n".join(["<div class='table-wrapper'>", *table, "</tbody>", "</table>", "</div>"])
    return f"{ZOO_HEAD}\n\n```{{raw}} html\n{body}\n```\n"


def first_lines(path: Path) -> tuple[str, str]:
    "Return the title of a page and the sentence below it."
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        text = next((cell.source for cell in cells if cell.cell_type == "markdown"), "")
    else:
        text = path.read_text(encoding="utf-8")
    title = re.search(r"^# (.+)", text, re.M)
    summary = re.search(r"^> (.+)", text, re.M)
    return title[1] if title else path.stem, summary[1] if summary else ""


def llms_text(stage: Path, groups: dict[str, list[str]], host: str) -> str:
    "Return the site in one text for language models: every page with a sentence, by group."
    parts = ["# vlmadapt", f"> {first_lines(stage / 'index.ipynb')[1]}"]
    for group, pages in groups.items():
        lines = [f"## {group}", ""]
        for page in pages:
            title, summary = first_lines(stage / page)
            address = f"{host}/{Path(page).with_suffix('.html').as_posix()}"
            lines.append(f"- [{title}]({address})" + (f": {summary}" if summary else ""))
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
