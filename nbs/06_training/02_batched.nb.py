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
# # Batched training
# > `fit_many` trains many runs of a method as one batch, with the results of training them one by one.
#
# Runs of one method that differ in seed, support set or continuous hyper-parameters have tensors of equal shape. While they train, each run's parameters and gradients are slices
# of one stacked tensor: `torch.func.vmap` computes all losses at once, one backward pass fills all gradients, and torch's own optimiser steps on the slices with each run's rate.
# What the runs have in common (constants of one problem, batches of one seed) is not repeated.

# %%
#| default_exp training.batched

# %%
#| export
import itertools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch.func import functional_call, vmap
from tqdm.auto import tqdm

from vlmadapt.core.registry import choose
from vlmadapt.core.values import NonNegativeInteger, convert
from vlmadapt.methods.base import Method
from vlmadapt.methods.requirements import check_kind
from vlmadapt.problems.base import Problem
from vlmadapt.problems.batches import Batch
from vlmadapt.training.checks import check_class, check_fittable, is_trained
from vlmadapt.training.loop import (
    check_finite,
    deterministic,
    initialise_method,
    make_optimizer,
    make_schedule,
    record_epoch,
    train,
)

# %%
#| hide
from fastcore.test import test_close, test_fail

from vlmadapt.methods.task_res import TaskRes
from vlmadapt.problems.few_shot import few_shot
from vlmadapt.training.loop import fit


# %% [markdown]
# ## Stacked runs

# %%
#| export
def _stack(tensors):
    "Return one tensor and None where all runs have the same, else their stack and dimension 0."
    first = tensors[0]
    if all(x is first or torch.equal(x, first) for x in tensors):
        return first, None
    return torch.stack(tensors), 0


# %%
#| export
class Stacked:
    "Runs of one method with tensors of equal shape, computed as one."

    def __init__(self, methods: list[Method]):
        self.methods = methods
        self.buffers = {}
        self.buffer_dims = {}
        for name, _ in methods[0].named_buffers():
            stacked, dim = _stack([method.get_buffer(name) for method in methods])
            self.buffers[name] = stacked
            self.buffer_dims[name] = dim
        self.parameters = {}
        for name, _ in methods[0].named_parameters():
            self.parameters[name] = self._stacked_parameter(name)

    def _stacked_parameter(self, name):
        "Stack a parameter of all runs; the runs' own parameters become slices of the stack."
        own = [method.get_parameter(name) for method in self.methods]
        stacked = torch.stack([parameter.detach() for parameter in own]).requires_grad_()
        stacked.grad = torch.zeros_like(stacked)
        slices = zip(own, stacked.detach(), stacked.grad, strict=True)
        for parameter, value, grad in slices:
            parameter.data = value
            parameter.grad = grad
        return stacked

    def backward(
        self,
        batches: list[Batch],  # distinct batches
        which: torch.Tensor,  # (runs,) the batch of each run
    ) -> torch.Tensor:  # (runs,) losses
        "Compute the losses and gradients of all runs."
        for x in self.parameters.values():
            x.grad.zero_()
        batch, dim = batches[0], None
        if len(batches) > 1:
            batch = Batch(*(torch.stack(x)[which] for x in zip(*batches, strict=True)))
            dim = 0

        def loss(parameters, buffers, batch):
            return functional_call(self.methods[0], (parameters, buffers), (batch, "loss"))

        losses = vmap(loss, in_dims=(0, self.buffer_dims, dim))(
            self.parameters, self.buffers, batch
        )
        losses.sum().backward()
        return losses.detach()

    def release(self) -> None:
        "Give each run tensors of its own again."
        for method in self.methods:
            for parameter in method.parameters():
                parameter.data = parameter.data.clone()
                parameter.grad = None


# %% [markdown]
# The loop is that of `train`, for several runs at once. Runs on the same problem with the same seed share their batches.

# %%
#| export
def _shared_batches(methods, problems, seeds):
    "Return the distinct sources of batches, and which of them each run reads."
    sources = {}
    which = []
    for problem, seed in zip(problems, seeds, strict=True):
        key = id(problem), seed
        if key not in sources:
            sources[key] = methods[0].batches(problem, seed)
        which.append(list(sources).index(key))
    return list(sources.values()), torch.tensor(which, device=methods[0].device)


def train_stacked(
    methods: list[Method],  # after `initialise_method`, with tensors of equal shape
    problems: list[Problem],  # to fit, one for each method
    seeds: list[int],  # of the order of batches and views, one for each method
    progress: bool = True,  # show a bar on long runs
) -> None:
    "Train runs side by side, as `train` does one by one."
    recipe = methods[0].hyper_parameters
    sources, which = _shared_batches(methods, problems, seeds)
    steps = len(sources[0])
    stack = Stacked(methods)
    optimizer = make_optimizer(methods)
    schedule = make_schedule(optimizer, recipe["schedule"], recipe["epochs"], steps)
    name = f"{type(methods[0]).__name__} x {len(methods)}"
    for epoch in tqdm(
        range(recipe["epochs"]), desc=name, delay=3, leave=False, disable=not progress
    ):
        total = torch.zeros(())
        rates = {}
        for batches in zip(*sources, strict=True):
            total = total + stack.backward(list(batches), which)
            rates = {g["initial_lr"]: g["lr"] for g in optimizer.param_groups}
            optimizer.step()
            schedule.step()
        losses = (total / steps).tolist()
        for method, problem, loss in zip(methods, problems, losses, strict=True):
            record_epoch(method, problem, epoch, loss, rates[method.hyper_parameters["lr"]])
        if all(method.diverged for method in methods):
            break
    stack.release()


