"""The documentation site: notebooks with their outputs, signatures of the library, and reports.

`python tools/docs.py` writes _docs/html. It executes no notebook and needs no network.
"""

import ast
import importlib.util
import inspect
import re
import shutil
import sys
from functools import reduce
from pathlib import Path

import nbformat
import site_pages
from derived import ROOT, settings, shown
from fontTools import subset
from gallery import gallery
from nbdev.showdoc import BasicMarkdownRenderer
from sphinx.cmd.build import main as sphinx

TUTORIALS = (
    "explore",
    "own_images",
    "questions_and_captions",
    "own_features",
    "compare_methods",
    "choose_a_method",
    "adapters_for_hf",
    "reproduce_a_table",
    "add_a_method",
    "add_a_dataset",
    "add_an_experiment",
    "cluster",
)
CHARACTERS = (
    *((0x20, 0x7F), (0xA0, 0x100), (0x131, 0x132), (0x237, 0x238), (0x2C6, 0x2DE), (0x300, 0x339)),
    *((0x370, 0x400), (0x2010, 0x2058), (0x20D0, 0x20E1), (0x2100, 0x2150), (0x2190, 0x2300)),
    *((0x2300, 0x230C), (0x239B, 0x23BA), (0x23DC, 0x23E2), (0x25A0, 0x2600), (0x27E6, 0x27F0)),
    *((0x27F5, 0x2800), (0x2A00, 0x2A0D), (0x1D400, 0x1D800)),
)  # of formulas: Latin, Greek, accents, operators, brackets, mathematical letters
TASKS = ("01_data/18_tasks", "03_mini/16_tasks", "04_problems/05_generation", "05_methods/5*")
INTERNALS = {
    "Core": "00_core",
    "Data": "01_data",
    "Models": "02_models",
    "The synthetic benchmark": "03_mini",
    "Problems": "04_problems",
    "Parts of methods": "05_methods",
    "Training": "06_training",
    "Grid": "07_grid",
    "Reporting": "08_reporting",
    "Command line": "09_cli",
    "The package": "10_api",
    "Experiments": "experiments",
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
        renderer = BasicMarkdownRenderer(symbol)
        if not own_docstring(symbol):
            renderer.docs = ""
        doc = renderer._repr_markdown_()
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


def own_docstring(symbol):
    "Return the docstring that `symbol` itself has; that of torch's base class says nothing new."
    return inspect.cleandoc(getattr(getattr(symbol, "fget", symbol), "__doc__", None) or "")


def summary(symbol):
    "Return the first line of the own docstring of `symbol`, not of one that it inherits."
    doc = own_docstring(symbol)
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


def joined(cells):
    "Return the cells of a report; code cells that follow one without outputs are one with it."
    found = []
    for cell in cells:
        last = found[-1] if found else None
        if cell.cell_type == "code" and last and last.cell_type == "code" and not last.outputs:
            last.source = f"{last.source}\n\n\n{cell.source}"
            last.outputs = cell.outputs
        else:
            found.append(cell)
    return found


def page(path, pictures):
    "Return the notebook at `path` as a page; `pictures` are figures of methods."
    nb = nbformat.read(path, as_version=4)
    module = exports(nb)
    nb = shown(nb)
    infos = method_modules().get(module)
    if infos:
        head, _, rest = nb.cells[0].source.partition("\n\n")
        top = site_pages.method_head(infos, pictures)
        nb.cells[0].source = "\n\n".join([head, top, rest])
    if path.parent.name == "reports":
        nb.cells = joined(nb.cells)
        for cell in nb.cells:
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide-input"]
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


def method_modules():
    "Return the descriptions of methods by the module that defines them."
    found = {}
    for info in site_pages.entries():
        found.setdefault(info.cls.__module__, []).append(info)
    return found


def groups(stage):
    "Return the pages below `stage` in five groups, in reading order."

    def matching(*patterns):
        found = [path for p in patterns for path in sorted(stage.glob(p + ".*"))]
        return [str(p.relative_to(stage)) for p in found if p.suffix in (".ipynb", ".md")]

    tasks = matching(*TASKS)
    modules = method_modules()
    methods = []
    for page in matching("05_methods/*"):
        if (
            page not in tasks
            and exports(nbformat.read(ROOT / "nbs" / page, as_version=4)) in modules
        ):
            methods.append(page)
    return {
        "Start": matching(*(f"tutorials/{name}" for name in TUTORIALS)),
        "Methods": ["zoo.md", *methods],
        "Tasks": tasks,
        "Results": [*matching("results/*", "reports/*"), "gallery.md"],
        "Internals": ["api.md", "CONTRIBUTING.md", "CHANGELOG.md", "internals.md"],
    }


def toctree(pages, caption=""):
    "Return a hidden table of contents."
    head = ["```{toctree}", ":hidden:", *([f":caption: {caption}"] if caption else []), ""]
    return "\n".join([*head, *(f"/{Path(page).with_suffix('')}" for page in pages), "```"])


def write_internals(stage, known):
    "Write a page for each package that lists its notebooks, and a page of these pages."
    (stage / "internals").mkdir()
    chapters = []
    for number, (title, folder) in enumerate(INTERNALS.items()):
        pages = [str(p.relative_to(stage)) for p in sorted((stage / folder).glob("*.ipynb"))]
        pages = [page for page in pages if page not in known]
        lines = []
        for page in pages:
            name, text = site_pages.first_lines(stage / page)
            lines.append(f"- [{name}](/{page})" + (f": {text}" if text else ""))
        path = stage / "internals" / f"{number:02d}_{folder}.md"
        path.write_text(f"# {title}\n\n" + "\n".join(lines) + f"\n\n{toctree(pages)}\n")
        chapters.append(str(path.relative_to(stage)))
    text = "The notebooks that the library is exported from, by package, from the lowest layer up."
    (stage / "internals.md").write_text(
        f"# How it works inside\n\n> {text}\n\n{toctree(chapters)}\n"
    )


def write_zoo(stage):
    "Write the page of all methods."
    pages = {}
    for path in sorted(stage.glob("05_methods/*.ipynb")):
        module = exports(nbformat.read(path, as_version=4))
        pages[module] = path.relative_to(stage).with_suffix(".html").as_posix()
    (stage / "zoo.md").write_text(site_pages.zoo(pages))


def staged(stage):
    "Write what Sphinx reads to the folder `stage`; return its pages by group."
    shutil.rmtree(stage, ignore_errors=True)
    shutil.copytree(ROOT / "nbs", stage, ignore=shutil.ignore_patterns(".ipynb_checkpoints", ".*"))
    (stage / "api.md").write_text(api(stage))
    write_zoo(stage)
    (stage / "gallery.md").write_text(gallery(stage))
    pictures = site_pages.pictures(stage)
    for path in stage.rglob("*.ipynb"):
        nbformat.write(page(path, pictures), path)
    (stage / "results").mkdir()
    for report in ROOT.glob("outputs/*/report/report.ipynb"):
        grid = report.parts[-3]
        nbformat.write(result(report, grid), stage / "results" / f"{grid}.ipynb")
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, stage)

    found = groups(stage)

    def first_page(match):
        "A link to a folder becomes one to its first notebook."
        return f"]({min((stage / match[1]).glob('*.ipynb')).relative_to(stage)})"

    index = nbformat.read(stage / "index.ipynb", as_version=4)
    cfg = settings()
    repository = f"{cfg['git_url']}/blob/{cfg['branch']}"
    site = re.escape(cfg["doc_host"] + cfg["doc_baseurl"])
    for cell in index.cells:
        cell.source = cell.source.replace("](../CITATION.cff)", f"]({repository}/CITATION.cff)")
        cell.source = re.sub(rf"\]\({site}/(\w+)\.html\)", r"](\1.md)", cell.source)
        cell.source = re.sub(r"\]\((\w+)/\)", first_page, cell.source.replace("](../", "]("))
    write_internals(stage, {page for pages in found.values() for page in pages})
    trees = [toctree(pages, title) for title, pages in found.items() if pages]
    index.cells.append(nbformat.v4.new_markdown_cell("\n\n".join(trees)))
    nbformat.write(index, stage / "index.ipynb")
    return found


