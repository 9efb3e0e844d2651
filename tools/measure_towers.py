"""Print what a training step of CLIP-LoRA and 2SFS costs here and in the official program.

python tools/measure_towers.py FOLDER [CLASSES:IMAGES:ROUNDS ...]; default: 20:4:3 20:32:1.
FOLDER is a checkout of FarinaMatteo/rethinking_fewshot_vlms at commit 64ac143, which has both
methods. A ViT-B/16 of random weights, single precision, one thread; both sides take turns. A step
reads its images in chunks of 4 and adds up their gradients, so that 32 images fit into 4 GB; the
text is computed once. What autograd keeps is measured for one chunk.
"""

import contextlib
import io
import json
import os
import statistics
import sys
import time
import types

import torch
import torch.nn.functional as F

from vlmadapt.methods import METHODS
from vlmadapt.models.backbones import load_backbone
from vlmadapt.models.class_prompts import photo_tokens
from vlmadapt.models.lora_prefix import LowRankBranch
from vlmadapt.models.open_clip_import import import_open_clip
from vlmadapt.problems.batches import Batch
from vlmadapt.problems.few_shot import few_shot

CHUNK = 4  # images

SETTINGS = dict(encoder="both", position="all", backbone="ViT-B/16", params=["q", "k", "v"])
SETTINGS |= dict(r=2, alpha=1, dropout_rate=0.25)


def official_model(weights, method):
    "Return the official model with these weights, prepared for a method, and its parameters."
    from clip.model import CLIP
    from fs.utils.model_utils import trainable_norm_params
    from loralib import apply_lora, get_lora_parameters, mark_only_lora_as_trainable

    model = CLIP(512, 224, 12, 768, 16, 77, 49408, 512, 8, 12)
    model.load_state_dict(weights)
    with contextlib.redirect_stdout(io.StringIO()):
        if method == "CLIPLoRA":
            apply_lora(types.SimpleNamespace(**SETTINGS), model, verbose=False)
            mark_only_lora_as_trainable(model)
            parameters = get_lora_parameters(model)
        else:
            parameters = trainable_norm_params(model)
    return model.train(), [p for p in parameters if p.requires_grad]


def official_parts(model):
    "Return functions for the text side and the image side."

    def unit(features):
        return features / features.norm(dim=-1, keepdim=True)

    def text(tokens):
        return unit(model.encode_text(tokens))

    def image(x):
        return unit(model.encode_image(x))

    return dict(text=text, image=image)


def own_parts(method):
    "Return the same functions of a method of the library."
    return dict(
        text=lambda tokens: method.trained_text(),
        image=lambda x: F.normalize(method.image(x), dim=-1),
    )


def text_pass(side, tokens, batch, scale):
    "Run the text side forward and backward."
    side["text"](tokens).square().sum(0)[0].backward()


def step_pass(side, tokens, batch, scale):
    "Run a step forward and backward, and return its loss."
    text = side["text"](tokens)
    leaf = text.detach().requires_grad_()
    total = 0.0
    for x, y in zip(batch.x.split(CHUNK), batch.y.split(CHUNK), strict=True):
        logits = scale * side["image"](x) @ leaf.t()
        loss = F.cross_entropy(logits, y, reduction="sum") / len(batch.y)
        loss.backward()
        total += loss.item()
    text.backward(leaf.grad)
    return total


