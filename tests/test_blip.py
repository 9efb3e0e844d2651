"BLIP: adapters, decoding, ranking, training and files, on a tiny model with random weights."

import copy
import shutil
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file

if find_spec("transformers") is None or find_spec("peft") is None:
    pytest.skip("needs the extra `blip`", allow_module_level=True)

from vlmadapt.core.hashing import content_key  # noqa: E402
from vlmadapt.core.seeding import stream  # noqa: E402
from vlmadapt.core.tensors import load_arrays  # noqa: E402
from vlmadapt.methods.generation import GENERATION_METHODS  # noqa: E402
from vlmadapt.mini.blip import load_tiny_blip, tiny_blip  # noqa: E402
from vlmadapt.models.adapted_models import (  # noqa: E402
    adapter_parameters,
    add_adapters,
    load_adapters,
    save_adapters,
)
from vlmadapt.models.adapters import ADAPTERS  # noqa: E402
from vlmadapt.models.answer_losses import (  # noqa: E402
    TokenizedBatch,
    answer_losses,
    rank_answers,
    tokenize_answers,
)
from vlmadapt.models.backbones import load_backbone  # noqa: E402
from vlmadapt.models.blip import load_blip  # noqa: E402
from vlmadapt.models.blip_adapters import capture_outputs  # noqa: E402
from vlmadapt.models.blip_model import Blip, import_blip  # noqa: E402
from vlmadapt.models.blocks import split_heads  # noqa: E402
from vlmadapt.models.decoding import stepper
from vlmadapt.models.lora_prefix import add_lora, add_prefix  # noqa: E402
from vlmadapt.models.p_laplacian import plap_message_passing  # noqa: E402
from vlmadapt.models.searches import beam_search, generate, greedy_search
from vlmadapt.models.tokens import PAD  # noqa: E402
from vlmadapt.problems.generation import answers_of, load_task  # noqa: E402
from vlmadapt.training.evaluation import evaluate  # noqa: E402
from vlmadapt.training.loop import fit  # noqa: E402

BACKBONE = load_tiny_blip(device="cpu", precision="fp32")
BLIP = BACKBONE.model
END = BACKBONE.tokenizer.end
IMAGES = torch.randn(2, 3, 32, 32, generator=stream(1, "photo"))
TOKENS = BACKBONE.tokenizer(["a photo of a red circle", "a tiny blue star above a ring"], 12)
QUESTIONS = ["what is it?", "what colour is the circle?"]


def moved(model):
    "A model whose trainable weights are random."
    for i, (name, p) in enumerate(adapter_parameters(model).items()):
        if p.ndim:
            p.data.add_(0.3 * torch.randn(p.shape, generator=stream(i, name)))
    return model


def adapted(name):
    makers = {
        "frozen": lambda: BLIP,
        "LoRA": lambda: add_lora(BLIP),
        "LoRA, query and value": lambda: add_lora(BLIP, parts=("query", "value")),
        "prefix": lambda: add_prefix(BLIP, length=5),
        "zero nodes": lambda: add_adapters(BLIP, nodes="zero", skip="attention"),
        "noise nodes": lambda: add_adapters(BLIP, nodes="noise", skip="attention"),
    }
    make = makers.get(name, lambda: add_adapters(BLIP, name, hidden=8))
    return moved(make()) if name != "frozen" else BLIP


KINDS = [
    "frozen",
    *ADAPTERS,
    "LoRA",
    "LoRA, query and value",
    "prefix",
    "zero nodes",
    "noise nodes",
]


@torch.no_grad()
def logits(model):
    return model(IMAGES, TOKENS)["logits"]


def by_hand(attention, h, source, mask):
    "The p-adapter at full width: a graph of all queries and values for each head."
    own, output = attention.self, attention.output
    q = split_heads(own.query(h), 4)
    k, v = split_heads(own.key(source), 4), split_heads(own.value(source), 4)
    M = (q @ k.mT / 12**0.5 + mask).softmax(-1)
    total = output.dense.bias
    for i, w in enumerate(output.dense.weight.T.split(12)):
        m = M[:, i]
        N1, N2 = m.shape[1:]
        above = torch.cat([m.new_zeros(2, N1, N1), m], 2)
        below = torch.cat([m.mT, m.new_zeros(2, N2, N2)], 2)
        nodes = torch.cat([q[:, i], v[:, i]], 1) @ w
        A = torch.cat([above, below], 1)
        total = total + plap_message_passing(A, nodes, 1.4, 0.3, degree="none")[:, :N1]
    return output.LayerNorm(total + attention.adapter.branch(total) + h)


