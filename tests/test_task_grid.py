"A grid on a task of one's own: its folder, candidates and metric, and rates of single methods."

import json

import pytest
from PIL import Image

from vlmadapt.grid.results import read_run
from vlmadapt.grid.runs import execute_now

PARAMS = """
experiment: tasks
grid: {{task: [jsonl], root: [{root}]}}
parameters:
  methods: [Frozen, BitFit, LoRA]
  candidates: [red, blue]
  resize: pad
  epochs: 2
  trials: 2
  space: {{lr: [0.01]}}
  spaces: {{BitFit: {{lr: [0.03, 0.003]}}}}
"""


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "two colours"
    root.mkdir()
    for part in ("train", "val", "test"):
        lines = []
        for n, colour in enumerate(["red", "blue"] * 4):
            name = f"{part}{n}.png"
            Image.new("RGB", (48, 32), colour).save(root / name)
            prompt = f"what colour is this {part} ?"
            lines.append(json.dumps({"image": name, "prompt": prompt, "answers": [colour]}))
        (root / f"{part}.jsonl").write_text("\n".join(lines))
    return root


@pytest.mark.slow
def test_a_task_of_ones_own(folder):
    out = execute_now(PARAMS.format(root=json.dumps(str(folder))))
    (run,) = {path.parent for path in out.rglob("result.json")}
    assert run.name == "jsonl_two-colours"
    found = {r.method: r for r in read_run(run) if r.metric == "accuracy"}
    assert set(found) == {"Frozen", "BitFit", "LoRA"}
    assert {r.dataset for r in found.values()} == {"two colours"}
    assert set("\n".join(r.predictions for r in found.values()).split()) <= {"red", "blue"}
    tried = {name: r.selection.trials for name, r in found.items()}
    assert tried["BitFit"] == 2 and found["BitFit"].hyper_parameters["lr"] in (0.03, 0.003)
    assert found["LoRA"].hyper_parameters["lr"] == 0.01
    assert found["Frozen"].provenance["resize"] == "pad"
    assert str(folder.parent) not in (run / "result.json").read_text()
