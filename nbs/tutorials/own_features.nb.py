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
# # Own features
# > Adapt features from any model whose image and text features share a space; the model itself is not needed.
#
# This tutorial takes a few seconds. It compares four methods on arrays, stores the best one, and turns it into a matrix
# that needs numpy only. The features may come from SigLIP, from a CLIP of your own, or from audio and text: the methods
# of `va.list_methods("features")` need no backbone.

# %%
import tempfile
from pathlib import Path

import numpy as np

import vlmadapt as va

# %%
#| hide
from fastcore.test import test_fail

# %% [markdown]
# ## Arrays
#
# There are `K` classes and `D` numbers per feature. Rows need not be normalised; numpy or torch, any float type. Here the
# features are drawn at random: every class has a direction, images scatter around it, and its text points roughly there.

# %%
rng, K, D = np.random.default_rng(0), 8, 64
directions = rng.normal(size=(K, D))


def images_of(n):
    y = np.repeat(np.arange(K), n)
    return (directions[y] + 1.6 * rng.normal(size=(len(y), D))).astype(np.float16), y


text = directions + 5 * rng.normal(size=(K, D))
class_names = [f"thing {k}" for k in range(K)]

# %%
problem = va.from_features(
    class_names, text, train=images_of(16), val=images_of(4), test=images_of(50), logit_scale=50.0
)
problem

# %% [markdown]
# Test labels are sealed; only `evaluate` reads them. Support features of several augmented views are given as (R, N, D),
# negative text ("a photo of no ...") as `text_neg`, which HeGraphAdapter needs.

# %%
accuracy = {}
for name in ("ZeroShot", "LinearProbe", "TaskRes", "GDA"):
    method = va.adapt(problem, method=name, trials=8)
    accuracy[name] = va.evaluate(method, problem)["accuracy"]
accuracy

# %%
#| hide
assert min(accuracy["GDA"], accuracy["LinearProbe"]) > accuracy["ZeroShot"] + 10
test_fail(lambda: va.create_method("CoOp", problem), contains="CoOp needs a backbone's text tower")
test_fail(
    lambda: va.from_features(class_names, text[:, :5], train=images_of(2)),
    contains="wide",
)

# %% [markdown]
# A method that needs more than features refuses the problem:

# %%
try:
    va.create_method("CoOp", problem)
except ValueError as error:
    print(error)

# %% [markdown]
# ## Scores, a stored file, a linear head
#
# `predict` and `predict_proba` take features of new images. Methods whose scores are linear in the feature fold into one
# matrix and a bias, which need no library but numpy.

# %%
new, truth = images_of(3)
path = Path(tempfile.mkdtemp()) / "things.safetensors"
method.save(path)
loaded = va.load_method(path)
assert loaded.predict(new) == method.predict(new)
head = loaded.fold()
W, b = head.weight.numpy(), head.bias.numpy()
unit = new.astype(np.float32)
unit /= np.linalg.norm(unit, axis=1, keepdims=True)
by_hand = unit @ W.T + b
assert np.allclose(by_hand, method.scores(new).numpy(), atol=1e-3)
f"{(by_hand.argmax(1) == truth).mean():.0%} of {len(truth)} new ones are correct"

# %% [markdown]
# A folder with the arrays in `features.safetensors` (`text`, `train_x`, `train_y`, `val_x`, ...) and the names in
# `classnames.json` is a dataset of grids and of the command line: `vlmadapt adapt ./features/`.
#
# Next: [choose a method](choose_a_method.ipynb).
