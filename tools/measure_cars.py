"""Compare `va.adapt` with plainly written loops in the style of the official programs.

    python tools/measure_cars.py BUNDLE --out outputs/measured/plain_loops.json

BUNDLE is a folder of features, such as ViT-B/32's of Stanford Cars with 16 shots. The loops below
follow the published recipes of TaskRes, Tip-Adapter-F, LP++ and CLIP-Adapter line by line, without
anything of this library but the arrays. Both sides train the same epochs with the same
hyper-parameters; Tip-Adapter-F then searches the same two weights on validation images. Seconds
are those of the processor, memory is the growth of the resident memory while a side runs.
"""

import argparse
import json
import math
import os
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import vlmadapt as va
from vlmadapt.core.environment import environment
from vlmadapt.core.verbosity import at_verbosity
from vlmadapt.grid.memory import reset_peak, resident_peak
from vlmadapt.methods import METHODS
from vlmadapt.problems.classification import FewShotProblem

SCALE = 100.0


class Data:
    "The arrays of a problem as the official programs hold them: unit rows and labels."

    def __init__(self, problem):
        features = problem.features
        self.text = features.text
        self.raw = features.train
        self.x = F.normalize(features.train, dim=-1)
        self.y = problem.labels["train"]
        self.val = features.val
        self.val_y = problem.labels["val"]
        self.test = features.test


def batches(count, size, drop_last):
    "Shuffled batches of positions."
    order = torch.randperm(count).split(size)
    return order[:-1] if drop_last and len(order[-1]) < size else order


def dassl_rate(optimizer, base, epoch, epochs):
    "Dassl's schedule: one epoch of constant warm-up, then a cosine by epoch."
    rate = 1e-5 if epoch == 0 else base * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2
    for group in optimizer.param_groups:
        group["lr"] = rate


