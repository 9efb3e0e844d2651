"The public task easy-VQA, where its package is installed or VLMADAPT_EASY_VQA names its folder."

import importlib.util
import os
from pathlib import Path

import pytest

import vlmadapt as va
from vlmadapt.data.tasks import read_task


def easy_vqa_folder():
    "The folder of the package `easy_vqa`, or None."
    named = os.environ.get("VLMADAPT_EASY_VQA")
    if named:
        return Path(named)
    found = importlib.util.find_spec("easy_vqa")
    return None if found is None else Path(found.origin).parent


FOLDER = easy_vqa_folder()
pytestmark = pytest.mark.skipif(
    FOLDER is None,
    reason="the package easy_vqa is not installed, and VLMADAPT_EASY_VQA does not name its folder",
)


@pytest.fixture(scope="module")
def splits():
    return read_task("easy-vqa", FOLDER)


def test_the_official_numbers(splits):
    images = {part: len(images) for part, (images, _) in splits.items()}
    questions = {part: len(examples) for part, (_, examples) in splits.items()}
    assert images["train"] + images["val"] == 4000 and images["test"] == 1000
    assert questions["train"] + questions["val"] == 38575 and questions["test"] == 9673
    yes_or_no = [sum(e.sort == "yes/no" for e in found) for _, found in splits.values()]
    assert yes_or_no[0] + yes_or_no[1] == 28407 and yes_or_no[2] == 7136
    assert not set(splits["train"][0]) & set(splits["val"][0])


@pytest.mark.slow
def test_an_adapter_learns_from_a_small_part():
    problem = va.load_task("easy-vqa", backbone="mini", root=FOLDER, train=1500)
    fixed = {"lr": 0.01, "epochs": 6}
    adapter = va.fit(va.create_method("Adapter", problem, **fixed), problem, seed=1)
    frozen = va.evaluate(va.create_method("Frozen", problem), problem)["accuracy"]
    adapted = va.evaluate(adapter, problem)["accuracy"]
    assert frozen < 50 < 65 < adapted, (frozen, adapted)
