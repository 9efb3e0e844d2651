"Hyper-parameters, numbers, divergence and params files: what is converted and what is refused."

import inspect
import json
import os
import typing
from pathlib import Path
from typing import Literal

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import run_command
from torch import nn

from vlmadapt.core.seeding import stream
from vlmadapt.core.values import NonNegative
from vlmadapt.grid.entries import method_entry, result_key
from vlmadapt.grid.params import read_runs
from vlmadapt.grid.runs import execute
from vlmadapt.grid.templates import template_parameters
from vlmadapt.methods import METHODS
from vlmadapt.methods.base import Method
from vlmadapt.methods.generation import GENERATION_METHODS
from vlmadapt.methods.hyper_parameters import OneOrMore, hyper_parameter
from vlmadapt.problems.classification import FewShotProblem
from vlmadapt.problems.few_shot import few_shot
from vlmadapt.problems.generation import load_task
from vlmadapt.training.batched import fit_many
from vlmadapt.training.evaluation import evaluate
from vlmadapt.training.loop import fit
from vlmadapt.training.tuning import sweep, tune, tune_many

PARAMS = Path(__file__).resolve().parent.parent / "params"
CLASSES = {  # a name that both kinds of methods have is that of the classifier
    **GENERATION_METHODS,
    **METHODS.classifiers(),
    "GenerationPAdapter": GENERATION_METHODS["PAdapter"],
    "GenerationFullFineTuning": GENERATION_METHODS["FullFineTuning"],
}


@pytest.fixture(scope="module")
def problem():
    return few_shot("mini-digits", shots=4, seed=1, views=2)


class Shift(Method):
    "A trained shift of the text classifier."

    recipe = dict(
        optimizer="adamw",
        lr=1e-3,
        weight_decay=0.0,
        epochs=2,
        batch_size=256,
        schedule="constant",
    )

    scale: NonNegative = hyper_parameter(1.0, search=[0.5, 1.0, 2.0], batched=True)

    def constants(self, problem):
        return dict(text=problem.features.text)

    def init(self, generator):
        self.table = nn.Parameter(torch.zeros_like(self.text))

    def logits(self, batch):
        return self.cosine_logits(batch.x, F.normalize(self.text + self.scale * self.table, dim=-1))


def message(f, error=ValueError):
    "The one line with which `f` is refused."
    with pytest.raises(error) as raised:
        f()
    text = str(raised.value)
    assert "\n" not in text
    return text


# Declarations


def bare_types(kind):
    "Types without a range within `kind`."
    if kind in (int, float, bool, tuple, list):
        return [kind]
    if typing.get_origin(kind) is typing.Annotated:
        return []
    return [bare for part in typing.get_args(kind) for bare in bare_types(part)]


def test_every_default_of_every_method_is_declared():
    offenders = []
    for label, cls in CLASSES.items():
        annotated = cls.declared()
        for name in cls.defaults():
            if name not in annotated or bare_types(annotated[name]):
                offenders.append(f"{label} {name}")
    assert not offenders, ", ".join(offenders)


def test_defaults_and_search_spaces_are_allowed_and_stay_as_they_are():
    for cls in CLASSES.values():
        defaults = cls.defaults()
        assert repr(cls.checked(defaults)) == repr(defaults)
        for name, values in {**cls.space, **cls.posthoc}.items():
            for value in values:
                assert repr(cls.checked({name: value})[name]) == repr(value)


@pytest.mark.parametrize(
    "name, given, expected",
    [
        ("TaskRes", dict(lr="1e-3", epochs="2"), dict(lr=0.001, epochs=2)),
        ("TaskRes", dict(epochs=2.0, batch_size=np.int64(16)), dict(epochs=2, batch_size=16)),
        ("LinearProbe", dict(epochs="2e1", lr=torch.tensor(0.5)), dict(epochs=20, lr=0.5)),
        ("GDA", dict(zero_shot="false", alpha=1), dict(zero_shot=False, alpha=1.0)),
        (
            "GDA",
            dict(zero_shot=np.bool_(True), shrink=pd.Series([2])[0]),
            dict(zero_shot=True, shrink=2.0),
        ),
        (
            "MuDPT",
            dict(depth="3", n_vision=None, words=None),
            dict(depth=3, n_vision=None, words=None),
        ),
        ("PAdapter", dict(towers="text", where=["ffn"]), dict(towers=("text",), where=("ffn",))),
        ("LoRA", dict(rank="4", parts=["query", "value"]), dict(rank=4, parts=("query", "value"))),
        ("GenerationPAdapter", dict(p=2, hidden="12", K=1.0), dict(p=2.0, hidden=12, K=1)),
        ("GCNIIAdapter", dict(lamb="0.5", alpha=0), dict(lamb=0.5, alpha=0.0)),
    ],
)
def test_unambiguous_values_are_converted(name, given, expected):
    found = CLASSES[name].checked(given)
    assert found == expected
    assert [type(v) for v in found.values()] == [type(v) for v in expected.values()]


