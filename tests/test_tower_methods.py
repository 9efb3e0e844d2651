"Methods that train parts of CLIP's towers: official numbers, counts, schedules and savings."

import pytest
import torch
from golden_clip import golden_problem, load_golden
from torch import nn

from vlmadapt.core.seeding import stream
from vlmadapt.methods import METHODS
from vlmadapt.models.adapted_models import TowerBlock
from vlmadapt.models.blocks import causal_mask
from vlmadapt.models.lora_prefix import PROJECTIONS, LowRankBranch, add_branches
from vlmadapt.problems.batches import Batch
from vlmadapt.training.loop import initialise_method, train

LETTERS = dict(q="query", k="key", v="value", o="output")


def relative(found, expected):
    "The largest difference, relative to the largest entry."
    return float((found.detach() - expected).abs().max() / expected.abs().max())


# CLIP-LoRA's attention


def golden_attention(golden, metadata, case, parts):
    "An attention of the file, with the branches of one case."
    attn = nn.MultiheadAttention(32, int(metadata["heads"]), batch_first=True).double()
    names = {
        "in_proj_weight": golden["in_proj_weight"],
        "in_proj_bias": golden["in_proj_bias"],
        "out_proj.weight": golden["out_proj_weight"],
        "out_proj.bias": golden["out_proj_bias"],
    }
    attn.load_state_dict(names)
    attn.requires_grad_(False)
    rank = len(golden[f"{case}.A_{parts[0]}"])
    alpha = float(golden[f"{case}.scaling"]) * rank**0.5
    branch = LowRankBranch(32, rank, alpha, [LETTERS[p] for p in parts], 0.0, stream(1, "lora"))
    branch.double()
    for n, part in enumerate(parts):
        branch.A.data[n] = golden[f"{case}.A_{part}"]
        branch.B.data[n] = golden[f"{case}.B_{part}"]
    holder = nn.Module()
    holder.attn = attn
    add_branches(TowerBlock("golden", "self", 1, holder), branch)
    return holder.attn


@pytest.mark.parametrize("case", ["r2a1qkv", "r4a8qkvo", "r4a8qk_causal"])
def test_clip_lora_attention_is_the_official_one(case):
    golden, metadata = load_golden("clip_lora")
    parts = case.removeprefix("r2a1").removeprefix("r4a8").removesuffix("_causal")
    attn = golden_attention(golden, metadata, case, parts)
    x = golden["x"]
    mask = causal_mask(x.shape[1])[0] if case.endswith("causal") else None
    output = attn(x, x, x, attn_mask=mask)[0]
    assert relative(output, golden[f"{case}.output"]) < 1e-12
    (output * golden["weight"]).sum().backward()
    for n, part in enumerate(parts):
        for letter, parameter in (("A", attn.branch.A), ("B", attn.branch.B)):
            name = f"{case}.grad_{letter}_{part}"
            if name in golden:
                assert relative(parameter.grad[n], golden[name]) < 1e-12, name
    update = attn.branch.update(PROJECTIONS["query"])
    assert relative(update, golden[f"{case}.delta_q"]) < 1e-12
    assert relative(attn.merged()(x, x, x, attn_mask=mask)[0], golden[f"{case}.output"]) < 1e-12


# Training by the official programs


LABELS = torch.tensor([0, 3, 4])  # of the three images of the tiny CLIP


def with_batches(cls, metadata, per_stage):
    "A subclass that reads the batches of a file; each stage begins with the first."
    images = load_golden("clip_tiny")[0]["images"]
    order = [i % 3 for steps in per_stage for i in range(steps)]
    found = []
    for i in order:
        index = metadata["batches"][i]
        found.append(Batch(images[index], LABELS[index]))

    class Given(cls):
        def batches(self, problem, seed):
            return GivenBatches(found)

    return Given


class GivenBatches:
    "One batch for each epoch, in the order of a list."

    def __init__(self, batches):
        self.left = iter(batches)

    def __len__(self):
        return 1

    def __iter__(self):
        yield next(self.left)


def logged(method, key):
    return torch.tensor([entry[key] for entry in method.log], dtype=torch.float64)


