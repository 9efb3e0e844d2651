"""Print seconds and peak memory of ProKeR at the size of ImageNet, with one beta and one lambda.

python tools/measure_proker.py [classes [shots]]; default: 1000 classes, 16 shots, width 512.
"""

import json
import resource
import sys
import time

import torch

from vlmadapt.methods import METHODS
from vlmadapt.problems.classification import from_features
from vlmadapt.training.loop import fit

CLOCKS = (time.perf_counter, time.process_time)


def random_problem(K, shots, width=512):
    "Return a problem of random unit features in float32."
    generator = torch.Generator().manual_seed(0)

    def rows(count):
        x = torch.randn(count, width, generator=generator)
        return torch.nn.functional.normalize(x, dim=-1)

    train = rows(K * shots), torch.arange(K).repeat_interleave(shots)
    names = [f"class {k}" for k in range(K)]
    return from_features(names, rows(K), train=train, test=(rows(100), torch.arange(100) % K))


def peak_gb():
    "Return the peak resident memory of this process in GB."
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def main(K=1000, shots=16):
    problem = random_problem(K, shots)
    before = peak_gb()
    clocks = [clock() for clock in CLOCKS]
    method = fit(METHODS["ProKeR"](problem, beta=2.0, lam=0.1), problem)
    spent = [round(clock() - t, 1) for clock, t in zip(CLOCKS, clocks, strict=True)]
    assert method.coefficients.isfinite().all()
    numbers = dict(classes=K, shots=shots, width=512, dtype="float32", seconds=spent[0])
    numbers |= dict(processor_seconds=spent[1], threads=torch.get_num_threads())
    numbers |= dict(peak_memory_gb=round(peak_gb(), 2), before_gb=round(before, 2))
    print(json.dumps(numbers | dict(torch=torch.__version__)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