def write_formula_font(folder):
    """Write the font of formulas, cut to the characters that they use, with its style sheet.

    It comes from the package ziamath. Without it formulas have a font of the reader's machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = importlib.util.find_spec("ziamath")
    if found is None:
        (folder / "formulas.css").write_text("/* ziamath is not installed */\n")
        return
    options = subset.Options(
        flavor="woff", hinting=False, glyph_names=False, layout_features=["ssty", "rtlm"]
    )
    source = Path(found.origin).parent / "fonts/STIXTwoMath-Regular.ttf"
    font = subset.load_font(str(source), options)
    cutter = subset.Subsetter(options)
    cutter.populate(unicodes=[code for first, last in CHARACTERS for code in range(first, last)])
    cutter.subset(font)
    subset.save_font(font, str(folder / "formulas.woff"), options)
    face = '@font-face { font-family: "Formulas"; src: url("formulas.woff") format("woff"); }'
    (folder / "formulas.css").write_text(f'{face}\nmath {{ font-family: "Formulas", math; }}\n')


def build(folder):
    "Build the site in `folder`/html and return the exit status of Sphinx."
    pages = staged(folder / "source")
    write_formula_font(folder / "formulas")
    static = f"{ROOT / 'tools/static'},{folder / 'formulas'}"
    options = ["-q", "-E", "-c", str(ROOT / "tools"), "-d", str(folder / "doctrees")]
    options += ["-D", f"html_static_path={static}", "-D", "html_css_files=site.css,formulas.css"]
    status = sphinx([*options, str(folder / "source"), str(folder / "html")])
    if status == 0:
        cfg = settings()
        text = site_pages.llms_text(folder / "source", pages, cfg["doc_host"] + cfg["doc_baseurl"])
        (folder / "html/llms.txt").write_text(text)
    return status


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    status = build(ROOT / "_docs")
    if status == 0:
        print("The site is in _docs/html/index.html")
    sys.exit(status)
