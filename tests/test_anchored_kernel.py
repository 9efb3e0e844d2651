"""Limits and negative controls of the anchored kernel."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vlmadapt.methods.anchored_kernel import (
    TEMPERATURES,
    AnchoredKernel,
    anchored_weights,
    halves,
    predictable,
    text_metric,
)
from vlmadapt.methods.base import Method
from vlmadapt.methods.zero_shot import ZeroShot
from vlmadapt.problems.batches import Batch
from vlmadapt.problems.classification import FewShotProblem
from vlmadapt.problems.few_shot import few_shot
from vlmadapt.training.evaluation import evaluate
from vlmadapt.training.loop import fit


def toy(K=5, D=12, counts=(4, 4, 4, 4, 4), signal=2.0, seed=0):
    "Classes around their texts plus a direction that the texts do not know."
    rng = np.random.default_rng(seed)
    text, shift = rng.normal(size=(2, K, D))

    def draw(counts):
        y = np.repeat(np.arange(K), counts)
        return signal * (0.3 * text + shift)[y] + rng.normal(size=(len(y), D)), y

    names = [f"class {k}" for k in range(K)]
    test = draw([40] * K)
    return FewShotProblem.from_features(names, text, draw(counts), None, test, logit_scale=20.0)


def permuted(problem, seed=0):
    "The same problem with the labels of its support images in random order."
    y = problem.labels["train"]
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    features = dict(train=problem.features.train, text=problem.features.text)
    return FewShotProblem.from_features(
        problem.class_names,
        features["text"],
        train=(features["train"], y[order]),
        logit_scale=problem.logit_scale,
    )


def accuracy(method, problem):
    return evaluate(method, problem)["accuracy"]


def test_learns_what_the_text_does_not_know():
    problem = toy()
    assert accuracy(fit(AnchoredKernel(problem), problem), problem) > 10 + accuracy(
        ZeroShot(problem), problem
    )


def test_without_support_it_is_zero_shot():
    problem = toy()
    x = problem.features.test
    torch.testing.assert_close(AnchoredKernel(problem).scores(x), ZeroShot(problem).scores(x))


def test_a_class_without_support_image_keeps_its_score():
    problem = toy(counts=(4, 0, 4, 4, 4))
    x = problem.features.test
    difference = fit(AnchoredKernel(problem), problem).scores(x) - ZeroShot(problem).scores(x)
    assert difference[:, 1].abs().max() == 0
    assert difference[:, 0].abs().max() > 0.1


def test_new_classes_are_scored_by_their_text():
    assert AnchoredKernel.new_class_scores is not Method.new_class_scores
    problem = toy()
    method = fit(AnchoredKernel(problem), problem)
    text = F.normalize(torch.randn(3, 12, dtype=problem.features.text.dtype), dim=-1)
    x = F.normalize(problem.features.test, dim=-1)
    torch.testing.assert_close(method.new_class_scores(Batch(x), text), 20 * x @ text.T)


def test_weights_are_the_dual_gaussian_process():
    "Kernel form F = F0 + s G (Y - P(F)) by damped iteration of single entries, in float64."
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    logits = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    y = torch.arange(9) % 3
    found = logits + x @ anchored_weights(x, logits, y, 0.4, 2000)
    expected = logits + 0.4 * (x @ x.T) @ (F.one_hot(y, 3) - found.softmax(1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def naive_gain(x, logits, y, variance, steps):
    "Mean and standard error of the held-out gain over a guess, one image after another."
    seen, half = {}, []
    for label in y.tolist():
        half.append(seen.get(label, 0) % 2)
        seen[label] = seen.get(label, 0) + 1
    gains = []
    for side in (0, 1):
        rest = [i for i in range(len(y)) if half[i] != side]
        weights = anchored_weights(x[rest], logits[rest], y[rest], variance, steps)
        held = [i for i in range(len(y)) if half[i] == side]
        tables = []
        for t in TEMPERATURES:
            rows = [(t * (logits[i] + x[i] @ weights)).log_softmax(0)[y[i]] for i in held]
            tables.append([float(row) for row in rows])
        gains += [value + math.log(logits.shape[1]) for value in max(tables, key=sum)]
    return np.mean(gains), np.std(gains, ddof=1) / len(gains) ** 0.5


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 3.0])
def test_check_agrees_with_a_loop(scale):
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(24) % 4
    x = torch.randn(24, 6, generator=generator, dtype=torch.float64)
    x[:, :4] += scale * F.one_hot(y, 4)
    logits = torch.randn(24, 4, generator=generator, dtype=torch.float64)
    mean, error = naive_gain(x, logits, y, 2.0, 50)
    assert predictable(x, logits, y, 2.0, 50) == (mean > 3 * error)


def test_one_image_per_class_cannot_be_checked():
    y = torch.arange(6)
    assert halves(y).tolist() == [-1] * 6
    assert predictable(torch.randn(6, 3), torch.randn(6, 6), y, 1.0, 5)


@pytest.mark.parametrize("seed", range(8))
def test_noise_is_not_learned(seed):
    "Features without classes, and labels in random order, leave zero-shot as it is."
    for problem in (toy(signal=0.0, seed=seed), permuted(toy(counts=(16,) * 5, seed=seed), seed)):
        method = fit(AnchoredKernel(problem), problem)
        assert method.coefficients.abs().max() == 0


@pytest.mark.parametrize("name", ["mini-digits", "mini-textures"])
@pytest.mark.parametrize("shots", [4, 16])
def test_permuted_labels_leave_zero_shot(name, shots):
    problem = few_shot(name, shots=shots, seed=1)
    shuffled = permuted(problem)
    unchecked = fit(AnchoredKernel(shuffled, check=False), shuffled)
    assert accuracy(unchecked, problem) < accuracy(ZeroShot(problem), problem) - 20
    assert accuracy(fit(AnchoredKernel(shuffled), shuffled), problem) == accuracy(
        ZeroShot(problem), problem
    )


def test_few_landmarks_approximate_all():
    problem = toy(counts=(16,) * 5)
    x = problem.features.test
    full = fit(AnchoredKernel(problem), problem).scores(x)
    assert len(AnchoredKernel(problem, landmarks=60).keys) == 60
    fewer = fit(AnchoredKernel(problem, landmarks=60), problem).scores(x)
    agreement = (full.argmax(1) == fewer.argmax(1)).double().mean()
    assert agreement > 0.9


def test_two_classes_and_unequal_scales():
    "Two classes have a text covariance of rank one; the size of the features does not matter."
    problem = toy(K=2, counts=(4, 4))
    method = fit(AnchoredKernel(problem), problem)
    assert method.scores(problem.features.test).isfinite().all()
    metric = text_metric(problem.features.text, 0.3)
    assert torch.linalg.matrix_rank(metric) == 12
    x = problem.features.test
    torch.testing.assert_close(method.scores(x), method.scores(7 * x))


def test_saved_and_loaded(tmp_path):
    problem = toy()
    method = fit(AnchoredKernel(problem), problem)
    method.save(tmp_path / "kernel.safetensors")
    loaded = AnchoredKernel.load(tmp_path / "kernel.safetensors")
    x = problem.features.test
    torch.testing.assert_close(loaded.scores(x), method.scores(x))