@pytest.mark.parametrize(
    "name, given, told",
    [
        (
            "TaskRes",
            dict(epochs=0),
            "TaskRes epochs: input should be greater than or equal to 1, got 0",
        ),
        ("TaskRes", dict(epochs=-5), "got -5"),
        ("TaskRes", dict(epochs=2.5), "TaskRes epochs"),
        ("TaskRes", dict(lr=float("nan")), "TaskRes lr: input should be a finite number, got nan"),
        ("TaskRes", dict(lr="inf"), "TaskRes lr: input should be a finite number"),
        ("TaskRes", dict(lr=-1), "TaskRes lr: input should be greater than 0, got -1"),
        ("TaskRes", dict(lr=None), "TaskRes lr"),
        ("TaskRes", dict(weight_decay=-0.1), "TaskRes weight_decay"),
        ("TaskRes", dict(alpha="big"), "TaskRes alpha: input should be a number, got 'big'"),
        (
            "TaskRes",
            dict(optimizer="adamm"),
            "unknown TaskRes optimizer 'adamm'; did you mean 'adamw'?",
        ),
        (
            "TaskRes",
            dict(schedule=3),
            "unknown TaskRes schedule 3; there are warmup_cosine, cosine, linear",
        ),
        (
            "TaskRes",
            dict(batch_sise=3),
            "unknown TaskRes parameter 'batch_sise'; did you mean 'batch_size'?",
        ),
        ("LinearProbe", dict(batch_size=0), "LinearProbe batch_size"),
        (
            "LinearProbeScratch",
            dict(C=0),
            "LinearProbeScratch C: input should be greater than 0, got 0",
        ),
        ("GDA", dict(zero_shot="maybe"), "GDA zero_shot"),
        ("GDA", dict(zero_shot=2), "GDA zero_shot"),
        (
            "CLIPAdapter",
            dict(ratio=1.5),
            "CLIPAdapter ratio: input should be less than or equal to 1",
        ),
        ("CLIPAdapter", dict(reduction=0), "CLIPAdapter reduction"),
        (
            "ProtoCLIP",
            dict(adapter="conv3x"),
            "unknown ProtoCLIP adapter 'conv3x'; did you mean 'conv-3x'?",
        ),
        ("CoOp", dict(n_ctx=0), "CoOp n_ctx"),
        ("CoOp", dict(place="middel"), "did you mean 'middle'?"),
        ("CoOp", dict(words=3), "CoOp words"),
        ("MuDPT", dict(depth=0), "MuDPT depth"),
        ("VPT", dict(crop=0), "VPT crop: input should be greater than 0, got 0"),
        ("PAdapter", dict(towers=["vison"]), "did you mean 'vision'?"),
        (
            "PAdapter",
            dict(towers=["text", "text"]),
            "PAdapter towers: input should name each option once",
        ),
        ("PAdapter", dict(where=[]), "PAdapter where"),
        ("LoRA", dict(rank=0), "LoRA rank"),
        ("LoRA", dict(parts="querry"), "did you mean 'query'?"),
        ("Prefix", dict(length=-1), "Prefix length"),
        ("GenerationPAdapter", dict(mu=-1), "GenerationPAdapter mu"),
        (
            "GenerationPAdapter",
            dict(learn="fix"),
            "unknown GenerationPAdapter learn 'fix'; did you mean 'fixed'?",
        ),
        ("APPNPAdapter", dict(alpha=2), "APPNPAdapter alpha"),
        ("GenerationFullFineTuning", dict(smoothing=1.5), "FullFineTuning smoothing"),
        ("FullFineTuning", dict(crop=1.5), "FullFineTuning crop"),
        ("CLIPLoRA", dict(dropout=1.5), "CLIPLoRA dropout"),
        ("CLIPLoRA", dict(layers="half"), "did you mean 'half-up'?"),
        ("TwoSFS", dict(first_share=-0.1), "TwoSFS first_share"),
    ],
)
def test_impossible_values_are_refused(name, given, told):
    assert told in message(lambda: CLASSES[name].checked(given))


def test_the_constructor_set_and_stored_methods_use_the_declarations(problem, tmp_path):
    method = METHODS["GDA"](problem, alpha="2")
    assert method.hyper_parameters["alpha"] == 2.0 and float(method.alpha) == 2.0
    assert method.set(alpha="0.5").hyper_parameters["alpha"] == 0.5
    assert "GDA alpha" in message(lambda: method.set(alpha=-1))
    assert "can be set after training 'zero_shot'" in message(lambda: method.set(zero_shot=False))
    assert "got nan" in message(lambda: METHODS["GDA"](problem, alpha=np.nan))
    fit(method, problem).save(tmp_path / "gda.safetensors")
    trained = fit(METHODS["LinearProbe"](problem, epochs=np.int64(2)), problem)
    trained.save(tmp_path / "probe.safetensors")
    assert (
        METHODS["LinearProbe"].load(tmp_path / "probe.safetensors").hyper_parameters["epochs"] == 2
    )
    stored = {**method.hyper_parameters, "alpha": -1.0}
    broken = METHODS["GDA"].__new__(METHODS["GDA"])
    nn.Module.__init__(broken)
    told = message(lambda: broken._setup(stored, dict))
    assert "GDA alpha" in told


def test_plain_annotations_are_understood(problem):
    class Plain(Shift):
        scale: float = hyper_parameter(1, batched=True)
        steps: int = hyper_parameter(3)
        on: bool = hyper_parameter(False)
        of: OneOrMore[Literal["a", "b"]] = hyper_parameter(("a", "b"))

    assert repr(Plain.defaults()["scale"]) == "1.0"
    values = Plain(problem, scale=2, steps="4", on="yes", of="a").hyper_parameters
    assert (values["scale"], values["steps"], values["on"]) == (2.0, 4, True)
    assert values["of"] == ("a",)
    for wrong in (dict(scale=True), dict(scale=np.inf), dict(steps=1.5), dict(on=3), dict(of="ab")):
        assert next(iter(wrong)) in message(lambda wrong=wrong: Plain(problem, **wrong))


