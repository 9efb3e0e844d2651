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
# # Training loop
# > `fit` resets a method from a seed and trains it on the support images of a problem.

# %%
#| default_exp training.loop

# %%
#| export
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from tqdm.auto import tqdm

from vlmadapt.core.registry import choose
from vlmadapt.core.values import NonNegativeInteger, convert
from vlmadapt.methods.base import Method
from vlmadapt.methods.hyper_parameters import hyper_parameter
from vlmadapt.problems.base import Problem
from vlmadapt.problems.batches import Batch
from vlmadapt.training.checks import check_fittable, check_partners, check_trainable, is_trained

# %%
#| hide
from typing import get_args

import pandas as pd
from fastcore.test import test_close, test_eq, test_fail, test_ne
from torch import nn

from vlmadapt.core.hashing import content_key
from vlmadapt.methods.hyper_parameters import RECIPE
from vlmadapt.methods.linear_head import same_length
from vlmadapt.problems.few_shot import few_shot


# %% [markdown]
# The example is a trained shift of the text classifier:

# %%
class Shift(Method):
    "Text classifier plus a trained shift."

    recipe = dict(
        optimizer="adamw",
        lr=1e-3,
        weight_decay=0.0,
        epochs=10,
        batch_size=256,
        schedule="warmup_cosine",
    )

    scale: float = hyper_parameter(1.0, batched=True)

    def constants(self, problem):
        return dict(text=problem.features.text)

    def init(self, generator):
        self.table = nn.Parameter(torch.zeros_like(self.text))

    def logits(self, batch):
        moved = self.text + self.scale * self.table
        return self.cosine_logits(batch.x, same_length(moved, self.text))


# %%
problem = few_shot("mini-digits", shots=8, seed=1)
shift = Shift(problem, scale=0.5, lr=1e-2)


# %% [markdown]
# ## Learning-rate schedules
#
# All schedules are functions of the step, so that no rounding error accumulates. CoOp's cosine with one constant warm-up epoch changes once per epoch and has period $E$, so it never
# reaches its end:
#
# $$\eta_0=10^{-5},\qquad \eta_e=\tfrac{\eta}{2}\Big(1+\cos\frac{\pi(e-1)}{E}\Big),\; e\ge1 .$$
#
# Tip-Adapter-F uses a plain cosine per step, p-adapter a straight line to zero.

# %%
#| export
class WarmupCosine(LRScheduler):
    "CoOp's schedule: one epoch at 1e-5, then a cosine that changes once per epoch."

    def __init__(self, optimizer: torch.optim.Optimizer, epochs: int, steps: int):
        self.epochs = epochs
        self.steps = steps  # in an epoch
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        epoch = self.last_epoch // self.steps  # last_epoch counts steps
        if epoch == 0:
            return [1e-5 for _ in self.base_lrs]
        factor = 1 + math.cos(math.pi * ((epoch - 1) / self.epochs))
        return [lr * factor / 2 for lr in self.base_lrs]


SCHEDULES = ("warmup_cosine", "cosine", "linear", "constant")


def make_schedule(
    optimizer: torch.optim.Optimizer,  # whose rates are scheduled
    name: str,  # one of `SCHEDULES`
    epochs: int,  # number of epochs
    steps: int,  # steps in an epoch
) -> LRScheduler:  # `step` is called after each step of the optimiser
    "Return the learning-rate schedule of that name."
    choose(name, dict.fromkeys(SCHEDULES), "schedule")
    total = epochs * steps
    if name == "warmup_cosine":
        return WarmupCosine(optimizer, epochs, steps)
    if name == "cosine":
        return LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * (step / total))) / 2)
    if name == "linear":
        return LambdaLR(optimizer, lambda step: 1 - step / total)
    return LambdaLR(optimizer, lambda step: 1.0)


