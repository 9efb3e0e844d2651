"Real CLIP features of ImageNet, 1000 classes and 4 shots, if the shared folder holds them."

import json

import pytest
from conftest import shared_data
from safetensors.torch import load_file

from vlmadapt.methods import METHODS
from vlmadapt.problems.classification import FewShotProblem
from vlmadapt.training.evaluation import evaluate
from vlmadapt.training.loop import fit
from vlmadapt.training.tuning import tune

PAIRED_ERROR = 0.8  # points, standard error of the difference of two methods on these 2000 images


@pytest.fixture(scope="module")
def problem():
    folder = shared_data("data/clip_vitb32_imagenet")
    x = load_file(folder / "features.safetensors")
    names = json.loads((folder / "classnames.json").read_text())

    def pair(s):
        return (x[f"{s}_x"], x[f"{s}_y"])

    return FewShotProblem.from_features(
        names, x["text"], train=pair("train"), val=pair("val"), test=pair("test")
    )


def accuracy(problem, name, **hyper_parameters):
    return evaluate(fit(METHODS[name](problem, **hyper_parameters), problem), problem)["accuracy"]


def test_zero_shot_is_the_published_figure(problem):
    assert accuracy(problem, "ZeroShot") == pytest.approx(61.10, abs=1e-9)


@pytest.mark.parametrize(
    "name, fixed, reference",
    [("GDA", {}, 65.4), ("GDA", {"zero_shot": False}, 53.9), ("TipAdapter", {}, 63.6)],
)
def test_closed_forms_agree_with_an_independent_implementation(problem, name, fixed, reference):
    assert (
        abs(accuracy(problem, name, **tune(METHODS[name], problem, fixed=fixed)) - reference)
        <= 2 * PAIRED_ERROR
    )


@pytest.mark.slow
def test_hegraph_gains_three_points(problem):
    assert accuracy(problem, "HeGraphAdapter", variant="T-P") >= accuracy(problem, "ZeroShot") + 3


def test_negatives_are_asked_for_by_name(problem):
    with pytest.raises(ValueError, match="no 'text_neg' features"):
        METHODS["HeGraphAdapter"](problem, variant="T")
