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
# # All methods
# > The registry of every method by name.

# %%
#| default_exp methods.__init__

# %%
#| export
from vlmadapt.methods.registry import Kind, MethodRegistry

# %%
#| hide
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastcore.test import test_eq, test_fail
from PIL import Image

from vlmadapt.core.hashing import content_key
from vlmadapt.data.images import Images
from vlmadapt.methods.registry import kind_of
from vlmadapt.problems.classification import Features, FewShotProblem
from vlmadapt.problems.few_shot import few_shot
from vlmadapt.training.batched import fit_many
from vlmadapt.training.evaluation import evaluate
from vlmadapt.training.loop import fit

# %% [markdown]
# `METHODS["TaskRes"]` imports and returns the class; `METHODS.names("features")` lists names without importing anything; `METHODS.register("MyMethod", MyMethod)` adds one.

# %%
#| export
_METHODS: tuple[tuple[str, str, Kind], ...] = (
    ("ZeroShot", "zero_shot", "features"),
    ("LinearProbeScratch", "linear_probe", "features"),
    ("LinearProbe", "linear_probe", "features"),
    ("GDA", "gda", "features"),
    ("TipAdapter", "tip_adapter", "features"),
    ("TipAdapterF", "tip_adapter", "features"),
    ("CLIPAdapter", "clip_adapter", "features"),
    ("TaskRes", "task_res", "features"),
    ("GraphAdapter", "graph_adapter", "features"),
    ("ProtoCLIP", "proto_clip", "features"),
    ("HeGraphAdapter", "hegraph_adapter", "features"),
    ("CoOp", "coop", "prompts"),
    ("CoCoOp", "coop", "prompts"),
    ("VPT", "vpt_maple", "prompts"),
    ("MaPLe", "vpt_maple", "prompts"),
    ("MuDPT", "mudpt", "prompts"),
    ("PAdapter", "p_adapter", "towers"),
    ("AnchoredProbe", "anchored_probe", "features"),
    ("Frozen", "generation", "generation"),
    ("FullFineTuning", "generation", "generation"),
    ("BitFit", "generation", "generation"),
    ("Prefix", "generation", "generation"),
    ("LoRA", "generation", "generation"),
    ("Adapter", "generation", "generation"),
    ("PAdapter", "generation", "generation"),
    ("GCNAdapter", "generation", "generation"),
    ("APPNPAdapter", "generation", "generation"),
    ("GCNIIAdapter", "generation", "generation"),
)
_CLASSES = {  # where the class is called otherwise
    ("PAdapter", "generation"): "GenerationPAdapter",
}

METHODS = MethodRegistry(entry_points="vlmadapt.methods")
for _name, _module, _kind in _METHODS:
    METHODS.register(
        _name, f"vlmadapt.methods.{_module}:{_CLASSES.get((_name, _module), _name)}", _kind
    )

# %%
#| hide
test_eq(
    {name: kind_of(cls) for name, cls in METHODS.classifiers().items()},
    {n: METHODS.entry(n).kind for n in METHODS.classifiers()},
)

# %% [markdown]
# ## What they need and train
#
# Default hyper-parameters on one small problem (two epochs for those that run a tower). Afterwards the backbone's weights and outputs are what they were, byte for byte.

# %%
problem = few_shot("mini-digits", shots=4, seed=1)


def weights():
    return content_key(weights=problem.backbone.model.state_dict())


images = [problem.images("test")[i] for i in range(4)]
before = weights(), problem.backbone.encode_images(images)
towers = {name: cls for name, cls in METHODS.classifiers().items() if cls.runs_tower()}
on_features = {name: cls for name, cls in METHODS.classifiers().items() if name not in towers}
methods = {
    name: fit(cls(problem, **({"epochs": 2} if name in towers else {})), problem)
    for name, cls in METHODS.classifiers().items()
}
test_eq(weights(), before[0])
test_eq(problem.backbone.encode_images(images), before[1])

# %%
pd.DataFrame(
    {
        name: dict(
            what=type(m).__doc__.split(";")[0],
            needs=", ".join(sorted(m.needs)),
            trained=m.trainable_parameters(),
            tuned=", ".join([*m.space, *m.posthoc]),
        )
        for name, m in methods.items()
    }
).T


# %% [markdown]
# ## Odd problems
#
# One class, two classes, a class without a support image, unequal shots: every method that reads features gives finite scores, alone and in a batch of runs. The others refuse a problem without a backbone.

# %%
def odd_problem(K, counts, D=6, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape)

    y = np.repeat(np.arange(K), counts)
    return FewShotProblem.from_features(
        [f"c{k}" for k in range(K)],
        normal(K, D),
        train=(normal(2, len(y), D), y),
        val=(normal(2 * K, D), np.arange(2 * K) % K),
        text_neg=normal(K, D),
    )


z = torch.as_tensor(np.random.default_rng(1).normal(size=(7, 6)))


def few(cls):
    return {"epochs": 3} if "epochs" in cls.recipe else {}


