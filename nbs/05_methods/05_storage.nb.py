# ---
# jupyter:
#   jupytext:
#     comment_magics: false
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: python3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Storage of methods
# > Store a method as one safetensors file and rebuild it.
#
# Rebuilding needs no problem: the frozen tensors come from the file, the trained ones are created by `init` and then filled. The card is compared with the class and with the tensors.
# Examples and checks are in the notebook on the [base class](07_base.ipynb), whose `save` and `load` call these functions.

# %%
#| default_exp methods.storage

# %%
#| export
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmadapt import __version__
from vlmadapt.core.records import RecordError
from vlmadapt.core.tensors import load_arrays, save_arrays
from vlmadapt.core.texts import one_line, shown_path
from vlmadapt.core.values import plain
from vlmadapt.methods.cards import ClassifierCard, card_backbone, check_backbone, check_card
from vlmadapt.models.backbones import Backbone, load_backbone

# %%
#| hide

from fastcore.test import test_eq


# %%
#| export
def store(
    method: Any,  # a fitted method
    path: str | Path,  # the file to write
    notes: dict[str, Any],  # plain values for the card
) -> None:
    "Store a method as one safetensors file."
    entries = {
        "method": type(method).__name__,
        "trained": [name for name, _ in method.named_parameters()],
        "hyper_parameters": method.hyper_parameters,
        "classnames": method.class_names,
        "logit_scale": method.logit_scale,
        "trainable_parameters": method.trainable_parameters(),
        "version": __version__,
    }
    notes = plain({**method.card.get("notes", {}), **notes})
    save_arrays(path, method.state_dict(), {**method.card, **entries, "notes": notes})


# %%
#| export
def empty_method(
    cls: Any,  # a method class
    card: dict[str, Any],  # that was stored
    backbone: Backbone | None,
) -> Any:
    "Return a method without tensors, with the entries of a stored card that are not rebuilt."
    method = cls.__new__(cls)
    nn.Module.__init__(method)
    method.backbone = backbone
    names = ("backbone", "backbone_key", "precision", "problem", "feature_width", "notes")
    method.card = {name: card[name] for name in names if name in card}
    return method


def _fill(method, tensors, card, path):
    "Set up a blank method from what was stored."
    unknown = [name for name in card["trained"] if name not in tensors]
    if unknown:
        raise ValueError(
            f"{path}: the card calls {shown_path(unknown[0])!r} trained, "
            "but the file holds no such tensor"
        )
    constants = {name: x for name, x in tensors.items() if name not in card["trained"]}
    try:
        values = method.completed(card["hyper_parameters"])
    except Exception as error:
        raise RecordError(f"{path}: {one_line(error)}") from None
    try:
        method._setup(card["classnames"], float(card["logit_scale"]), values, lambda: constants)
        method.load_state_dict(tensors)
    except Exception as error:  # whatever a class makes of tensors that are not its own
        raise ValueError(
            f"{path}: the tensors do not fit {type(method).__name__} "
            f"as the card describes it ({one_line(error, 200)})"
        ) from None


@torch.no_grad()
def _check_classes(method, path):
    "Refuse a card with another number of class names than the tensors have classes."
    if method.runs_tower() or method.feature_width is None:
        return
    try:
        n = method.scores(torch.ones(1, method.feature_width)).shape[-1]
    except Exception as error:
        raise ValueError(f"{path}: the tensors do not fit together ({one_line(error)})") from None
    if n != len(method.class_names):
        raise ValueError(
            f"{path}: the card has {len(method.class_names)} class names, "
            f"but the tensors {n} classes"
        )


def restore(
    cls: Any,  # a method class
    path: str | Path,  # a file made by `store`
    backbone: str | Backbone | None = None,  # default: the one that the card names
) -> Any:
    """Rebuild a stored method; raise ValueError where card, tensors, class and backbone differ.

    The backbone that the card names is loaded at once where the method runs a tower, otherwise
    when the first image comes.
    """
    tensors, card = load_arrays(path)
    check_card(path, card, ClassifierCard, cls, cls.__name__)
    if isinstance(backbone, str):
        backbone = load_backbone(backbone, precision=card.get("precision"))
    if backbone is not None:
        check_backbone(card, backbone, path)
    elif cls.runs_tower():
        backbone = card_backbone(card, path)
    method = empty_method(cls, card, backbone)
    _fill(method, tensors, card, path)
    method.eval()
    _check_classes(method, path)
    return method


# %%
class Example(nn.Module):
    "Stands for a method class."


example = empty_method(
    Example, dict(backbone=None, notes={"accuracy": 90.0}, classnames=["cat"]), None
)
test_eq(example.card, dict(backbone=None, notes={"accuracy": 90.0}))
