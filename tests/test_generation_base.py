"The base class of generation methods: one precision for all paths, and files."

import numpy as np
import pytest
import torch

from vlmadapt.core.records import RecordError
from vlmadapt.core.tensors import load_arrays, save_arrays
from vlmadapt.methods.generation import Frozen, GenerationFullFineTuning, LoRA
from vlmadapt.methods.generation_base import GenerationMethod
from vlmadapt.models.adapted_models import thin_copy
from vlmadapt.models.backbones import load_backbone
from vlmadapt.problems.generation import load_task

TASKS = ("mini-vqa", "mini-entailment")


@pytest.fixture(scope="module", params=TASKS)
def problem(request):
    backbone = load_backbone("mini", device="cpu", precision="bf16")
    found = load_task(request.param, backbone, train=8)
    found._images["val"] = found._images["val"][:4]
    for part in (found.prompts, found.labels):
        part["val"] = part["val"][:4]
    return found


@pytest.mark.parametrize("cls", [LoRA, GenerationFullFineTuning])
def test_every_path_reads_the_image_tokens_of_the_backbones_precision(problem, cls, monkeypatch):
    method = cls(problem, batch_size=4)
    seen = []

    def recorded(encode):
        def call(x):
            seen.append(torch.is_autocast_enabled("cpu"))
            return encode(x)

        return call

    for model in (problem.backbone.model, method.model):
        monkeypatch.setattr(model, "_encode_image", recorded(model._encode_image))
    method.loss(next(iter(method.batches(problem, seed=1))))
    method.outputs(problem, "val")
    prompts = problem.prompts["val"]
    assert method.predict(problem.images("val"), prompts) == method.outputs(problem, "val")
    problem.encode(next(problem.pixels("val").split(4)))
    assert len(seen) >= 4 and all(seen)


PHOTO = np.zeros((32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def answering():
    return Frozen(load_task("mini-vqa", train=8))


@pytest.mark.parametrize(
    "images, texts, search, message",
    [
        ([PHOTO] * 3, ["what?"] * 2, {}, "3 images but 2 texts: give one text for all images"),
        (PHOTO, ["what?"] * 2, {}, "1 image but 2 texts: give one text for all images"),
        ([PHOTO], [], {}, "1 image but 0 texts: give one text for all images"),
        ([], [], {}, "got an empty list"),
        ([PHOTO], None, {}, "texts must be the question or prompt"),
        ([PHOTO], [None], {}, "text 0 must be a string, got None"),
        ([PHOTO], {"q": "what?"}, {}, "a list of texts is needed, got dict"),
        ([None], "what?", {}, "got None .* as item 0 of a list"),
        ([[PHOTO]], "what?", {}, "as item 0 of a list"),
        (torch.eye(2, 512), "what?", {}, "Frozen reads images, not features"),
        ([PHOTO], "very " * 60, {}, "is 61 tokens long, the decoder reads 32"),
        ([PHOTO], "what?", dict(batch_size=0), "batch_size: input should be greater"),
        ([PHOTO], "what?", dict(num_beam=3), "argument of the search 'num_beam'; did you mean"),
        ([PHOTO], "what?", dict(rows=[0]), "unknown argument of the search 'rows'"),
        ([PHOTO], "what?", dict(prompts="who?"), "unknown argument of the search 'prompts'"),
        ([PHOTO], "what?", dict(max_new_tokens=0), "max_new_tokens: input should be greater"),
        ([PHOTO], "what?", dict(min_new_tokens=30), "min_new_tokens=30 is larger than max_new"),
    ],
)
def test_wrong_questions_are_refused_in_one_line(answering, images, texts, search, message):
    with pytest.raises(ValueError, match=message) as error:
        answering.predict(images, texts, **search)
    assert "\n" not in str(error.value)


def test_outputs_take_arguments_of_the_search_alone(answering):
    problem = load_task("mini-vqa", train=8)
    with pytest.raises(ValueError, match="unknown argument of the search 'rows'"):
        answering.outputs(problem, "val", rows=[0])


def test_notes_may_be_numbers_of_numpy(problem, tmp_path):
    method = LoRA(problem)
    method.save(tmp_path / "lora.safetensors", accuracy=np.float32(93.25))
    _, card = load_arrays(tmp_path / "lora.safetensors")
    assert card["notes"] == {"accuracy": 93.25}


@pytest.mark.parametrize("name", [["LoRA"], {"a": 1}, 5, None])
def test_a_card_whose_method_is_no_text_is_refused(problem, tmp_path, name):
    path = tmp_path / "lora.safetensors"
    LoRA(problem).save(path)
    tensors, card = load_arrays(path)
    save_arrays(path, tensors, {**card, "method": name})
    with pytest.raises(RecordError, match="card: method"):
        LoRA.load(path, problem.backbone)


class Faulty(GenerationMethod):
    "Fails where it is told to."

    fails = False

    def adapt(self, model, seed):
        if self.fails:
            return 1 / 0
        adapted = thin_copy(model)
        adapted.text_decoder.ln_final.requires_grad_(True)
        return adapted


def test_an_error_of_a_subclass_is_not_taken_for_a_damaged_file(problem, tmp_path, monkeypatch):
    path = tmp_path / "faulty.safetensors"
    Faulty(problem).save(path)
    assert load_arrays(path)[1]["method"] == "Faulty"
    monkeypatch.setattr(Faulty, "fails", True)
    with pytest.raises(ZeroDivisionError):
        Faulty.load(path, problem.backbone)


def test_wrong_hyper_parameters_of_a_card_name_their_cause(problem, tmp_path):
    path = tmp_path / "lora.safetensors"
    LoRA(problem).save(path)
    tensors, card = load_arrays(path)
    hyper_parameters = {**card["hyper_parameters"], "rank": -1}
    save_arrays(path, tensors, {**card, "hyper_parameters": hyper_parameters})
    with pytest.raises(RecordError, match="rank") as caught:
        LoRA.load(path, problem.backbone)
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_class_without_adapt_says_what_to_define(problem):
    class Empty(GenerationMethod):
        pass

    with pytest.raises(NotImplementedError, match="Empty adapts nothing: define adapt"):
        Empty(problem)
