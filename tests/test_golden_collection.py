"""APE, APE-T, TIMO, TIMO-S and ProLIP against the numbers of their official programs.

Every number is computed in float64. A difference is relative to the largest entry of the expected
array; where the official program computed in float32, the tolerance is float32's.
"""

import pytest
import torch
from golden_clip import load_golden
from test_golden import assert_close, from_arrays, gradients, put

from vlmadapt.methods import METHODS
from vlmadapt.methods.ape import APE, APET, channel_criterion, kept_channels
from vlmadapt.methods.gda import gda_classifier
from vlmadapt.methods.prolip import ProLIP
from vlmadapt.methods.timo import (
    TIMO,
    TIMOS,
    guided_text,
    matching_scores,
    prompt_layout,
    text_samples,
)
from vlmadapt.problems.batches import Batch
from vlmadapt.problems.classification import FewShotProblem
from vlmadapt.problems.features import Features
from vlmadapt.training.batched import fit_many
from vlmadapt.training.loop import fit

SINGLE = 1e-6  # relative, where the official program computed in float32
PRECISION = 5e-5  # relative: a pseudo-inverse in float32


def class_names(count):
    return [f"class {k}" for k in range(count)]


@pytest.mark.parametrize("case", ["a", "b"])
def test_ape(case):
    golden, _ = load_golden("ape")
    text, keys, labels = (golden[name] for name in ("text", "keys", "labels"))
    w = golden[f"{case}.w"].tolist()
    criterion = channel_criterion(text, keys, labels, *w)
    assert_close(criterion, golden[f"{case}.criterion"])
    indices = golden[f"{case}.indices"]
    share = len(indices) / text.shape[1]
    assert kept_channels(criterion, share).tolist() == indices.tolist()
    problem = from_arrays(text, (keys, labels))
    weights = {"similarity_weight": w[0], "variance_weight": w[1], "share": share}
    for setting, logits in zip(golden["alpha_beta_gamma"], golden[f"{case}.logits"], strict=True):
        values = dict(zip(("alpha", "beta", "gamma"), setting.tolist(), strict=True))
        method = fit(APE(problem, **weights, **values), problem)
        assert_close(method.logits(Batch(golden["queries"])), logits)


def ape_t():
    golden, metadata = load_golden("ape_t")
    problem = from_arrays(golden["text"], (golden["keys"], golden["labels"]))
    alpha, beta = float(metadata["alpha"]), float(metadata["beta"])
    settings = {name: float(metadata[name]) for name in ("lr", "weight_decay", "eps")}
    batch = Batch(golden["batch"], golden["labels"], torch.arange(len(golden["labels"])))

    class OneBatch(APET):
        "Each epoch is one step on the batch of the file."

        def batches(self, problem, seed):
            return [batch]

    method = OneBatch(
        problem,
        alpha=alpha,
        beta=beta,
        alpha_train=alpha,
        beta_train=beta,
        share=len(golden["indices"]) / golden["text"].shape[1],
        epochs=3,
        **settings,
    )
    return golden, problem, method, batch


def test_ape_t_at_the_start():
    golden, _, method, batch = ape_t()
    assert method.kept.tolist() == golden["indices"].tolist()
    loss, (residual, weight) = gradients(method, batch, method.residual, method.weight)
    assert_close(loss, golden["loss"][0])
    assert_close(residual, golden["grad_residual"][0])
    assert_close(weight, golden["grad_weight"][0])


def test_ape_t_trained_by_fit():
    golden, problem, method, _ = ape_t()
    found = []

    def after_epoch(epoch):
        logits = method.logits(Batch(golden["queries"])).detach()
        found.append((method.residual.detach().clone(), method.weight.detach().clone(), logits))

    fit(method, problem, after_epoch=after_epoch)
    for step, (residual, weight, logits) in enumerate(found):
        assert_close(residual, golden["residual"][step], 1e-10)
        assert_close(weight, golden["weight"][step], 1e-10)
        assert_close(logits, golden["query_logits"][step], 1e-10)


