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
# # The package `vlmadapt`
# > Everything that most users need, by `import vlmadapt as va`.

# %%
#| default_exp __init__

# %%
#| export
import difflib
import importlib
from functools import reduce
from typing import TYPE_CHECKING, Any

__version__ = ""  # nbdev_export writes the version of settings.ini here

# %%
#| hide
import re
import subprocess
import sys

from fastcore.test import test_eq, test_fail

# %% [markdown]
# ```python
# import vlmadapt as va
#
# problem = va.few_shot("oxford_pets", backbone="ViT-B-16", shots=16)
# method = va.adapt(problem)
# va.evaluate(method, problem)
# method.predict(["photo.jpg"])
# ```
#
# The package itself imports nothing heavy. A name is imported from the module that defines it when it is first used, so
# `import vlmadapt` takes milliseconds and `va.list_methods()` works without torch.

# %%
#| export
_MODULES = {
    "vlmadapt.core.environment": ("show_versions",),
    "vlmadapt.core.verbosity": ("set_verbosity", "verbosity"),
    "vlmadapt.data.datasets": ("Dataset", "DatasetSpec", "list_datasets", "register_dataset"),
    "vlmadapt.data.images": ("Images",),
    "vlmadapt.methods": (
        "create_method",
        "list_methods",
        "load_method",
        "method_info",
        "register_method",
    ),
    "vlmadapt.methods.base": ("Method",),
    "vlmadapt.methods.generation_base": ("GenerationMethod",),
    "vlmadapt.methods.hyper_parameters": ("hyper_parameter",),
    "vlmadapt.methods.information": ("MethodInfo",),
    "vlmadapt.models.backbones": (
        "Backbone",
        "BackboneSpec",
        "list_backbones",
        "load_backbone",
        "register_backbone",
    ),
    "vlmadapt.models.hf_adapters": ("AdapterConfig", "PAdapterConfig", "get_model"),
    "vlmadapt.problems.base": ("Problem",),
    "vlmadapt.problems.classification": ("FewShotProblem",),
    "vlmadapt.problems.few_shot": ("few_shot",),
    "vlmadapt.problems.generation": ("GenerationProblem", "load_task"),
    "vlmadapt.problems.own_data": ("from_dataset", "from_folder"),
    "vlmadapt.training.adaptation": ("adapt",),
    "vlmadapt.training.batched": ("fit_many",),
    "vlmadapt.training.comparison": ("compare",),
    "vlmadapt.training.evaluation": ("evaluate",),
    "vlmadapt.training.loop": ("fit",),
    "vlmadapt.training.tuning": ("Tuned", "tune"),
}
_PLACES = {name: (module, name) for module, names in _MODULES.items() for name in names}
_PLACES["cache"] = ("vlmadapt.problems.cache_contents", "")  # the module: cache.info, cache.clear
_PLACES["from_features"] = ("vlmadapt.problems.classification", "FewShotProblem.from_features")

# %% [markdown]
# Editors and type checkers read the same names from imports that never run. `_all_` adds them to `__all__`:

# %%
#| export
if TYPE_CHECKING:
    # fmt: off
    from vlmadapt.core.environment import show_versions  # noqa: F401, I001
    from vlmadapt.core.verbosity import set_verbosity, verbosity  # noqa: F401
    from vlmadapt.data.datasets import Dataset, DatasetSpec, list_datasets  # noqa: F401
    from vlmadapt.data.datasets import register_dataset  # noqa: F401
    from vlmadapt.data.images import Images  # noqa: F401
    from vlmadapt.methods import create_method, list_methods, load_method  # noqa: F401
    from vlmadapt.methods import method_info, register_method  # noqa: F401
    from vlmadapt.methods.base import Method  # noqa: F401
    from vlmadapt.methods.generation_base import GenerationMethod  # noqa: F401
    from vlmadapt.methods.hyper_parameters import hyper_parameter  # noqa: F401
    from vlmadapt.methods.information import MethodInfo  # noqa: F401
    from vlmadapt.models.backbones import Backbone, BackboneSpec, list_backbones  # noqa: F401
    from vlmadapt.models.backbones import load_backbone, register_backbone  # noqa: F401
    from vlmadapt.models.hf_adapters import AdapterConfig, PAdapterConfig  # noqa: F401
    from vlmadapt.models.hf_adapters import get_model  # noqa: F401
    from vlmadapt.problems import cache_contents as cache  # noqa: F401
    from vlmadapt.problems.base import Problem  # noqa: F401
    from vlmadapt.problems.classification import FewShotProblem
    from vlmadapt.problems.few_shot import few_shot  # noqa: F401
    from vlmadapt.problems.generation import GenerationProblem, load_task  # noqa: F401
    from vlmadapt.problems.own_data import from_dataset, from_folder  # noqa: F401
    from vlmadapt.training.adaptation import adapt  # noqa: F401
    from vlmadapt.training.batched import fit_many  # noqa: F401
    from vlmadapt.training.comparison import compare  # noqa: F401
    from vlmadapt.training.evaluation import evaluate  # noqa: F401
    from vlmadapt.training.loop import fit  # noqa: F401
    from vlmadapt.training.tuning import Tuned, tune  # noqa: F401

    from_features = FewShotProblem.from_features

# %%
#| export
_all_ = [
    "AdapterConfig",
    "Backbone",
    "BackboneSpec",
    "Dataset",
    "DatasetSpec",
    "FewShotProblem",
    "GenerationMethod",
    "GenerationProblem",
    "Images",
    "Method",
    "MethodInfo",
    "PAdapterConfig",
    "Problem",
    "Tuned",
    "adapt",
    "cache",
    "compare",
    "create_method",
    "evaluate",
    "few_shot",
    "fit",
    "fit_many",
    "from_features",
    "from_dataset",
    "from_folder",
    "get_model",
    "hyper_parameter",
    "list_backbones",
    "list_datasets",
    "list_methods",
    "load_backbone",
    "load_method",
    "load_task",
    "method_info",
    "register_backbone",
    "register_dataset",
    "register_method",
    "set_verbosity",
    "show_versions",
    "tune",
    "verbosity",
]


# %%
#| export
def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        near = difflib.get_close_matches(name, _PLACES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
    from vlmadapt.core.docstrings import describe_parameters

    module, path = _PLACES[name]
    found = reduce(getattr, filter(None, path.split(".")), importlib.import_module(module))
    globals()[name] = describe_parameters(found)  # the next look-up does not come here
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})


# %% [markdown]
# How many modules `import vlmadapt` loads in a fresh process; torch is not among them, even after the list of
# methods:

# %%
code = """
import sys
before = set(sys.modules)
import vlmadapt as va
loaded = len(set(sys.modules) - before)
print(loaded, len(va.list_methods()), "torch" in sys.modules)
"""
run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
loaded, methods, torch = run.stdout.split()
assert int(loaded) < 30 and torch == "False"
loaded

# %%
import vlmadapt as va

test_eq(sorted(_all_), sorted(_PLACES))
test_eq(sorted(set(va.__all__)), sorted(_PLACES))
assert set(va.__all__) <= set(dir(va))
assert re.fullmatch(r"\d+\.\d+\.\d+\S*", va.__version__)
test_fail(lambda: va.adopt, contains="did you mean 'adapt'?")
va.list_methods("features")