def test_what_may_be_batched_is_declared_not_guessed(problem):
    class Whole(Shift):
        scale: NonNegative = hyper_parameter(1, batched=True)

    class Fixed(Shift):
        scale: NonNegative = hyper_parameter(1.0)

    values = [dict(epochs=1, scale=scale) for scale in (1, 2.0)]
    for cls in (Whole, Fixed):
        many = fit_many([(cls, v, problem, 1) for v in values])
        for method, v in zip(many, values, strict=True):
            alone = fit(cls(problem, **v), problem)
            assert torch.allclose(method.table, alone.table, atol=1e-6)
    assert isinstance(Whole(problem).scale, torch.Tensor) and Fixed(problem).scale == 1.0
    assert Whole(problem).set(scale=2).hyper_parameters["scale"] == 2.0
    assert "can be set after training 'scale'" in message(lambda: Fixed(problem).set(scale=2))


def test_a_subclass_fixes_or_redeclares_hyper_parameters(problem):
    class Half(Shift):
        scale = 0.5

    class Narrow(Shift):
        scale: NonNegative = hyper_parameter(2.0, search=[2.0, 3.0], batched=True)

    assert "scale" not in Half.defaults() and "scale" not in Half.space
    assert Half(problem).scale == 0.5
    assert "unknown Half parameter 'scale'" in message(lambda: Half(problem, scale=1))
    assert Narrow.space == dict(scale=[2.0, 3.0]) and Shift.space == dict(scale=[0.5, 1.0, 2.0])
    assert list(inspect.signature(Narrow).parameters)[:2] == ["problem", "scale"]


# Arguments of few_shot, fit and tune


@pytest.mark.parametrize(
    "two", [2, np.int64(2), np.int32(2), pd.Series([2])[0], 2.0, "2", torch.tensor(2)]
)
def test_numbers_of_few_shot_mean_the_same_however_written(two):
    expected = few_shot("mini-digits", shots=2, seed=2, views=2)
    found = few_shot("mini-digits", shots=two, seed=two, views=two)
    assert found.images("train").key() == expected.images("train").key()
    assert found.provenance == expected.provenance
    assert [type(found.provenance[name]) for name in ("shots", "seed", "views")] == [int, int, int]


@pytest.mark.parametrize(
    "given, told",
    [
        (dict(shots=True), "shots: input should be a number, not a truth value"),
        (dict(shots=0), "shots: input should be greater than or equal to 1, got 0"),
        (dict(shots=1.5), "shots"),
        (dict(seed=-1), "seed: input should be greater than or equal to 0, got -1"),
        (dict(seed="one"), "seed: input should be a number, got 'one'"),
        (dict(views=0), "views: input should be greater than or equal to 1, got 0"),
        (dict(views=-1), "views"),
        (
            dict(prompts="templates"),
            "unknown kind of prompts 'templates'; did you mean 'template'?",
        ),
        (dict(text_pool="units"), "unknown text pooling 'units'; did you mean 'unit'?"),
        (dict(part="bases"), "unknown part of the classes 'bases'; did you mean 'base'?"),
    ],
)
def test_few_shot_refuses_impossible_arguments(given, told):
    assert told in message(lambda: few_shot("mini-digits", **given))


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf"), "big", True])
def test_logit_scale_is_finite_and_positive(scale):
    text = np.eye(2, 4)
    assert "logit_scale" in message(
        lambda: FewShotProblem.from_features(["a", "b"], text, logit_scale=scale)
    )


def test_seeds_and_trials_are_converted(problem):
    first = fit(Shift(problem), problem, seed=2)
    for seed in ("2", 2.0, np.int64(2)):
        assert torch.equal(fit(Shift(problem), problem, seed=seed).table, first.table)
        assert torch.equal(fit_many([(Shift, {}, problem, seed)])[0].table, first.table)
    assert dict(tune(Shift, problem, trials="2", seed="1")) == dict(
        tune(Shift, problem, trials=2, seed=1)
    )
    assert tune(Shift, problem, trials=0).selection == "defaults"
    for wrong in (dict(trials=-1), dict(trials=1.5), dict(seed=-1), dict(seed=True)):
        assert next(iter(wrong)) in message(lambda wrong=wrong: tune(Shift, problem, **wrong))
    assert "2 problems but 1 seeds" in message(lambda: tune_many(Shift, [problem, problem], [1]))


@pytest.mark.parametrize(
    "given, told",
    [
        (
            dict(fixed=dict(epochs=0)),
            "Shift epochs: input should be greater than or equal to 1, got 0",
        ),
        (dict(fixed=dict(epoch=1)), "unknown Shift parameter 'epoch'; did you mean 'epochs'?"),
        (
            dict(space=dict(scale=[1, -1])),
            "Shift scale: input should be greater than or equal to 0, got -1",
        ),
        (dict(space=dict(scale=1.0)), "Shift scale takes a list of values to try, not 1.0"),
        (dict(space=dict(scale="12")), "Shift scale takes a list of values to try, not '12'"),
        (dict(space=dict(scale=[])), "Shift scale: the list of values to try is empty"),
        (
            dict(space=dict(schedule=["cosin"])),
            "unknown Shift schedule 'cosin'; did you mean 'cosine'?",
        ),
    ],
)
def test_tune_checks_what_it_is_given(problem, given, told):
    assert told in message(lambda: tune(Shift, problem, trials=2, **given))


