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
# # Generation methods
# > Ten methods that adapt a model with a text decoder to a generative task: full fine-tuning, BitFit, LoRA, prefix tuning and adapters, beside the frozen model.
#
# A CoCa or BLIP model is adapted to questions, entailment or captions. Four methods are the baselines of the p-adapter paper: full fine-tuning, prefix tuning, LoRA, adapters. BitFit is added here. The others are the
# aggregations of the paper's table 2. All change the decoder only, except full fine-tuning, which also trains the text and image towers. Only what was trained is stored.
#
# LoRA and prefix tuning are implemented here for open_clip. peft's LoRA for torch's `nn.MultiheadAttention` gives queries, keys and values one product in common and hides the weights from step-by-step decoding,
# where the paper changes queries and keys each by its own; peft's prefix tuning serves models of transformers alone.

# %%
#| default_exp methods.generation

# %%
#| export
import copy
from typing import Any, Literal

import torch

from vlmadapt.core.registry import Registry
from vlmadapt.core.values import NonNegative, PositiveInteger
from vlmadapt.methods.generation_base import GenerationMethod
from vlmadapt.methods.hyper_parameters import OneOrMore, hyper_parameter
from vlmadapt.models.adapted_models import WHERE, add_adapters, thin_copy
from vlmadapt.models.adapters import setting_types, settings_of
from vlmadapt.models.answer_losses import tokenize_answers
from vlmadapt.models.decoding import generate
from vlmadapt.models.lora_prefix import add_lora, add_prefix

# %%
#| hide
import tempfile
from collections import Counter

import pandas as pd
from fastcore.test import test_close, test_eq, test_fail

from vlmadapt.core.hashing import content_key
from vlmadapt.core.tensors import load_arrays
from vlmadapt.models.adapted_models import adapter_parameters
from vlmadapt.models.answer_losses import answer_losses
from vlmadapt.problems.generation import load_task


# %% [markdown]
# ## Nothing, everything, or the biases

# %%
#| export
class Frozen(GenerationMethod):
    "The backbone as it is, with which every method is compared."

    space = {}

    def adapt(self, model, seed):
        return thin_copy(model)

    def training_free(self):
        return True


class FullFineTuning(GenerationMethod):
    "All parameters of the model."

    frozen_vision = False
    recipe = {**GenerationMethod.recipe, "lr": 2e-4}
    space = dict(lr=(2e-5,))

    def adapt(self, model, seed):
        return copy.deepcopy(model).requires_grad_(True)


# %%
#| export
class BitFit(GenerationMethod):
    "The biases of the decoder."

    def adapt(self, model, seed):
        adapted: Any = thin_copy(model)
        for name, parameter in adapted.text_decoder.named_parameters():
            if name.endswith("bias"):
                parameter.data = parameter.data.clone()
                parameter.requires_grad_(True)
        return adapted


# %% [markdown]
# ## LoRA
#
# A product of two thin matrices is added to some of the query, key and value parts of each attention's input matrix.

# %%
#| export
class LoRA(GenerationMethod):
    "Low-rank changes to some of the queries, keys and values of the decoder's attentions."

    rank: PositiveInteger = hyper_parameter(8, "r")
    alpha: NonNegative = hyper_parameter(32.0, "the change is scaled by alpha/r")
    parts: OneOrMore[Literal["query", "key", "value"]] = hyper_parameter(
        ("query", "key"), "of `QKV`"
    )

    def adapt(self, model, seed):
        return add_lora(model, seed=seed, **self.settings())


# %% [markdown]
# ## Prefix
#
# Trained keys and values stand before the real ones in each self-attention.

# %%
#| export
class Prefix(GenerationMethod):
    "Trained keys and values before those of the decoder's self-attentions."

    length: PositiveInteger = hyper_parameter(
        16,
        "prefix tokens of each attention (the paper does not say; its parameter count suggests 32)",
    )

    def adapt(self, model, seed):
        return add_prefix(model, seed=seed, **self.settings())


