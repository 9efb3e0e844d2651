"Metrics on request: against definitions and scikit-learn, named errors, labels that stay sealed."

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from vlmadapt.methods import METHODS
from vlmadapt.problems.classification import from_features
from vlmadapt.problems.few_shot import few_shot
from vlmadapt.problems.generation import load_task
from vlmadapt.training.evaluation import (
    FURTHER_METRICS,
    evaluate,
    expected_calibration_error,
    top5_accuracy,
)
from vlmadapt.training.loop import fit

NAMES = [f"class {k}" for k in range(9)]


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(9, 16, generator=generator)
    y = torch.arange(8).repeat_interleave(20)  # the last class has no image
    x = text[y] + 2.5 * torch.randn(160, 16, generator=generator)
    return from_features(NAMES, text, test=(x, y), logit_scale=8)


def test_metrics_are_those_of_scikit_learn(problem):
    method = METHODS["ZeroShot"](problem)
    plain = evaluate(method, problem)
    found = evaluate(method, problem, FURTHER_METRICS)
    assert {name: found[name] for name in plain} == plain
    assert set(found) - set(plain) == set(FURTHER_METRICS)
    truth = problem.labels["test"]._labels
    predicted = found["predictions"]
    scores = method.scores(problem.features.test)
    top = reference.top_k_accuracy_score(truth, scores, k=5, labels=range(9))
    assert found["top5_accuracy"] == pytest.approx(100 * top)
    assert plain["accuracy"] < found["top5_accuracy"] < 100
    seen = np.array(
        [100 * v for v in reference.recall_score(truth, predicted, average=None, labels=range(8))]
    )
    assert found["balanced_accuracy"] == pytest.approx(seen.mean())
    matrix = found["confusion_matrix"]
    assert list(matrix.index) == list(matrix.columns) == NAMES
    assert (matrix.index.name, matrix.columns.name) == ("class", "predicted")
    expected = reference.confusion_matrix(truth, predicted, labels=range(9))
    assert (matrix.to_numpy() == expected).all()
    assert matrix.loc["class 8"].sum() == 0 and matrix.to_numpy().sum() == 160


def calibration_by_definition(scores, truth):
    "Guo et al., equation 3, bin by bin."
    probability = scores.double().softmax(1)
    confidence, predicted = probability.max(1)
    right = (predicted == truth).double()
    total = 0.0
    for m in range(1, 16):
        inside = (confidence > (m - 1) / 15) & (confidence <= m / 15)
        if inside.any():
            total += inside.sum() * abs(right[inside].mean() - confidence[inside].mean())
    return 100 * float(total / len(truth))


def test_calibration_error_is_its_definition(problem):
    truth = problem.labels["test"]._labels
    scores = METHODS["ZeroShot"](problem).scores(problem.features.test)
    for scale in (0.1, 1, 20):
        found = expected_calibration_error(scale * scores, truth, NAMES)
        assert found == pytest.approx(calibration_by_definition(scale * scores, truth))
    sharp = torch.nn.functional.one_hot(truth, 9) * 1000.0
    assert expected_calibration_error(sharp, truth, NAMES) == 0
    assert expected_calibration_error(sharp, (truth + 1) % 9, NAMES) == 100  # sure and wrong
    uniform = torch.zeros(90, 9)
    labels = torch.arange(9).repeat(10)
    assert expected_calibration_error(uniform, labels, NAMES) == pytest.approx(0)


def test_fewer_than_five_classes():
    assert top5_accuracy(torch.rand(4, 3), torch.tensor([0, 1, 2, 0]), NAMES[:3]) == 100


def test_unknown_metrics_are_named_before_anything_is_read(problem):
    class Unread:
        def __len__(self):
            raise AssertionError("test labels were read")

        __iter__ = __getitem__ = __array__ = __len__

    sealed = from_features(NAMES, problem.features.text, test=(problem.features.test, [0] * 160))
    method = METHODS["ZeroShot"](sealed)
    sealed.labels["test"] = Unread()
    for wrong, hint in (("top_accuracy", "top5_accuracy"), (["accuracy", "macro-f1"], "macro_f1")):
        with pytest.raises(ValueError, match=f"unknown metric .*; did you mean '{hint}'") as caught:
            evaluate(method, sealed, wrong)
        assert "\n" not in str(caught.value)
    assert set(evaluate(METHODS["ZeroShot"](problem), problem, "accuracy")) == set(
        evaluate(METHODS["ZeroShot"](problem), problem)
    )


def test_generation_has_its_own_metrics():
    task = load_task("mini-vqa", train=8)
    method = METHODS["ZeroShot"].__new__(METHODS["ZeroShot"])  # not reached
    with pytest.raises(ValueError, match="are for classification; .* is scored by vqa_accuracy"):
        evaluate(method, task, "top5_accuracy")


ZERO_SHOT_ON_NEW = (
    *("LinearProbe", "GDA", "TipAdapter", "TipAdapterF", "TaskRes", "AnchoredProbe", "ZSLP"),
    *("CLAP", "LPPlusPlus", "SSText", "CrossModal", "APE", "APET", "TIMO", "TIMOS", "ProKeR"),
)


@pytest.mark.parametrize("name", [*ZERO_SHOT_ON_NEW, "CLIPAdapter", "ProLIP"])
def test_methods_on_features_score_new_classes_by_their_text(name):
    base, new = (few_shot("mini-digits", shots=2, views=2, part=part) for part in ("base", "new"))
    cls = METHODS[name]
    method = fit(cls(base, **({"epochs": 1} if "epochs" in cls.recipe else {})), base)
    scores = method.outputs(new, "test")
    assert scores.shape == (len(new.features.test), new.K) and scores.isfinite().all()
    if name in ZERO_SHOT_ON_NEW:
        zero_shot = METHODS["ZeroShot"](new).outputs(new, "test")
        ratio = (scores / zero_shot).flatten()
        assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-4)
    every = few_shot("mini-digits", shots=2, views=2)
    mixed = method.outputs(every, "test")
    assert mixed.shape[1] == every.K and mixed.isfinite().all()