def test_adapters_are_the_formula_at_full_width():
    settings = dict(where=("self", "cross"), p=1.4, mu=0.3, learn="fixed", up_std=0.3)
    model = add_adapters(copy.deepcopy(BLIP).double(), **settings)
    layer = model.text_decoder.bert.encoder.layer[0]
    patches = model._encode_image(IMAGES.double())[1].detach()
    h = torch.randn(2, 7, 48, generator=stream(1, "h")).double()
    causal = torch.full((7, 7), -torch.inf, dtype=h.dtype).triu(1)
    found = layer.attention(h, attention_mask=causal)[0]
    assert (found - by_hand(layer.attention, h, h, causal)).abs().max() < 1e-10
    assert (found - by_hand(layer.attention, h, h, 0.0)).abs().max() > 0.01
    found = layer.crossattention(h, encoder_hidden_states=patches)[0]
    assert (found - by_hand(layer.crossattention, h, patches, 0.0)).abs().max() < 1e-10


def test_a_prefix_is_keys_and_values_before_those_of_the_words():
    model = adapted("prefix")
    attention = model.text_decoder.bert.encoder.layer[0].attention.self
    states = model.text_decoder.bert.embeddings(TOKENS)
    cached = model.past(2).self_attention_cache.layers[0]
    k = torch.cat([cached.keys, split_heads(attention.key(states), 4)], 2)
    v = torch.cat([cached.values, split_heads(attention.value(states), 4)], 2)
    mask = torch.full((12, 17), -torch.inf).triu(6)
    q = split_heads(attention.query(states), 4)
    expected = ((q @ k.mT / 12**0.5 + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)
    with torch.no_grad(), capture_outputs(attention) as outputs:
        model.states(model._encode_image(IMAGES)[1], TOKENS)
    assert (outputs[attention][0] - expected).abs().max() < 1e-5
    assert (expected - attention(states)[0]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["frozen", "p-adapter"])
def test_losses_do_not_depend_on_other_rows(name):
    model = adapted(name)
    prompts = ["what is it?", "how many red circles are in the picture?"]
    batch = tokenize_answers(BACKBONE.tokenizer, prompts, ["a red circle", "2"])
    patches = model._encode_image(IMAGES)[1]
    together = answer_losses(model, patches, batch)
    for i, n in enumerate((batch.tokens > 0).sum(1)):
        alone = TokenizedBatch(batch.tokens[i : i + 1, :n], batch.answer_mask[i : i + 1, : n - 1])
        loss = answer_losses(model, patches[i : i + 1], alone)
        assert (together[i] - loss).abs().max() < 1e-4


@pytest.mark.parametrize("name", KINDS)
def test_searches_with_and_without_cache_agree(name):
    model = adapted(name)
    found = []
    for cache in (True, False):
        step = stepper(model, IMAGES, cache)
        found.append(beam_search(step, TOKENS[:, :4], num_beams=3, max_new_tokens=8, end=END))
    assert torch.equal(found[0][0], found[1][0])
    assert (found[0][1] - found[1][1]).abs().max() < 1e-3
    prompts = ["what colour is it?", "a photo of a"]
    texts = [
        generate(BACKBONE, IMAGES, prompts, model, max_new_tokens=8, cache=cache)
        for cache in (True, False)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["frozen", "adapter", "p-adapter", "LoRA"])
def test_greedy_search_is_that_of_transformers(name):
    model = adapted(name)
    prompt = TOKENS[:, :4]
    ours = greedy_search(stepper(model, IMAGES), prompt, 8, END)
    given = torch.cat([prompt, torch.full((2, 1), END)], 1)  # `generate` drops the last token
    theirs = model.core.generate(
        pixel_values=IMAGES, input_ids=given, max_new_tokens=8, do_sample=False
    )
    length = min(ours.shape[1], theirs.shape[1])
    assert torch.equal(ours[:, :length], theirs[:, :length])


@pytest.mark.parametrize("name", ["frozen", "p-adapter"])
def test_ranks_are_by_minus_the_loss(name):
    model = adapted(name)
    answers = ["red", "blue", "a red circle"]
    prompts = BACKBONE.tokenizer(QUESTIONS, 10)
    prompts = prompts.masked_fill(prompts == END, PAD)
    candidates = BACKBONE.tokenizer(answers, 6)[:, 1:]
    scores = rank_answers(model, IMAGES, prompts, candidates)
    with torch.no_grad():
        patches = model._encode_image(IMAGES)[1]
        for n, answer in enumerate(answers):
            batch = tokenize_answers(BACKBONE.tokenizer, QUESTIONS, [answer] * 2)
            losses = answer_losses(model, patches, batch)
            assert (scores[:, n] + losses).abs().max() < 1e-3
    few = rank_answers(model, IMAGES, prompts, candidates, k=1)
    assert (few > -torch.inf).sum(1).tolist() == [1, 1]


# Training

RATES = {"BitFit": 1e-2, "Prefix": 3e-2, "LoRA": 1e-2, "FullFineTuning": 1e-3}


@pytest.fixture(scope="module")
def problem():
    return load_task("mini-vqa", backbone=BACKBONE, train=64)


@pytest.mark.parametrize("name", [name for name in GENERATION_METHODS if name != "Frozen"])
def test_methods_learn_and_are_saved(problem, tmp_path, name):
    "The loss falls, the frozen weights stay, the stored method is the fitted one."
    key = content_key(weights=BLIP.state_dict())
    method = GENERATION_METHODS[name](problem, lr=RATES.get(name, 1e-2), epochs=3, batch_size=16)
    method = fit(method, problem, seed=1, progress=False)
    losses = [entry["loss"] for entry in method.log]
    assert losses[-1] < 0.97 * losses[0]
    file = tmp_path / "method.safetensors"
    method.save(file)
    again = GENERATION_METHODS[name].load(file, backbone=BACKBONE)
    assert len(load_arrays(file)[0]) == len(adapter_parameters(method.model))
    assert torch.equal(logits(again.model), logits(method.model))
    texts = [generate(BACKBONE, IMAGES, "what is it?", m.model) for m in (method, again)]
    assert texts[0] == texts[1]
    with pytest.raises(ValueError, match="with other weights than mini"):
        GENERATION_METHODS[name].load(file, backbone="mini")
    assert content_key(weights=BLIP.state_dict()) == key
    assert not any(p.requires_grad or p.grad is not None for p in BLIP.parameters())


def test_evaluation_and_gradients(problem):
    method = GENERATION_METHODS["PAdapter"](problem, lr=1e-2, epochs=1, batch_size=16)
    fit(method, problem, seed=1, progress=False)
    assert evaluate(method, problem)["n"] == len(problem.labels["test"])
    method.loss(next(iter(method.batches(problem, 1)))).backward()
    for p in method.parameters():
        assert (p.grad is not None) == p.requires_grad
    entailment = load_task("mini-entailment", backbone=BACKBONE)
    for content in (entailment.labels, entailment.prompts, entailment._images):
        content["val"] = content["val"][:6]
    assert set(answers_of(BLIP, entailment)) <= set(entailment.candidates)


# Files


def test_adapters_are_saved_with_their_weights(tmp_path):
    model = adapted("released")
    save_adapters(model, tmp_path / "adapters.safetensors")
    again = load_adapters(tmp_path / "adapters.safetensors", BLIP)
    assert torch.equal(logits(again), logits(model))
    for other in (Blip(tiny_blip(seed=2)[0]).eval(), load_backbone("mini", device="cpu").model):
        with pytest.raises(ValueError, match="belong to a model with other frozen weights"):
            load_adapters(tmp_path / "adapters.safetensors", other)


def test_attention_of_another_class_is_refused():
    foreign = copy.deepcopy(BLIP)
    foreign.text_decoder.bert.encoder.layer[1].crossattention.self = torch.nn.Identity()
    message = "decoder layer 1: attention is of class Identity, not BlipTextSelfAttention"
    with pytest.raises(ValueError, match=message):
        add_adapters(foreign)


def test_a_model_for_questions_gives_image_encoder_and_decoder(tmp_path):
    core, tokenizer = tiny_blip(seed=3)
    core.config.architectures = None
    questions = import_blip().BlipForQuestionAnswering(core.config)
    questions.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    taken = load_blip(str(tmp_path), device="cpu").model.core
    for part in ("vision_model", "text_decoder"):
        keys = [content_key(weights=getattr(m, part).state_dict()) for m in (taken, questions)]
        assert keys[0] == keys[1]


def test_missing_weights_are_named(tmp_path):
    core, tokenizer = tiny_blip(seed=3)
    core.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    weights = load_file(tmp_path / "whole/model.safetensors")
    weights.pop("text_decoder.bert.embeddings.LayerNorm.bias")
    save_file(weights, tmp_path / "part/model.safetensors", {"format": "pt"})
    message = "1 weights are missing, among them text_decoder.bert.embeddings.LayerNorm.bias"
    with pytest.raises(ValueError, match=message):
        load_blip(str(tmp_path / "part"), device="cpu")