# %% [markdown]
# ## Adapters
#
# The [adapters](../02_models/12_adapters.ipynb), with their settings as hyper-parameters.

# %%
#| export
class Adapter(GenerationMethod):
    "Adapters in the decoder."

    adapter = "adapter"  # which of `ADAPTERS`

    def adapt(self, model, seed):
        return add_adapters(model, self.adapter, seed=seed, **self.settings())

    @classmethod
    def defaults(cls) -> dict:
        "Return all hyper-parameters with their default values."
        return dict(where=WHERE, ffn="sequential", **settings_of(cls.adapter), **cls.recipe)

    @classmethod
    def declared(cls) -> dict:
        "Return all hyper-parameters with the types that they are declared with."
        placed = dict(where=OneOrMore[Literal[WHERE]], ffn=Literal["sequential", "parallel"])
        return {**super().declared(), **placed, **setting_types(cls.adapter)}


# %%
#| export
class GCNAdapter(Adapter):
    "Adapters on a graph convolution over the attention graph."

    adapter = "gcn"


class APPNPAdapter(Adapter):
    "Adapters on APPNP's aggregation."

    adapter = "appnp"


# %%
#| export
class GCNIIAdapter(Adapter):
    "Adapters on GCNII's aggregation."

    adapter = "gcnii"


class GenerationPAdapter(Adapter):
    "Adapters on p-Laplacian message passing: the paper's own."

    name = "PAdapter"
    adapter = "p-adapter"


# %% [markdown]
# `GENERATION_METHODS` holds the classes by name, in the order of the paper's table.

# %%
#| export
_CLASSES = (
    Frozen,
    FullFineTuning,
    BitFit,
    Prefix,
    LoRA,
    Adapter,
    GenerationPAdapter,
    GCNAdapter,
    APPNPAdapter,
    GCNIIAdapter,
)
GENERATION_METHODS = Registry("method", {method.name: method for method in _CLASSES})

# %% [markdown]
# ## Trainable parameters
#
# Counted, and by formula: for D = 96, two decoder layers with self- and cross-attention and a feed-forward part behind each.

# %%
problem = load_task("mini-vqa", train=96)
backbone = problem.backbone
weights_before = content_key(weights=backbone.model.state_dict())
counts = {name: cls(problem).trainable_parameters() for name, cls in GENERATION_METHODS.items()}
D, r, layers = 96, 12, 2
adapter = 2 * D * r + r + D
attentions = 2 * layers
in_and_out = 3 * D + D
norms = 2 * D
feed_forward = 4 * D + D
image_norms_and_last_norm = layers * D + D
formula = {
    "Frozen": 0,
    "FullFineTuning": sum(p.numel() for p in backbone.model.parameters()),
    "BitFit": attentions * (in_and_out + norms + feed_forward) + image_norms_and_last_norm,
    "Prefix": layers * 2 * 16 * D,
    "LoRA": attentions * 4 * 8 * D,
    "Adapter": 2 * attentions * adapter,
    "GCNAdapter": 2 * attentions * adapter,
    "APPNPAdapter": 2 * attentions * adapter,
    "GCNIIAdapter": 2 * attentions * adapter,
    "PAdapter": 2 * attentions * adapter + attentions,
}
test_eq(counts, formula)
table = pd.DataFrame({"trained": counts})
table["% of all"] = (100 * table["trained"] / counts["FullFineTuning"]).round(2)
table.T

# %% [markdown]
# ## Initialisation
#
# The frozen model, full fine-tuning, BitFit, LoRA and the adapters on plain attention equal the frozen model before training. The p-adapter does at p = 2 and mu = 0. Prefixes, APPNP, GCNII and
# the p-adapter of the paper do not.

# %%
x = next(problem.pixels("val").split(6))
texts = tokenize_answers(
    backbone.tokenizer, problem.prompts["val"][:6], [a[0] for a in problem.labels["val"][:6]]
)


