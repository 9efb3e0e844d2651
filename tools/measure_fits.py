"""Measure `fit` against loops of fifteen lines that train the same without any library.

    python tools/measure_fits.py --out outputs/measured/fits.json

Features are random unit rows, 16 images per class. A ratio is that of processor seconds
(ours / plain), the median of alternating repeats in one process; at most 1 where `fit` is free.
The building of a method is measured too, as a loop builds its tensors.
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

from vlmadapt.core.environment import environment
from vlmadapt.methods import METHODS
from vlmadapt.reporting.bench_parts import BenchSizes, feature_problem
from vlmadapt.training.loop import fit

SIZES = {"10x64": (10, 64, 50), "100x512": (100, 512, 5)}  # K, D, epochs


def batches(x, y, size, generator, drop_last):
    "The batches of an epoch of views x (R, N, D)."
    view = torch.randint(len(x), (len(y),), generator=generator)
    order = torch.randperm(len(y), generator=generator)
    parts = order.split(size)
    if drop_last and len(parts) > 1 and len(parts[-1]) < size:
        parts = parts[:-1]
    return [(x[view[i], i], y[i]) for i in parts]


def warmup_cosine(epoch, epochs, lr):
    "CoOp's schedule by epoch."
    return lr * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2 if epoch else 1e-5


def task_res(problem, epochs):
    "TaskRes: a residual on the text classifier."
    f, text, y = problem.features, problem.features.text, problem.labels["train"]
    generator = torch.Generator().manual_seed(1)
    residual = torch.zeros_like(text, requires_grad=True)
    optimizer = torch.optim.Adam([residual], lr=2e-3, weight_decay=5e-4)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = warmup_cosine(epoch, epochs, 2e-3)
        for x, labels in batches(f.views, y, 256, generator, True):
            classifier = F.normalize(text + 0.5 * residual, dim=-1)
            logits = problem.logit_scale * F.normalize(x, dim=-1) @ classifier.T
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return residual


def tip_adapter_f(problem, epochs):
    "Tip-Adapter-F: a cache with trained keys."
    f, text, y = problem.features, problem.features.text, problem.labels["train"]
    generator = torch.Generator().manual_seed(1)
    keys = F.normalize(f.views.mean(0), dim=-1).requires_grad_()
    values = F.one_hot(y, problem.K).to(text)
    optimizer = torch.optim.AdamW([keys], lr=1e-3, eps=1e-4)
    steps = epochs * math.ceil(len(y) / 256)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for x, labels in batches(f.views, y, 256, generator, False):
            x = F.normalize(x, dim=-1)
            cache = torch.exp(-1.0 * (1 - x @ keys.T)) @ values
            loss = F.cross_entropy(problem.logit_scale * x @ text.T + 1.17 * cache, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return keys


def clip_adapter(problem, epochs):
    "CLIP-Adapter: a bottleneck on the image feature."
    f, text, y = problem.features, problem.features.text, problem.labels["train"]
    generator = torch.Generator().manual_seed(1)
    D = text.shape[1]
    down, up = torch.nn.Linear(D, D // 4, bias=False), torch.nn.Linear(D // 4, D, bias=False)
    parameters = [*down.parameters(), *up.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=2e-3, momentum=0.9, weight_decay=5e-4)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = warmup_cosine(epoch, epochs, 2e-3)
        for x, labels in batches(f.views, y, 32, generator, True):
            adapted = 0.2 * F.relu(up(F.relu(down(x)))) + 0.8 * x
            logits = problem.logit_scale * F.normalize(adapted, dim=-1) @ text.T
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return down


LOOPS = {"TaskRes": task_res, "TipAdapterF": tip_adapter_f, "CLIPAdapter": clip_adapter}


def spent(function) -> float:
    "Processor seconds of a call."
    start = time.process_time()
    function()
    return time.process_time() - start


def measure(name: str, size: str, repeats: int) -> dict:
    "Times of both for one method and size."
    K, D, epochs = SIZES[size]
    problem = feature_problem(BenchSizes(classes=K, width=D, shots=16), views=2)

    def ours():
        fit(METHODS[name](problem, epochs=epochs), problem, progress=False)

    def plain():
        LOOPS[name](problem, epochs)

    ours()
    plain()
    pairs = [(spent(ours), spent(plain)) for _ in range(repeats)]
    return dict(
        method=name,
        size=size,
        epochs=epochs,
        fit_s=statistics.median(a for a, _ in pairs),
        plain_s=statistics.median(b for _, b in pairs),
        ratio=statistics.median(a / b for a, b in pairs),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--sizes", default=",".join(SIZES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size in options.sizes.split(","):
        for name in LOOPS:
            row = measure(name, size, options.repeats)
            rows.append(row)
            print(
                f"{size:9} {name:12} fit {row['fit_s']:.3f} s plain {row['plain_s']:.3f} s", end=""
            )
            print(f" ratio {row['ratio']:.2f}", flush=True)
    if options.out:
        found = dict(environment=environment(), load=os.getloadavg()[0], rows=rows)
        options.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
