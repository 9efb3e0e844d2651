"""ZS-LP, CLAP, LP++, SS-Text and the cross-modal probe: official numbers, rules, new classes.

Official numbers are compared in float64, relative to the largest entry of the expected array.
"""

import pytest
import torch
import torch.nn.functional as F
from golden_clip import load_golden
from test_golden import SINGLE, assert_close, from_arrays, gradients, put, random_problem

from vlmadapt.methods import METHODS
from vlmadapt.methods.cross_modal import CrossModalBatches
from vlmadapt.methods.task_res import raw_text
from vlmadapt.problems.batches import Batch
from vlmadapt.problems.few_shot import few_shot
from vlmadapt.training.batched import fit_many
from vlmadapt.training.evaluation import evaluate
from vlmadapt.training.loop import fit
from vlmadapt.training.paper_protocol import as_released, best_epoch
from vlmadapt.training.tuning import tune

NAMES = ("ZSLP", "CLAP", "LPPlusPlus", "SSText", "CrossModal")
SHORT = {name: {"epochs": 2} for name in NAMES if "epochs" in METHODS[name].recipe}
SHORT["CrossModal"] |= {"steps": 5}


@pytest.fixture(scope="module")
def digits():
    return few_shot("mini-digits", shots=4, seed=1, views=2)


def built(name, problem, **given):
    return METHODS[name](problem, **SHORT.get(name, {}), **given)


# Official numbers


def clap_problem(golden, metadata):
    pair = golden["features"], golden["labels"]
    return from_arrays(golden["text"], pair, logit_scale=float(metadata["logit_scale"]))


KINDS = {"plain": "class-wise"} | {k: k for k in ("constant", "corrected", "balanced")}


@pytest.mark.parametrize("kind", KINDS)
def test_clap(kind):
    "The official program computes in float32."
    golden, metadata = load_golden("clap")
    problem = clap_problem(golden, metadata)
    method = METHODS["CLAP"](problem, constraint=KINDS[kind])
    put(method.W, golden["prototypes"])
    batch = Batch(golden["features"], golden["labels"])
    assert_close(method.multipliers, golden[f"{kind}.lambda"], SINGLE)
    penalty = (method.multipliers * method.distances()).mean()
    assert_close(penalty, golden[f"{kind}.constraint"], SINGLE)
    loss, (gradient,) = gradients(method, batch, method.W)
    assert_close(loss, golden[f"{kind}.loss"], SINGLE)
    assert_close(gradient, golden[f"{kind}.grad"], SINGLE)
    assert_close(method.logits(batch), golden["logits"], SINGLE)
    assert_close(method.logits(Batch(golden["queries"])), golden["query_logits"], SINGLE)


def test_multipliers_of_clap():
    "They move by the penalty of the previous epoch, which is zero at first; not where fixed."
    golden, metadata = load_golden("clap")
    problem = clap_problem(golden, metadata)
    fixed, adaptive = (METHODS["CLAP"](problem, adaptive=value) for value in (False, True))
    for method in (fixed, adaptive):
        put(method.W, golden["prototypes"])
    for step in (1, 2):
        fixed.end_epoch()
        adaptive.end_epoch()
        assert_close(adaptive.multipliers, golden[f"plain.lambda_after_{step}"], SINGLE)
        assert_close(fixed.multipliers, golden["plain.lambda"], SINGLE)
    assert (golden["plain.lambda_after_2"] > golden["plain.lambda_after_1"]).any()


def test_zs_lp():
    golden, metadata = load_golden("clap")
    method = METHODS["ZSLP"](clap_problem(golden, metadata))
    batch = Batch(golden["features"], golden["labels"])
    assert_close(method.logits(batch), golden["zero_shot_logits"], SINGLE)
    put(method.W, golden["prototypes"])
    assert_close(method.loss(batch), golden["cross_entropy"], SINGLE)


