"""InstructBLIP and language models with an encoder as backbones: exact beside transformers."""

import json
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from PIL import Image
from warm_process import warm_python

if find_spec("transformers") is None or find_spec("peft") is None:
    pytest.skip("needs the extra `hf`", allow_module_level=True)

import vlmadapt as va

va.AdapterConfig  # noqa: B018  imports transformers beside any build of torchvision

import transformers as tf  # noqa: E402
from hf_families import OPT, QFORMER, VISION  # noqa: E402
from hf_processors import PROMPT_READERS, pair  # noqa: E402

from vlmadapt.data.task_files import Example  # noqa: E402
from vlmadapt.models.adapted_models import adapter_parameters, add_adapters  # noqa: E402
from vlmadapt.models.adapters import adapter_layers, settings_of  # noqa: E402
from vlmadapt.models.answer_losses import (  # noqa: E402
    CandidateAnswers,
    answer_likelihood,
    answer_losses,
    tokenize_answers,
)
from vlmadapt.models.decoding import image_tokens  # noqa: E402
from vlmadapt.models.searches import generate  # noqa: E402
from vlmadapt.models.tokens import pad_rows  # noqa: E402

QUESTIONS = ["what colour is it?", "is it red?", "is it light blue, a light green, yes?"]
ANSWERS = ["red", "light blue", "green"]


@lru_cache
def backbone(name, double=False):
    core, processor = pair(name)
    return va.hf_backbone(core.double() if double else core, processor, name=f"hf:{name}")


