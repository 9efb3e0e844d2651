"""The gallery of the site: the stored figures of tutorials, reports and methods, with links."""

import base64
from pathlib import Path

import nbformat

CHAPTERS = {
    "Results": "reports/*",
    "Tutorials": "tutorials/*",
    "Methods": "05_methods/*",
    "The synthetic benchmark": "03_mini/1*",
}
MOST = 3  # figures of one page
SMALLEST = 150  # pixels; what is less high is a strip of pictures
HEAD = """# Gallery

> Figures of reports, tutorials and methods; a click opens the page that draws the figure."""


def height(png: bytes) -> int:
    "Return the height that a PNG file states in its first chunk, in pixels."
    return int.from_bytes(png[20:24], "big")


def figures(path: Path) -> list[bytes]:
    "Return the first figures that the outputs of a notebook hold, as PNG files."
    found = []
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", ()):
            stored = output.get("data", {}).get("image/png")
            picture = base64.b64decode(stored) if stored else b""
            if picture and height(picture) >= SMALLEST:
                found.append(picture)
    return found[:MOST]


def title(path: Path) -> str:
    "Return the heading of a notebook."
    first = nbformat.read(path, as_version=4).cells[0].source
    return first.partition("\n")[0].removeprefix("#").strip()


def card(picture: str, path: Path, name: str) -> str:
    "Return a linked figure with its caption."
    page = path.with_suffix(".html").as_posix()
    lines = [f":::{{figure}} {picture}", f":target: {page}", f":alt: Figure of the page {name}"]
    return "\n".join([*lines, ":loading: lazy", "", name, ":::"])


def gallery(stage: Path) -> str:
    "Write the figures of the notebooks below `stage` as files; return the page that shows them."
    folder = stage / "figures"
    folder.mkdir()
    parts = [HEAD]
    for chapter, pattern in CHAPTERS.items():
        cards = []
        for path in sorted(stage.glob(f"{pattern}.ipynb")):
            for number, picture in enumerate(figures(path), start=1):
                file = folder / f"{path.parent.name}_{path.stem}_{number}.png"
                file.write_bytes(picture)
                place = path.relative_to(stage)
                cards.append(card(file.relative_to(stage).as_posix(), place, title(path)))
        body = "\n\n".join(cards)
        parts.append(f"## {chapter}\n\n::::{{container}} gallery\n{body}\n::::")
    return "\n\n".join(parts) + "\n"
