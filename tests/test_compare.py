"Several methods on one problem in one table."

import math

import numpy as np
import pytest
import torch
from conftest import refused

import vlmadapt as va


@pytest.fixture(scope="module")
def digits():
    return va.few_shot("mini-digits", backbone="mini", shots=2, views=1)


class Failing(va.Method):
    "Fails when it is trained."

    def constants(self, problem):
        return {"text": problem.features.text}

    def logits(self, batch):
        raise RuntimeError("no\nmemory left")


def test_a_line_is_what_adapt_and_evaluate_give(digits):
    table = va.compare(digits, ["GDA", "TipAdapter"], trials=3, seeds=[2])
    assert list(table.index) == ["GDA", "TipAdapter"] and table.index.name == "method"
    for name in table.index:
        method = va.adapt(digits, name, trials=3, seed=2)
        line = table.loc[name]
        assert line["test"] == va.evaluate(method, digits)["accuracy"]
        assert line["validation"] == method.card["selection"]["value"]
        assert line["selection"] == method.card["selection"]["rule"] == "few_shot_val"
        assert line["trainable_parameters"] == method.trainable_parameters()
        assert 0 < line["seconds"] < 60
    assert "error" not in table and "test_std" not in table
    assert table.attrs["metric"] == "accuracy" and table.attrs["seeds"] == [2]


def test_a_failure_leaves_the_others(digits):
    with pytest.warns(UserWarning, match="Failing: no memory left"):
        table = va.compare(digits, ["ZeroShot", Failing, "GDA"], trials=0)
    assert list(table.index) == ["ZeroShot", "Failing", "GDA"]
    assert table["error"]["Failing"] == "no memory left" and math.isnan(table["test"]["Failing"])
    assert table["test"].drop("Failing").notna().all()
    assert table["trainable_parameters"]["ZeroShot"] == 0
    with pytest.warns(UserWarning, match="no memory left"):
        alone = va.compare(digits, [Failing])
    assert list(alone.columns) == ["error"]


def test_seeds_build_problems_and_give_means():
    def build(seed):
        return va.few_shot("mini-digits", backbone="mini", shots=3, seed=seed, views=1)

    table = va.compare(build, ["GDA"], trials=0, seeds=[1, 2, 3])
    found = [va.evaluate(va.adapt(build(s), "GDA", 0, s), build(s))["accuracy"] for s in (1, 2, 3)]
    assert table["test"]["GDA"] == pytest.approx(np.mean(found))
    assert table["test_std"]["GDA"] == pytest.approx(np.std(found, ddof=1))
    assert len(set(found)) > 1


def test_fixed_values_and_the_default_methods(digits):
    table = va.compare(digits, ["TaskRes"], trials=0, fixed={"TaskRes": {"epochs": 1}})
    assert table["seconds"]["TaskRes"] > 0 and table["selection"]["TaskRes"]
    fixed = {name: {"epochs": 1} for name in ("LinearProbe", "TaskRes", "CLIPAdapter")}
    whole = va.compare(digits, trials=0, fixed=fixed)
    assert len(whole) == 7 and "AnchoredKernel" in whole.index and whole["test"].notna().all()


def test_what_cannot_be_is_refused_before_anything_is_trained(digits, monkeypatch):
    monkeypatch.setattr("vlmadapt.training.comparison.adapt", None)
    refused(lambda: va.compare(digits, ["GDA", "TaskRess"]), "did you mean 'TaskRes'?")
    refused(lambda: va.compare(digits, ["GDA"], fixed={"TaskRes": {}}), "'TaskRes' is not among")
    refused(lambda: va.compare("mini-digits", ["GDA"]), "compare", error=(ValueError, TypeError))


def test_without_test_labels_and_without_validation():
    x = torch.eye(3, 8).repeat_interleave(4, 0) + 0.01 * torch.arange(12)[:, None]
    y = torch.arange(3).repeat_interleave(4)
    problem = va.from_features(["a", "b", "c"], torch.eye(3, 8), train=(x, y))
    table = va.compare(problem, ["ZeroShot", "TipAdapter"], trials=2)
    assert table["test"].isna().all()
    assert table["selection"]["TipAdapter"] == "held_out_shots"


def test_generation():
    task = va.load_task("mini-entailment", backbone="mini", train=8)
    table = va.compare(task, ["Frozen", "BitFit"], trials=0, fixed={"BitFit": {"epochs": 1}})
    assert table["test"].notna().all() and table.attrs["metric"] == task.metric