def test_a_search_space_is_converted(problem):
    found = tune(
        Shift, problem, fixed=dict(epochs="1"), space=dict(scale=np.array([0.5, 1, 2])), trials=9
    )
    texts = tune(
        Shift, problem, fixed=dict(epochs=1.0), space=dict(scale=["5e-1", 1, "2", 2.0]), trials=9
    )
    assert found["epochs"] == 1 and len(found.trials) == 3
    assert found.trials.equals(texts.trials)


# Definitions


def test_unknown_methods_are_refused_with_the_nearest():
    assert (
        message(lambda: METHODS["HeGraph"])
        == "unknown method 'HeGraph'; did you mean 'HeGraphAdapter'?"
    )
    assert "did you mean 'LoRA'?" in message(lambda: METHODS["LoRa"])
    assert "HeGraph" not in METHODS and METHODS.get("HeGraph") is None


def test_classes_instances_and_problems_are_told_apart(problem):
    taskres = METHODS["TaskRes"]
    built = taskres(problem)
    assert "fit(TaskRes(problem), problem)" in message(lambda: fit(taskres, problem))
    assert "not a TaskRes that is built already" in message(lambda: tune(built, problem))
    assert "did you mean 'TaskRes'?" in message(lambda: tune("TaskRess", problem))
    assert "not a TaskRes that is built already" in message(
        lambda: fit_many([(built, {}, problem, 1)])
    )
    assert "fit_many takes tuples" in message(lambda: fit_many([(taskres, problem)]))
    assert "few_shot('mini-digits'), not 'mini-digits'" in message(
        lambda: fit(built, "mini-digits")
    )
    assert "TaskRes is built on a problem" in message(lambda: taskres("mini-digits"))
    assert "unknown answer to divergence 'skip'" in message(lambda: fit_many([], on_diverge="skip"))
    assert "BitFit generates text" in message(lambda: tune(METHODS["BitFit"], problem))


def test_impossible_definitions_are_named(problem):
    class Scoreless(Method):
        def constants(self, problem):
            return {}

    class Idle(Shift):
        def init(self, generator):
            self.table = torch.zeros_like(self.text)

    class Partial(Shift):
        recipe = dict(lr=1e-3, epochs=2)

    class Bad(Shift):
        recipe = {**Shift.recipe, "epochs": 0}

    class Short(Method):
        recipe = Shift.recipe
        constants, init, logits = Shift.constants, Shift.init, Shift.logits
        scale = 1.0

    assert "Scoreless gives no scores: define logits" in message(
        lambda: fit(Scoreless(problem), problem)
    )
    assert "Idle has a recipe but nothing to train" in message(lambda: fit(Idle(problem), problem))
    told = message(lambda: fit(Partial(problem), problem))
    assert told.endswith("its recipe lacks optimizer, weight_decay, batch_size, schedule")
    assert "'scale' needs a type" in message(
        lambda: type("Untyped", (Shift,), dict(scale=hyper_parameter(1.0)))
    )
    assert "Wrong scale: input should be greater than or equal to 0, got -1" in message(
        lambda: type(
            "Wrong",
            (Shift,),
            dict(scale=hyper_parameter(-1.0), __annotations__=dict(scale=NonNegative)),
        )
    )
    assert "'scalee'; did you mean 'scale'?" in message(
        lambda: type("Misspelt", (Shift,), dict(space=dict(scalee=[1.0])))
    )
    assert "Bad epochs" in message(lambda: Bad(problem))
    assert fit(Short(problem, epochs="3"), problem).hyper_parameters["epochs"] == 3


def test_variants_that_train_nothing_are_no_fault(problem):
    for name, values in (
        ("ProtoCLIP", dict(variant="training-free")),
        ("HeGraphAdapter", dict(variant="Base")),
        ("ZeroShot", {}),
    ):
        assert not fit(METHODS[name](problem, **values), problem).diverged


# Divergence


@pytest.mark.parametrize(
    "name, values",
    [
        ("LinearProbe", dict(lr=1e38)),
        ("TaskRes", dict(lr=1e38)),
        ("TipAdapter", dict(alpha=1e300)),
        ("TipAdapter", dict(alpha=3e38, beta=0)),
    ],
)
def test_what_is_not_finite_in_the_end_is_named(problem, name, values):
    more = dict(epochs=2) if "epochs" in METHODS[name].recipe else {}
    told = message(
        lambda: fit(METHODS[name](problem, **values, **more), problem), FloatingPointError
    )
    assert told.startswith(f"{name} on mini-digits, 4 shots, seed 1: ")
    assert "NaN or infinity in" in told or "the loss became" in told


def test_a_last_step_that_breaks_is_found(problem):
    once = dict(lr=1e38, epochs=1)
    told = message(lambda: fit(Shift(problem, **once), problem), FloatingPointError)
    assert "after training at learning rate 1e+38" in told
    good = (Shift, {}, problem, 1)
    methods = fit_many([good, (Shift, once, problem, 1), good], on_diverge="keep")
    assert [bool(m.diverged) for m in methods] == [False, True, False]
    alone = fit(Shift(problem), problem)
    assert torch.allclose(methods[2].table, alone.table, atol=1e-6)
    assert "1e+38" in message(
        lambda: fit_many([good, (Shift, once, problem, 1)]), FloatingPointError
    )


def test_closed_forms_are_checked(problem):
    class Broken(METHODS["GDA"]):
        def solve(self, problem):
            super().solve(problem)
            self.W[0, 0] = torch.nan

    assert "NaN or infinity in W" in message(
        lambda: fit(Broken(problem), problem), FloatingPointError
    )


