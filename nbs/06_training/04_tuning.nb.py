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
# # Tuning
# > `tune` chooses hyper-parameters on validation data and returns the fitted winner.
#
# Hyper-parameters are chosen on validation data only: the problem's own (CoOp draws min(S, 4) images per class), or, when a classification problem has none, min(S/4, 4) shots per class held
# out from the support set. With nothing to hold out, at one to three shots, or with no trials, the defaults are returned. `selection` records which was done.
# Fixed values and the search space are converted and checked as in the constructor.

# %%
#| default_exp training.tuning

# %%
#| export
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch.func import functional_call, vmap

from vlmadapt.core.registry import choose
from vlmadapt.core.seeding import np_stream
from vlmadapt.core.values import NonNegativeInteger, convert
from vlmadapt.data.sampling import VAL_SHOTS
from vlmadapt.methods import METHODS
from vlmadapt.methods.base import Method
from vlmadapt.methods.requirements import check_kind
from vlmadapt.models.pixels import Pixels
from vlmadapt.problems.base import Problem
from vlmadapt.problems.batches import Batch
from vlmadapt.problems.classification import Features, FewShotProblem
from vlmadapt.training.batched import fit_many
from vlmadapt.training.checks import check_class, check_problem

# %%
#| hide
from fastcore.test import test_close, test_eq, test_fail
from torch import nn

from vlmadapt.methods.task_res import TaskRes
from vlmadapt.problems.few_shot import few_shot
from vlmadapt.problems.generation import load_task
from vlmadapt.training.loop import fit


# %% [markdown]
# ## Validation data

