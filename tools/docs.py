"""The documentation site: the notebooks as they stand, outputs included, in reading order, with the signatures of what they export,
and the reports of the grids that were run here.

`python tools/docs.py` writes _docs/html. Nothing is executed, nothing is fetched; the pages need no network either.
"""

import importlib
import inspect
import re
import shutil
import sys
from functools import reduce
from pathlib import Path

import nbformat
from derived import ROOT, settings, shown
from nbdev.showdoc import BasicMarkdownRenderer
from sphinx.cmd.build import main as sphinx

CHAPTERS = {
    "Results": ["results/*"],
    "Tutorials": [
        f"tutorials/{n}.ipynb"
        for n in (
            "explore",
            "own_images",
            "own_features",
            "choose_a_method",
            "add_a_method",
            "add_a_dataset",
            "cluster",
        )
    ],
    "Methods": ["05_methods/*"],
    "Core": ["00_core/*"],
    "Data": ["01_data/*"],
    "Models": ["02_models/*"],
    "The synthetic benchmark": ["03_mini/*"],
    "Problems": ["04_problems/*"],
    "Training": ["06_training/*"],
    "Grid": ["07_grid/*"],
    "Reporting": ["08_reporting/*"],
    "Experiments": ["experiments/*"],
    "Reports": ["reports/*"],
    "The project": ["api.md", "CONTRIBUTING.md"],
}


def public(module):
    "Name -> object of what `module` exports, methods included."
    names = importlib.import_module("vlmadapt._modidx").d["syms"].get(module, {})
    names = [
        n.removeprefix(f"{module}.")
        for n in names
        if not any(part.startswith("_") for part in n.removeprefix(module).split(".")[1:])
    ]
    return {n: reduce(getattr, n.split("."), importlib.import_module(module)) for n in names}


def source(symbol):
    "Where the code of `symbol` stands, as a link into the repository; '' for what has no lines of its own."
    try:
        file, line = inspect.getsourcefile(symbol), inspect.getsourcelines(symbol)[1]
    except (TypeError, OSError):
        return ""
    cfg, path = settings(), Path(file)
    return (
        f"[source]({cfg['git_url']}/blob/{cfg['branch']}/{path.relative_to(ROOT)}#L{line})"
        if path.is_relative_to(ROOT)
        else ""
    )


def signatures(module):
    "Markdown with the signatures, docments and docstrings of the public names of `module`, and links to their source."
    blocks = []
    for name, symbol in public(module).items():
        symbol = getattr(symbol, "fget", symbol)
        doc = BasicMarkdownRenderer(symbol)._repr_markdown_()
        blocks.append(
            "\n\n".join(
                filter(
                    None,
                    [
                        f"### `{name}`",
                        doc.partition("\n### ")[2].partition("\n")[2].strip(),
                        source(symbol),
                    ],
                )
            )
        )
    return (
        f"## Reference\n\nThe public names of `{module}`.\n\n" + "\n\n".join(blocks)
        if blocks
        else ""
    )


def exports(nb):
    "The module that the notebook `nb` exports to, or None."
    found = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(c.source for c in nb.cells), re.M)
    return f"vlmadapt.{found[1]}".removesuffix(".__init__") if found else None


def api(folder):
    "Every public name of the notebooks below `folder` with its one line, linked to its reference, as Markdown."
    parts = [
        "# API\n\n> Every public name, by module; each links to its signature and arguments, below the notebook that defines it."
    ]
    for path in sorted(folder.rglob("*.ipynb")):
        names = public(module) if (module := exports(nbformat.read(path, as_version=4))) else {}
        told = {
            n: (inspect.getdoc(getattr(x, "fget", x)) or "").partition("\n")[0].replace("$", "\\$")
            for n, x in names.items()
        }
        lines = [
            f"- [`{n}`]({path.relative_to(folder)}#{re.sub(r'[^a-z0-9_-]', '', n.lower())}): {text}"
            for n, text in told.items()
        ]
        if lines:
            parts += [f"## `{module}`", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def page(path):
    "The notebook at `path` as a page."
    nb = nbformat.read(path, as_version=4)
    module, nb = exports(nb), shown(nb)
    if module and (text := signatures(module)):
        nb.cells.append(nbformat.v4.new_markdown_cell(text))
    return nb


def result(path, grid):
    "The executed report at `path` as a page of outcomes: its code stands in the report's own page."
    nb = shown(nbformat.read(path, as_version=4))
    nb.cells[0].source = re.sub(r"^# .*", f"# Results of the grid {grid}", nb.cells[0].source)
    for cell in nb.cells:
        cell.metadata["tags"] = ["remove-input"]
    return nb


def contents(stage):
    "The pages under `stage` in reading order, as hidden tables of contents for the side bar."
    for title, patterns in CHAPTERS.items():
        pages = [
            p.relative_to(stage).with_suffix("")
            for pattern in patterns
            for p in sorted(stage.glob(pattern))
            if p.suffix in (".ipynb", ".md")
        ]
        if pages:
            yield "\n".join(
                ["```{toctree}", ":hidden:", f":caption: {title}", "", *map(str, pages), "```"]
            )


def staged(stage):
    "Write what Sphinx reads to the folder `stage`."
    shutil.rmtree(stage, ignore_errors=True)
    shutil.copytree(ROOT / "nbs", stage, ignore=shutil.ignore_patterns(".ipynb_checkpoints", ".*"))
    (stage / "api.md").write_text(api(stage))
    for path in stage.rglob("*.ipynb"):
        nbformat.write(page(path), path)
    (stage / "results").mkdir()
    for report in ROOT.glob("outputs/*/report/report.ipynb"):
        nbformat.write(
            result(report, report.parts[-3]), stage / "results" / f"{report.parts[-3]}.ipynb"
        )
    for name in ("CONTRIBUTING.md", "LICENSE"):
        shutil.copy(ROOT / name, stage)
    index = nbformat.read(stage / "index.ipynb", as_version=4)
    first = lambda m: f"]({min((stage / m[1]).glob('*.ipynb')).relative_to(stage)})"
    for cell in index.cells:
        cell.source = re.sub(r"\]\((\w+)/\)", first, cell.source.replace("](../", "]("))
    index.cells.append(nbformat.v4.new_markdown_cell("\n\n".join(contents(stage))))
    nbformat.write(index, stage / "index.ipynb")


def build(folder):
    "Build the site in `folder`/html; the exit status of Sphinx."
    staged(folder / "source")
    return sphinx(
        [
            "-q",
            "-E",
            "-c",
            str(ROOT / "tools"),
            "-d",
            str(folder / "doctrees"),
            str(folder / "source"),
            str(folder / "html"),
        ]
    )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(build(ROOT / "_docs") or print("The site is in _docs/html/index.html"))