def test_tune_never_takes_a_diverged_candidate(problem):
    space = dict(lr=[1e38, 1e-2])
    found = tune(Shift, problem, fixed=dict(epochs=1), space=space, trials=3)
    assert found["lr"] < 1 and not found.method.diverged
    hopeless = dict(fixed=dict(lr=1e38, epochs=1), space=dict(scale=[0.5, 1.0]), trials=2)
    told = message(lambda: tune(Shift, problem, **hopeless), FloatingPointError)
    assert "all 2 candidates diverged, such as Shift on mini-digits" in told
    one_shot = problem.features.train[::4], problem.labels["train"][::4]
    single = FewShotProblem.from_features(
        problem.class_names, problem.features.text, train=one_shot
    )
    message(lambda: tune(Shift, single, fixed=dict(lr=1e38, epochs=1)), FloatingPointError)


def test_scores_that_are_not_finite_are_the_worst_of_a_sweep(problem):
    class Fragile(METHODS["TipAdapter"]):
        def logits(self, batch):
            return super().logits(batch) + torch.where(self.beta > 2, torch.nan, 0.0)

    method = fit(Fragile(problem), problem)
    val = problem.features.val, problem.labels["val"]
    rows = sweep(method, dict(beta=[1, "2.0", 3.0]), *val)
    assert [row["beta"] for row in rows] == [1.0, 2.0, 3.0]
    assert [row["accuracy"] < 0 for row in rows] == [False, False, True]
    assert rows[2]["nll"] == float("inf")
    assert max(rows, key=lambda r: (r["accuracy"], -r["nll"]))["beta"] < 3
    assert "alpha: input should be a finite number" in message(
        lambda: sweep(method, dict(alpha=["nan"]), *val)
    )
    assert "takes a list of values" in message(lambda: sweep(method, dict(beta=1.0), *val))
    assert tune(Fragile, problem, fixed=dict(alpha=1.0))["beta"] < 3


def test_a_rate_that_diverges_is_not_chosen_for_a_generation_method():
    class Fragile(GENERATION_METHODS["BitFit"]):
        "Diverges at rates above 1."

        def loss(self, batch):
            loss = super().loss(batch)
            return loss * torch.nan if self.hyper_parameters["lr"] > 1 else loss

    task = load_task("mini-vqa", train=8)
    short = dict(epochs=1, batch_size=8)
    best = tune(Fragile, task, fixed=short, space=dict(lr=[2.0, 1e-3]))
    assert best["lr"] == 1e-3 and best.method.hyper_parameters["lr"] == 1e-3
    assert best.trials["value"].isna().tolist() == [True, False]
    assert "all 2 candidates diverged" in message(
        lambda: tune(Fragile, task, fixed=short, space=dict(lr=[2.0, 3.0])), FloatingPointError
    )


# Templates


BASE = 'methods = ["ZeroShot"]\nseeds = [1]\nout = ""\n'


