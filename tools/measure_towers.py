"""Print what a training step of CLIP-LoRA and 2SFS costs here and in the official program.

python tools/measure_towers.py FOLDER [CLASSES:IMAGES:ROUNDS ...]; default: 20:4:3 20:32:1.
FOLDER is a checkout of FarinaMatteo/rethinking_fewshot_vlms at commit 64ac143, which has both
methods. A ViT-B/16 of random weights, single precision, one thread; both sides take turns. With 32
images the official step keeps 6 GB for its backward pass.
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


def official_parts(model, tokens, batch, scale):
    "Return functions for the text side and the loss of a step."

    def unit(features):
        return features / features.norm(dim=-1, keepdim=True)

    def text():
        return unit(model.encode_text(tokens))

    def image():
        return unit(model.encode_image(batch.x))

    def step():
        return F.cross_entropy(scale * image() @ text().t(), batch.y)

    return dict(text=text, step=step)


def own_parts(method, batch):
    "Return the same functions of a method of the library."
    return dict(
        text=method.trained_text,
        step=lambda: method.loss(batch),
    )


def gradients(function, parameters):
    "Run a part forward and backward; return the gradients that there are."
    found = function()
    loss = found if found.ndim == 0 else found.square().sum(0)[0]
    return torch.autograd.grad(loss, parameters, allow_unused=True)


def measured(function, parameters, model):
    """Return processor seconds of a pass forward and backward, and the MB that autograd keeps.

    Each storage counts once; weights are left out.
    """
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    seen = {}

    def note(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return x

    begin = time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        gradients(function, parameters)
    return time.process_time() - begin, sum(seen.values()) / 1e6


def numbers_of(seconds, memory):
    "Return seconds and MB of both sides, rounded, and the ratio of the seconds."
    return dict(
        official_s=round(seconds["official"], 2),
        here_s=round(seconds["here"], 2),
        times_faster=round(seconds["official"] / seconds["here"], 2),
        official_kept_mb=round(memory["official"]),
        here_kept_mb=round(memory["here"]),
    )


def compared(name, sides, rounds):
    "Return medians of seconds, their ratios and the kept memory of both sides."
    medians, memory = {}, {}
    for part in ("text", "step"):
        seconds = {side: [] for side in sides}
        kept = memory[part] = {}
        for _ in range(rounds):
            for side, (parts, parameters, model) in sides.items():
                one, kept[side] = measured(parts[part], parameters, model)
                seconds[side].append(one)
        medians[part] = {side: statistics.median(values) for side, values in seconds.items()}
        print(name, part, medians[part], kept, file=sys.stderr)
    for both in (medians, memory):  # the image side is what the step has beside its text side
        both["image"] = {side: both["step"][side] - both["text"][side] for side in sides}
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
    sides = sides_of(name, backbone, names, images=2)
    losses, norms = {}, {}
    for side, (parts, parameters, model) in sides.items():
        without_dropout(model)
        losses[side] = round(parts["step"]().item(), 6)
        found = gradients(parts["step"], parameters)
        squares = sum(g.square().sum().item() for g in found if g is not None)
        norms[side] = round(squares**0.5, 6)
    return dict(loss=losses, gradient_norm=norms)


def sides_of(name, backbone, names, images):
    "Return parts, parameters and model of the official program and of the library."
    problem = few_shot("mini-digits", backbone=backbone, shots=1)
    method = METHODS[name](problem)
    method.class_names = names
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, 224, 224, generator=generator)
    batch = Batch(pixels, torch.randint(len(names), (images,), generator=generator))
    official, parameters = official_model(backbone.model.state_dict(), name)
    tokens = photo_tokens(backbone, names)
    if name == "CLIPLoRA":
        with_branches_of(official, method.branches)
    own = [p for n, p in method.named_parameters() if n != "classifier"]
    return dict(
        official=(
            official_parts(official, tokens, batch, method.logit_scale),
            parameters,
            official,
        ),
        here=(own_parts(method, batch), own, method.adapted),
    )


def cell(backbone, classes, images, rounds):
    "Return the numbers of both methods at one number of classes and of images."
    names = import_open_clip().IMAGENET_CLASSNAMES[:classes]
    found = dict(classes=classes, images=images, rounds=rounds)
    found["load_before"] = round(os.getloadavg()[0], 1)
    for name in ("CLIPLoRA", "TwoSFS"):
        same = agreement(name, backbone, names[:8])
        sides = sides_of(name, backbone, names, images)
        counts = {side: sum(p.numel() for p in s[1]) for side, s in sides.items()}
        found[name] = dict(trained=counts, **same, **compared(name, sides, rounds))
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
