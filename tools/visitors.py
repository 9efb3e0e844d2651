"""Cells for visitors: links that open a notebook in Colab or Binder, and a cell that installs.

`python tools/visitors.py` puts them behind the title of every tutorial, report and method notebook;
`tools/derived.py` calls it, and a test checks that they are there.
"""

import hashlib
import json
from pathlib import Path

from derived import ROOT, settings

PATTERNS = ("tutorials/*", "reports/*", "05_methods/[1-5]*")
INSTALL = """#| hide
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("vlmadapt") is None:  # on Colab: fetch the repository and install it
    address = "{url}"
    subprocess.run(["git", "clone", "-q", "--depth=1", address, "repository"], check=True)
    install = [sys.executable, "-m", "pip", "install", "-q", "./repository[{extras}]"]
    subprocess.run(install, check=True)
    os.chdir("repository/{folder}")"""
EXTRAS = {
    "tutorials/adapters_for_hf": "workbook,hf",
    "tutorials/questions_and_captions": "workbook,hf",
    "05_methods/19_hegraph_pyg": "workbook,graph",
}


def notebooks(root: Path = ROOT) -> list[Path]:
    "Return the notebooks that visitors open."
    found = [path for pattern in PATTERNS for path in root.glob(f"nbs/{pattern}.ipynb")]
    return sorted(found)


def links(path: Path, root: Path = ROOT) -> str:
    "Return links to Colab and Binder for the notebook at `path`."
    cfg = settings(root)
    repository = cfg["git_url"].removeprefix("https://github.com/")
    place, branch = path.relative_to(root).as_posix(), cfg["branch"]
    colab = f"https://colab.research.google.com/github/{repository}/blob/{branch}/{place}"
    binder = f"https://mybinder.org/v2/gh/{repository}/{branch}?labpath={place}"
    return f"[Open in Colab]({colab}) · [Open in Binder]({binder})"


def install(path: Path, root: Path = ROOT) -> str:
    "Return the code that installs the library where it is missing."
    name = path.relative_to(root / "nbs").with_suffix("").as_posix()
    folder = path.parent.relative_to(root).as_posix()
    extras = EXTRAS.get(name, "workbook")
    return INSTALL.format(url=settings(root)["git_url"], folder=folder, extras=extras)


def visitor_cells(path: Path, root: Path = ROOT) -> list[dict]:
    "Return the two cells of the notebook at `path`; their ids come from its name."
    cells = []
    for kind, text in (("markdown", links(path, root)), ("code", install(path, root))):
        name = path.relative_to(root).as_posix()
        digest = hashlib.sha256(f"{kind} {name}".encode()).hexdigest()[:8]
        cell = {"cell_type": kind, "id": digest, "metadata": {}}
        if kind == "code":
            cell = {**cell, "execution_count": None, "outputs": []}
        cells.append({**cell, "source": text.splitlines(keepends=True)})
    return cells


def with_cells(path: Path, root: Path = ROOT) -> str:
    "Return the text of the notebook at `path` with its cells for visitors behind the title."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    new = visitor_cells(path, root)
    ids = {cell["id"] for cell in new}
    title, *rest = [cell for cell in notebook["cells"] if cell["id"] not in ids]
    notebook["cells"] = [title, *new, *rest]
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def write(root: Path = ROOT) -> list[Path]:
    "Put the cells into all notebooks that lack them; return the paths of these."
    changed = []
    for path in notebooks(root):
        text = with_cells(path, root)
        if text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed


if __name__ == "__main__":
    for path in write():
        print(path.relative_to(ROOT))