def named_branches(method):
    "The branches of a method by the names of the file."
    towers = [(tower, i) for tower in method.towers for i in range(3)]
    names = [f"{tower}.{i}" for tower, i in towers]
    return dict(zip(names, method.branches, strict=True))


def test_clip_lora_trains_as_the_official_program():
    golden, metadata = load_golden("clip_lora_training")
    steps = metadata["iterations"]

    class Official(with_batches(METHODS["CLIPLoRA"], metadata, [steps])):
        def init(self, generator):
            super().init(generator)
            self.logit_scale = 100.0
            for name, branch in named_branches(self).items():
                for n, part in enumerate("qkv"):
                    branch.A.data[n] = golden[f"start_A.{name}.{part}"]

    problem = golden_problem(metadata["classnames"], labels=LABELS)
    method = Official(problem, epochs=steps, lr=metadata["lr"], dropout=0.0, batch_size=2)
    gradients = []
    loss = method.loss

    def watched(batch):
        found = loss(batch)
        parameters = list(method.branches.parameters())
        gradients.append(torch.autograd.grad(found, parameters, retain_graph=True))
        return found

    method.loss = watched
    initialise_method(method, problem, seed=1)
    train(method, problem, seed=1, progress=False)
    assert relative(logged(method, "loss"), golden["losses"]) < 1e-9
    assert relative(logged(method, "lr"), golden["rates"]) < 1e-12
    for step in (1, 3):
        found = dict(zip(method.branches.parameters(), gradients[step - 1], strict=True))
        for name, branch in named_branches(method).items():
            for letter, parameter in (("A", branch.A), ("B", branch.B)):
                for n, part in enumerate("qkv"):
                    expected = golden[f"grad{step}_{letter}.{name}.{part}"]
                    scale = expected.abs().max().clamp(min=1e-6)
                    assert (found[parameter][n] - expected).abs().max() < 1e-6 * scale, name
    for name, branch in named_branches(method).items():
        for n, part in enumerate("qkv"):
            assert relative(branch.B[n], golden[f"B.{name}.{part}"]) < 1e-6
            assert relative(branch.A[n], golden[f"A.{name}.{part}"]) < 1e-6
    images = load_golden("clip_tiny")[0]["images"]
    assert relative(method.scores(Batch(images)), golden["logits"]) < 1e-6


def norm_names(model):
    "The LayerNorms inside blocks by the names of the official model."
    return {id(m): n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)}


def test_two_sfs_trains_as_the_official_program():
    golden, metadata = load_golden("two_sfs")
    steps = metadata["iterations"]
    cls = with_batches(METHODS["TwoSFS"], metadata, [6, 4])
    problem = golden_problem(metadata["classnames"], labels=LABELS)
    method = cls(problem, epochs=steps, lr=metadata["lr"], batch_size=2)
    assert method.stages() == {0: 6, 6: 4}
    gradients, starts = [], []
    loss = method.loss

    def watched(batch):
        found = loss(batch)
        ((_, parameters),) = method.decays()
        gradients.append(torch.autograd.grad(found, parameters, retain_graph=True))
        starts.append(method.classifier.detach().clone())
        return found

    method.loss = watched
    initialise_method(method, problem, seed=1)
    train(method, problem, seed=1, progress=False)
    assert relative(logged(method, "loss"), golden["losses"]) < 1e-9
    assert relative(logged(method, "lr"), golden["rates"]) < 1e-12
    names = norm_names(method.adapted)
    found = iter(gradients[0])
    for norm in method.norms:
        for kind, parameter in norm.named_parameters():
            name = f"{names[id(norm)]}.{kind}"
            assert relative(next(found), golden[f"grad.{name}"]) < 1e-6, name
            assert relative(parameter, golden[f"tuned.{name}"]) < 1e-9, name
    assert sum(name.startswith("grad.") for name in golden) == 2 * len(method.norms)
    assert relative(starts[6], golden["classifier_start"]) < 1e-9
    assert relative(gradients[6][0], golden["grad_classifier"]) < 1e-6
    assert relative(method.classifier, golden["classifier"]) < 1e-9
    images = load_golden("clip_tiny")[0]["images"]
    assert relative(method.scores(Batch(images), metadata["mixed"]), golden["mixed_logits"]) < 1e-9
