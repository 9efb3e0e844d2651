"Scores and gradients of prompt methods against the model's own blocks on all positions."

import pytest
import torch
import torch.nn.functional as F
from reference_towers import image_reference, text_reference

from vlmadapt.methods.coop import CoCoOp, CoOp
from vlmadapt.methods.mudpt import MuDPT
from vlmadapt.methods.vpt_maple import VPT, MaPLe
from vlmadapt.problems.batches import Batch
from vlmadapt.problems.few_shot import few_shot
from vlmadapt.training.loop import fit

CONTEXTUAL = {
    "CoOp": (CoOp, dict(n_ctx=4, epochs=3)),
    "deep CoOp": (CoOp, dict(n_ctx=4, words=None, depth=4, epochs=3, lr=2e-2)),
    "CoCoOp": (CoCoOp, dict(epochs=1, lr=8e-3, batch_size=8)),
}


@pytest.fixture(scope="module")
def problem():
    return few_shot("mini-digits", backbone="mini", shots=4)


def contextual_scores(method, problem, x, shift=0):
    "Scores of CoOp or CoCoOp, one image and one class at a time."
    deep = getattr(method, "deep", None)
    deep = () if deep is None else deep
    context = " ".join(["X"] * method.n_ctx)
    tokens = problem.backbone.tokenizer([f"{context} {name}." for name in problem.class_names])
    positions = torch.arange(1, 1 + method.n_ctx)[None, None] + shift
    z = F.normalize(x, dim=-1)
    contexts = method.context.expand(len(x), -1, -1)
    if hasattr(method, "meta"):
        contexts = method.context + method.meta(z)[:, None]
    scores = []
    for image, first in zip(z, contexts, strict=True):
        for ids in tokens:
            found = text_reference(method.text_tower, ids[None, None], positions, first[None], deep)
            scores.append(method.logit_scale * image @ F.normalize(found[0, 0], dim=-1))
    return torch.stack(scores).view(len(x), -1)


@pytest.mark.parametrize("name", CONTEXTUAL)
def test_text_prompts(problem, name):
    "The same scores and gradients; with the context one position further they are not."
    cls, values = CONTEXTUAL[name]
    method = fit(cls(problem, **values), problem)
    batch = Batch(problem.features.train[::10], problem.labels["train"][::10])
    own = method.logits(batch)
    expected = contextual_scores(method, problem, batch.x)
    assert (own - expected).abs().max() < 2e-3
    grads = []
    for scores in (own, expected):
        loss = F.cross_entropy(scores, batch.y)
        grads.append(torch.autograd.grad(loss, method.context)[0])
    assert (grads[0] - grads[1]).norm() < 1e-3 * grads[1].norm()
    shifted = contextual_scores(method, problem, batch.x, shift=1)
    assert (own - shifted).abs().max() > 0.5


def two_tower_scores(method, problem, x, T, V):
    "Scores with prompts in both towers; the text is the plain one where T is None."
    context = "a photo of a"
    ids = problem.backbone.tokenizer([f"{context} {name}." for name in problem.class_names])
    if T is None:
        text = problem.backbone.model.encode_text(ids, normalize=False)
    else:
        n = T.shape[1]
        positions = torch.arange(1, 1 + n).expand(1, len(ids), n)
        text = text_reference(method.text_tower, ids[None], positions, T[:1], T[1:])[0]
    image = image_reference(method.image_tower, x, V[0], V[1:])
    return method.logit_scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T


def late(prompts):
    "Deep prompts that enter one block too late."
    return torch.cat([prompts[:1], prompts[1:2], prompts[1:]])


@pytest.mark.parametrize("cls", [VPT, MaPLe, MuDPT])
@torch.no_grad()
def test_prompts_in_both_towers(problem, cls):
    with torch.enable_grad():
        method = fit(cls(problem, epochs=2), problem)
    x = next(method.inputs(problem, "test").split(8))
    own = method.logits(Batch(x))
    T, V = (None, method.V) if cls is VPT else method.prompts()
    assert (own - two_tower_scores(method, problem, x, T, V)).abs().max() < 2e-3
    wrong = two_tower_scores(method, problem, x, None if T is None else late(T), late(V))
    assert (own - wrong).abs().max() > 0.1
