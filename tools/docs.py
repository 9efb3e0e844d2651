"""The documentation site: the notebooks as they stand, outputs included, in reading order, with the signatures of what they export,
and the reports of the grids that were run here.

`python tools/docs.py` writes _docs/html. Nothing is executed, nothing is fetched; the pages need no network either.
"""
import importlib, re, shutil, sys
from functools import reduce
import nbformat
from nbdev.showdoc import BasicMarkdownRenderer
from sphinx.cmd.build import main as sphinx
from derived import ROOT, shown

CHAPTERS = {"Results": ["results/*"], "Tutorials": [f"tutorials/{n}.ipynb" for n in ("explore", "own_images", "own_features", "choose_a_method", "add_a_method", "add_a_dataset")], "From datasets to fits": ["00_*.ipynb", "00_mini/*", "0[1-9]_*"], "Methods": ["methods/*"],
            "Tasks": ["tasks/*"], "Runs, results, figures": ["[5-9][0-9]_*"], "Experiments": ["experiments/*"], "Reports": ["reports/*"],
            "The project": ["CONTRIBUTING.md"]}


def signatures(module):
    "Markdown with the signatures, docments and docstrings of the public names of `module`."
    names = importlib.import_module("vlmadapt._modidx").d["syms"].get(module, {})
    public = [n.removeprefix(f"{module}.") for n in names if not any(part.startswith("_") for part in n.removeprefix(module).split(".")[1:])]
    if not public: return ""
    blocks = []
    for name in public:
        symbol = reduce(getattr, name.split("."), importlib.import_module(module))
        doc = BasicMarkdownRenderer(getattr(symbol, "fget", symbol))._repr_markdown_()
        blocks.append(f"### `{name}`\n\n" + doc.partition("\n### ")[2].partition("\n")[2].strip())
    return f"## Reference\n\nThe public names of `{module}`.\n\n" + "\n\n".join(blocks)


def page(path):
    "The notebook at `path` as a page."
    nb = nbformat.read(path, as_version=4)
    module = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(c.source for c in nb.cells), re.M)
    nb = shown(nb)
    if module and (text := signatures(f"vlmadapt.{module[1]}".removesuffix(".__init__"))): nb.cells.append(nbformat.v4.new_markdown_cell(text))
    return nb


def result(path, grid):
    "The executed report at `path` as a page of outcomes: its code stands in the report's own page."
    nb = shown(nbformat.read(path, as_version=4))
    nb.cells[0].source = re.sub(r"^# .*", f"# Results of the grid {grid}", nb.cells[0].source)
    for cell in nb.cells: cell.metadata["tags"] = ["remove-input"]
    return nb


def contents(stage):
    "The pages under `stage` in reading order, as hidden tables of contents for the side bar."
    for title, patterns in CHAPTERS.items():
        pages = [p.relative_to(stage).with_suffix("") for pattern in patterns for p in sorted(stage.glob(pattern)) if p.suffix in (".ipynb", ".md")]
        if pages: yield "\n".join(["```{toctree}", ":hidden:", f":caption: {title}", "", *map(str, pages), "```"])


def staged(stage):
    "Write what Sphinx reads to the folder `stage`."
    shutil.rmtree(stage, ignore_errors=True)
    shutil.copytree(ROOT/"nbs", stage, ignore=shutil.ignore_patterns(".ipynb_checkpoints", ".*"))
    for path in stage.rglob("*.ipynb"): nbformat.write(page(path), path)
    (stage/"results").mkdir()
    for report in ROOT.glob("outputs/*/report/report.ipynb"):
        nbformat.write(result(report, report.parts[-3]), stage/"results"/f"{report.parts[-3]}.ipynb")
    for name in ("CONTRIBUTING.md", "LICENSE"): shutil.copy(ROOT/name, stage)
    index = nbformat.read(stage/"index.ipynb", as_version=4)
    first = lambda m: f"]({min((stage/m[1]).glob('*.ipynb')).relative_to(stage)})"
    for cell in index.cells: cell.source = re.sub(r"\]\((\w+)/\)", first, cell.source.replace("](../", "]("))
    index.cells.append(nbformat.v4.new_markdown_cell("\n\n".join(contents(stage))))
    nbformat.write(index, stage/"index.ipynb")


def build(folder):
    "Build the site in `folder`/html; the exit status of Sphinx."
    staged(folder/"source")
    return sphinx(["-q", "-E", "-c", str(ROOT/"tools"), "-d", str(folder/"doctrees"), str(folder/"source"), str(folder/"html")])


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(build(ROOT/"_docs") or print("The site is in _docs/html/index.html"))