def own(folder, cell, name="mine.ipynb", kernel=True):
    "A notebook whose parameters cell is `cell`."
    cells = [nbformat.v4.new_code_cell(cell), nbformat.v4.new_code_cell("print(methods)")]
    cells[0].metadata["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=cells)
    if kernel:
        notebook.metadata["kernelspec"] = dict(name="python3", language="python", display_name="p")
    nbformat.write(notebook, folder / name)
    return folder / name


@pytest.mark.parametrize(
    "cell, expected",
    [
        ('note = "a=b"', dict(note="a=b")),
        ('note = "#1"  # such as x=1', dict(note="#1")),
        ("note: None|str = None", dict(note=None)),
        ("note: Optional[str] = 'a'", dict(note="a")),
        ("size: int = 3", dict(size=3)),
        ("sizes = [\n    1,  # one\n    2,\n]", dict(sizes=[1, 2])),
        ('table = {\n    "a": 1,\n    "b": (2, -3),\n}', dict(table={"a": 1, "b": [2, -3]})),
        ("rate = 10**-3", dict(rate=0.001)),
        ("rate = -1", dict(rate=-1)),
        ("rate = 3 * 1e-3 / 2", dict(rate=0.0015)),
        ('note = """a\nb"""', dict(note="a\nb")),
        ("a = 1; b = 2", dict(a=1, b=2)),
        ("a, b = 1, 2", dict(a=1, b=2)),
        ("a = b = 1", dict(a=1, b=1)),
        ("size = 3\nif size == 3: pass", dict(size=3)),
        ("%matplotlib inline\nsize = 3", dict(size=3)),
        ('import os\n"text"\nsize = 3', dict(size=3)),
    ],
)
def test_the_parameters_cell_is_parsed(tmp_path, cell, expected):
    found = template_parameters(own(tmp_path, BASE + cell))
    assert {name: found[name] for name in expected} == expected
    assert list(found)[:3] == ["methods", "seeds", "out"] and len(found) == 3 + len(expected)


@pytest.mark.parametrize(
    "cell, told",
    [
        (
            "size = len(seeds)",
            "line 4 of the cell tagged 'parameters': size = len(seeds) is no literal",
        ),
        ("\nsize = seeds", "line 5"),
        ("size = 10**10**10", "is no literal"),
        ("size = 1 / 0", "is no literal"),
        ("note = f'{seeds}'", "is no literal"),
        (
            "if seeds:\n    size = 3",
            "line 4 of the cell tagged 'parameters' sets size in another way",
        ),
        ("seeds += [2]", "sets seeds in another way"),
        ("size = = 3", "line 4 of the cell tagged 'parameters' is no Python"),
    ],
)
def test_what_is_no_literal_is_refused_with_its_line(tmp_path, cell, told):
    assert told in message(lambda: template_parameters(own(tmp_path, BASE + cell)))


def test_what_is_no_notebook_is_refused(tmp_path):
    for name, text in (
        ("a.ipynb", "[]"),
        ("b.ipynb", "{"),
        ("c.ipynb", '{"cells": [3]}'),
        ("d.ipynb", "{}"),
    ):
        (tmp_path / name).write_text(text)
        assert "is no notebook" in message(lambda name=name: template_parameters(tmp_path / name))
    (tmp_path / "e.ipynb").write_text(json.dumps(dict(cells=[])))
    assert "has no cell tagged 'parameters'" in message(
        lambda: template_parameters(tmp_path / "e.ipynb")
    )
    assert "a folder, not a file" in message(lambda: template_parameters(tmp_path))
    assert "no such file" in message(lambda: template_parameters(tmp_path / "none.ipynb"))


def runs_of(folder, cell, parameters):
    "The runs of a notebook with that cell, given these `parameters`."
    own(folder, BASE + cell)
    (folder / "x.yml").write_text(f"experiment: mine.ipynb\nparameters: {parameters}\n")
    return read_runs(folder / "x.yml", out=folder / "outputs")


@pytest.mark.parametrize(
    "cell, given, expected",
    [
        ('note = "a"', "{note: b}", "b"),
        ("note = None", "{note: c}", "c"),
        ("note = None", "{note: [1, 2]}", [1, 2]),
        ("note = None", "{note: 3}", 3),
        ("note: None|str = None", "{note: c}", "c"),
        ("note: 'None|int' = None", "{note: '3'}", 3),
        ("note: float = 3", "{note: 0.5}", 0.5),
        ("note: list[float] = [1]", "{note: [1e-3, 2]}", [0.001, 2.0]),
        ("note = 1e-3", "{note: 2e-3}", 0.002),
        ("note = 1e-3", "{note: 2}", 2.0),
        ("note = 3", "{note: 4.0}", 4),
        ("note = 3", "{note: '4'}", 4),
        ("note = False", "{note: 'yes'}", True),
        ("note = {'a': 1}", "{note: {c: 3}}", {"c": 3}),
        ("epochs: 'NonNegativeInteger' = 1", "{epochs: 0}", 0),
    ],
)
def test_values_reach_the_run_as_the_default_asks(tmp_path, cell, given, expected):
    (run,) = runs_of(tmp_path, cell, given)
    name = "epochs" if "epochs" in cell else "note"
    assert run.parameters[name] == expected and type(run.parameters[name]) is type(expected)


@pytest.mark.parametrize(
    "cell, given, told",
    [
        ('note = "a"', "{note: 2024-01-01}", "put text in quotes"),
        ('note = "a"', "{note: yes}", "note takes text, not True; put text in quotes"),
        ('note = "a"', "{note: 5}", "note takes text, not 5; put text in quotes"),
        ("note = None", "{note: 2024-01-01}", "put text in quotes"),
        ("note: None|str = None", "{note: no}", "put text in quotes"),
        ("note = 3", "{note: four}", "note takes a whole number, not 'four'"),
        ("note = 3", "{note: 2.5}", "note takes a whole number, not 2.5"),
        ("note = 3", "{note: true}", "note takes a whole number, not True"),
        ("note = 0.5", "{note: .nan}", "note takes a number, not nan"),
        ("note = [1]", "{note: 3}", "note takes a list, not 3"),
        ("note = 3", "{note: 010}", "YAML reads 010 as 8"),
        ("note = 3", "{note: 1:30}", "YAML reads 1:30 as 90"),
    ],
)
def test_values_that_do_not_fit_the_default_are_refused(tmp_path, cell, given, told):
    text = message(lambda: runs_of(tmp_path, cell, given))
    assert text.startswith(f"{tmp_path}/x.yml: ") and told in text


def test_an_experiment_needs_methods_seeds_and_out(tmp_path):
    own(tmp_path, 'methods = ["ZeroShot"]\nseeds = [1]')
    (tmp_path / "x.yml").write_text("experiment: mine.ipynb\n")
    assert "mine.ipynb has no parameter 'out'" in message(lambda: read_runs(tmp_path / "x.yml"))


# Params files


HEAD = (
    "experiment: few_shot\n"
    "grid: {dataset: [mini-digits]}\n"
    "parameters: {methods: [TaskRes], seeds: [1], "
)


def read(folder, text, name="grid.yml"):
    (folder / name).write_text(text)
    return read_runs(folder / name, out=folder / "outputs")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("lr: 1e-3", dict(lr=0.001)),
        ("epochs: 2e1", dict(epochs=20)),
        ("epochs: '20'", dict(epochs=20)),
        ("epochs: 20.0", dict(epochs=20)),
        ("alpha: 1", dict(alpha=1.0)),
    ],
)
def test_fixed_values_are_converted(tmp_path, text, expected):
    (run,) = read(tmp_path, HEAD + f"fixed: {{TaskRes: {{{text}}}}}}}\n")
    assert run.parameters["fixed"] == {"TaskRes": expected}
    assert list(map(type, run.parameters["fixed"]["TaskRes"].values())) == list(
        map(type, expected.values())
    )