def measured(run, side, *inputs):
    """Return processor seconds of a pass forward and backward, and the MB that autograd keeps.

    Each storage counts once; weights are left out.
    """
    model = side["model"]
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    seen = {}

    def note(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return x

    begin = time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        run(side, *inputs)
    return time.process_time() - begin, sum(seen.values()) / 1e6


def numbers_of(seconds, memory):
    "Return seconds and MB of both sides, rounded, and the ratio of the seconds."
    found = {f"{side}_s": round(value, 2) for side, value in seconds.items()}
    found["times_faster"] = round(seconds["official"] / seconds["here"], 2)
    return found | {f"{side}_kept_mb": round(value) for side, value in memory.items()}


def compared(name, sides, inputs, rounds):
    "Return medians of seconds, their ratios and the kept memory of both sides."
    medians, memory = {}, {}
    for part, run in (("text", text_pass), ("step", step_pass)):
        seconds = {side: [] for side in sides}
        kept = memory[part] = {}
        for _ in range(rounds):
            for side, parts in sides.items():
                one, kept[side] = measured(run, parts, *inputs)
                seconds[side].append(one)
        medians[part] = {side: statistics.median(values) for side, values in seconds.items()}
        print(name, part, medians[part], kept, file=sys.stderr)
    for both in (medians, memory):  # the image side is what the step has beside its text side
        both["image"] = {side: both["step"][side] - both["text"][side] for side in sides}
    if len(inputs[1].y) > CHUNK:
        memory = dict.fromkeys(memory, {})
    found = {part: numbers_of(medians[part], memory[part]) for part in ("text", "image", "step")}
    free = medians["step"]["official"] / medians["image"]["here"]
    found["faster_if_text_were_free"] = round(free, 2)
    return found


def without_dropout(model):
    "Let nothing be dropped; the official layers take another path where the rate is 0."
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 1e-300
        if isinstance(module, LowRankBranch):
            module.dropout = 0.0


def with_branches_of(official, branches):
    "Copy the initial branches of the official model."
    layers = [m for tower in (official.visual, official.transformer) for m in tower.modules()]
    layers = [m for m in layers if type(m).__name__ == "PlainMultiheadAttentionLoRA"]
    for layer, branch in zip(layers, branches, strict=True):
        for n, part in enumerate("qkv"):
            branch.A.data[n] = getattr(layer, f"{part}_proj").w_lora_A.data


def agreement(name, backbone, names):
    "Return losses and lengths of the gradients of both sides on two images, without dropout."
    sides, inputs = sides_of(name, backbone, names, images=2)
    losses, norms = {}, {}
    for side, parts in sides.items():
        without_dropout(parts["model"])
        losses[side] = round(step_pass(parts, *inputs), 6)
        found = [p.grad for p in parts["parameters"] if p.grad is not None]
        norms[side] = round(sum(g.square().sum().item() for g in found) ** 0.5, 6)
    return dict(loss=losses, gradient_norm=norms)


def sides_of(name, backbone, names, images):
    "Return the official program and the library as dicts of parts, and the inputs of a pass."
    problem = few_shot("mini-digits", backbone=backbone, shots=1)
    method = METHODS[name](problem)
    method.class_names = names
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, 224, 224, generator=generator)
    batch = Batch(pixels, torch.randint(len(names), (images,), generator=generator))
    official, parameters = official_model(backbone.model.state_dict(), name)
    if name == "CLIPLoRA":
        with_branches_of(official, method.branches)
    own = [p for n, p in method.named_parameters() if n != "classifier"]
    sides = dict(
        official=dict(official_parts(official), parameters=parameters, model=official),
        here=dict(own_parts(method), parameters=own, model=method.adapted),
    )
    return sides, (photo_tokens(backbone, names), batch, method.logit_scale)


def cell(backbone, classes, images, rounds):
    "Return the numbers of both methods at one number of classes and of images."
    names = import_open_clip().IMAGENET_CLASSNAMES[:classes]
    found = dict(classes=classes, images=images, rounds=rounds)
    found["load_before"] = round(os.getloadavg()[0], 1)
    for name in ("CLIPLoRA", "TwoSFS"):
        same = agreement(name, backbone, names[:8])
        sides, inputs = sides_of(name, backbone, names, images)
        counts = {s: sum(p.numel() for p in parts["parameters"]) for s, parts in sides.items()}
        found[name] = dict(trained=counts, **same, **compared(name, sides, inputs, rounds))
    return found


def main(folder, sizes=("20:4:3", "20:32:1")):
    torch.set_num_threads(1)
    sys.path.insert(0, folder)
    backbone = load_backbone("ViT-B-16-quickgelu:", device="cpu", precision="fp32")
    cells = [cell(backbone, *map(int, size.split(":"))) for size in sizes]
    numbers = dict(backbone="ViT-B/16, random weights", threads=1, torch=torch.__version__)
    numbers |= dict(seconds="processor time, median of rounds", cells=cells)
    print(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], *([sys.argv[2:]] if sys.argv[2:] else []))