# %%
def scheduled_rates(name, lr, epochs, steps=1):
    "Learning rate of each step."
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = make_schedule(optimizer, name, epochs, steps)
    rates = []
    for _ in range(epochs * steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


test_eq(get_args(RECIPE["schedule"]), SCHEDULES)
expected = [1e-5, 0.0025, 0.0022613, 0.0016363, 0.00086373]
test_close(scheduled_rates("warmup_cosine", 0.0025, 5), expected, eps=5e-8)
test_close(scheduled_rates("warmup_cosine", 0.002, 50)[-1], 7.885299e-06, eps=1e-12)
test_eq(scheduled_rates("warmup_cosine", 0.1, 2, 3), [1e-5] * 3 + [0.1] * 3)
cosine = [1e-3 * (1 + math.cos(math.pi * (step / 12))) / 2 for step in range(12)]
test_eq(scheduled_rates("cosine", 1e-3, 4, 3), cosine)
test_eq(scheduled_rates("linear", 1e-3, 4, 3), [1e-3 * (1 - step / 12) for step in range(12)])


# %%
#| export
def _sgd(groups, **options):
    return torch.optim.SGD(groups, momentum=0.9, **options)


OPTIMIZERS = dict(adamw=torch.optim.AdamW, adam=torch.optim.Adam, sgd=_sgd)


def make_optimizer(
    methods: list[Method],  # trained side by side; they differ in rate and weight decay
) -> torch.optim.Optimizer:
    "Return the optimiser, with a parameter group for each learning rate and weight decay."
    recipe = methods[0].hyper_parameters
    groups: dict[tuple[float, float], list] = {}
    for method in methods:
        for decay, parameters in method.decays():
            groups.setdefault((method.hyper_parameters["lr"], decay), []).extend(parameters)
    options: dict[str, Any] = dict(fused=True)
    if "eps" in recipe:
        options["eps"] = recipe["eps"]
    optimizer = choose(recipe["optimizer"], OPTIMIZERS, "optimizer")
    return optimizer(
        [dict(params=params, lr=lr, weight_decay=decay) for (lr, decay), params in groups.items()],
        **options,
    )


# %% [markdown]
# ## Finite numbers
#
# A run whose loss is not finite is recorded as diverged, with the epoch and the rate. The last step, and a method without a loop, show in no loss. So tensors and scores of support images are looked at once
# more in the end: all support images where their features are in memory, one batch where a tower has to run.

# %%
#| export
def record_epoch(
    method: Method,  # in training
    problem: Problem,  # for the message
    epoch: int,  # from 0
    loss: float,  # mean over the epoch
    lr: float,  # learning rate of its last step
) -> None:
    "Add an epoch to the method's log; a loss that is not finite makes the method diverged."
    method.log.append(dict(epoch=epoch, loss=loss, lr=lr))
    if not math.isfinite(loss) and not method.diverged:
        method.diverged = (
            f"{type(method).__name__} on {problem}: the loss became {loss} "
            f"in epoch {epoch} at learning rate {lr:.3g}"
        )


def _broken_tensor(method, problem):
    "Return the name of a trained or solved tensor that holds NaN or infinity, or None."
    tensors = {name: x for name, x in method.named_parameters() if x.requires_grad}
    if problem.kind == "classification":
        tensors.update(method.named_buffers())
    for name, x in tensors.items():
        if x.is_floating_point() and not bool(x.isfinite().all()):
            return name
    return None


def _support_scores(method, problem, seed):
    "Return scores of support images, or the loss of a batch of texts; None where none is at hand."
    if problem.kind == "generation":
        if not is_trained(method):
            return None
        return method.loss(next(iter(method.batches(problem, seed)))).view(1, 1)
    if method.reads_images():
        x = method.inputs(problem, "train")
    elif problem.features.is_loaded("train"):
        x = problem.features.train
    elif problem.features.is_loaded("views"):
        x = problem.features.views[0]
    else:
        return None
    if method.runs_tower():
        x = next(iter(x.split(method.hyper_parameters.get("batch_size", 32))))
    return method.scores(Batch(x))


@torch.no_grad()
def check_finite(
    method: Method,  # fitted
    problem: Problem,  # that it was fitted on
    seed: int,  # of the training
) -> None:
    "Make a fitted method diverged where its tensors or its scores are not finite."
    if method.diverged:
        return
    broken = _broken_tensor(method, problem)
    if broken is None:
        scores = _support_scores(method, problem, seed)
        if scores is None or scores.amax(-1).isfinite().all():
            return
        broken = "the scores of support images"
    rate = f" at learning rate {method.hyper_parameters['lr']:.3g}" if is_trained(method) else ""
    method.diverged = (
        f"{type(method).__name__} on {problem}: NaN or infinity in {broken} after training{rate}"
    )


# %% [markdown]
# ## The loop

# %%
#| export
@contextmanager
def deterministic() -> Iterator[None]:
    "Use torch's deterministic algorithms inside the block."
    settings: Any = torch.utils.deterministic
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    # filling new memory, which nothing here reads, doubles the time of large runs
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill


# %%
#| export
def problem_device(problem: Problem) -> Any:
    "Return where methods are trained: beside the problem's backbone, or on a GPU if there is one."
    if problem.backbone is not None:
        return problem.backbone.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def initialise_method(
    method: Method,  # to be fitted
    problem: Problem,  # to fit
    seed: int,  # of the initialisation
    device: str | None = None,  # default: `problem_device`
) -> None:
    "Reset a method from its seed; a method with a closed form is solved here."
    method.log = []
    method.diverged = None
    method.reset(seed)
    check_trainable(method)
    method.to(device or problem_device(problem))
    if hasattr(method, "solve"):
        method.solve(problem)


def train(
    method: Method,  # after `initialise_method`
    problem: Problem,  # to fit
    seed: int,  # of the order of batches, views and answers
    progress: bool = True,  # show a bar on long runs
    after_epoch: Callable[[int], None] | None = None,  # function of the epoch
) -> None:
    "Train a method by gradient descent: the reference that batched training agrees with."
    recipe = method.hyper_parameters
    batches = method.batches(problem, seed)
    steps = len(batches)
    optimizer = make_optimizer([method])
    schedule = make_schedule(optimizer, recipe["schedule"], recipe["epochs"], steps)
    name = type(method).__name__
    for epoch in tqdm(
        range(recipe["epochs"]), desc=name, delay=3, leave=False, disable=not progress
    ):
        total, lr = torch.zeros(()), 0.0
        for batch in batches:
            method.zero_grad()
            loss = method(batch, "loss")
            loss.backward()
            lr = optimizer.param_groups[0]["lr"]
            optimizer.step()
            schedule.step()
            total = total + loss.detach()
        record_epoch(method, problem, epoch, float(total / steps), lr)
        if after_epoch is not None:
            after_epoch(epoch)
        if method.diverged:
            break
    method.zero_grad()


# %%
#| export
def fit(
    method: Method,  # a method built on `problem`
    problem: Problem,  # support images or training examples to fit
    seed: int = 1,  # initialisation, order of batches, views and answers
    device: str | None = None,  # default: the backbone's device
    progress: bool = True,  # show a bar on long runs
    after_epoch: Callable[[int], None] | None = None,  # function of the epoch, called after it
) -> Method:  # the same method, trained
    """Reset `method` from `seed` and train it on the train split of `problem`.

    Raises FloatingPointError when loss, trained tensors or scores are not finite.
    """
    check_fittable(method, problem, "fit")
    check_partners(method, problem, fitting=True)
    seed = convert(seed, NonNegativeInteger, "seed")
    with deterministic():
        initialise_method(method, problem, seed, device)
        if is_trained(method):
            train(method, problem, seed, progress, after_epoch)
        check_finite(method, problem, seed)
    if method.diverged:
        raise FloatingPointError(method.diverged)
    return method.eval()


# %%
fit(shift, problem, seed=1)
pd.DataFrame(shift.log).plot(
    x="epoch", y="loss", figsize=(4, 2), legend=False, ylabel="training loss"
);

# %% [markdown]
# Fitting twice gives the same bytes, another seed does not:

# %%
first = shift.table.detach().clone()
test_eq(fit(shift, problem, seed=1).table.detach(), first)
test_ne(fit(shift, problem, seed=2).table.detach(), first)
test_eq(fit(shift, problem, seed="1").table.detach(), first)

# %% [markdown]
# The backbone is not touched, whatever is fitted:

# %%
test_eq(
    content_key(weights=problem.backbone.model.state_dict()),
    content_key(weights=few_shot("mini-digits").backbone.model.state_dict()),
)
test_eq([p.grad for p in problem.backbone.model.parameters() if p.grad is not None], [])


# %% [markdown]
# A run that diverges is refused with the epoch and the rate, also where the last step broke it:

# %%
class Fragile(Shift):
    def loss(self, batch):
        return super().loss(batch) * torch.where(self.scale > 1, torch.nan, 1.0)


test_fail(
    lambda: fit(Fragile(problem, scale=2.0), problem),
    exc=FloatingPointError,
    contains="Fragile on mini-digits, 8 shots, seed 1: the loss became nan in epoch 0",
)
test_fail(
    lambda: fit(Shift(problem, lr=1e38, epochs=1, schedule="constant"), problem),
    exc=FloatingPointError,
    contains="NaN or infinity in",
)


# %%
#| hide
class Idle(Shift):
    def init(self, generator):
        pass


class Partial(Shift):
    recipe = dict(lr=1e-3, epochs=2)


test_fail(lambda: fit(Idle(problem), problem), contains="Idle has a recipe but nothing to train")
test_fail(
    lambda: fit(Partial(problem), problem),
    contains="its recipe lacks optimizer, weight_decay, batch_size, schedule",
)
test_fail(lambda: fit(Shift, problem), contains="not the class Shift: fit(Shift(problem), problem)")
test_fail(
    lambda: fit(shift, problem, seed=-1),
    contains="seed: input should be greater than or equal to 0",
)
