"Reference outputs of official programs, and the tiny CLIP that they share, as a `Backbone`."

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from vlmadapt.data.images import Images
from vlmadapt.models.backbones import Backbone
from vlmadapt.models.open_clip_import import import_open_clip
from vlmadapt.problems.classification import FewShotProblem
from vlmadapt.problems.features import Features

GOLDEN = Path(__file__).resolve().parent / "golden"


def load_golden(
    name: str,  # of the file, without its suffix
) -> tuple[dict, dict]:  # arrays in float64 (integers stay integers), and the metadata
    "Load a file of golden numbers; metadata that is JSON is decoded."
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    for key, x in arrays.items():
        if x.is_floating_point():
            arrays[key] = x.double()
    return arrays, {key: _decoded(text) for key, text in metadata.items()}


def _decoded(text):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def golden_clip() -> Backbone:
    "Return the tiny CLIP of the golden numbers as a backbone that computes in float64."
    arrays, metadata = load_golden("clip_tiny")
    sizes = metadata["sizes"]
    open_clip = import_open_clip()
    model = open_clip.CLIP(
        embed_dim=sizes["embed"],
        vision_cfg={
            "image_size": sizes["image"],
            "patch_size": sizes["patch"],
            "width": sizes["vision_width"],
            "layers": sizes["vision_layers"],
            "head_width": sizes["vision_width"] // sizes["vision_heads"],
        },
        text_cfg={
            "context_length": sizes["context"],
            "vocab_size": sizes["vocabulary"],
            "width": sizes["text_width"],
            "heads": sizes["text_heads"],
            "layers": sizes["text_layers"],
        },
        quick_gelu=True,
    ).double()
    model.load_state_dict(_state(arrays, sizes))
    model.visual.preprocess_cfg = {"size": sizes["image"], "mean": (0, 0, 0), "std": (1, 1, 1)}
    return Backbone("golden", model, "ViT-B-32-quickgelu", "cpu", "fp32")


def _state(arrays, sizes):
    "The state dict; only some rows of the token embedding are stored, all others are zero."
    names = [key for key in arrays if key.startswith("clip.")]
    state = {key.removeprefix("clip."): arrays[key] for key in names}
    rows = torch.zeros(sizes["vocabulary"], sizes["text_width"], dtype=torch.float64)
    rows[arrays["token_ids"]] = arrays["token_rows"]
    state["token_embedding.weight"] = rows
    return state


def golden_problem(
    class_names: list[str] | None = None,  # default: those of the file
    backbone: Backbone | None = None,  # default: a new `golden_clip`
    labels: torch.Tensor | None = None,  # of the three images; default: those of the file
) -> FewShotProblem:  # its train features are those of the file's three images
    "Return a problem on the tiny CLIP: three images, labels and class names of the golden numbers."
    arrays, metadata = load_golden("clip_tiny")
    names = class_names or metadata["classnames"]
    x = arrays["image_features"]
    text = torch.zeros(len(names), x.shape[1], dtype=x.dtype)
    features = Features(text=text, views=x[None], train=x)
    train = arrays["labels"] if labels is None else labels
    backbone = backbone or golden_clip()
    # the golden pixels are preprocessed already; tests pass them to the methods themselves
    pictures = Images(np.zeros((len(train), 32, 32, 3), np.uint8), train)
    scale = backbone.logit_scale
    images = {"train": pictures}
    return FewShotProblem(names, features, {"train": train}, scale, backbone, images=images)
