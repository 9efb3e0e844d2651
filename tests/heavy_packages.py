"""Imported once by the interpreter that `warm_process` forks: what most notebooks and scripts load
first, and the built-in model and datasets that they use.
"""

import gc

import fastcore.test  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import nbdev.test  # noqa: F401
import pandas  # noqa: F401
import scipy.stats  # noqa: F401
import seaborn  # noqa: F401
import sklearn.linear_model  # noqa: F401

import vlmadapt
from vlmadapt.methods import METHODS
from vlmadapt.mini.data import load
from vlmadapt.models.backbones import load_backbone
from vlmadapt.models.open_clip_import import import_open_clip

import_open_clip()
names = [getattr(vlmadapt, name) for name in vlmadapt.__all__]  # imports their modules
classes = list(METHODS.values())  # and those of the methods
datasets = [load(name) for name in ("mini-digits", "mini-shapes")]
backbone = load_backbone("mini", device="cpu")
gc.collect()
gc.freeze()  # a collection in a fork would copy every page
