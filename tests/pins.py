"""Pinned outputs of every method on fixed inputs, with counts, saved files and a small grid.

`python tests/pins.py [GROUP ...]` writes `tests/pinned/`, or what it has of some groups;
`test_pins.py` compares. Write the files anew only for a change of values that is intended, and name
the change in the commit.
"""

import copy
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from vlmadapt.core.tensors import load_arrays
from vlmadapt.grid.results import read_run
from vlmadapt.grid.runs import execute_now
from vlmadapt.methods import METHODS
from vlmadapt.methods.generation import GENERATION_METHODS
from vlmadapt.methods.generation_base import NAMES_0_1
from vlmadapt.mini.tasks import MINI_TASKS
from vlmadapt.models.backbones import load_backbone
from vlmadapt.problems.classification import FewShotProblem
from vlmadapt.problems.few_shot import few_shot
from vlmadapt.problems.generation import load_task
from vlmadapt.training.loop import fit

FOLDER = Path(__file__).resolve().parent / "pinned"
SHORT = dict(epochs=3)
# label -> (class name, hyper-parameters): every method, and the options that change its output
FEATURE_METHODS = {
    "ZeroShot": ("ZeroShot", {}),
    "LinearProbeScratch": ("LinearProbeScratch", dict(max_iter=50)),
    "LinearProbe": ("LinearProbe", SHORT),
    "GDA": ("GDA", {}),
    "GDA images": ("GDA", dict(zero_shot=False, shrink=2.0)),
    "TipAdapter": ("TipAdapter", dict(alpha=2.0, beta=5.0)),
    "TipAdapterF": ("TipAdapterF", SHORT),
    "CLIPAdapter": ("CLIPAdapter", SHORT),
    "TaskRes": ("TaskRes", SHORT),
    "GraphAdapter": ("GraphAdapter", SHORT),
    "GraphAdapter zero": ("GraphAdapter", dict(SHORT, start="zero", subsets=2, beta=0.3)),
    "AnchoredProbe": ("AnchoredProbe", {}),
    **{
        f"ProtoCLIP {variant} {adapter}": (
            "ProtoCLIP",
            dict(SHORT, variant=variant, adapter=adapter, gain=1.0),
        )
        for variant, adapter in (
            ("training-free", "none"),
            ("F", "fc"),
            ("F-Q^T", "fc"),
            ("F-Q^T", "conv-2x"),
            ("F-Q^T", "conv-3x"),
        )
    },
    **{
        f"HeGraphAdapter {variant}": ("HeGraphAdapter", dict(SHORT, variant=variant))
        for variant in ("Base", "T-N", "T-P", "T", "full", "graph-free")
    },
    **{
        f"HeGraphAdapter {name}": ("HeGraphAdapter", dict(SHORT, **options))
        for name, options in {
            "equations": dict(form="equations", start="uniform"),
            "count_match": dict(form="count_match"),
            "prob_mix": dict(fusion="prob_mix", cache_reduce="mean", leave_one_out=True),
            "learn_paths": dict(learn_paths=True, act="relu", dissim="one_minus", src_degree="row"),
            "raw": dict(node_scale="raw", act="identity"),
        }.items()
    },
    "AMUTuning": ("AMUTuning", SHORT),
    "AMUTuning moment": ("AMUTuning", dict(SHORT, uncertainty="moment")),
    "AMUTuning own": ("AMUTuning", dict(SHORT, encoder="own")),
}
TOWER_METHODS = {
    "CoOp": ("CoOp", dict(n_ctx=4)),
    "CoOp middle": ("CoOp", dict(n_ctx=4, place="middle", class_specific=True)),
    "CoOp deep": ("CoOp", dict(n_ctx=4, words=None, depth=2)),
    "CoCoOp": ("CoCoOp", {}),
    "VPT": ("VPT", {}),
    "MaPLe": ("MaPLe", {}),
    **{
        f"MuDPT {injection}": ("MuDPT", dict(injection=injection))
        for injection in ("transformer", "linear", "linear_per_layer", "silent", "none")
    },
    "PAdapter": ("PAdapter", {}),
    "CLIPLoRA": ("CLIPLoRA", dict(lr=2e-2)),
    "CLIPLoRA output": (
        "CLIPLoRA",
        dict(parts=["query", "output"], layers="up", dropout=0.0, lr=2e-2),
    ),
    "TwoSFS first stage": ("TwoSFS", dict(first_share=1.0, lr=2e-2)),
    "TwoSFS second stage": ("TwoSFS", dict(first_share=0.0, lr=2e-2)),
    "LayerNormTuning": ("LayerNormTuning", dict(outer_norms=True, lr=2e-2)),
    "FullFineTuning": ("FullFineTuning", dict(lr=1e-3)),
    "PromptSRC": ("PromptSRC", dict(epochs=3, mean=1.0, deviation=1.0, lr=2e-2)),
}


