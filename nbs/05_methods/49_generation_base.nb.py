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
# # Base class of generation methods
# > The base class of methods that adapt a model with a text decoder: loss, answers to new images, saving and loading.

# %%
#| default_exp methods.generation_base

# %%
#| export
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmadapt.core.records import RecordError
from vlmadapt.core.tensors import load_arrays, save_arrays
from vlmadapt.core.texts import one_line, shown_path
from vlmadapt.methods.base import Method
from vlmadapt.methods.cards import Card, card_backbone, check_backbone, check_card
from vlmadapt.methods.inputs import OpenedPixels, as_inputs
from vlmadapt.models.adapted_models import adapter_parameters, parameter_groups
from vlmadapt.models.answer_losses import answer_losses
from vlmadapt.models.backbones import Backbone, load_backbone
from vlmadapt.models.decoding import generate
from vlmadapt.problems.batches import TaskBatch, TaskBatches
from vlmadapt.problems.generation import GenerationProblem, answers_of, rank_candidates

# %%
#| hide
import tempfile

from fastcore.test import test_eq, test_fail

from vlmadapt.models.adapted_models import thin_copy
from vlmadapt.problems.generation import load_task


# %% [markdown]
# A generation method copies what it changes of the backbone's model and leaves the backbone as it is. A subclass gives a `name` and `adapt`, which returns the copy whose parameters with gradients are trained.
# `fit` minimises the cross-entropy of the answers' tokens. `tune` tries the learning rates of `space` in order; they are those of the p-adapter paper.
#
# Scalars, such as the exponent p, have no weight decay: it would pull them to 0.

# %%
#| export
class GenerationMethod(Method):
    "A copy of the backbone's model, some of whose parameters are trained on a generative task."

    backbone: Backbone
    model: Any  # the module that is trained
    name = ""  # in the registry and in cards
    needs = {"generator"}
    frozen_vision = True  # does the image tower stay as it is?
    recipe = dict(
        lr=1e-3,
        epochs=5,
        batch_size=32,
        optimizer="adamw",
        schedule="linear",
        weight_decay=0.05,
        smoothing=0.0,
        drop_last=True,  # p-adapter's released train loader
    )
    space = dict(lr=(1e-4, 2e-4, 5e-4, 1e-3))  # the paper's

    def __init__(
        self,
        problem: GenerationProblem,  # what the method is built on
        **hyper_parameters: Any,  # by name; the others have their defaults
    ):
        super().__init__(problem, **hyper_parameters)
        self.candidates = list(problem.candidates)

    def constants(self, problem: GenerationProblem) -> dict:
        return {}

    def adapt(
        self,
        model: Any,  # the backbone's module; it is not changed
        seed: int,  # of the initialisation
    ) -> nn.Module:
        "Return the copy of `model` that is trained."
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        "Return the hyper-parameters that do not belong to the recipe."
        return {k: v for k, v in self.hyper_parameters.items() if k not in self.recipe}

    def reset(self, seed: int) -> "GenerationMethod":
        "Start again from the backbone's model, with an initialisation from `seed`."
        self.model = self.adapt(self.backbone.model, seed).eval()
        return self.to(self.backbone.device)

    def loss(self, batch: TaskBatch) -> torch.Tensor:
        "Return the mean over the batch of the cross-entropy of the answers' tokens."
        patches = batch.x if self.frozen_vision else self.model._encode_image(batch.x)[1]
        smoothing = self.hyper_parameters["smoothing"]
        return answer_losses(self.model, patches, batch.texts, smoothing).mean()

    def decays(self) -> list:
        "Return pairs of a weight decay and the parameters that have it."
        groups = parameter_groups(self.model, self.hyper_parameters["weight_decay"])
        return [(group["weight_decay"], group["params"]) for group in groups if group["params"]]

    def batches(self, problem: GenerationProblem, seed: int) -> TaskBatches:
        "Return texts with image tokens, or with pixels where the image tower is trained."
        recipe = self.hyper_parameters
        drop_last = recipe.get("drop_last", True)
        size = recipe["batch_size"]
        return TaskBatches(problem, seed, size, self.device, self.frozen_vision, drop_last)

    def outputs(
        self,
        problem: GenerationProblem,  # with the split
        split: str,  # which examples
        **search,  # arguments of `generate`
    ) -> list[str]:  # a text for each example
        "Answer the examples of a `split`."
        return answers_of(self.model, problem, split, **search)

    @torch.no_grad()
    def predict(
        self,
        inputs: Any,  # paths, PIL images or arrays of pixels: one or a list
        texts: str | list[str] | None = None,  # questions or prompts: one for all, or one for each
        batch_size: int = 64,  # images at once
        **search,  # arguments of `generate`
    ) -> list[str]:  # one answer for each image
        "Answer with one of the candidates where there are any, else with generated text."
        items = as_inputs(inputs)
        if isinstance(items, torch.Tensor):
            raise ValueError(f"{type(self).__name__} reads images, not features")
        prompts = _prompts(texts, len(items))
        answers: list[str] = []
        for x in OpenedPixels(items, self.backbone.preprocess).split(batch_size, self.device):
            own = prompts[len(answers) : len(answers) + len(x)]
            if self.candidates:
                answers += rank_candidates(self.model, self.backbone, x, own, self.candidates)
            else:
                answers += generate(self.backbone, x, own, self.model, **search)
        return answers

    def save(
        self,
        path: str | Path,  # the file to write
        **notes,  # plain values for the card
    ) -> None:
        "Store the trained parameters, with the key of the backbone that they belong to."
        made = dict(
            method=self.name,
            hyper_parameters=self.hyper_parameters,
            classnames=self.candidates,
            notes={**self.card.get("notes", {}), **notes},
        )
        arrays: dict[str, torch.Tensor] = {**adapter_parameters(self.model)}
        save_arrays(path, arrays, {**self.card, **made})

    @classmethod
    def load(
        cls,
        path: str | Path,  # a file made by `save`
        backbone: str | Backbone | None = None,  # default: the card's, in its precision
    ) -> "GenerationMethod":
        "Load a stored method; raise ValueError where card, tensors, class and backbone differ."
        tensors, card = load_arrays(path)
        if isinstance(card, dict) and card.get("method") in NAMES_0_1:
            card["method"] = NAMES_0_1[card["method"]]
        check_card(path, card, Card, cls, cls.name)
        if backbone is None:
            backbone = card_backbone(card, path)
        elif isinstance(backbone, str):
            backbone = load_backbone(backbone, precision=card.get("precision"))
        check_backbone(card, backbone, path)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.backbone = backbone
        self.log = []
        self.diverged = None
        self.card = {name: card[name] for name in CARD_ENTRIES if name in card}
        self.candidates = list(card["classnames"])
        try:
            self._setup([], 1.0, self.completed(card["hyper_parameters"]), dict)
        except Exception as error:
            raise RecordError(f"{shown_path(path)}: {one_line(error)}") from None
        self._copy_trained(tensors, path)
        return self.eval()

    def _copy_trained(self, tensors, path):
        "Copy the stored tensors into the model; raise ValueError where names or shapes differ."
        trained = adapter_parameters(self.model)
        refusal = f"{path}: the tensors do not fit {self.name!r} as the card describes it:"
        odd = sorted(trained.keys() ^ tensors.keys())
        if odd:
            state = "missing" if odd[0] in trained else "unknown"
            raise ValueError(f"{refusal} {shown_path(odd[0])!r} is {state}")
        for name, parameter in trained.items():
            x = tensors[name]
            if parameter.shape != x.shape:
                shapes = f"{tuple(x.shape)}, not {tuple(parameter.shape)}"
                raise ValueError(f"{refusal} {name!r} is {shapes}")
            parameter.data.copy_(x)