def task_res(data):
    "TaskRes: a residual on the text features."
    residual = nn.Parameter(torch.zeros_like(data.text))
    optimizer = torch.optim.Adam([residual], lr=2e-3, weight_decay=5e-4)

    def logits(x):
        moved = data.text + 0.5 * residual
        moved = moved / moved.norm(dim=-1, keepdim=True)
        return SCALE * (x / x.norm(dim=-1, keepdim=True)) @ moved.t()

    for epoch in range(100):
        dassl_rate(optimizer, 2e-3, epoch, 100)
        for index in batches(len(data.y), 256, drop_last=True):
            loss = F.cross_entropy(logits(data.raw[index]), data.y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return logits(data.test)


def tip_adapter_f(data):
    "Tip-Adapter-F: trained keys of the cache, then a search over its two weights."
    keys = nn.Parameter(data.x.clone())
    values = F.one_hot(data.y, len(data.text)).float()
    optimizer = torch.optim.AdamW([keys], lr=1e-3, eps=1e-4)
    steps = 20 * math.ceil(len(data.y) / 256)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def logits(x, alpha, beta):
        x = x / x.norm(dim=-1, keepdim=True)
        cache = ((-1) * (beta - beta * (x @ keys.t()))).exp() @ values
        return SCALE * x @ data.text.t() + alpha * cache

    for _ in range(20):
        for index in batches(len(data.y), 256, drop_last=False):
            loss = F.cross_entropy(logits(data.raw[index], 1.17, 1.0), data.y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    best, found = -1.0, (1.17, 1.0)
    grid = METHODS["TipAdapterF"].posthoc
    with torch.no_grad():
        for beta in grid["beta"]:
            for alpha in grid["alpha"]:
                right = logits(data.val, alpha, beta).argmax(1) == data.val_y
                if right.float().mean() > best:
                    best, found = right.float().mean(), (alpha, beta)
        return logits(data.test, *found)


def lp_plus_plus(data):
    "LP++: rows of image and text features, with step sizes that follow from the data."
    N, K = len(data.y), len(data.text)
    one_hot = F.one_hot(data.y, K).float()
    sums = one_hot.t() @ data.x
    means = sums / one_hot.sum(0)[:, None]
    start = 250.0 * (means * data.text).sum(1).mean()
    layer = nn.Linear(data.x.shape[1], K)
    layer.weight.data = sums.clone()
    alpha = (start * torch.ones(K)).requires_grad_()
    rate = 4 * N / torch.linalg.eigvalsh(data.x.t().double() @ data.x.double())[-1].item()
    rate_alpha = N / (4 * (data.x @ data.text.t()).square().sum(0).max().item())
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9)
    total = torch.zeros(K)
    for epoch in range(300):
        logits = layer(data.x) + (data.x @ data.text.t()) * alpha
        loss = F.cross_entropy(logits, data.y)
        optimizer.zero_grad()
        alpha.grad = None
        loss.backward()
        optimizer.step()
        total += alpha.grad
        if (epoch + 1) % 10 == 0:
            alpha.data -= rate_alpha * total
    with torch.no_grad():
        x = F.normalize(data.test, dim=-1)
        return layer(x) + (x @ data.text.t()) * alpha


def clip_adapter(data):
    "CLIP-Adapter: a bottleneck on the image feature."
    D = data.x.shape[1]
    adapter = nn.Sequential(
        nn.Linear(D, D // 4, bias=False),
        nn.ReLU(inplace=True),
        nn.Linear(D // 4, D, bias=False),
        nn.ReLU(inplace=True),
    )
    optimizer = torch.optim.SGD(adapter.parameters(), lr=2e-3, momentum=0.9, weight_decay=5e-4)

    def logits(x):
        x = 0.2 * adapter(x) + 0.8 * x
        return SCALE * (x / x.norm(dim=-1, keepdim=True)) @ data.text.t()

    for epoch in range(50):
        dassl_rate(optimizer, 2e-3, epoch, 50)
        for index in batches(len(data.y), 32, drop_last=True):
            loss = F.cross_entropy(logits(data.raw[index]), data.y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return logits(data.test)


LOOPS = dict(
    TaskRes=task_res, TipAdapterF=tip_adapter_f, LPPlusPlus=lp_plus_plus, CLIPAdapter=clip_adapter
)


def fixed_values(name: str) -> dict:
    "The defaults of everything that a search would train anew."
    cls = METHODS[name]
    return {n: v for n, v in cls.defaults().items() if n in cls.space}


def adapted(name, problem, seed):
    "Scores of the library on the test images."
    fixed = fixed_values(name)
    method = va.adapt(problem, method=name, trials=1, seed=seed, fixed=fixed)
    return method.outputs(problem, "test")


def measured(function) -> tuple[torch.Tensor, float, float]:
    "Scores, processor seconds and MB by which the resident memory grew."
    reset_peak()
    before, start = resident_peak(), time.process_time()
    scores = function()
    seconds = time.process_time() - start
    return scores, seconds, (resident_peak() - before) / 2**20


def compare(name: str, problem: FewShotProblem, seeds: list[int]) -> dict:
    "Both sides in turn for each seed."
    data = Data(problem)
    labels = problem.labels["test"]._labels
    sides: dict[str, list] = dict(library=[], loop=[])
    for seed in seeds:
        torch.manual_seed(seed)
        runs = dict(
            library=lambda seed=seed: adapted(name, problem, seed), loop=lambda: LOOPS[name](data)
        )
        for side in list(runs)[:: 1 if seed % 2 else -1]:
            scores, seconds, memory = measured(runs[side])
            accuracy = 100 * float((scores.argmax(1) == labels).double().mean())
            sides[side].append(dict(accuracy=accuracy, cpu_s=seconds, memory_mb=memory))
            print(f"{name} {side} {seed}: {accuracy:.2f} %, {seconds:.1f} s", flush=True)
    row: dict = dict(method=name, seeds=seeds, runs=sides)
    for side, runs in sides.items():
        for figure in ("accuracy", "cpu_s", "memory_mb"):
            row[f"{side}_{figure}"] = statistics.mean(run[figure] for run in runs)
    row["loop_over_library_s"] = row["loop_cpu_s"] / row["library_cpu_s"]
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--methods", default=",".join(LOOPS))
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    problem = FewShotProblem.from_bundle(options.bundle, shots=options.shots, whole_val=True)
    rows = []
    with at_verbosity("quiet"):
        va.adapt(problem, method="GDA", trials=1)  # imports
        for name in options.methods.split(","):
            rows.append(compare(name, problem, list(range(1, options.seeds + 1))))
            if options.out:
                found = dict(environment=environment(), load=os.getloadavg()[0], rows=rows)
                found |= dict(bundle=options.bundle.name, shots=options.shots)
                options.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