def feature_problem() -> FewShotProblem:
    """Six classes of Gaussian features in float64, four support images with three views each.

    The auxiliary features are a narrower map of the same images.
    """
    rng = np.random.default_rng(7)
    classes, width, shots, views = 6, 32, 4, 3
    centres = rng.normal(size=(classes, width))

    def draw(count, noise):
        labels = np.repeat(np.arange(classes), count)
        return centres[labels] + noise * rng.normal(size=(len(labels), width)), labels

    support, labels = draw(shots, 1.5)
    augmented = support + 0.3 * rng.normal(size=(views, *support.shape))
    text = centres + rng.normal(size=centres.shape)
    val, test = draw(3, 1.5), draw(5, 1.5)
    text_neg = rng.normal(size=centres.shape)
    second = rng.normal(size=(width, 20))
    images = dict(train=augmented, val=val[0], test=test[0])
    return FewShotProblem.from_features(
        [f"class {k}" for k in range(classes)],
        text,
        train=(augmented, labels),
        val=val,
        test=test,
        text_neg=text_neg,
        auxiliary={"second": {part: np.tanh(x @ second) for part, x in images.items()}},
    )


def saved(method) -> dict:
    "What the file of a method holds: tensor names with shapes, and the names in its card."
    with tempfile.TemporaryDirectory() as folder:
        method.save(Path(folder) / "method.safetensors")
        tensors, card = load_arrays(Path(folder) / "method.safetensors")
    return dict(tensors={n: list(x.shape) for n, x in sorted(tensors.items())}, card=sorted(card))


def described(method) -> dict:
    return dict(
        trainable_parameters=method.trainable_parameters(),
        hyper_parameters=method.hyper_parameters,
        saved=saved(method),
    )


def feature_methods() -> tuple[dict, dict]:
    "Scores (18, 6) of the validation features after three epochs, in float64."
    problem = feature_problem()
    scores, facts = {}, {}
    for label, (name, values) in FEATURE_METHODS.items():
        method = METHODS[name](problem, **values)
        fit(method, problem, seed=1, device="cpu", progress=False)
        scores[label] = method.scores(method.inputs(problem, "val"))
        facts[label] = described(method)
    return scores, facts


@contextmanager
def double_precision() -> Iterator[None]:
    """Compute in float64 what computes in float32, with stored features of its own.

    The rounding of float32 differs between processors, and training enlarges it.
    """
    kept = torch.get_default_dtype()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, VLMADAPT_CACHE=folder),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(kept)


def tower_methods() -> tuple[dict, dict]:
    "Scores of validation images after one epoch, or a few, on the built-in backbone, in float64."
    backbone = copy.deepcopy(load_backbone("mini", device="cpu"))  # the loaded one is shared
    backbone.logit_scale = float(backbone.model.double().logit_scale.exp())
    scores, facts = {}, {}
    with double_precision():
        problem = few_shot("mini-shapes", backbone=backbone, shots=1, seed=1, views=2)
        for label, (name, values) in TOWER_METHODS.items():
            method = METHODS[name](problem, **{"epochs": 1, **values})
            fit(method, problem, seed=1, device="cpu", progress=False)
            scores[label] = method.scores(method.inputs(problem, "val"))
            facts[label] = described(method)
    return scores, facts


def generation_methods() -> tuple[dict, dict]:
    "Training losses of one epoch of 64 examples on a built-in task, in float32."
    problem = load_task(next(iter(MINI_TASKS)), train=64)
    losses, facts = {}, {}
    for label, name in NAMES_0_1.items():  # the pins have the labels of version 0.1
        cls = GENERATION_METHODS[name]
        method = fit(cls(problem, epochs=1, batch_size=16), problem, seed=1, progress=False)
        losses[label] = torch.tensor([entry["loss"] for entry in method.log], dtype=torch.float64)
        facts[label] = described(method)
    return losses, facts


def small_grid() -> dict:
    "Accuracy, predictions and chosen values by method and seed of a tuned grid."
    description = """
experiment: few_shot
grid: {dataset: [mini-digits]}
parameters:
  shots: 2
  views: 2
  methods: [ZeroShot, TipAdapter, TipAdapterF, TaskRes]
  seeds: [1, 2]
  trials: 2
  fixed: {TaskRes: {epochs: 5}, TipAdapterF: {epochs: 5}}
"""
    folder = execute_now(description)
    (file,) = folder.rglob("result.json")
    found = {}
    for result in read_run(file.parent):
        if result.metric == "accuracy":
            found[f"{result.label} {result.seed}"] = dict(
                accuracy=result.value,
                predictions=result.predictions,
                selection=result.selection.rule,
                candidates=result.selection.trials,
                hyper_parameters=result.hyper_parameters,
                trainable_parameters=result.trainable_parameters,
            )
    return found


GROUPS = dict(features=feature_methods, towers=tower_methods, generation=generation_methods)


def write(groups: list[str]) -> None:
    "Measure the pins of some groups, or all of them, and write them to `FOLDER`."
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / "facts.json"
    facts = json.loads(file.read_text()) if groups else {}
    for group in groups or GROUPS:
        arrays, facts[group] = GROUPS[group]()
        arrays = {label: x.contiguous() for label, x in arrays.items()}
        save_file(arrays, FOLDER / f"{group}.safetensors")
    if not groups:
        facts["grid"] = small_grid()
    file.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")


def pinned(group: str) -> tuple[dict, dict]:
    "The stored arrays and facts of a group."
    facts = json.loads((FOLDER / "facts.json").read_text())
    return load_file(FOLDER / f"{group}.safetensors"), facts[group]


if __name__ == "__main__":
    write(sys.argv[1:])