def with_prompts(golden, views=None, val=None):
    "A problem whose classes have several prompts."
    prompts = golden["prompts"]
    K, P, _ = prompts.shape
    features = Features(
        text=torch.nn.functional.normalize(prompts.mean(1), dim=-1),
        sentences=prompts.flatten(0, 1),
        owner=torch.arange(K).repeat_interleave(P),
        views=golden["features"][None],
        train=golden["features"],
        val=golden.get("val"),
    )
    labels = {"train": golden["labels"], "val": golden.get("val_labels")}
    return FewShotProblem(class_names(K), features, labels)


def test_timo():
    golden, _ = load_golden("timo")
    problem = with_prompts(golden)
    f = problem.features
    prompts, valid = prompt_layout(f.sentences, f.owner, problem.K)
    scores = matching_scores(prompts, valid, golden["features"], golden["labels"])
    assert_close(scores, golden["matching_score"], SINGLE)
    for gamma in (1, 50, 100):
        text = guided_text(prompts, valid, scores, gamma)
        # the softmax of gamma times a cosine rounded to float32
        assert_close(text, golden[f"gamma{gamma}.W_c"], 5 * SINGLE)
    samples, labels = text_samples(prompts, valid, scores, 1.0)
    vectors = golden["gda.vectors"]
    assert_close(samples, vectors[: len(samples)], SINGLE)
    assert labels.tolist() == golden["gda.labels"][: len(labels)].tolist()
    method = fit(TIMO(problem), problem)
    assert_close(method.W.T, golden["gda.W"], PRECISION)
    assert_close(method.b, golden["gda.b"], PRECISION)
    for alpha, logits in zip(golden["gda.alpha"], golden["gda.logits"], strict=True):
        method.set(alpha=float(alpha))
        assert_close(method.logits(Batch(golden["queries"])), logits, PRECISION)


def test_timo_s():
    golden, _ = load_golden("timo_s")
    problem = with_prompts(golden)
    P = golden["prompts"].shape[1]
    x, y = golden["val"], golden["val_labels"]
    for gamma, accuracy in zip(golden["gamma"], golden["gamma_accuracy"], strict=True):
        text = TIMOS(problem, gamma=float(gamma)).text
        right = ((x @ text.T).argmax(1) == y).double().mean()
        assert right == accuracy
    gamma = float(golden["gamma"][golden["gamma_accuracy"].argmax()])
    for place, count in enumerate(golden["beta"].tolist()):
        method = fit(TIMOS(problem, gamma=gamma, text_share=count / P), problem)
        assert_close(method.text, golden["text"])
        assert_close(method.W.T, golden["W"][place], 1e-9)
        assert_close(method.b, golden["b"][place], 1e-9)
    W, b = (golden[name][int(golden["best"])] for name in ("W", "b"))
    assert (method.W.T - W).abs().max() > 1e-3  # the last count is not the chosen one
    alpha = golden["alpha"][int(golden["best"])]
    scores = alpha * golden["queries"] @ golden["text"].T + golden["queries"] @ W + b
    right = (scores.argmax(1) == golden["query_labels"]).double().mean()
    assert 100 * right == golden["accuracy"]


def test_timo_without_text_samples_is_another_classifier():
    golden, _ = load_golden("timo")
    W, _ = gda_classifier(golden["features"], golden["labels"], 8)
    assert (W.T - golden["gda.W"]).abs().max() > 0.1 * golden["gda.W"].abs().max()


def prolip(golden, **given):
    features = Features(
        text=golden["text"],
        projection=golden["P0"],
        unprojected_views=golden["views"],
        unprojected_train=golden["views"].mean(0),
    )
    K = len(golden["text"])
    problem = FewShotProblem(class_names(K), features, {"train": golden["labels"]})
    return ProLIP(problem, lr=1e-2, epochs=4, **given), problem


