"""Derived files: README.md from nbs/index.ipynb, environment.yml from settings.ini.

`python tools/derived.py` writes them; a test checks that they agree. No Quarto, no network.
"""

import posixpath
import re
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"^#\|\s*([\w-]+):?[ \t]*(.*)\n?", re.M)
CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.M | re.S)
LINK = re.compile(r"""(\]\(|src="|href=")(?![a-z]+:|#|/)([^)"\s]+)""")


def settings(root=ROOT):
    "Return the settings of the project, as nbdev reads them."
    config = ConfigParser(delimiters=["="])
    config.read(root / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def requirement_keys(cfg):
    "Return the keys of the requirements: of the core, then of each extra."
    return [key for key in cfg if key.endswith("requirements")]


def shown(nb):
    "Return `nb` without directive lines, hidden cells and empty ones."
    cells = []
    for cell in nb.cells:
        directives = dict(DIRECTIVE.findall(cell.source)) if cell.cell_type == "code" else {}
        if "hide" in directives or "injected-parameters" in cell.metadata.get("tags", []):
            continue
        if directives:
            cell.source = DIRECTIVE.sub("", cell.source).strip("\n")
            if not cell.source:
                continue
        if "hide_input" in directives or directives.get("echo") == "false":
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "remove-input"]
        if "hide_output" in directives:
            cell.outputs = []
        cells.append(cell)
    nb.cells = cells
    nb.metadata["language_info"] = {"name": "python"}
    return nb


def moved(text, folder):
    "Return Markdown with relative links of `folder` for a file at the root."

    def move(match):
        return match[1] + posixpath.normpath(posixpath.join(folder, match[2]))

    parts = CODE.split(text)  # text and code alternate
    return "".join(part if i % 2 else LINK.sub(move, part) for i, part in enumerate(parts))


def readme(root=ROOT):
    "Return the files made from nbs/index.ipynb, path to bytes: README.md, then its pictures."
    nb = shown(nbformat.read(root / "nbs/index.ipynb", as_version=4))
    kinds = ["text/markdown", "image/svg+xml", "image/png", "text/html", "text/plain"]
    config = Config(
        {
            "NbConvertBase": {"display_data_priority": kinds},
            "TagRemovePreprocessor": {"enabled": True, "remove_input_tags": ["remove-input"]},
        }
    )
    text, resources = MarkdownExporter(config=config).from_notebook_node(
        nb, {"unique_key": "index", "output_files_dir": "images"}
    )
    text = text.replace("![png]", "![figure]")
    note = "<!-- Made from nbs/index.ipynb by `make export`; edit that notebook. -->\n\n"
    text = note + re.sub(r"\s*\n\s*\n", "\n\n", moved(text, "nbs")).strip() + "\n"
    return {"README.md": text.encode()} | {
        f"nbs/{name}": data for name, data in sorted(resources["outputs"].items())
    }


def environment(root=ROOT):
    "Return the conda environment: Python from conda, packages of settings.ini by pip."
    cfg = settings(root)
    needs = []
    for key in requirement_keys(cfg):
        needs += cfg[key].split()
    lines = [
        "# Made from settings.ini by `make export`; the tested versions are in constraints.txt.",
        f"name: {cfg['lib_name']}",
        "channels:",
        "  - conda-forge",
        "dependencies:",
        "  - python=3.11",
        "  - pip",
        "  - pip:",
        "      - -c constraints.txt",
    ]
    lines += [f'      - "{requirement}"' for requirement in needs]
    text = "\n".join([*lines, "      - -e ."]) + "\n"
    return {"environment.yml": text.encode()}


if __name__ == "__main__":
    (ROOT / "nbs/images").mkdir(exist_ok=True)
    for old in (ROOT / "nbs/images").glob("index_*"):
        old.unlink()
    for path, data in {**readme(), **environment()}.items():
        (ROOT / path).write_bytes(data)
