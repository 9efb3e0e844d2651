"""Models of transformers as generation backbones: prompts, losses, answers, adapting, files."""

import subprocess
import sys
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

if find_spec("transformers") is None or find_spec("peft") is None:
    pytest.skip("needs the extra `hf`", allow_module_level=True)

import vlmadapt as va

va.AdapterConfig  # noqa: B018  imports transformers beside any build of torchvision

import transformers as tf  # noqa: E402
from hf_processors import PROCESSORS, pair  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from vlmadapt.data.task_files import Example  # noqa: E402
from vlmadapt.models.adapted_models import adapter_parameters, add_adapters  # noqa: E402
from vlmadapt.models.answer_losses import answer_losses, tokenize_answers  # noqa: E402
from vlmadapt.models.decoding import image_tokens  # noqa: E402
from vlmadapt.models.searches import generate  # noqa: E402

QUESTIONS = ["what colour is it?", "is it red?", "is it light blue, a light green, yes?"]
WORDS = ["red", "blue", "green"]


@lru_cache
def backbone(name):
    core, processor = pair(name)
    return va.hf_backbone(
        core, processor, name=f"hf:{name}", side=None if name != "qwen2-vl" else 32
    )


def photo(n):
    pixels = np.random.default_rng(n).integers(0, 255, (40, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@lru_cache
def problem(name):
    """Questions about the colour of an image."""
    splits = {}
    for number, (split, size) in enumerate((("train", 8), ("val", 4), ("test", 4))):
        images = [photo(100 * number + n) for n in range(size)]
        questions = [QUESTIONS[n % 2] for n in range(size)]
        examples = [Example(n, q, WORDS[n % 2]) for n, q in enumerate(questions)]
        splits[split] = images, examples
    return va.GenerationProblem(splits, "accuracy", backbone(name))


def own_inputs(name, image, question, answer=None):
    """What the model's own processor makes of an image and a question."""
    core, processor = pair(name)
    own = backbone(name)
    side = own.size
    image = image.resize((side, side)) if side else image
    text = own.tokenizer.written(question)
    return core, processor, processor(images=[image], text=[text], return_tensors="pt")


@pytest.mark.parametrize("name", PROCESSORS)
def test_prompts_are_those_of_the_processor(name):
    for question in QUESTIONS:
        _, _, inputs = own_inputs(name, photo(1), question)
        found = backbone(name).tokenizer.prompt(question)
        assert [token - 1 for token in found] == inputs["input_ids"][0].tolist()


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", PROCESSORS)
def test_answers_are_those_of_transformers(name, cache):
    """Prompts of three lengths in one batch, each as if it were alone in `generate`.

    Placeholders of images are suppressed there: a model with random weights may write them.
    """
    own = backbone(name)
    images = [photo(n) for n in range(3)]
    x = torch.stack([own.preprocess(image) for image in images])
    found = generate(own, x, QUESTIONS, max_new_tokens=5, cache=cache)
    for image, question, answer in zip(images, QUESTIONS, found, strict=True):
        core, processor, inputs = own_inputs(name, image, question)
        options = dict(do_sample=False, suppress_tokens=own.model.placeholders)
        out = core.generate(**inputs, max_new_tokens=5, **options)
        new = out[0, inputs["input_ids"].shape[1] :]
        assert answer == processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert len(set(found)) > 1


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_loss_is_that_of_transformers(name):
    own = backbone(name)
    images = [photo(n) for n in range(3)]
    batch = tokenize_answers(own.tokenizer, QUESTIONS, WORDS)
    patches = image_tokens(own.model, torch.stack([own.preprocess(i) for i in images]), own)
    losses = answer_losses(own.model, patches, batch)
    for image, question, row, mask, loss in zip(images, QUESTIONS, *batch, losses, strict=True):
        core, processor, inputs = own_inputs(name, image, question)
        length = int((row > 0).sum())
        ids = row[None, :length] - 1
        given = inputs["input_ids"].shape[1]
        labels = ids.clone()
        labels[:, :given] = -100
        for key in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
            if key in inputs:
                fill = 0 if key == "mm_token_type_ids" else 1
                pad = torch.full((1, length - given), fill)
                inputs[key] = torch.cat([inputs[key], pad], 1)
        inputs["input_ids"] = ids
        inputs.pop("labels", None)
        expected = core(**inputs, labels=labels).loss * int(mask.sum())
        assert abs(loss.item() - expected.item()) < 1e-4


@pytest.mark.parametrize("kind", ["adapter", "p-adapter", "released"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_cache_changes_nothing_behind_adapters(name, kind):
    own = backbone(name)
    ffn = "parallel" if kind == "released" and name != "blip2" else "sequential"
    model = add_adapters(own.model, kind, hidden=8, ffn=ffn)
    for n, parameter in enumerate(adapter_parameters(model).values()):
        if parameter.ndim:
            generator = torch.Generator().manual_seed(n)
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    x = torch.stack([own.preprocess(photo(n)) for n in range(3)])
    options = dict(model=model, max_new_tokens=6)
    for beams in (1, 3):
        found = [generate(own, x, QUESTIONS, num_beams=beams, cache=c, **options) for c in (1, 0)]
        assert found[0] == found[1]
    assert found[0] != generate(own, x, QUESTIONS, num_beams=3, max_new_tokens=6)


LOAD = """
import sys
import numpy as np
from PIL import Image
import vlmadapt as va
images = np.load(sys.argv[1])
for folder in sys.argv[2:]:
    method = va.load_method(folder + "/method.safetensors")
    print(method.predict(list(images), "what colour is it?"))
"""


@pytest.mark.slow
def test_methods_are_tuned_stored_and_loaded_in_a_new_process(tmp_path):
    images = np.stack([np.asarray(photo(n)) for n in range(3)])
    np.save(tmp_path / "images.npy", images)
    expected = []
    for name in PROCESSORS:
        core, processor = pair(name)
        if name == "qwen2-vl":
            processor.image_processor.size = dict(shortest_edge=64, longest_edge=1024)
        core.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        own = va.load_backbone(f"hf:{tmp_path / name}", device="cpu")
        task = problem(name)
        task = va.GenerationProblem(
            {s: (task.images(s), _examples(task, s)) for s in ("train", "val", "test")},
            "accuracy",
            own,
        )
        frozen = {key: x.clone() for key, x in own.model.state_dict().items()}
        method = va.adapt(
            task, method="PAdapter", trials=2, seed=1, fixed=dict(epochs=2, batch_size=4, hidden=4)
        )
        for key, x in own.model.state_dict().items():
            assert torch.equal(x, frozen[key]), key
        assert set(va.evaluate(method, task)) >= {"accuracy"}
        method.save(tmp_path / name / "method.safetensors")
        expected.append(str(method.predict(list(images), "what colour is it?")))
    folders = [str(tmp_path / name) for name in PROCESSORS]
    command = [sys.executable, "-c", LOAD, str(tmp_path / "images.npy"), *folders]
    run = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.splitlines() == expected


def _examples(task, split):
    words = [WORDS[n % 2] for n in range(len(task.prompts[split]))]
    return [
        Example(n, q, w) for n, (q, w) in enumerate(zip(task.prompts[split], words, strict=True))
    ]


@pytest.mark.parametrize(
    "method", ["Frozen", "Adapter", "PAdapter", "ReleasedPAdapter", "LoRA", "IA3"]
)
def test_methods_of_the_comparison(method):
    task = problem("llava")
    size = {"hidden": 8} if "Adapter" in method else {}
    made = va.create_method(method, task, epochs=12, batch_size=4, lr=2e-2, **size)
    batch = next(iter(made.batches(task, seed=1)))
    before = made.loss(batch).item()
    va.fit(made, task, seed=1)
    after = made.loss(batch).item()
    assert after < 0.9 * before if method != "Frozen" else after == before
    answers = made.predict(task.images("val"), "what colour is it?")
    assert len(answers) == 4


def test_candidates_are_ranked():
    own = backbone("qwen2-vl")
    images = [photo(n) for n in range(4)]
    examples = [Example(n, QUESTIONS[0], WORDS[n % 2]) for n in range(4)]
    task = va.GenerationProblem(dict(val=(images, examples)), "accuracy", own, WORDS)
    method = va.create_method("Frozen", task)
    answers = method.predict(images, QUESTIONS[0])
    x = torch.stack([own.preprocess(image) for image in images])
    patches = image_tokens(own.model, x, own)
    losses = [
        answer_losses(
            own.model, patches, tokenize_answers(own.tokenizer, QUESTIONS[:1] * 4, [w] * 4)
        )
        for w in WORDS
    ]
    assert answers == [WORDS[n] for n in torch.stack(losses).argmin(0)]


def test_wide_pictures_are_shown_whole():
    wide = Image.new("RGB", (96, 32), "red")
    examples = [Example(0, QUESTIONS[0], "red")]
    shown = {}
    for resize in ("crop", "pad", "squash"):
        splits = dict(val=([wide], examples))
        task = va.GenerationProblem(splits, "accuracy", backbone("llava"), resize=resize)
        x = next(task.pixels("val").split(1))
        shown[resize] = float((x[0, 0] == x[0, 0].max()).float().mean())
    assert shown["crop"] == shown["squash"] == 1 and shown["pad"] < 0.7


def test_what_does_not_fit_is_refused_in_one_line():
    core, processor = pair("llava")
    with pytest.raises(ValueError, match="give another template"):
        va.hf_backbone(core, processor, template="{prompt}")
    own = backbone("paligemma")
    with pytest.raises(ValueError, match="has a line break, which ends a prompt of PaliGemma"):
        generate(own, own.preprocess(photo(1))[None], ["is it\nred?"])
    long = "is it red? " * 600
    examples = [Example(0, long, "red")]
    with pytest.raises(ValueError, match="tokens long, the context holds 64"):
        splits = dict(val=([photo(1)], examples))
        va.GenerationProblem(splits, "accuracy", backbone("qwen2-vl"))
    with pytest.raises(ValueError, match="takes no prefix here"):
        va.create_method("Prefix", problem("llava"))
    with pytest.raises(ValueError, match="its files are not in the local cache"):
        va.load_backbone("hf:nobody/nothing")


def test_an_answer_has_the_space_of_a_word_behind_another():
    """BLIP-2 adds nothing to a prompt; the tokenizer of OPT writes a space into a word."""
    core, _ = pair("blip2")
    names = ["<pad>", "<s>", "</s>", "<image>", "what", "?", "red", "\u0120red", "<unk>"]
    inner = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own = tf.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    own.add_special_tokens(dict(additional_special_tokens=["<image>"]))
    images = tf.BlipImageProcessor(size=dict(height=16, width=16))
    processor = tf.Blip2Processor(images, own, num_query_tokens=4)
    tokenizer = va.hf_backbone(core, processor, name="hf:blip2").tokenizer
    assert [names[token - 1] for token in tokenizer.encode("red")] == ["\u0120red"]
    assert tokenizer.prompt("what?")[-2:] == [5, 6]


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", PROCESSORS)
def test_placeholders_of_images_are_never_written(name, cache):
    """The placeholder is the most probable token of every step."""
    core, processor = pair(name)
    own = va.hf_backbone(core, processor, name=f"hf:{name}", side=backbone(name).size or None)
    head = core.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)))
    head.bias.data[own.model.image_token] = 1e4
    x = torch.stack([own.preprocess(photo(n)) for n in range(3)])
    for beams in (1, 3):
        options = dict(num_beams=beams, max_new_tokens=5, cache=cache)
        assert generate(own, x, QUESTIONS, **options) == generate(
            backbone(name), x, QUESTIONS, **options
        )


@pytest.mark.parametrize("name", PROCESSORS)
def test_texts_with_a_placeholder_are_refused(name):
    own = backbone(name)
    text = f"is {own.tokenizer.image} red?"
    with pytest.raises(ValueError, match="holds .* which stands for an image in this model"):
        generate(own, own.preprocess(photo(1))[None], [text])
    with pytest.raises(ValueError, match="holds .* which stands for an image in this model"):
        tokenize_answers(own.tokenizer, QUESTIONS[:1], [text])
