"""Derived files: README.md from nbs/index.ipynb, environments and badges from settings.ini.

`python tools/derived.py` writes them, and the cells for visitors (`visitors.py`); tests check that
they agree. No Quarto, no network.
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
    "Return the conda environments of contributors, and of Binder with torch for processors."
    cfg = settings(root)
    needs = []
    for key in requirement_keys(cfg):
        needs += cfg[key].split()
    visitors = [*cfg["requirements"].split(), *cfg["workbook_requirements"].split()]
    wheels = "--extra-index-url https://download.pytorch.org/whl/cpu"
    found = {
        "environment.yml": conda(cfg, ["-c constraints.txt"], needs, "-e ."),
        "binder/environment.yml": conda(cfg, [wheels, "-c ../constraints.txt"], visitors, "-e .."),
    }
    return {path: text.encode() for path, text in found.items()}


def conda(cfg, options, needs, package):
    "Return a conda environment: Python from conda, packages by pip."
    lines = [
        "# Made from settings.ini by `make export`; the tested versions are in constraints.txt.",
        f"name: {cfg['lib_name']}",
        "channels:",
        "  - conda-forge",
        "dependencies:",
        "  - python=3.11",
        "  - pip",
        "  - pip:",
    ]
    lines += [f"      - {option}" for option in options]
    lines += [f'      - "{requirement}"' for requirement in needs]
    return "\n".join([*lines, f"      - {package}"]) + "\n"


BADGE = """<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img">
<title>{label}: {text}</title>
<rect width="{width}" height="20" rx="3" fill="#555"/>
<path d="M{left} 0h{right}a3 3 0 0 1 3 3v14a3 3 0 0 1-3 3h-{right}z" fill="#1f6feb"/>
<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle">
<text x="{first}" y="14">{label}</text><text x="{second}" y="14">{text}</text></g></svg>
"""


def badge(label, text):
    "Return a picture with a label and a text."
    left, right = 7 * len(label) + 10, 7 * len(text) + 10
    places = {"width": left + right, "left": left, "right": right - 3}
    middle = {"first": left / 2, "second": left + right / 2}
    return BADGE.format(label=label, text=text, **places, **middle).encode()


def badges(root=ROOT):
    "Return the badges of the README, path to bytes."
    cfg = settings(root)
    newest = max(re.findall(r"Python :: 3\.(\d+)", (root / "pyproject.toml").read_text()), key=int)
    texts = {
        "version": ("version", cfg["version"]),
        "python": ("Python", f"{cfg['min_python']} to 3.{newest}"),
        "licence": ("licence", "Apache 2.0"),
    }
    return {f"nbs/images/badge_{name}.svg": badge(*text) for name, text in texts.items()}


if __name__ == "__main__":
    (ROOT / "nbs/images").mkdir(exist_ok=True)
    for old in (ROOT / "nbs/images").glob("index_*"):
        old.unlink()
    for path, data in {**readme(), **environment(), **badges()}.items():
        (ROOT / path).parent.mkdir(exist_ok=True)
        (ROOT / path).write_bytes(data)
    from visitors import write  # which imports this module

    write()
