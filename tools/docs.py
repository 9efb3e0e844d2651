"""The documentation site: notebooks with their outputs, signatures of the library, and reports.

`python tools/docs.py` writes _docs/html. It executes no notebook and needs no network.
"""

import ast
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
            "add_an_experiment",
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
    "Command line": ["09_cli/*"],
    "The package": ["10_api/*"],
    "Experiments": ["experiments/*"],
    "Reports": ["reports/*"],
    "The project": ["api.md", "CONTRIBUTING.md"],
}


def loaded_with_types(module):
    "Import `module` and what it imports for type checkers only, so that annotations resolve."
    loaded = importlib.import_module(module)
    for node in ast.parse(inspect.getsource(loaded)).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            imports = compile(ast.Module(node.body, []), loaded.__file__, "exec")
            exec(imports, vars(loaded))
    return loaded


def public(module):
    "Return the public objects that `module` exports by name, methods included."
    loaded = loaded_with_types(module)
    found = {}
    names = importlib.import_module("vlmadapt._modidx").d["syms"].get(module)
    if names is None:  # nbdev's index leaves __init__.py out
        names = [
            name
            for name in getattr(loaded, "__all__", ())
            if getattr(vars(loaded).get(name), "__module__", "") == module
        ]
    for qualified in names:
        name = qualified.removeprefix(f"{module}.")
        parts = name.split(".")
        if not any(part.startswith("_") for part in parts):
            found[name] = reduce(getattr, parts, loaded)
    return found


def source(symbol):
    "Return a link to the code of `symbol` in the repository, or nothing."
    try:
        path = Path(inspect.getsourcefile(symbol))
        line = inspect.getsourcelines(symbol)[1]
    except (TypeError, OSError):
        return ""
    if not path.is_relative_to(ROOT):
        return ""
    cfg = settings()
    return f"[source]({cfg['git_url']}/blob/{cfg['branch']}/{path.relative_to(ROOT)}#L{line})"


def signatures(module):
    "Return signatures and docstrings of the public names of `module`, with links, as Markdown."
    blocks = []
    for name, symbol in public(module).items():
        symbol = getattr(symbol, "fget", symbol)
        doc = BasicMarkdownRenderer(symbol)._repr_markdown_()
        body = doc.partition("\n### ")[2].partition("\n")[2].strip()
        blocks += [part for part in (f"### `{name}`", body, source(symbol)) if part]
    if not blocks:
        return ""
    head = f"## Reference\n\nThe public names of `{module}`."
    return "\n\n".join([head, *blocks])


def exports(nb):
    "Return the module that the notebook `nb` exports to, or None."
    found = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(c.source for c in nb.cells), re.M)
    return f"vlmadapt.{found[1]}".removesuffix(".__init__") if found else None


def summary(symbol):
    "Return the first line of the docstring of `symbol`."
    doc = inspect.getdoc(getattr(symbol, "fget", symbol)) or ""
    return doc.partition("\n")[0].replace("$", "\\$")


def anchor(name):
    "Return the anchor of the reference of `name` on its page."
    return re.sub(r"[^a-z0-9_-]", "", name.lower())


def root_names(pages):
    "Return the names of `import vlmadapt as va`, linked to their references on `pages`."
    root = importlib.import_module("vlmadapt")
    lines = []
    for name in root.__all__:
        module, path = root._PLACES[name]  # `getattr` would add parameters to docstrings
        found = importlib.import_module(module)
        symbol = reduce(getattr, filter(None, path.split(".")), found)
        if inspect.ismodule(symbol):  # a name of its own for each function
            page = pages[symbol.__name__]
            for own, function in public(symbol.__name__).items():
                if inspect.isfunction(function):
                    text = summary(function)
                    lines.append(f"- [`va.{name}.{own}`]({page}#{anchor(own)}): {text}")
            continue
        link = f"{pages[symbol.__module__]}#{anchor(symbol.__qualname__)}"
        lines.append(f"- [`va.{name}`]({link}): {summary(symbol)}")
    return lines


