"Features with prompts: the towers against their reference form, and against the model itself."

import copy
import functools
import logging
import math

import pytest
import torch
from reference_towers import image_reference, text_reference
from torch import nn

from vlmadapt.core.seeding import stream
from vlmadapt.models.backbones import load_backbone
from vlmadapt.models.class_prompts import tokenize_with_context
from vlmadapt.models.image_tower import ImageTower
from vlmadapt.models.open_clip_import import import_open_clip
from vlmadapt.models.pretrained import build_model
from vlmadapt.models.text_tower import PromptPlan, TextTower

NAMES = ["ox", "polar bear", "very long-winded sea cow", "gnu"]
LAYOUTS = ("CLIP", "CustomTextCLIP", "CoCa")


@functools.lru_cache
def tiny(kind="CLIP", layers=4):
    "A model with random weights in float64, in one of open_clip's three layouts."
    coca = kind == "CoCa"
    vision = dict(image_size=32, patch_size=8, width=32, layers=layers, head_width=16)
    vision |= dict(attentional_pool=coca, attn_pooler_heads=2, output_tokens=coca)
    text = dict(context_length=20, width=24, heads=2, layers=layers)
    text |= dict(embed_cls=coca, output_tokens=coca)
    more = {}
    if coca:
        more["multimodal_cfg"] = dict(width=24, heads=2, layers=1, context_length=20)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(import_open_clip(), kind)(16, vision_cfg=vision, text_cfg=text, **more)
        for p in model.parameters():
            p.data.normal_(std=0.2 if p.ndim < 2 else 0.7 * p.shape[-1] ** -0.5)
        for layer in model.modules():
            if isinstance(layer, nn.LayerNorm):
                layer.weight.data += 1
    return model.double().eval().requires_grad_(False)


@functools.lru_cache
def large():
    "A ViT-B/16 with random weights in float64."
    logging.disable(logging.WARNING)  # open_clip says that the weights are random
    model = build_model("ViT-B-16-quickgelu").requires_grad_(False).eval().double()
    logging.disable(logging.NOTSET)
    return model


@functools.lru_cache
def tokenizer(context_length=20):
    own = import_open_clip().get_tokenizer("ViT-B-32")
    return functools.partial(own, context_length=context_length)


def own_states(model, ids, n):
    "The model's own states at the positions of the prompt, where each block begins."
    tower = TextTower(model)
    length = ids.shape[1]
    x = tower.embed(ids[:1]) + tower.positions[:length]
    mask = torch.full((length, length), -math.inf).triu(1).double()
    states = []
    for block in tower.blocks[:-1]:
        x = block(x, attn_mask=mask)
        states.append(x[:, 1 : 1 + n])
    return tower.embed(ids[:1])[:, 1 : 1 + n], torch.cat(states)


def with_gradients(features, leaves):
    weights = torch.randn(features.shape, generator=stream(2, "weights"), dtype=features.dtype)
    gradients = torch.autograd.grad((features * weights).sum(), leaves)
    return features.detach(), torch.cat([x.flatten() for x in gradients])


def gaps(model, names, n, depth=1, groups="shared", place="end", budget=None, tokens=None):
    "Largest differences of values and gradients between plan and reference."
    tower = TextTower(model)
    generator = stream(1, "compare")
    ids, positions = tokenize_with_context(tower, tokens or tokenizer(), names, n, place=place)
    axis = 1 if groups == "classes" else 0
    ids, positions = ids.unsqueeze(axis), positions.unsqueeze(axis)
    count = dict(shared=1, classes=len(names), images=3)[groups]
    scale = tower.embed.weight[:99].std()
    shapes = ((count, n, tower.width), (depth - 1, n, tower.width))
    first, deep = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    first, deep = (scale * first).requires_grad_(), (scale * deep).requires_grad_()
    leaves = [first, deep][: 1 + (depth > 1)]
    plan = PromptPlan(tower, ids, positions, count, budget)
    assert plan.recompute is (budget is not None)
    expected = with_gradients(text_reference(tower, ids, positions, first, deep), leaves)
    found = with_gradients(plan.features(first, deep), leaves)
    return [float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)]


CASES = {
    **{f"depth {depth}": dict(n=4, depth=depth) for depth in (1, 2, 3, 4)},
    "classes": dict(n=3, groups="classes"),
    "images": dict(n=3, groups="images"),
    "front": dict(n=4, place="front"),
    "middle": dict(n=4, place="middle"),
    "recomputed": dict(n=4, depth=3, budget=1),
    "recomputed, classes": dict(n=4, groups="classes", budget=1),
}


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_text_features_equal_the_reference(kind, case):
    values, gradients = gaps(tiny(kind), NAMES, **CASES[case])
    assert values < 1e-12 and gradients < 1e-10