# %%
#| export
def _held_out(y, K):
    "Return positions of support images that stay, and of min(S/4, 4) per class that are held out."
    counts = torch.bincount(y, minlength=K).tolist()
    taken = [0] * K
    rest, aside = [], []
    for i, k in enumerate(y.tolist()):
        if taken[k] < min(counts[k] // 4, VAL_SHOTS):
            taken[k] += 1
            aside.append(i)
        else:
            rest.append(i)
    return rest, aside


def hold_out(
    problem: FewShotProblem,  # without validation images
) -> FewShotProblem:  # the other support images, and those held out as val
    "Hold min(S/4, 4) support images per class out for validation."
    y = problem.labels["train"]
    rest, aside = _held_out(y, problem.K)
    features = problem.features
    sources = {}
    for name in ("text", "text_neg", "text_raw", "sentences", "owner", "test"):
        if name in features:
            sources[name] = lambda name=name: getattr(features, name)
    sources["views"] = lambda: features.views[:, rest]
    sources["train"] = lambda: features.train[rest]
    sources["val"] = lambda: features.train[aside]
    images = {}
    if problem.has_images("train"):
        support = problem.images("train")
        images = dict(train=support.subset(rest), val=support.subset(aside))
    return FewShotProblem(
        problem.class_names,
        Features(**sources),
        dict(train=y[rest], val=y[aside]),
        problem.logit_scale,
        problem.backbone,
        images,
        problem.provenance,
        problem.flip,
    )


# %%
problem = few_shot("mini-digits", shots=8, seed=1)
bare = FewShotProblem.from_features(
    problem.class_names,
    problem.features.text,
    train=(problem.features.views, problem.labels["train"]),
)
rest = hold_out(bare)
test_eq((len(rest.labels["train"]), len(rest.features.val)), (60, 20))
test_eq(torch.bincount(rest.labels["val"]), torch.full((10,), 2))


# %% [markdown]
# ## Values that act at test time
#
# Hyper-parameters that act only at test time (`posthoc`) are swept on the trained method. They are buffers, so one `vmap` per axis of the grid gives all scores as one broadcasted tensor, in which
# a part that depends on one value is computed once per value, and a part that depends on none once. Large grids are cut along the first axis: put the value with the
# most work behind it there. Among equal accuracies the smaller cross-entropy wins.

# %%
#| export
def _accuracy_and_nll(logits, y):
    "Accuracy and mean cross-entropy of (N, K) scores; -0.01 where an image has no finite score."
    finite = logits.amax(-1).isfinite().all()
    accuracy = (logits.argmax(-1) == y).double().mean()
    nll = F.cross_entropy(logits, y)
    return torch.where(finite, accuracy, -0.01), torch.where(finite, nll, math.inf)


def _checked_grid(method, grid):
    "Return a grid of test-time values, converted as the class declares them."
    floats = dict.fromkeys(method.batched_names())
    for name in grid:
        choose(name, floats, f"{type(method).__name__} parameter that can be set after training")
    return _checked_values(type(method), grid)


def _checked_values(cls, space):
    "Return the values to try for each hyper-parameter of `cls`, converted, each once."
    found = {}
    for name, values in space.items():
        if isinstance(values, str) or not hasattr(values, "__iter__"):
            raise ValueError(
                f"{cls.__name__} {name} takes a list of values to try, not {values!r:.60}"
            )
        converted = [cls.checked({name: value})[name] for value in values]
        found[name] = [v for i, v in enumerate(converted) if v not in converted[:i]]
        if not converted:
            raise ValueError(f"{cls.__name__} {name}: the list of values to try is empty")
    return found


SWEEP_LIMIT = 50_000_000  # scores in memory at once


def _chunk_size(method, grid, rows):
    "Return how many values of the first axis are computed at once."
    first, *others = grid.values()
    inner = math.prod(len(values) for values in others)
    return max(1, SWEEP_LIMIT // (rows * max(method.largest(), len(method.class_names) * inner)))


def _sweep_grid(method, grid, x, y):
    "Return accuracy and cross-entropy at all points of a grid, in the order of `product`."

    def measure(*values):
        buffers = dict(zip(grid, values, strict=True))
        return _accuracy_and_nll(functional_call(method, buffers, (Batch(x),)), y)

    axes = range(len(grid))
    for axis in reversed(axes):
        in_dims = tuple(0 if other == axis else None for other in axes)
        chunk = None if axis else _chunk_size(method, grid, len(x))
        measure = vmap(measure, in_dims=in_dims, chunk_size=chunk)
    values = [torch.tensor(v, dtype=x.dtype, device=x.device) for v in grid.values()]
    accuracy, nll = measure(*values)
    return accuracy.flatten().tolist(), nll.flatten().tolist()


@torch.no_grad()
def sweep(
    method: Method,  # fitted
    grid: dict[str, Iterable],  # test-time hyper-parameter -> values
    x: torch.Tensor | Pixels,  # (M, D) validation features; `Pixels` where the grid is empty
    y: torch.Tensor,  # (M,) labels
) -> list[dict[str, Any]]:  # for each point its values, accuracy and nll
    "Score a fitted method at every point of a `grid` of test-time values."
    if method.diverged:
        return [dict(accuracy=-1.0, nll=math.inf)]
    grid = _checked_grid(method, grid)
    if not grid:
        accuracy, nll = _accuracy_and_nll(method.scores(x), y.cpu())
        return [dict(accuracy=100 * float(accuracy), nll=float(nll))]
    assert isinstance(x, torch.Tensor)
    x, y = x.to(method.device), y.to(method.device)
    points = itertools.product(*grid.values())
    found = []
    for values, accuracy, nll in zip(points, *_sweep_grid(method, grid, x, y), strict=True):
        found.append(dict(zip(grid, values, strict=True), accuracy=100 * accuracy, nll=nll))
    return found


# %% [markdown]
# ## The search
#
# For a classifier, the candidates are the defaults and random other points of the space. A generation method is expensive to train: its space is a short list of learning rates, which are tried in order. A
# candidate that diverges is never chosen.

# %%
#| export
class Tuned(dict):
    "Chosen hyper-parameters by name, with how they were chosen."

    def __init__(
        self,
        values: dict[str, Any],  # hyper-parameters
        selection: str,  # "few_shot_val", "held_out_shots", "val" or "defaults"
        trials: pd.DataFrame | None = None,  # hyper-parameters and `value` of all trials
        method: Method | None = None,  # the winner, where it was trained on all support images
        metric: str = "accuracy",  # that `value` is
    ):
        super().__init__(values)
        self.selection = selection
        self.trials = trials
        self.method = method
        self.metric = metric

    @property
    def value(self) -> float | None:
        "The winner's validation value, None without trials."
        return None if self.trials is None else float(np.nanmax(self.trials["value"].to_numpy()))


# %%
#| export
def _points(space):
    "Return all points of a search space, in order."
    return [dict(zip(space, v, strict=True)) for v in itertools.product(*space.values())]


def random_candidates(
    space: dict[str, list],  # hyper-parameter -> values
    first: dict[str, Any],  # the defaults
    trials: int,  # how many candidates
    seed: int,  # of the draw
) -> list[dict[str, Any]]:
    "Return `first` and up to `trials`-1 other random points of `space`, all distinct."
    points = [p for p in _points(space) if not p.items() <= first.items()]
    chosen = np_stream(seed, "tune").permutation(len(points))[: max(trials - 1, 0)]
    return [first] + [{**first, **points[i]} for i in chosen]


# %%
#| export
class Search:
    "The trials of one method on one problem."

    def __init__(
        self,
        cls: type[Method],  # a method class
        problem: Problem,  # to tune on
        seed: int,  # of the candidates and of their training
        fixed: dict[str, Any],  # hyper-parameters that are given
        space: dict[str, list],  # hyper-parameter -> values
        trials: int,  # how many trained candidates
    ):
        self.cls = cls
        self.problem = problem
        self.train = problem  # what candidates are trained and validated on
        self.seed = seed
        idle = cls.unused({**cls.defaults(), **fixed}) | set(fixed)
        self.grid = {n: v for n, v in cls.posthoc.items() if n not in space and n not in idle}
        space = {name: values for name, values in space.items() if name not in idle}
        tuned = {*space, *self.grid}
        self.first = {n: v for n, v in cls.defaults().items() if n in tuned} | fixed
        if problem.kind == "generation":
            self._ordered_candidates(space, fixed, trials)
        else:
            self._random_candidates(space, trials)

    def _ordered_candidates(self, space, fixed, trials):
        "Try the points of the space in order; a single one is taken without validation."
        points = _points(space)[: max(1, trials)]
        self.selection = "val"
        self.candidates = [{**point, **fixed} for point in points]
        if len(points) == 1:
            self.selection = "defaults"
        elif not self.problem.labels.get("val"):
            self.selection = "defaults"
            self.candidates = [self.first]

    def _random_candidates(self, space, trials):
        "Try the defaults and random points, validated on validation or held-out images."
        self.selection = "few_shot_val"
        if not len(self.problem.labels.get("val", ())):
            self.train = hold_out(cast(FewShotProblem, self.problem))
            self.selection = "held_out_shots"
        searched = bool(space or self.grid) and trials > 0
        if not searched or not len(self.train.labels["val"]):
            self.selection = "defaults"
            self.train = self.problem
            space = {}
        self.candidates = random_candidates(space, self.first, trials, self.seed)

    def runs(self) -> list[tuple]:
        "Return the runs that `fit_many` trains."
        return [(self.cls, candidate, self.train, self.seed) for candidate in self.candidates]

    def _validated(self, method):
        "Return the validation value at each point of the grid of test-time values."
        if self.train.kind == "generation":
            if method.diverged:
                return [dict(value=math.nan)]
            found = self.train.score(method.outputs(self.train, "val"), "val")
            return [dict(value=found[self.train.metric])]
        x = method.inputs(self.train, "val")
        points = sweep(method, self.grid, x, self.train.labels["val"])
        for point in points:
            accuracy = point.pop("accuracy")
            point["value"] = accuracy if accuracy >= 0 else math.nan
        return points

    def best(self, methods: Iterable[Method]) -> Tuned:
        "Return the best of the trained candidates; raise FloatingPointError where all diverged."
        if self.selection == "defaults":
            (method,) = methods
            if method.diverged:
                raise FloatingPointError(method.diverged)
            metric = self.problem.metric
            return Tuned(self.candidates[0], self.selection, method=method, metric=metric)
        points: list[dict] = []
        best, winner, failure = None, None, "their validation scores are not finite"
        for candidate, method in zip(self.candidates, methods, strict=True):
            failure = method.diverged or failure
            for point in self._validated(method):
                points.append({**candidate, **point})
                if _is_better(point, best):
                    best, winner = points[-1], method
        if best is None or winner is None:
            raise FloatingPointError(
                f"{self.cls.__name__} on {self.problem}: all {len(self.candidates)} candidates "
                f"diverged, such as {failure}"
            )
        values = {name: best[name] for name in (*self.candidates[0], *self.grid)}
        if self.train is not self.problem:
            winner = None
        elif self.grid:
            winner.set(**{name: best[name] for name in self.grid})
        return Tuned(values, self.selection, pd.DataFrame(points), winner, self.problem.metric)


def _is_better(point, best):
    "Return whether a point has the higher value, or the same and a smaller cross-entropy."
    if math.isnan(point["value"]):
        return False
    if best is None:
        return True
    return (point["value"], -point.get("nll", 0)) > (best["value"], -best.get("nll", 0))


# %%
#| export
def _class_of(method, problem):
    "Return the method class that a name stands for on a problem."
    return METHODS.find(method, problem) if isinstance(method, str) else method


def _trained(cls, searches) -> Iterator[Method]:
    "Yield the trained candidates: one by one where a tower runs, else all in one batch."
    runs = [run for search in searches for run in search.runs()]
    if not cls.runs_tower():
        yield from fit_many(runs, on_diverge="keep")
        return
    for run in runs:
        yield from fit_many([run], on_diverge="keep")


def tune_many(
    method: type[Method] | str,  # a method class, or its name
    problems: list[Problem],  # with support and validation data
    seeds: list[int],  # of the candidates and of their training, one for each problem
    fixed: dict[str, Any] | None = None,  # hyper-parameters that are given
    space: dict[str, Iterable] | None = None,  # name -> values to try; default: the class's own
    trials: int = 16,  # as in `tune`
) -> list[Tuned]:  # one for each problem
    "Tune on several problems, all candidates of all problems trained together."
    if len(problems) != len(seeds):
        raise ValueError(f"{len(problems)} problems but {len(seeds)} seeds")
    for problem in problems:
        check_problem(problem, "tune")
    if not problems:
        return []
    cls = _class_of(method, problems[0])
    check_class(cls, "tune")
    for problem in problems:
        check_kind(cls, problem)
    trials = convert(trials, NonNegativeInteger, "trials")
    given = cls.checked(fixed or {})
    values = _checked_values(cls, cls.space if space is None else space)
    searches = []
    for problem, seed in zip(problems, seeds, strict=True):
        seed = convert(seed, NonNegativeInteger, "seed")
        searches.append(Search(cls, problem, seed, given, values, trials))
    trained = _trained(cls, searches)
    found = []
    for search in searches:
        found.append(search.best(itertools.islice(trained, len(search.candidates))))
    return found


def tune(
    method: type[Method] | str,  # a method class, or its name
    problem: Problem,  # with support and validation data
    trials: int = 16,  # candidates to train at most; with 0 the defaults are taken
    fixed: dict[str, Any] | None = None,  # hyper-parameters that are given
    space: dict[str, Iterable] | None = None,  # name -> values to try; default: the class's own
    seed: int = 1,  # of the candidates and of their training
) -> Tuned:  # `fixed` and the chosen values; its `method` is the fitted winner
    """Choose hyper-parameters on validation data.

    Raises FloatingPointError when all candidates diverge.
    """
    return tune_many(method, [problem], [seed], fixed, space, trials)[0]


# %%
best = tune("TaskRes", problem, trials=4, fixed=dict(epochs=5))
test_eq((best["epochs"], best.selection, best.metric), (5, "few_shot_val", "accuracy"))
test_eq((len(best.trials), best.value), (4, best.trials["value"].max()))
best, best.trials

# %% [markdown]
# The winner is fitted already; fitting again with its values gives the same method. Several problems are tuned in one batch:

# %%
refitted = fit(TaskRes(problem, **best), problem, seed=1)
test_close(best.method.X.detach(), refitted.X.detach(), eps=1e-5)
other = few_shot("mini-digits", shots=8, seed=2)
both = tune_many(TaskRes, [problem, other], [1, 2], fixed=dict(epochs=5), trials=4)
alone = [
    tune(TaskRes, p, 4, fixed=dict(epochs=5), seed=seed) for p, seed in ((problem, 1), (other, 2))
]
test_eq([dict(found) for found in both], [dict(found) for found in alone])

# %% [markdown]
# A generation method is tuned in the same way. The learning rates are tried in order, and each candidate is trained alone:

# %%
task = load_task("mini-vqa", train=32)
best = tune("BitFit", task, fixed=dict(epochs=1), space=dict(lr=[1e-4, 1e-2]))
test_eq((best.selection, best.metric), ("val", "vqa_accuracy"))
test_eq(best.method.hyper_parameters["lr"], best["lr"])
test_eq(tune("Frozen", task).selection, "defaults")
best.trials

# %%
test_eq(tune(TaskRes, bare, trials=2, fixed=dict(epochs=2)).selection, "held_out_shots")
single = FewShotProblem.from_features(
    problem.class_names,
    problem.features.text,
    train=(problem.features.train[::8], problem.labels["train"][::8]),
)
best = tune(TaskRes, single)
test_eq((dict(best), best.selection), (dict(alpha=0.5, lr=2e-3), "defaults"))
test_eq(tune(TaskRes, problem, trials=0).selection, "defaults")
test_fail(lambda: tune(TaskRes, problem, fixed=dict(epoch=5)), contains="did you mean 'epochs'?")
test_fail(
    lambda: tune(TaskRes, problem, fixed=dict(epochs=0)),
    contains="TaskRes epochs: input should be greater than or equal to 1, got 0",
)
test_fail(
    lambda: tune(TaskRes, problem, space=dict(lr=[1e-3, -1])),
    contains="TaskRes lr: input should be greater than 0, got -1",
)
test_fail(
    lambda: tune(TaskRes, problem, space=dict(lr=1e-3)),
    contains="TaskRes lr takes a list of values to try, not 0.001",
)
test_fail(lambda: tune(TaskRes, problem, trials=-1), contains="trials")
test_fail(lambda: tune("BitFit", problem), contains="BitFit")
test_fail(
    lambda: tune(refitted, problem),
    contains="such as METHODS['TaskRes'], not a TaskRes that is built already",
)


# %% [markdown]
# Tuning does not open the test labels, and gives the same values on the same arrays:

# %%
class Unreadable:
    def __getattribute__(self, name):
        raise AssertionError("test labels were read")

    def __len__(self):
        raise AssertionError("test labels were read")


arrays = FewShotProblem.from_features(
    problem.class_names,
    problem.features.text,
    train=(problem.features.views, problem.labels["train"]),
    val=(problem.features.val, problem.labels["val"]),
    test=(problem.features.test, Unreadable()),
)
quick = dict(trials=2, fixed=dict(epochs=5))
test_eq(dict(tune(TaskRes, arrays, **quick)), dict(tune(TaskRes, problem, **quick)))


# %% [markdown]
# A candidate that diverges is not chosen, whatever its accuracy; where all diverge, `tune` raises:

# %%
class Fragile(TaskRes):
    def loss(self, batch):
        return super().loss(batch) * torch.where(self.alpha > 1, torch.nan, 1.0)


space = dict(alpha=[0.5, 2.0])
test_eq(tune(Fragile, problem, 2, fixed=dict(epochs=2), space=space)["alpha"], 0.5)
test_fail(
    lambda: tune(Fragile, problem, 2, dict(epochs=2, alpha=2.0), dict(lr=[1e-3, 1e-2])),
    exc=FloatingPointError,
    contains="candidates diverged",
)


# %% [markdown]
# A method that reads images is tuned in the same way. This one reads the mean colours of sixteen squares:

# %%
class Squares(Method):
    "A linear classifier of sixteen mean grey values."

    needs = {"image_tower"}
    recipe = dict(
        optimizer="adamw",
        lr=1e-2,
        weight_decay=0.0,
        epochs=4,
        batch_size=32,
        schedule="constant",
        crop=0.8,
    )
    space = dict(lr=[1e-3, 1e-2])

    def constants(self, problem):
        return dict(zero=torch.zeros(len(problem.class_names), 16))

    def init(self, generator):
        self.W = nn.Parameter(torch.randn(self.zero.shape, generator=generator) * 0.1)

    def logits(self, batch):
        return F.adaptive_avg_pool2d(batch.x.mean(1), 4).flatten(1) @ self.W.T


squares = fit(Squares(problem), problem)
test_eq(fit_many([(Squares, {}, problem, s) for s in (2, 1)])[1].W.detach(), squares.W.detach())
test_eq(tune(Squares, problem).selection, "few_shot_val")
test_eq(tune(Squares, hold_out(problem), trials=1, space={}).selection, "defaults")
some = [problem.images("test")[i] for i in range(3)]
test_eq(squares.scores(some), squares.scores(squares.inputs(problem, "test"))[:3])
test_fail(lambda: squares.predict(problem.features.test), contains="Squares reads images")
test_fail(
    lambda: Squares(bare),
    contains="Squares needs a backbone's vision transformer and support images",
)