@pytest.mark.parametrize("name", ["lambda0", "lambda0.333"])
def test_prolip(name):
    golden, _ = load_golden("prolip")
    lam = float(golden[f"{name}.lambda"])
    method, problem = prolip(golden, lam=lam)
    found = []

    def after_epoch(epoch):
        found.append((method.projection.detach().clone(), float(method.penalty())))

    for step, batch in zip(range(4), _turns(golden), strict=True):
        start = golden["P0"] if step == 0 else golden[f"{name}.P"][step - 1]
        put(method.projection, start)
        loss, (gradient,) = gradients(method, batch, method.projection)
        expected = golden[f"{name}.cross_entropy"][step] + lam * golden[f"{name}.distance"][step]
        assert_close(loss, expected)
        assert_close(gradient, golden[f"{name}.grad"][step])
        assert_close(method.logits(batch), golden[f"{name}.logits"][step])
    fit(method, problem, after_epoch=after_epoch)
    for step, (projection, _) in enumerate(found):
        assert_close(projection, golden[f"{name}.P"][step], 1e-10)
    assert_close(method.logits(Batch(golden["queries"])), golden[f"{name}.query_logits"], 1e-10)


def _turns(golden):
    "The views take turns, the second one first."
    return [Batch(golden["views"][view], golden["labels"]) for view in (1, 0, 1, 0)]


def test_the_penalty_of_prolip_is_one_over_the_shots_unless_given():
    golden, _ = load_golden("prolip")
    method, _ = prolip(golden)
    shots = int(torch.bincount(golden["labels"]).max())
    put(method.projection, golden["P0"] + 0.1)
    batch = _turns(golden)[0]
    free, _ = prolip(golden, lam=0.0)
    put(free.projection, golden["P0"] + 0.1)
    assert_close(method.loss(batch) - free.loss(batch), method.penalty() / shots)


NAMES = ("APE", "APET", "TIMO", "TIMOS", "ProKeR", "ProLIP")


@pytest.fixture(scope="module")
def digits():
    from vlmadapt.problems.few_shot import few_shot

    return few_shot("mini-digits", shots=4, seed=1, prompts="ensemble")


def short(name):
    return {"epochs": 3} if METHODS[name].recipe else {}


@pytest.mark.parametrize("name", NAMES)
def test_fitting_again_gives_the_same_and_a_saved_method_scores_the_same(name, digits, tmp_path):
    cls = METHODS[name]
    method = fit(cls(digits, **short(name)), digits, seed=2)
    x = method.inputs(digits, "test")[:50]
    scores = method.scores(x)
    again = fit(cls(digits, **short(name)), digits, seed=2)
    assert torch.equal(again.scores(x), scores)
    method.save(tmp_path / "method.safetensors")
    loaded = cls.load(tmp_path / "method.safetensors")
    assert torch.equal(loaded.scores(x), scores)


@pytest.mark.parametrize("name", NAMES)
def test_fitting_together_is_fitting_one_by_one(name, digits):
    cls = METHODS[name]
    settings = [{**short(name)}, {**short(name)}]
    if "lr" in cls.recipe:
        settings[1]["lr"] = 2e-3
    runs = [(cls, values, digits, seed) for values, seed in zip(settings, (1, 2), strict=True)]
    for method, (_, values, _, seed) in zip(fit_many(runs), runs, strict=True):
        alone = fit(cls(digits, **values), digits, seed=seed)
        x = alone.inputs(digits, "val")[:20]
        torch.testing.assert_close(method.scores(x), alone.scores(x), rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_new_classes_are_scored_by_their_text(name):
    from vlmadapt.methods.zero_shot import ZeroShot
    from vlmadapt.problems.few_shot import few_shot

    base, new = (
        few_shot("mini-objects", shots=2, seed=1, prompts="ensemble", part=part)
        for part in ("base", "new")
    )
    cls = METHODS[name]
    method = fit(cls(base, **short(name)), base)
    scores = method.outputs(new, "test")
    assert scores.shape == (len(new.features.test), new.K)
    if name != "ProLIP":  # its projection changes the scores of all classes
        zero_shot = ZeroShot(new).outputs(new, "test")
        assert torch.equal(scores.argmax(1), zero_shot.argmax(1))