def test_lp_plus_plus():
    "Twenty steps from the stored bias: float64 throughout."
    golden, _ = load_golden("lp_pp")
    problem = from_arrays(golden["text"], (golden["features"], golden["labels"]))

    class GivenBias(METHODS["LPPlusPlus"]):
        def init(self, generator):
            super().init(generator)
            put(self.b, golden["bias0"])

    method = GivenBias(problem, epochs=20)
    assert_close(method.step, torch.stack([golden["lr_w"], golden["lr_alpha"]]))
    assert_close(method.alpha_start, golden["init_alpha"])
    assert_close(method.W, golden["weight0"])
    states = []
    fit(
        method,
        problem,
        progress=False,
        after_epoch=lambda _: states.append((method.W.detach().clone(), method.alpha.clone())),
    )
    for step in (10, 20):
        weight, alpha = states[step - 1]
        assert_close(weight, golden[f"weight{step}"])
        assert_close(alpha[None], golden[f"alpha{step}"])
    assert_close(method.b, golden["bias20"])
    batch = Batch(golden["features"], golden["labels"])
    assert_close(method.logits(batch), golden["logits20"])
    losses = [entry["loss"] for entry in method.log] + [float(method.loss(batch).detach())]
    assert_close(torch.tensor(losses, dtype=torch.float64), golden["losses"])
    fresh = fit(GivenBias(problem, epochs=20, alpha_gradient="fresh"), problem)
    assert (fresh.alpha - method.alpha).abs().max() > 0.1


SS_TEXT = {
    "sstext": {},
    "sstext_plus": {"variant": "plus"},
    "shots": {"weighting": "shots"},
    "performance": {"weighting": "performance"},
}


@pytest.mark.parametrize("case", SS_TEXT)
def test_ss_text(case):
    "The official program computes in float32."
    golden, metadata = load_golden("ss_text")
    problem = clap_problem(golden, metadata)
    method = METHODS["SSText"](problem, **SS_TEXT[case])
    assert_close(method.classifier(), golden[f"{case}.weights"], SINGLE)
    assert_close(method.logits(Batch(golden["queries"])), golden[f"{case}.query_logits"], SINGLE)
    found = method.logits(Batch(golden["features"])).softmax(-1)
    assert_close(found, golden[f"{case}.probabilities"], SINGLE)
    others = [other for other in SS_TEXT if other != case]
    for other in others:
        difference = method.classifier() - golden[f"{other}.weights"]
        assert difference.abs().max() > 1e-3, other


@pytest.mark.parametrize("run", [0, 1, 2])
def test_cross_modal(run):
    "Sixty iterations on the stored batches, the best iteration, and WiSE-FT."
    golden, _ = load_golden("cross_modal")
    case = "abc"[run]
    images, labels = golden["images"], golden["labels"]
    scale = float(golden["logit_scale"])
    val = golden["validation"], golden["validation_labels"]
    problem = from_arrays(golden["zero_shot_weights"], (images, labels), val=val, logit_scale=scale)
    batches = [
        Batch(
            torch.cat([images[i], golden["text"][j]]),
            torch.cat([labels[i], golden["text_labels"][j]]),
        )
        for i, j in zip(golden["image_index"], golden["text_index"], strict=True)
    ]

    class Given(METHODS["CrossModal"]):
        "Each epoch is one step on a stored batch."

        def batches(self, problem, seed):
            remaining = iter(batches)

            class One:
                def __len__(self):
                    return 1

                def __iter__(self):
                    yield next(remaining)

            return One()

    names = ("lr", "weight_decay")
    settings = {name: float(golden[name][run]) for name in names} | {"epochs": 60}
    method = Given(problem, **settings)
    states, right = [], []

    def look(_):
        states.append(method.W.detach().clone())
        predicted = method.scores(val[0]).argmax(1)
        right.append(float((predicted == val[1]).double().mean()))

    fit(method, problem, progress=False, after_epoch=look)
    for step, weights in zip((1, 10, 50, 60), golden[f"{case}.weights"], strict=True):
        assert_close(states[step - 1], weights)
    log = {name: torch.tensor([entry[name] for entry in method.log]) for name in ("loss", "lr")}
    assert_close(log["loss"].double(), golden[f"{case}.losses"], SINGLE)  # float32 in the log
    assert_close(log["lr"].double(), golden[f"{case}.rates"], SINGLE)
    validated = right[::10]
    best = validated.index(max(validated))
    assert 10 * best == int(golden[f"{case}.best_iter"])
    assert validated[best] == pytest.approx(float(golden[f"{case}.val_acc"]))
    batch = Batch(golden["queries"])
    assert_close(method.logits(batch), golden[f"{case}.linear_logits"])
    averaged = METHODS["CrossModal"](problem, variant="wise-ft")
    put(averaged.W, method.W.detach())
    assert_close(averaged.logits(batch), golden[f"{case}.wiseft_logits"])


