"Features with prompts by a model's own blocks on all positions: a cell of an experiment."

from pathlib import Path

import nbformat
import torch

NOTEBOOK = Path(__file__).resolve().parent.parent / "nbs/experiments/prompt_efficiency.ipynb"


def _functions():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    (source,) = [cell.source for cell in cells if "def text_reference(" in cell.source]
    names = dict(torch=torch)
    exec(compile(source, NOTEBOOK.name, "exec"), names)
    return names["text_reference"], names["image_reference"]


text_reference, image_reference = _functions()