@pytest.mark.parametrize("kind", ["CLIP", "CoCa"])
def test_several_buckets(kind):
    many = [" ".join(["ox"] * (9 if i % 5 == 0 else 1)) for i in range(60)]
    tower = TextTower(tiny(kind, 2))
    ids, positions = tokenize_with_context(tower, tokenizer(), many, 4)
    assert len(PromptPlan(tower, ids[None], positions[None]).parts) == 2
    assert max(gaps(tiny(kind, 2), many, 4, depth=2)) < 1e-10
    assert max(gaps(tiny(kind, 2), many, 2, groups="classes")) < 1e-10


@pytest.mark.parametrize("depth", [1, 2, 9, 12])
def test_a_tower_of_twelve_blocks(depth):
    assert max(gaps(tiny("CLIP", 12), NAMES, 4, depth)) < 1e-10


def test_the_text_tower_of_a_large_model():
    assert max(gaps(large(), NAMES[:2], 4, 9, tokens=tokenizer(77))) < 1e-10


def test_deep_prompts_behind_the_name_are_refused():
    tower = TextTower(tiny())
    ids, positions = tokenize_with_context(tower, tokenizer(), NAMES, 2, place="front")
    first = torch.zeros(1, 2, 24, dtype=torch.float64)
    plan = PromptPlan(tower, ids[None], positions[None])
    with pytest.raises(ValueError, match="must stand in front of the class name"):
        plan.features(first, first)


@pytest.mark.parametrize("name", ["mini", "ViT-B/16"])
def test_own_states_as_prompts_change_nothing(name):
    "At any depth; states that are taken a block too early do."
    if name == "mini":
        backbone = load_backbone("mini", device="cpu", precision="fp32")
        model, tokens = backbone.model, backbone.tokenizer
        model = copy.deepcopy(model).double()
    else:
        model, tokens = large(), tokenizer(77)
    tower = TextTower(model)
    photo = tokens([f"a photo of a {n}." for n in NAMES[:2]])
    ids, positions = tokenize_with_context(tower, tokens, NAMES[:2], 4)
    plan = PromptPlan(tower, ids[None], positions[None])
    first, deep = own_states(model, photo, 4)
    expected = model.encode_text(photo, normalize=False)
    scale = expected.abs().max()
    for depth in (1, tower.depth // 2, tower.depth):
        features = plan.features(first, deep[: depth - 1])[0]
        assert (features - expected).abs().max() < 1e-10 * scale
    early = plan.features(first, torch.cat([first, deep[:-1]]))[0]
    assert (early - expected).abs().max() > 1e-3 * scale
    # tokens behind the end do not count
    other = plan.ids.clone()
    other[0, :, int(tower.lengths(photo).max()) :] = 7 if tower.cls is None else tower.pad
    features = text_reference(tower, other, plan.positions, first, deep)[0]
    assert (features - expected).abs().max() < 1e-10 * scale


def test_image_features_of_a_large_model():
    "Without a prompt they are the model's; patches see a prompt."
    tower = ImageTower(large())
    pixels = torch.randn(1, 3, 224, 224, generator=stream(1, "pixels"), dtype=torch.float64)
    expected = large().encode_image(pixels, normalize=False)
    scale = expected.abs().max()
    assert (tower.features(pixels) - expected).abs().max() < 1e-10 * scale
    prompt = torch.randn(4, tower.width, generator=stream(1, "prompt"), dtype=torch.float64)
    features = tower.features(pixels, prompt)
    assert (features - expected).abs().max() > 1e-3 * scale
    assert (features - image_reference(tower, pixels, prompt)).abs().max() < 1e-10 * scale


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_image_features_equal_the_reference(kind, depth):
    "In values and gradients, with a class token and with attentional pooling."
    tower = ImageTower(tiny(kind))
    generator = stream(1, "vision")
    pixels = torch.randn(3, 3, 32, 32, generator=generator, dtype=torch.float64)
    shapes = ((3, 32), (depth - 1, 3, 32))
    first, deep = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    leaves = [first.requires_grad_(), deep.requires_grad_()][: 1 + (depth > 1)]
    expected, gradient = with_gradients(image_reference(tower, pixels, first, deep), leaves)
    features, own = with_gradients(tower.features(pixels, first, deep), leaves)
    assert (features - expected).abs().max() < 1e-12
    assert (own - gradient).abs().max() < 1e-10
    assert gradient.abs().max() > 0.05