def test_cross_modal_starts_at_the_mean_of_raw_prompts():
    "The mean of unit prompts is another row."
    golden, _ = load_golden("cross_modal")
    text = golden["text"].view(8, -1, golden["text"].shape[1])
    problem = from_arrays(text.mean(1), (golden["images"], golden["labels"]))
    assert_close(METHODS["CrossModal"](problem).W, golden["zero_shot_weights"])
    unit = F.normalize(F.normalize(text, dim=-1).mean(1), dim=-1)
    assert (unit - golden["zero_shot_weights"]).abs().max() > 1e-3


# What a problem must offer


@pytest.mark.parametrize("name", ["ZSLP", "CLAP"])
def test_unit_text_rows_are_refused_unless_rows_of_equal_length_are_wanted(name):
    raw = random_problem(16)
    rows = raw_text(raw)
    pair = raw.features.views, raw.labels["train"]
    unit = from_arrays(F.normalize(rows, dim=-1), pair)
    with pytest.raises(ValueError, match=f"{name} needs text features before normal") as refused:
        METHODS[name](unit)
    assert "\n" not in str(refused.value)
    method = METHODS[name](unit, text_norm="equal", length=7)
    assert_close(method.W.norm(dim=1), torch.full((len(rows),), 7.0))
    assert_close(METHODS[name](raw).W, rows)


# Training


@pytest.mark.parametrize("name", NAMES)
def test_fitting_twice_saving_and_loading(name, digits, tmp_path):
    x = digits.features.test[:50]
    method = fit(built(name, digits), digits)
    scores = method.scores(x)
    assert torch.equal(fit(method, digits).scores(x), scores)
    method.save(tmp_path / "m.safetensors")
    loaded = METHODS[name].load(tmp_path / "m.safetensors", backbone=digits.backbone)
    assert torch.equal(loaded.scores(x), scores)
    assert torch.equal(fit(loaded, digits).scores(x), scores)


@pytest.mark.parametrize("name", NAMES)
def test_many_runs_equal_single_ones(name, digits):
    values = [{"lr": lr} for lr in (1e-3, 1e-2)] if "lr" in METHODS[name].recipe else [{}, {}]
    given = SHORT.get(name, {})
    runs = [(METHODS[name], {**given, **v}, digits, seed) for v in values for seed in (1, 2)]
    x = digits.features.test[:50]
    for (cls, own, problem, seed), method in zip(runs, fit_many(runs, progress=False), strict=True):
        single = fit(cls(problem, **own), problem, seed=seed, progress=False)
        torch.testing.assert_close(method.scores(x), single.scores(x), rtol=1e-4, atol=1e-3)
        assert [e["lr"] for e in method.log] == pytest.approx([e["lr"] for e in single.log])


def test_adaptive_multipliers_are_reset_and_not_shared(digits):
    "Runs with multipliers that move are trained one by one; fixed ones stay at the confidence."
    runs = [
        (METHODS["CLAP"], {"epochs": 4, "adaptive": True, "lr": lr}, digits, 1)
        for lr in (0.1, 0.05)
    ]
    first, second = fit_many(runs, progress=False)
    assert (first.multipliers > first.confidence).all()
    assert not torch.equal(first.multipliers, second.multipliers)
    again = fit(METHODS["CLAP"](digits, epochs=4, adaptive=True), digits, seed=1)
    assert torch.equal(again.multipliers, first.multipliers)
    fixed = fit(METHODS["CLAP"](digits, epochs=4), digits)
    assert torch.equal(fixed.multipliers, fixed.confidence)


def test_penalty_of_clap_zero_is_zs_lp(digits):
    x = digits.features.test[:50]
    plain = fit(built("ZSLP", digits), digits).scores(x)
    assert torch.equal(fit(built("CLAP", digits, weight=0.0), digits).scores(x), plain)
    assert not torch.equal(fit(built("CLAP", digits), digits).scores(x), plain)


def test_zero_shot_is_the_start(digits):
    x = digits.features.test[:50]
    expected = METHODS["ZeroShot"](digits).scores(x)
    for name in ("ZSLP", "CLAP", "CrossModal"):
        torch.testing.assert_close(built(name, digits).scores(x), expected, rtol=0, atol=1e-3)
    far = METHODS["SSText"](digits, penalty=1e9).scores(x)
    torch.testing.assert_close(far, expected, rtol=0, atol=1e-3)


