"""Parts of the site made of registry and results: the head of a method, the zoo, llms.txt."""

import html
import re
from pathlib import Path

import nbformat
import pandas as pd

from vlmadapt.methods import METHODS, method_info

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "outputs/measured/features.parquet"
DATASET = "clip_vitb32_stanford_cars"  # real features that most methods were measured on
SHOTS = 16
KINDS = ("features", "prompts", "towers", "generation")
ZOO_HEAD = """# Method zoo

> Every method in one table: what it reads, how its values are chosen, and its accuracy.

A click on a heading sorts the table. Accuracy: percent on features of Stanford Cars from CLIP
ViT-B/32, means over seeds, hyper-parameters selected without test data; the
[report on features](reports/features.ipynb) has all datasets and the protocol.
`va.method_info(name)` describes the hyper-parameters of a method."""
INPUTS = {
    "features": "image and text features; no image files",
    "prompts": "image files and a backbone",
    "towers": "image files and a backbone",
    "generation": "images with texts, and a backbone that generates text",
}


def entries() -> list:
    "Return the description of every registered method, in the order of the registry."
    found = []
    for kind in KINDS:
        found += [method_info(name, kind) for name in METHODS.names(kind)]
    return found


def links(info, text: str) -> list[str]:
    "Return links to the paper and the official code of a method; `text` is its notebook's."
    found = []
    arxiv = info.arxiv or next(iter(re.findall(r"arxiv\.org/abs/(\d{4}\.\d{4,5})", text)), "")
    if arxiv:
        found.append(f"[paper](https://arxiv.org/abs/{arxiv})")
    source = info.source
    if not source.startswith("http"):
        pattern = r"https://github\.com/[\w.-]+/[\w.-]*\w"
        source = next(iter(re.findall(pattern, text)), "")
    if source:
        found.append(f"[official code]({source})")
    return found


def rule(info) -> str:
    "Return in words how hyper-parameters are chosen."
    return "defaults" if info.validation_free else "selected on validation data"


def method_head(infos: list, text: str) -> str:
    "Return what a method's page begins with: links, input, three lines of use."
    parts = []
    for info in infos:
        training = "No training." if info.training_free else "Trained."
        told = " · ".join([f"**{info.name}**", *links(info, text)])
        parts.append(
            f"{told}\n\n{training} Reads {INPUTS[info.kind]}; hyper-parameters: {rule(info)}."
        )
    first = infos[0]
    problem = 'va.from_folder("my_images/", backbone="ViT-B-16")'
    if first.kind == "generation":
        problem = 'va.load_task("mini-vqa", backbone="mini")'
    code = [f"problem = {problem}", f'method = va.adapt(problem, "{first.name}")']
    code.append(
        'va.evaluate(method, problem)["accuracy"]'
        if first.kind != "generation"
        else "va.evaluate(method, problem)"
    )
    parts.append("```python\n" + "\n".join(code) + "\n```")
    return "\n\n".join(parts)


def measured() -> pd.Series:
    "Return the mean accuracy on real features over seeds, by method."
    table = pd.read_parquet(MEASURED, columns=["dataset", "shots", "method", "variant", "value"])
    own = table[
        (table["dataset"] == DATASET) & (table["shots"] == SHOTS) & (table["variant"] == "")
    ]
    return own.groupby("method")["value"].mean()


def zoo(pages: dict[str, str], texts: dict[str, str]) -> str:
    "Return the page with all methods in one table; `pages` and `texts` are by module."
    accuracy = measured()
    heads = ("method", "kind", "training", "hyper-parameters", f"accuracy, {SHOTS} shots", "paper")
    lines = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for info in entries():
        module = info.cls.__module__
        name = html.escape(info.name)
        if module in pages:
            name = f'<a href="{pages[module]}">{name}</a>'
        value = accuracy.get(info.name) if info.kind == "features" else None
        found = [link for link in links(info, texts.get(module, "")) if link.startswith("[paper]")]
        paper = f'<a href="{found[0][8:-1]}">arXiv</a>' if found else ""
        cells = [name, info.kind, "none" if info.training_free else "yes", rule(info)]
        cells += ["" if value is None or pd.isna(value) else f"{value:.1f}", paper]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    table = "\n".join(
        [
            "<table class='sortable'>",
            "<thead>",
            lines[0],
            "</thead>",
            "<tbody>",
            *lines[1:],
            "</tbody>",
            "</table>",
        ]
    )
    body = f"```{{raw}} html\n<div class='table-wrapper'>\n{table}\n</div>\n```"
    return f"{ZOO_HEAD}\n\n{body}\n"


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