def refusal_of_a_dry_run(folder, capsys, text):
    "The one line with which a dry run refuses a params file of this text."
    file = folder / "grid.yml"
    file.write_text(text)
    assert run_command("grid", str(file), dry_run=True, out=str(folder / "outputs")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{file}: ")
    return line


@pytest.mark.parametrize(
    "text, told",
    [
        (
            "fixed: {TaskRes: {optimizer: adamm}}",
            "fixed: unknown TaskRes optimizer 'adamm'; did you mean 'adamw'?",
        ),
        ("fixed: {TaskRes: {schedule: 3}}", "fixed: unknown TaskRes schedule 3"),
        (
            "fixed: {TaskRes: {alpha: big}}",
            "fixed: TaskRes alpha: input should be a number, got 'big'",
        ),
        ("fixed: {TaskRes: {epochs: 0}}", "fixed: TaskRes epochs"),
        ("fixed: {TaskRes: {epochs: -5}}", "got -5"),
        ("fixed: {TaskRes: {lr: .nan}}", "fixed: TaskRes lr"),
        ("fixed: {TaskRes: {lr: -1}}", "got -1"),
        ("fixed: {TaskRes: {batch_size: 0}}", "fixed: TaskRes batch_size"),
        ("fixed: {CoOp: {words: yes}}", "put text in quotes"),
        ("shots: 0", "shots: input should be greater than or equal to 1, got 0"),
        ("shots: 2.5", "shots takes a whole number, not 2.5"),
        ("views: -1", "views"),
        ("views: 0", "views"),
        ("trials: -1", "trials: input should be greater than or equal to 0, got -1"),
        ("trials: many", "trials takes a whole number, not 'many'"),
        ("prompts: templates", "unknown kind of prompts 'templates'; did you mean 'template'?"),
        ("prompts: none.json", "/none.json"),
        ("backbone: minn", "unknown backbone 'minn'; did you mean 'mini'?"),
        ("backbone: 'ViT-B-99:openai'", "unknown open_clip model 'ViT-B-99'; did you mean"),
        (
            "backbone: 'ViT-B-32:opnai'",
            "unknown weight tag of ViT-B-32 'opnai'; did you mean 'openai'?",
        ),
        ("backbone: 'ViT-B-32:none.safetensors'", "no such weight file: none.safetensors"),
    ],
)
def test_a_dry_run_refuses_impossible_values(tmp_path, capsys, text, told):
    assert told in refusal_of_a_dry_run(tmp_path, capsys, HEAD + text + "}\n")


def test_a_dry_run_refuses_impossible_values_of_a_variant(tmp_path, capsys):
    variant = "{method: TaskRes, variant: a, hyper_parameters: {epochs: 0}}"
    text = HEAD.replace("methods: [TaskRes]", f"methods: [{variant}]") + "shots: 1}\n"
    assert "methods: TaskRes (a): TaskRes epochs" in refusal_of_a_dry_run(tmp_path, capsys, text)


def test_all_runs_and_fixed_by_are_checked_before_the_first_starts(tmp_path):
    seeds = HEAD.replace("seeds: [1]", "seeds: [1, -1]")
    assert "each of seeds" in message(lambda: read(tmp_path, seeds + "shots: 1}\n"))
    shots = HEAD.replace("dataset: [mini-digits]", "dataset: [mini-digits], shots: [1, 0]")
    assert "each of grid: shots" in message(lambda: read(tmp_path, shots + "trials: 0}\n"))
    by = (
        HEAD.replace("dataset: [mini-digits]", "dataset: [mini-digits], shots: [1, 2]")
        + "trials: 0}\nfixed_by:\n"
    )
    runs = read(tmp_path, by + "  shots: {'2': {TaskRes: {epochs: '7'}}}\n")
    assert [run.parameters["fixed"] for run in runs] == [{"TaskRes": {"epochs": 7}}, {}]
    told = message(lambda: read(tmp_path, by + "  shots: {2: {TaskRes: {epochs: 0}}}\n"))
    assert "fixed_by: shots: 2: fixed: TaskRes epochs" in told
    assert "is given twice" in message(lambda: read(tmp_path, by + "  shots: {2: {}, '2': {}}\n"))
    parts = f"parts:\n  one:\n    {HEAD.strip().replace(chr(10), chr(10) + '    ')} shots: 0}}\n"
    assert "grid.yml: one: shots" in message(lambda: read(tmp_path, parts))


def test_searched_and_varied_values_are_checked(tmp_path):
    task = "experiment: tasks\nparameters: {methods: [LoRA], seeds: [1], space: "
    (run,) = read(tmp_path, task + "{lr: ['1e-3', 1]}}\n")
    assert run.parameters["space"] == {"lr": [0.001, 1.0]}
    for text, told in (
        ("{lrr: [1]}", "did you mean 'lr'?"),
        ("{lr: [0]}", "space: LoRA lr"),
        ("{lr: []}", "is empty"),
        ("{lr: 1e-3}", "takes a list"),
    ):
        assert told in message(lambda text=text: read(tmp_path, task + text + "}\n"))
    assert "epochs" in message(lambda: read(tmp_path, task + "{}, epochs: 0}\n"))
    vary = "experiment: sensitivity\nparameters: {seeds: [1], vary: "
    (run,) = read(tmp_path, vary + "{alpha_pp: [0, 1e-2]}}\n")
    assert run.parameters["vary"] == {"alpha_pp": [0, 0.01]}
    assert "did you mean 'alpha_vp'?" in message(lambda: read(tmp_path, vary + "{alpha_v: [0]}}\n"))
    assert "got 'big'" in message(lambda: read(tmp_path, vary + "{alpha_pp: [big]}}\n"))


def key_of(run):
    "The key of the results of TaskRes with seed 1."
    return result_key(run.settings, method_entry("TaskRes", run.parameters["fixed"]), 1)


def test_equal_meaning_gives_equal_runs_and_keys(tmp_path):
    plain = HEAD.replace("seeds: [1]", "seeds: [1, 2]").replace(
        "[mini-digits]", "[mini-digits], shots: [1, 2]"
    )
    other = HEAD.replace("seeds: [1]", "seeds: ['1', 2.0]").replace(
        "[mini-digits]", "[mini-digits], shots: ['1', 2e0]"
    )
    first = read(tmp_path, plain + "trials: 4, fixed: {TaskRes: {epochs: 20, lr: 0.001}}}\n")
    second = read(tmp_path, other + "trials: '4', fixed: {TaskRes: {epochs: '2e1', lr: 1e-3}}}\n")
    assert [run.folder for run in first] == [run.folder for run in second]
    assert [run.parameters for run in first] == [run.parameters for run in second]
    keys = [[key_of(run) for run in runs] for runs in (first, second)]
    assert keys[0] == keys[1]


def test_no_shipped_params_file_is_refused():
    for file in sorted(PARAMS.glob("*.yml")):
        for run in read_runs(file):
            yaml.safe_dump(run.parameters)
            json.dumps(run.parameters)


def test_files_that_are_none_are_refused_without_hanging(tmp_path):
    os.mkfifo(tmp_path / "pipe.yml")
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.yml").mkdir()
    (tmp_path / "bytes.yml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "deep.yml").write_text("[" * 3000)
    for name, told in (
        ("pipe.yml", "a pipe, socket or device, not a file"),
        ("folder.yml", "a folder, not a file"),
        ("none.yml", "no such file"),
        ("x" * 300, "name too long"),
        ("bytes.yml", "UTF-8"),
        ("deep.yml", "nested"),
    ):
        assert told in message(lambda name=name: read_runs(tmp_path / name)).replace("File", "file")
    assert "a folder, not a file" in message(lambda: read_runs("."))
    for prompts, told in (
        (tmp_path / "pipe.json", "a pipe, socket or device, not a file"),
        (f"{'x' * 300}.json", "too long"),
    ):
        assert told in message(
            lambda prompts=prompts: read(tmp_path, HEAD + f"prompts: {prompts}}}\n")
        )
    (tmp_path / "marked.yml").write_bytes(b"\xef\xbb\xbf" + (HEAD + "shots: 1}\n").encode())
    assert len(read_runs(tmp_path / "marked.yml")) == 1


@pytest.mark.parametrize(
    "given, told",
    [
        (dict(workers=0), "--workers"),
        (dict(workers="two"), "--workers"),
        (dict(gpus_per_run=float("nan")), "--gpus-per-run"),
        (dict(gpus_per_run=-1), "--gpus-per-run"),
        (dict(memory_per_run=-1), "--memory-per-run"),
    ],
)
def test_numbers_of_the_command_are_checked(capsys, given, told):
    assert run_command("grid", str(PARAMS / "mini.yml"), dry_run=True, **given) == 2
    assert capsys.readouterr().err.startswith(told)


def test_a_notebook_without_kernelspec_runs_with_converted_values(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = own(tmp_path, BASE + "note: None|str = None\nshots = 1", kernel=False)
    cell = (
        "from vlmadapt.grid.experiments import measure_missing\n"
        "from vlmadapt.grid.store import ResultStore\n"
        "store = ResultStore(out, dict(note=note, shots=shots), methods, seeds)\n"
        "value = dict(metric='accuracy', value=float(shots))\n"
        "measure_missing(store, lambda entry, missing: [value for seed in missing])"
    )
    text = json.loads(notebook.read_text())
    text["cells"][1]["source"] = cell
    notebook.write_text(json.dumps(text))
    (run,) = read(tmp_path, "experiment: mine.ipynb\nparameters: {note: 'a=b', shots: '3'}\n")
    assert execute(run) is None
    (record,) = json.loads((run.folder / "result.json").read_text())["results"]
    assert record["value"] == 3.0 and record["shots"] == 3 and record["settings"]["note"] == "a=b"


def test_a_grid_with_text_for_numbers_is_computed(tmp_path):
    (run,) = read(
        tmp_path,
        HEAD + "shots: '1', trials: 0, views: 2, fixed: {TaskRes: {epochs: 2e0, lr: 1e-3}}}\n",
    )
    assert execute(run) is None
    record, *others = json.loads((run.folder / "result.json").read_text())["results"]
    assert all(r["hyper_parameters"] == record["hyper_parameters"] for r in others)
    assert record["hyper_parameters"]["epochs"] == 2 and record["hyper_parameters"]["lr"] == 0.001


def test_the_value_of_an_epoch_is_what_it_was(problem):
    "Valid input gives what it gave: a linear probe of two epochs, by hand."
    method = fit(
        METHODS["LinearProbe"](problem, epochs=1, schedule="constant", optimizer="sgd", lr=0.1),
        problem,
    )
    x = problem.features.views
    order = torch.randperm(len(problem.labels["train"]), generator=stream(1, "batches"))
    view = torch.randint(len(x), (len(order),), generator=stream(1, "views"))
    z = F.normalize(x[view[order], order], dim=-1)
    W = problem.features.text.clone().requires_grad_()
    b = torch.zeros(problem.K, requires_grad=True)
    loss = F.cross_entropy(problem.logit_scale * F.linear(z, W) + b, problem.labels["train"][order])
    loss.backward()
    assert torch.allclose(method.W, W - 0.1 * W.grad, atol=1e-5)
    assert torch.allclose(method.b, b - 0.1 * b.grad, atol=1e-5)
    assert evaluate(method, problem)["n"] > 0