# %% [markdown]
# ## Many runs
#
# Runs are grouped by what must agree for stacking: the method, its integer and text hyper-parameters, and every tensor's shape. Groups are
# cut so that the stacked parameters stay small. A method that runs a tower fills the machine by itself; such runs are trained alone.

# %%
#| export
STACK_LIMIT = 50_000_000  # trained values in one stack of runs


def _shape_key(method, problem):
    "Return what must agree between runs of one stack."
    free = {*method.batched_names(), "lr", "weight_decay"}
    fixed = sorted((k, v) for k, v in method.hyper_parameters.items() if k not in free)
    tensors = itertools.chain(method.named_parameters(), method.named_buffers())
    shapes = tuple((name, tuple(x.shape)) for name, x in tensors)
    return type(method), repr(fixed), shapes, len(problem.labels["train"])


def _groups(runs) -> Iterator[list[int]]:
    "Yield lists of positions of runs that can be stacked."
    groups = {}
    for i, (method, problem, _) in enumerate(runs):
        if is_trained(method):
            groups.setdefault(_shape_key(method, problem), []).append(i)
    for members in groups.values():
        method = runs[members[0]][0]
        size = 1
        if not method.runs_tower():
            size = max(1, STACK_LIMIT // method.trainable_parameters())
        for start in range(0, len(members), size):
            yield members[start : start + size]


# %%
#| export
def _built(run):
    "Return the method of a run of `fit_many`, its problem and its seed."
    if not isinstance(run, (tuple, list)) or len(run) != 4:
        raise ValueError("fit_many takes tuples (method class, hyper-parameters, problem, seed)")
    cls, values, problem, seed = run
    check_class(cls, "fit_many")
    method = cls(problem, **values)
    check_fittable(method, problem, "fit_many")
    check_kind(method, problem)
    return method, problem, convert(seed, NonNegativeInteger, "seed")


# %%
#| export
def fit_many(
    runs: list[tuple[type[Method], dict[str, Any], Problem, int]],  # see below
    device: str | None = None,  # as in `fit`
    progress: bool = True,  # show a bar on long runs
    on_diverge: Literal["raise", "keep"] = "raise",  # "keep": `diverged` of the method tells
) -> list[Method]:  # fitted methods, in the order of `runs`
    """Train many runs; those with tensors of equal shape are computed as one batch.

    A run is a tuple (method class, hyper-parameters, problem, seed).
    """
    choose(on_diverge, dict.fromkeys(("raise", "keep")), "answer to divergence")
    built = [_built(run) for run in runs]
    with deterministic():
        for method, problem, seed in built:
            initialise_method(method, problem, seed, device)
        for members in _groups(built):
            methods, problems, seeds = (
                list(x) for x in zip(*(built[i] for i in members), strict=True)
            )
            if len(methods) == 1:
                train(methods[0], problems[0], seeds[0], progress)
            else:
                train_stacked(methods, problems, seeds, progress)
        for method, problem, seed in built:
            check_finite(method, problem, seed)
    for method, *_ in built:
        if method.diverged and on_diverge == "raise":
            raise FloatingPointError(method.diverged)
    return [method.eval() for method, *_ in built]


# %% [markdown]
# Batched training agrees with the reference loop, also where problems, seeds and rates differ:

# %%
problem = few_shot("mini-digits", shots=8, seed=1)
other = few_shot("mini-digits", shots=8, seed=2)
short = dict(epochs=10)
runs = [
    (TaskRes, dict(short, lr=1e-3), problem, 1),
    (TaskRes, dict(short, lr=1e-2, alpha=0.3), problem, 1),
    (TaskRes, dict(short, lr=1e-2, alpha=0.3), other, 2),
]
reference = [fit(cls(p, **values), p, seed) for cls, values, p, seed in runs]
for a, b in zip(fit_many(runs), reference, strict=True):
    test_close(a.X.detach(), b.X.detach(), eps=1e-5)
    test_close([e["loss"] for e in a.log], [e["loss"] for e in b.log], eps=1e-5)
    assert [e["lr"] for e in a.log] == [e["lr"] for e in b.log]
assert (reference[1].X - reference[2].X).abs().max() > 1e-3

# %% [markdown]
# The same with batches of 32 of the 80 support images, whose last batch has 16:

# %%
incomplete = dict(batch_size=32, epochs=3, drop_last=False)
runs = [(cls, {**values, **incomplete}, p, seed) for cls, values, p, seed in runs]
for a, (cls, values, p, seed) in zip(fit_many(runs), runs, strict=True):
    test_close(a.X.detach(), fit(cls(p, **values), p, seed).X.detach(), eps=1e-5)
both_rules = [(TaskRes, {**incomplete, "drop_last": rule}, problem, 1) for rule in (False, True)]
all_images, full_batches = fit_many(both_rules)
assert (all_images.X - full_batches.X).abs().max() > 1e-4


# %% [markdown]
# A run that diverges is named and leaves the others of its stack alone:

# %%
class Fragile(TaskRes):
    def loss(self, batch):
        return super().loss(batch) * torch.where(self.alpha > 1, torch.nan, 1.0)


runs = [(Fragile, dict(short, alpha=alpha), problem, 1) for alpha in (2.0, 0.5)]
bad, good = fit_many(runs, on_diverge="keep")
assert bad.diverged and not good.diverged
test_close(good.X.detach(), fit(TaskRes(problem, **short), problem).X.detach(), eps=1e-5)
test_fail(lambda: fit_many(runs), exc=FloatingPointError, contains="the loss became nan")
test_fail(lambda: fit_many([(good, {}, problem, 1)]), contains="a Fragile that is built already")
