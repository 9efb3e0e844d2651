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
# # Cards of stored methods
# > The card of a stored method: its entries, their checks, and the backbone that fits it.
#
# One safetensors file holds the tensors of a method and, in its header, a card: what is needed to rebuild the method, which problem it was fitted on, and notes such as the accuracy and
# how the hyper-parameters were selected. The card's digest covers the tensors and the card itself.

# %%
#| default_exp methods.cards

# %%
#| export
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from vlmadapt.core.records import RecordError, validate
from vlmadapt.core.tensors import load_arrays
from vlmadapt.core.texts import one_line, shown_path
from vlmadapt.core.values import Positive
from vlmadapt.methods.hyper_parameters import HyperParameters
from vlmadapt.models.backbones import Backbone, load_backbone

# %%
#| hide
from fastcore.test import test_eq, test_fail


# %%
#| export
class Card(BaseModel, extra="allow", strict=True):
    "What the card of a stored method must hold."

    method: str
    hyper_parameters: dict[str, Any]
    classnames: list[str]
    backbone: str | None
    backbone_key: str | None
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    problem: dict[str, Any] = {}
    notes: dict[str, Any] = {}
    feature_width: Annotated[int, Field(ge=1, lt=2**20)] | None = None


class ClassifierCard(Card):
    "What the card of a stored classifier must hold besides."

    trained: list[str]
    logit_scale: Positive


# %%
#| export
def _checked(path, card, kind):
    "Return `card`; raise RecordError where it is not of this `kind`."
    place = shown_path(path)
    if not isinstance(card, dict) or "method" not in card:
        raise RecordError(f"{place} holds no method: its card does not name one")
    required = [name for name, field in kind.model_fields.items() if field.is_required()]
    missing = [name for name in required if name not in card]
    if missing:
        raise RecordError(f"{place}: the card lacks {missing[0]!r}")
    validate(card, kind, f"{place}: card")
    if (card["backbone"] is None) != (card["backbone_key"] is None):
        told = "the card must name both 'backbone' and 'backbone_key', or neither"
        raise RecordError(f"{place}: {told}")
    return card


def read_card(
    path: str | Path,  # a file made by `save`
) -> dict[str, Any]:  # method, class names, hyper-parameters, backbone, problem, notes, ...
    "Read what a stored method says about itself."
    return _checked(path, load_arrays(path)[1], Card)


def check_card(
    path: str | Path,  # the file, for messages
    card: Any,  # what was read
    kind: type[Card],  # the keys that must be there
    cls: type[HyperParameters],  # the method class that is to be rebuilt
    name: str,  # what `card["method"]` must be
) -> dict[str, Any]:
    "Return `card`; raise RecordError where it is not that of a stored `cls`."
    place = shown_path(path)
    if isinstance(card, dict) and card.get("method", name) != name:
        found = validate(card["method"], str, f"{place}: card: method")
        raise RecordError(f"{place} holds a method of class {shown_path(found)}, not {name}")
    _checked(path, card, kind)
    needed = set(cls.defaults()) - set(cls.recipe)  # the recipe acts in training only
    absent = sorted(needed - set(card["hyper_parameters"]))
    if absent:
        raise RecordError(f"{place}: the card lacks the hyper-parameter {absent[0]!r} of {name}")
    return card


# %%
minimal = dict(method="TaskRes", hyper_parameters={}, classnames=[], backbone="a", backbone_key="b")
test_eq(check_card("a.safetensors", minimal, Card, HyperParameters, "TaskRes"), minimal)
for card, told in (
    ({}, "holds no method"),
    ({**minimal, "method": "GDA"}, "holds a method of class GDA, not TaskRes"),
    ({**minimal, "backbone": None}, "name both 'backbone' and 'backbone_key', or neither"),
    ({**minimal, "precision": "int8"}, "card: precision"),
):
    test_fail(
        lambda card=card: check_card("a.safetensors", card, Card, HyperParameters, "TaskRes"),
        contains=told,
    )


# %% [markdown]
# ## Its backbone
#
# A backbone with other weights or in another precision than the card names is refused.

# %%
#| export
def backbone_entries(
    backbone: Backbone | None,
) -> dict[str, str | None]:
    "The entries of a card that name a backbone."
    if backbone is None:
        return dict.fromkeys(("backbone", "backbone_key", "precision"))
    return {
        "backbone": backbone.name,
        "backbone_key": backbone.key,
        "precision": backbone.precision,
    }


def card_backbone(
    card: dict[str, Any],  # of a method
    who: str | Path,  # for the message
    load: Callable = load_backbone,  # function of a name and a precision
) -> Backbone:
    "Load the backbone that a card names, in its precision; raise ValueError where that fails."
    name, precision = card["backbone"], card.get("precision")
    try:
        backbone = load(name, precision=precision)
    except Exception as error:
        raise ValueError(
            f"{who}: its backbone {name!r} cannot be loaded ({one_line(error)}); "
            "give features, or load the method with backbone=..."
        ) from error
    return check_backbone(card, backbone, who)


def check_backbone(
    card: dict[str, Any],  # of a method
    backbone: Backbone,  # that is to be used with it
    who: str | Path,  # for the message
) -> Backbone:
    "Return `backbone`; raise ValueError unless it has the weights and precision of the card."
    key = card.get("backbone_key")
    if backbone.key == key:
        return backbone
    if key is None:
        raise ValueError(
            f"{who} was fitted on features without a backbone; "
            "encode the images yourself and give features"
        )
    told = f"{who} was fitted on backbone {card['backbone']} ({card.get('precision')})"
    if backbone.name == card["backbone"] and backbone.precision != card.get("precision"):
        right = f"load_backbone({backbone.name!r}, precision={card.get('precision')!r})"
        raise ValueError(f"{told}, not in {backbone.precision}; use {right}")
    raise ValueError(f"{told} with other weights than {backbone.name} ({backbone.precision})")


# %%
backbone = load_backbone("mini")
card = backbone_entries(backbone)
test_eq(check_backbone(card, backbone, "cats.safetensors"), backbone)
test_fail(
    lambda: check_backbone({**card, "backbone_key": "0"}, backbone, "cats.safetensors"),
    contains="cats.safetensors was fitted on backbone mini (fp32) with other weights than mini",
)
test_fail(
    lambda: card_backbone({**card, "backbone": "mimi"}, "cats.safetensors"),
    contains="its backbone 'mimi' cannot be loaded",
)
card