@torch.no_grad()
def losses_of(model):
    return answer_losses(model, model._encode_image(x)[1], texts)


def gap(method):
    "Largest difference of a loss between a method and the frozen model."
    return float((losses_of(method.model) - losses_of(backbone.model)).abs().max())


gaps = {name: gap(cls(problem)) for name, cls in GENERATION_METHODS.items()}
gaps["PAdapter, p=2, mu=0"] = gap(GenerationPAdapter(problem, p=2.0, mu=0.0, learn="fixed"))
frozen_at_first = {
    "Frozen",
    "FullFineTuning",
    "BitFit",
    "LoRA",
    "Adapter",
    "GCNAdapter",
    "PAdapter, p=2, mu=0",
}
test_eq({name for name, value in gaps.items() if value < 1e-4}, frozen_at_first)
pd.Series(gaps, name="largest difference of a loss").to_frame().T.round(4)

# %% [markdown]
# ## Training
#
# Each method is trained for four passes over 96 questions by plain AdamW; `fit` of the training notebooks does the same with a schedule and checks. The loss on the most common answers falls below that of
# the frozen model, the backbone stays as it is to the last bit, and a stored method answers like the trained one.

# %%
common = [Counter(answers).most_common(1)[0][0] for answers in problem.labels["train"]]
common = tokenize_answers(backbone.tokenizer, problem.prompts["train"], common)
pixels = next(problem.pixels("train").split(96))
rates = dict(BitFit=1e-2, Prefix=3e-2, FullFineTuning=1e-3)  # others: 3e-3


@torch.no_grad()
def loss_on_common(method):
    patches = method.model._encode_image(pixels)[1]
    return answer_losses(method.model, patches, common).mean().item()


def train(method):
    "Train for four passes and return the loss on common answers before and after."
    before = loss_on_common(method.reset(1))
    groups = [dict(params=params, weight_decay=decay) for decay, params in method.decays()]
    optimizer = torch.optim.AdamW(groups, lr=rates.get(method.name, 3e-3))
    batches = method.batches(problem, seed=1)
    for _ in range(4):
        for batch in batches:
            optimizer.zero_grad()
            method.loss(batch).backward()
            optimizer.step()
    return dict(before=before, after=loss_on_common(method.eval()))


trained = {name: cls(problem, batch_size=16) for name, cls in GENERATION_METHODS.items()}
del trained["Frozen"]
losses = pd.DataFrame({name: train(method) for name, method in trained.items()})
assert (losses.loc["after"] < losses.loc["before"]).all()
test_eq(content_key(weights=backbone.model.state_dict()), weights_before)
losses.round(2)

# %%
images, prompts = problem.images("val")[:6], problem.prompts["val"][:6]
for name in ("Prefix", "LoRA", "PAdapter", "BitFit"):
    method = trained[name]
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        method.save(file.name)
        loaded = type(method).load(file.name)
        test_eq(len(load_arrays(file.name)[0]), len(adapter_parameters(method.model)))
        test_fail(lambda path=file.name: FullFineTuning.load(path), contains=f"of class {name}")
    test_close(gap(loaded), gap(method), eps=1e-6)
    test_eq(loaded.card, {**method.card, "notes": {}})
    answers = loaded.predict(images, prompts, max_new_tokens=6)
    test_eq(answers, method.predict(images, prompts, max_new_tokens=6))
    for cache in (True, False):
        test_eq(
            generate(backbone, x, prompts, method.model, max_new_tokens=6, cache=cache), answers
        )
test_fail(lambda: LoRA(problem, rnk=4), contains="rank")
test_fail(lambda: LoRA(problem, rank=0), contains="LoRA rank: input should be greater than")
test_fail(lambda: GenerationPAdapter(problem, learn="fix"), contains="did you mean 'fixed'?")
test_fail(lambda: GENERATION_METHODS["PAdaptr"], contains="did you mean 'PAdapter'?")
test_fail(lambda: load_task("mini-vqa", "mini-rn"), contains="no text decoder")