CARD_ENTRIES = ("backbone", "backbone_key", "precision", "problem", "feature_width", "notes")
NAMES_0_1 = {  # method in cards of version 0.1 -> name
    "frozen": "Frozen",
    "full": "FullFineTuning",
    "bitfit": "BitFit",
    "prefix": "Prefix",
    "lora": "LoRA",
    "adapter": "Adapter",
    "gcn": "GCNAdapter",
    "appnp": "APPNPAdapter",
    "gcnii": "GCNIIAdapter",
    "p-adapter": "PAdapter",
}


def _prompts(texts, n):
    "Return one prompt for each of `n` images."
    if texts is None:
        raise ValueError(
            "texts must be the question or prompt: one for all images, or one for each"
        )
    if isinstance(texts, str):
        return [texts] * n
    texts = list(texts)
    if len(texts) != n:
        raise ValueError(f"{n} images but {len(texts)} texts")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts must be text, but item {i} is {text!r}")
    return texts


# %% [markdown]
# A method that trains the last layer norm of the decoder, fitted by hand for one step. New images are answered like those of a problem: with one of the candidates where there are any, otherwise with
# generated text.

# %%
class LastNorm(GenerationMethod):
    "The decoder's last layer norm."

    name = "LastNorm"

    def adapt(self, model, seed):
        model = thin_copy(model)
        for parameter in model.text_decoder.ln_final.parameters():
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(True)
        return model


problem = load_task("mini-vqa", train=32)
method = LastNorm(problem, batch_size=8)
batch = next(iter(method.batches(problem, seed=1)))
before = method.loss(batch)
before.backward()
with torch.no_grad():
    for parameter in method.parameters():
        if parameter.grad is not None:
            parameter -= 0.1 * parameter.grad / parameter.grad.norm()
assert method.loss(batch) < before
test_eq(method.trainable_parameters(), 2 * 96)

images = problem.images("val")[:2]
answers = method.predict(images, "what is it?")
test_fail(lambda: method.predict(images, ["who?"]), contains="2 images but 1 texts")
test_fail(lambda: method.predict(images), contains="texts must be the question or prompt")
answers

# %%
with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
    method.save(file.name)
    test_eq(LastNorm.load(file.name).predict(images, "what is it?"), answers)