def photo(n):
    pixels = np.random.default_rng(n).integers(0, 255, (40, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixels_of(own, count=3):
    x = torch.stack([own.preprocess(photo(n)) for n in range(count)])
    return x.to(own.model.core.dtype)


@lru_cache
def problem(name, candidates=()):
    """Questions about images, with answers that depend on the question."""
    splits = {}
    for number, (split, size) in enumerate((("train", 8), ("val", 4), ("test", 4))):
        images = [photo(100 * number + n) for n in range(size)]
        examples = [Example(n, QUESTIONS[n % 2], ANSWERS[n % 2]) for n in range(size)]
        splits[split] = images, examples
    return va.GenerationProblem(splits, "accuracy", backbone(name), candidates)


def reference(name, question, n, answer=None):
    """Return what transformers' own model makes of one image and question, in float64."""
    own = backbone(name, double=True)
    core = own.model.core
    processor = PROMPT_READERS[name]()
    inputs = processor(images=[photo(n)], text=[question], return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    if answer is None:
        options = dict(do_sample=False, max_new_tokens=5, suppress_tokens=own.model.placeholders)
        out = core.generate(**inputs, **options)[0]
        start = 1 if name.endswith("t5") else inputs["input_ids"].shape[1]
        return processor.tokenizer.decode(out[start:], skip_special_tokens=True).strip()
    labels = torch.tensor([[*processor.tokenizer.encode(answer, add_special_tokens=False), 2]])
    if name.endswith("t5"):
        logits = core(**inputs, labels=labels).logits
    else:
        inputs["input_ids"] = torch.cat([inputs["input_ids"], labels], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        logits = core(**inputs).logits[:, -labels.shape[1] - 1 : -1]
    return F.cross_entropy(logits[0], labels[0], reduction="sum")


def moved(model, std=0.3):
    for n, parameter in enumerate(adapter_parameters(model).values()):
        if parameter.ndim:
            generator = torch.Generator().manual_seed(n)
            parameter.data = std * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", PROMPT_READERS)
def test_losses_are_those_of_transformers(name):
    """Prompts of three lengths in one batch, each as if it were alone, in double precision."""
    own = backbone(name, double=True)
    batch = tokenize_answers(own.tokenizer, QUESTIONS, ANSWERS)
    patches = image_tokens(own.model, pixels_of(own), own)
    losses = answer_losses(own.model, patches, batch)
    prompts = pad_rows([own.tokenizer.prompt(question) for question in QUESTIONS])
    answers = pad_rows([[*own.tokenizer.encode(answer), 3] for answer in ANSWERS])
    likelihood = answer_likelihood(own.model, patches, prompts, answers)
    for n, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
        expected = reference(name, question, n, answer)
        assert abs(losses[n] - expected) < 1e-10
        assert abs(likelihood[n] + expected) < 1e-5  # in single precision


@pytest.mark.parametrize("name", PROMPT_READERS)
def test_candidates_are_ranked_and_prompts_read_once(name):
    own = backbone(name, double=True)
    read = []
    core = own.model.core
    reader = core.get_encoder() if name.endswith("t5") else core.qformer
    hook = reader.register_forward_hook(lambda module, inputs, out: read.append(len(out[0])))
    candidates = CandidateAnswers(own.tokenizer, ANSWERS)
    prompts = [own.tokenizer.prompt(question) for question in QUESTIONS]
    patches = image_tokens(own.model, pixels_of(own), own)
    rows = [2, 0, 0]
    found = candidates.losses(own.model, patches, prompts, rows)
    hook.remove()
    assert read == [len(prompts)]
    for n, (question, row) in enumerate(zip(QUESTIONS, rows, strict=True)):
        for k, answer in enumerate(ANSWERS):
            assert abs(found[n, k] - reference(name, question, row, answer)) < 1e-10


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", PROMPT_READERS)
def test_answers_are_those_of_transformers(name, cache):
    """Greedy answers, several about one image: each as if it were alone in `generate`."""
    own = backbone(name, double=True)
    rows = [0, 1, 1]
    options = dict(rows=rows, max_new_tokens=5, cache=cache)
    found = generate(own, pixels_of(own), QUESTIONS, **options)
    expected = [reference(name, q, n) for q, n in zip(QUESTIONS, rows, strict=True)]
    assert found == expected and len(set(found)) > 1


@pytest.mark.parametrize("kind", ["adapter", "p-adapter", "released", "gcn"])
@pytest.mark.parametrize("name", PROMPT_READERS)
def test_a_cache_changes_nothing_behind_adapters(name, kind):
    own = backbone(name)
    ffn = "parallel" if kind == "released" and "opt" not in name else "sequential"
    x = pixels_of(own)
    batch = tokenize_answers(own.tokenizer, QUESTIONS, ANSWERS)
    skip = dict(skip="attention") if "skip" in settings_of(kind) else {}
    model = add_adapters(own.model, kind, hidden=8, ffn=ffn, **skip)
    losses = [answer_losses(m, image_tokens(m, x, own), batch) for m in (own.model, model)]
    assert torch.equal(losses[0], losses[1].detach())
    moved(model)
    options = dict(model=model, max_new_tokens=6)
    for beams in (1, 3):
        found = [generate(own, x, QUESTIONS, num_beams=beams, cache=c, **options) for c in (1, 0)]
        assert found[0] == found[1]
        alone = [generate(own, x[[n]], QUESTIONS[n], num_beams=beams, **options) for n in range(3)]
        assert found[0] == [text for texts in alone for text in texts]
    assert found[0] != generate(own, x, QUESTIONS, num_beams=3, max_new_tokens=6)


PLACES = {"blip2-t5": "self cross ffn", "instructblip-t5": "self cross ffn"}


@pytest.mark.parametrize("name", PROMPT_READERS)
def test_adapters_go_into_the_decoder(name):
    model = add_adapters(backbone(name).model, "adapter", hidden=4)
    names = list(adapter_parameters(model))
    assert names and all("language_model" in parameter for parameter in names)
    assert not any(".encoder." in parameter or "qformer" in parameter for parameter in names)
    kinds = {adapter.site.kind for _, adapter in adapter_layers(model)}
    assert kinds == set(PLACES.get(name, "self ffn").split())


def test_get_model_leaves_an_encoder_as_it_is():
    """The language model of a BLIP-2 with T5 is an encoder and a decoder."""
    model = va.get_model(pair("blip2-t5")[0], va.AdapterConfig(hidden=4))
    names = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert names and all(".language_model.decoder." in key for key in names)


METHODS = ["Adapter", "PAdapter", "LoRA", "IA3", "FullFineTuning"]


@pytest.mark.parametrize("method", [*METHODS, "ReleasedPAdapter"])
@pytest.mark.parametrize("name", ["blip2-t5", "instructblip-opt", "instructblip-t5"])
def test_the_loss_falls_and_the_backbone_stays(name, method, tmp_path):
    task = problem(name)
    model = backbone(name).model
    before = {key: x.clone() for key, x in model.state_dict().items()}
    given = dict(hidden=8) if "Adapter" in method else {}
    if method == "PAdapter":
        given["skip"] = "attention"
    if method == "ReleasedPAdapter" and "opt" in name:
        given["ffn"] = "sequential"
    made = va.create_method(method, task, epochs=12, batch_size=4, lr=2e-2, **given)
    batch = next(iter(made.batches(task, seed=1)))
    first = made.loss(batch).item()
    if method != "ReleasedPAdapter":  # its initial up-projection is not zero
        frozen = va.create_method("Frozen", task, batch_size=4)
        tokens = next(iter(frozen.batches(task, seed=1)))
        assert first == pytest.approx(frozen.loss(tokens).item(), rel=1e-6)
    va.fit(made, task, seed=1)
    assert made.loss(batch).item() < 0.9 * first
    answers = made.predict(task.images("val"), task.prompts["val"])
    made.save(tmp_path / "method.safetensors")
    again = va.load_method(tmp_path / "method.safetensors", backbone=backbone(name))
    assert again.predict(task.images("val"), task.prompts["val"]) == answers
    for key, x in model.state_dict().items():
        assert torch.equal(x, before[key]), key


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PROMPT_READERS)
def test_half_precision(name, precision):
    core, processor = pair(name)
    own = va.hf_backbone(core.to(precision), processor, name=f"hf:{name}")
    x = torch.stack([own.preprocess(photo(n)) for n in range(3)])
    batch = tokenize_answers(own.tokenizer, QUESTIONS, ANSWERS)
    losses, exact = (
        answer_losses(b.model, image_tokens(b.model, x, b), batch) for b in (own, backbone(name))
    )
    assert torch.allclose(losses, exact, rtol=0.1)
    assert len(generate(own, x, QUESTIONS, max_new_tokens=3)) == 3


LOAD = """
import json, sys
import vlmadapt as va
for folder in sys.argv[1:]:
    method = va.load_method(folder + "/method.safetensors")
    image = folder + "/data/0.png"
    print(json.dumps(method.predict([image, image], ["what colour is it?", "is it red?"])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blip2-t5", "instructblip-llama", "instructblip-t5"])
def test_a_task_by_name_in_files_and_in_another_process(name, tmp_path):
    """The verbs one after the other, with candidates and with open answers."""
    core, processor = pair(name)
    core.save_pretrained(tmp_path / name)
    processor.save_pretrained(tmp_path / name)
    data = tmp_path / name / "data"
    data.mkdir()
    entries = []
    for n in range(12):
        photo(n).save(data / f"{n}.png")
        split = "train" if n < 8 else "val" if n < 10 else "test"
        for question, answer in zip(QUESTIONS[:2], ANSWERS[:2], strict=True):
            entry = dict(image=f"{n}.png", question=question, answer=answer, split=split)
            entries.append(entry)
    (data / "own.json").write_text(json.dumps(entries))
    for candidates in (None, ANSWERS[:2]):
        place = f"hf:{tmp_path / name}"
        task = va.load_task(data / "own.json", backbone=place, candidates=candidates)
        before = va.evaluate(va.create_method("Frozen", task), task)["accuracy"]
        fixed = dict(epochs=8, batch_size=4, hidden=8)
        method = va.adapt(task, "PAdapter", trials=2, space=dict(lr=[1e-4, 0.1]), fixed=fixed)
        assert va.evaluate(method, task)["accuracy"] >= before
        method.save(tmp_path / name / "method.safetensors")
        image = data / "0.png"
        expected = method.predict([image, image], QUESTIONS[:2])
        assert not candidates or set(expected) <= set(candidates)
        done = warm_python().run(LOAD, tmp_path / name)
        assert not done.returncode, done.stderr
        assert json.loads(done.stdout) == expected


def test_a_decoder_without_biases_has_no_bitfit():
    message = refused(lambda: va.create_method("BitFit", problem("blip2-t5")))
    assert message.startswith("BitFit trains biases, and the decoder of hf:blip2-t5 has none")


def test_other_encoders_are_refused_before_weights_are_read(tmp_path):
    text = dict(OPT, model_type="opt")
    parts = dict(text_config=text, vision_config=VISION, qformer_config=QFORMER)
    configs = [tf.InstructBlipVideoConfig(**parts), tf.Florence2Config()]
    for config in configs:
        config.save_pretrained(tmp_path)
        message = refused(lambda: va.load_backbone(f"hf:{tmp_path}", device="cpu"))
        assert "generate text about images" in message or "way of its own" in message


def test_a_prompt_too_long_for_the_q_former_is_refused():
    core, processor = pair("instructblip-llama")
    core.config.qformer_config.max_position_embeddings = 8
    own = va.hf_backbone(core, processor, name="hf:short")
    with pytest.raises(ValueError, match="has 13 tokens, but the Q-Former of .* reads 8; shorten"):
        generate(own, pixels_of(own), QUESTIONS)