def test_cross_modal_takes_smaller_batches_of_few_samples():
    problem = random_problem(16)
    text_rows = len(problem.features.text)
    (batch,) = CrossModalBatches(problem, 1, 64, "cpu", steps=1)
    assert int((batch.index >= len(problem.labels["train"])).sum()) == text_rows
    assert len(batch.x) == text_rows + min(32, len(problem.labels["train"]))


def test_augmented_views_join_the_images(digits):
    batches = CrossModalBatches(digits, 1, 8, "cpu", steps=1, augmented=True)
    assert batches.first_text == 3 * len(digits.labels["train"])
    assert torch.equal(batches.y[: batches.first_text], digits.labels["train"].repeat(3))


# New classes


@pytest.fixture(scope="module")
def parts():
    kwargs = dict(shots=4, seed=1, views=2)
    return {part: few_shot("mini-digits", part=part, **kwargs) for part in ("base", "new", "all")}


@pytest.mark.parametrize("name", NAMES)
def test_new_classes_are_scored_by_their_text(name, parts):
    method = fit(built(name, parts["base"]), parts["base"])
    scores = method.outputs(parts["new"], "test")
    zero_shot = METHODS["ZeroShot"](parts["new"]).outputs(parts["new"], "test")
    assert torch.equal(scores.argmax(1), zero_shot.argmax(1))
    if name != "LPPlusPlus":
        torch.testing.assert_close(scores, zero_shot, rtol=0, atol=1e-3)
    found = evaluate(method, parts["new"])["accuracy"]
    assert found == evaluate(METHODS["ZeroShot"](parts["new"]), parts["new"])["accuracy"]
    together = method.outputs(parts["all"], "test")
    own = method.scores(parts["all"].features.test)
    base = [parts["all"].class_names.index(c) for c in parts["base"].class_names]
    torch.testing.assert_close(together[:, base], own)


def test_other_methods_and_bare_features_refuse_new_classes(parts):
    method = fit(METHODS["GraphAdapter"](parts["base"], epochs=1), parts["base"])
    with pytest.raises(ValueError, match="was fitted for other classes"):
        method.outputs(parts["new"], "test")
    probe = built("CrossModal", parts["base"])
    with pytest.raises(ValueError, match="was fitted for other classes"):
        probe.scores(parts["new"].features.test, parts["new"].class_names)


# Selection


@pytest.mark.parametrize("name", ["ZSLP", "CLAP", "SSText"])
def test_released_rule_without_validation_ignores_what_was_tuned(name, digits):
    tuned = {"SSText": {"penalty": 1e5}}.get(name, {"lr": 1e-3})
    given = SHORT.get(name, {})
    released = as_released(name, digits, **given, **tuned)
    assert released["selection"] == "defaults"
    default = evaluate(fit(METHODS[name](digits, **given), digits), digits)["accuracy"]
    assert released["accuracy"] == default
    assert METHODS[name].validation_free
    untuned = tune(name, digits, trials=0, fixed=given)
    assert (
        untuned.selection == "defaults" and evaluate(untuned.method, digits)["accuracy"] == default
    )


def test_released_rule_of_lp_plus_plus_takes_the_last_best_epoch(digits):
    method = METHODS["LPPlusPlus"](digits, epochs=30)
    x, y = digits.features.val, digits.labels["val"]
    values = best_epoch(
        method,
        digits,
        1,
        lambda m: float((m.scores(x).argmax(1) == y).double().mean()),
        ties="last",
    )
    expected = evaluate(method, digits)["accuracy"]
    found = as_released("LPPlusPlus", digits, epochs=30, lr=0.1)
    assert found["accuracy"] == expected and found["selection"] == "val_epoch"
    assert values[-1] <= max(values)


def test_released_rule_of_cross_modal_averages_after_the_choice(digits):
    given = {"epochs": 2, "steps": 20}
    linear = as_released("CrossModal", digits, **given)
    averaged = as_released("CrossModal", digits, variant="wise-ft", **given)
    assert linear["rule"] == averaged["rule"] and linear["selection"] == "val_epoch"
    zero_shot = evaluate(METHODS["ZeroShot"](digits), digits)["accuracy"]
    assert linear["accuracy"] >= zero_shot - 1 and averaged["accuracy"] >= zero_shot - 1