def api(folder):
    "Return every public name with the first line of its docstring, linked to its reference."
    head = "> Every public name, by module, with a link to its signature and arguments."
    pages = {}
    for path in sorted(folder.rglob("*.ipynb")):
        module = exports(nbformat.read(path, as_version=4))
        if module:
            pages[module] = path.relative_to(folder)
    parts = ["# API", head, "## `import vlmadapt as va`", "\n".join(root_names(pages))]
    for module, path in pages.items():
        lines = [
            f"- [`{name}`]({path}#{anchor(name)}): {summary(symbol)}"
            for name, symbol in public(module).items()
        ]
        if lines:
            parts += [f"## `{module}`", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def page(path):
    "Return the notebook at `path` as a page."
    nb = nbformat.read(path, as_version=4)
    module = exports(nb)
    nb = shown(nb)
    text = signatures(module) if module else ""
    if text:
        nb.cells.append(nbformat.v4.new_markdown_cell(text))
    return nb


def result(path, grid):
    "Return the executed report at `path` as a page of outputs; its code is on another page."
    nb = shown(nbformat.read(path, as_version=4))
    nb.cells[0].source = re.sub(r"^# .*", f"# Results of the grid {grid}", nb.cells[0].source)
    for cell in nb.cells:
        cell.metadata["tags"] = ["remove-input"]
    return nb


def contents(stage):
    "Yield the pages below `stage` in reading order, as hidden tables of contents."
    for title, patterns in CHAPTERS.items():
        pages = []
        for pattern in patterns:
            for path in sorted(stage.glob(pattern)):
                if path.suffix in (".ipynb", ".md"):
                    pages.append(str(path.relative_to(stage).with_suffix("")))
        if pages:
            head = ["```{toctree}", ":hidden:", f":caption: {title}", ""]
            yield "\n".join([*head, *pages, "```"])


def staged(stage):
    "Write what Sphinx reads to the folder `stage`."
    shutil.rmtree(stage, ignore_errors=True)
    shutil.copytree(ROOT / "nbs", stage, ignore=shutil.ignore_patterns(".ipynb_checkpoints", ".*"))
    (stage / "api.md").write_text(api(stage))
    for path in stage.rglob("*.ipynb"):
        nbformat.write(page(path), path)
    (stage / "results").mkdir()
    for report in ROOT.glob("outputs/*/report/report.ipynb"):
        grid = report.parts[-3]
        nbformat.write(result(report, grid), stage / "results" / f"{grid}.ipynb")
    for name in ("CONTRIBUTING.md", "LICENSE"):
        shutil.copy(ROOT / name, stage)

    def first_page(match):
        "A link to a folder becomes one to its first notebook."
        return f"]({min((stage / match[1]).glob('*.ipynb')).relative_to(stage)})"

    index = nbformat.read(stage / "index.ipynb", as_version=4)
    cfg = settings()
    repository = f"{cfg['git_url']}/blob/{cfg['branch']}"
    for cell in index.cells:
        for name in ("CHANGELOG.md", "CITATION.cff"):  # files of the repository, no pages
            cell.source = cell.source.replace(f"](../{name})", f"]({repository}/{name})")
        cell.source = re.sub(r"\]\((\w+)/\)", first_page, cell.source.replace("](../", "]("))
    index.cells.append(nbformat.v4.new_markdown_cell("\n\n".join(contents(stage))))
    nbformat.write(index, stage / "index.ipynb")


def build(folder):
    "Build the site in `folder`/html and return the exit status of Sphinx."
    staged(folder / "source")
    options = ["-q", "-E", "-c", str(ROOT / "tools"), "-d", str(folder / "doctrees")]
    return sphinx([*options, str(folder / "source"), str(folder / "html")])


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    status = build(ROOT / "_docs")
    if status == 0:
        print("The site is in _docs/html/index.html")
    sys.exit(status)