for K, counts in ((1, (2,)), (2, (1, 3)), (3, (2, 0, 1)), (5, (3, 1, 2, 4, 2))):
    odd = odd_problem(K, counts)
    for name, cls in on_features.items():
        assert fit(cls(odd, **few(cls)), odd).scores(z).isfinite().all(), (name, K)
        for m in fit_many([(cls, few(cls), odd, seed) for seed in (1, 2)]):
            assert m.scores(z).isfinite().all(), (name, K)
for cls in towers.values():
    test_fail(lambda cls=cls: cls(odd), contains=f"{cls.__name__} needs a backbone's")

# %% [markdown]
# The methods that run a tower get the same problems with images of unequal size. Two classes of one name get equal scores:

# %%
mini = problem.backbone


def odd_images(counts):
    rng = np.random.default_rng(0)

    def draw(i):
        return Image.fromarray(rng.integers(0, 255, (40, 50 + i, 3), dtype=np.uint8))

    images = {
        split: Images(
            [draw(i) for i in range(sum(n))], torch.as_tensor(np.repeat(np.arange(len(n)), n))
        )
        for split, n in dict(train=counts, test=[2] * len(counts)).items()
    }
    f = Features(
        views=mini.encode_images(images["train"].items)[None],
        test=mini.encode_images(images["test"].items),
    )
    return FewShotProblem(
        ["oak", "elm", "oak"][: len(counts)],
        f,
        {s: x.labels for s, x in images.items()},
        mini.logit_scale,
        mini,
        images,
    )


for counts in ((2,), (1, 3), (2, 0, 1)):
    odd = odd_images(counts)
    for name, cls in towers.items():
        m = fit(cls(odd, epochs=1), odd)
        scores = m.scores(m.inputs(odd, "test"))
        assert scores.isfinite().all() and (
            len(counts) < 3 or torch.equal(scores[:, 0], scores[:, 2])
        ), name

# %% [markdown]
# A batch of runs gives what the runs give alone, for each of these methods, whether they differ in their support set, their seed or the learning rate:

# %%
gaps, pair = {}, [odd_problem(5, (3, 3, 3, 3, 3), seed=s) for s in (1, 2)]
for name, cls in on_features.items():
    hypers = [{**few(cls), **({"lr": lr} if "lr" in cls.recipe else {})} for lr in (1e-3, 3e-3)]
    runs = [(cls, hp, p, s) for hp in hypers for s, p in enumerate(pair, 1)]
    gaps[name] = max(
        float((m.scores(z) - fit(c(p, **hp), p, s).scores(z)).abs().max())
        for m, (c, hp, p, s) in zip(fit_many(runs), runs, strict=True)
    )
assert max(gaps.values()) < 1e-9
pd.Series(gaps, name="largest difference of scores, float64").map("{:.0e}".format).to_frame().T

# %% [markdown]
# What cannot work is refused in one line:

# %%
rows, text = np.ones((4, 6)), np.eye(4, 6)
test_fail(
    lambda: FewShotProblem.from_features(list("abcd"), text, train=(np.ones((4, 5)), range(4))),
    contains="train features are 5 wide, text features 6",
)
test_fail(
    lambda: FewShotProblem.from_features(
        list("abcd"), text, train=(np.where(np.arange(6) == 2, np.nan, rows), range(4))
    ),
    contains="rows hold NaN",
)
test_fail(
    lambda: METHODS["HeGraphAdapter"](
        FewShotProblem.from_features(list("abcd"), text, train=(rows, range(4)))
    ),
    contains="no 'text_neg' features",
)
test_fail(
    lambda: METHODS["HeGraph"], contains="unknown method 'HeGraph'; did you mean 'HeGraphAdapter'?"
)

# %% [markdown]
# ## Shifted images, fewer classes
#
# A method that is fitted on one dataset can be evaluated on another whose classes it knows. The variants of `mini-shapes` stand for ImageNet-V2, -Sketch, -A and -R; two of
# them hold half of the classes, and the classifier then has those only.

# %%
source = few_shot("mini-shapes", shots=16, seed=1)
shifted = {
    "mini-shapes": source,
    **{f"-{s}": few_shot(f"mini-shapes-{s}") for s in ("v2", "sketch", "noise", "rendition")},
}
fitted = {
    name: fit(METHODS[name](source), source)
    for name in ("ZeroShot", "TipAdapterF", "HeGraphAdapter")
}
pd.DataFrame(
    {
        name: {s: evaluate(m, p)["accuracy"] for s, p in shifted.items()}
        for name, m in fitted.items()
    }
).T.round(1)

# %%
test_fail(
    lambda: evaluate(fitted["HeGraphAdapter"], problem),
    contains="was fitted for other classes: it does not know",
)
test_fail(lambda: fit(METHODS["TipAdapter"](source), shifted["-v2"]), contains="no support images")

# %% [markdown]
# ## Stored and loaded
#
# After storing and loading, every method gives the same scores to the bit:

# %%
for name, m in methods.items():
    path = Path(tempfile.mkdtemp()) / f"{name}.safetensors"
    m.save(path)
    test_eq(
        METHODS[name].load(path).scores(m.inputs(problem, "test")),
        m.scores(m.inputs(problem, "test")),
    )
