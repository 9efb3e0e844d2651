"""Imported once by the server that `notebook_cells` forks: what most notebooks load first."""

import fastcore.test  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import nbdev.test  # noqa: F401
import pandas  # noqa: F401
import scipy.stats  # noqa: F401
import sklearn.linear_model  # noqa: F401

from vlmadapt.models.open_clip_import import import_open_clip

import_open_clip()
