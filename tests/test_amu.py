"""AMU-Tuning against the numbers of its official program, and problems with a second encoder."""

import numpy as np
import pytest
import torch
from golden_clip import load_golden
from test_golden import assert_close, from_arrays, gradients

import vlmadapt as va
from vlmadapt.grid.results import read_results
from vlmadapt.grid.runs import execute_now
from vlmadapt.methods.amu_tuning import UNCERTAINTIES, AMUTuning
from vlmadapt.problems.batches import Batch
from vlmadapt.problems.features import auxiliary_array
from vlmadapt.reporting.summaries import of_metric
from vlmadapt.training.batched import fit_many
from vlmadapt.training.loop import fit
from vlmadapt.training.paper_protocol import as_released
from vlmadapt.training.tuning import hold_out, tune

ARRAY = auxiliary_array("second", "test")


def golden_problem(golden):
    train = (golden["clip"], golden["labels"])
    return from_arrays(golden["text"], train, auxiliary={"second": {"train": golden["auxiliary"]}})


def joined(golden, kind=""):
    names = [f"{kind}clip", f"{kind}auxiliary"]
    return Batch(torch.cat([golden[name] for name in names], -1), golden["labels"])


@pytest.mark.parametrize("kind", UNCERTAINTIES)
def test_losses_and_gradients_are_the_official_ones(kind):
    golden, _ = load_golden("amu_tuning")
    problem, batch = golden_problem(golden), joined(golden)
    method = AMUTuning(problem, uncertainty=kind)
    assert_close(method.theta, golden["start"])
    loss, (gradient,) = gradients(method, batch, method.theta)
    assert_close(loss, golden[f"{kind}.loss"][0])
    assert_close(gradient, golden[f"{kind}.grad"])
    logits, z = method.both_logits(batch.x)
    assert_close(logits, golden[f"{kind}.logits"])
    assert_close(z, golden[f"{kind}.aux_logits"])
    for part, share in enumerate((1, 0), start=1):  # the sum alone, the second encoder alone
        own = AMUTuning(problem, uncertainty=kind, merge=share)
        assert_close(own.loss(batch), golden[f"{kind}.loss"][part])


def test_training_is_the_official_one():
    golden, metadata = load_golden("amu_tuning")
    settings = {name: float(metadata[name]) for name in ("lr", "weight_decay", "eps", "alpha")}
    batch = joined(golden)

    class OneBatch(AMUTuning):
        "Each epoch is one step on the whole support set."

        def batches(self, problem, seed):
            return [batch]

    found = []

    def after_epoch(epoch):
        logits = method.logits(joined(golden, "query_")).detach()
        found.append((method.theta.detach().clone(), logits))

    problem = golden_problem(golden)
    method = OneBatch(problem, epochs=3, **settings)
    fit(method, problem, after_epoch=after_epoch)
    for step, (weight, logits) in enumerate(found):
        assert_close(weight, golden["trained.weight"][step])
        assert_close(logits, golden["trained.query_logits"][step])
    assert [entry["loss"] for entry in method.log] == pytest.approx(golden["trained.loss"].tolist())


@pytest.fixture(scope="module")
def problem():
    return va.few_shot("mini-digits", shots=4, seed=1, views=3, auxiliary={"second": "mini-rn"})


def test_runs_of_one_batch_agree_with_single_ones(problem):
    runs = [
        (AMUTuning, dict(alpha=a, lr=lr, epochs=3), problem, 1) for a, lr in ((1, 1e-3), (2, 1e-2))
    ]
    for together, (cls, values, _, seed) in zip(fit_many(runs), runs, strict=True):
        alone = fit(cls(problem, **values), problem, seed=seed)
        torch.testing.assert_close(together.theta, alone.theta, atol=1e-5, rtol=1e-4)


def test_both_encoders_see_the_same_crops(problem):
    "Encoded twice by the same backbone, views and support images agree."
    same = va.few_shot("mini-digits", shots=2, seed=3, views=2, auxiliary={"second": "mini"})
    for part in ("train", "views", "val", "test"):
        own, second = (getattr(same.features, n) for n in (part, auxiliary_array("second", part)))
        assert torch.equal(own, second)


def test_shots_are_held_out_of_both_encoders(problem):
    x = problem.features.train
    second = getattr(problem.features, auxiliary_array("second", "train"))
    y = problem.labels["train"]
    bare = va.from_features(
        problem.class_names,
        problem.features.text,
        train=(x, y),
        auxiliary={"second": {"train": second}},
    )
    rest = hold_out(bare)
    held = getattr(rest.features, auxiliary_array("second", "val"))
    assert len(held) == len(rest.labels["val"]) == problem.K
    assert torch.equal(second[3::4], held) or torch.equal(second[0::4], held)
    assert tune(AMUTuning, bare, trials=2, fixed=dict(epochs=2)).selection == "held_out_shots"


def test_the_released_rule_is_recorded_as_such(problem):
    found = as_released("AMUTuning", problem, epochs=4)
    assert (found["selection"], found["rule"]) == ("test_epoch", "the best test epoch")
    last = fit(AMUTuning(problem, epochs=4), problem)
    assert found["accuracy"] >= va.evaluate(last, problem)["accuracy"]


def test_a_new_class_is_scored_by_zero_shot(problem):
    base = va.few_shot(
        "mini-digits", shots=4, part="base", views=3, auxiliary={"second": "mini-rn"}
    )
    method = fit(AMUTuning(base, epochs=1), base)
    output = method.outputs(problem, "val")
    zero = va.create_method("ZeroShot", problem).scores(problem.features.val)
    torch.testing.assert_close(output[:, base.K :], zero[:, base.K :], atol=1e-4, rtol=0)


def test_stored_methods_name_their_second_encoder(problem, tmp_path):
    method = fit(AMUTuning(problem, epochs=1), problem)
    method.save(tmp_path / "a.safetensors")
    again = va.load_method(tmp_path / "a.safetensors")
    images = [problem.images("test")[i] for i in range(2)]
    expected = method.scores(method.inputs(problem, "test")[:2])
    torch.testing.assert_close(again.scores(images), expected, atol=1e-2, rtol=0)
    with pytest.raises(ValueError, match=f"got float32 .2, {problem.features.test.shape[1]}"):
        again.scores(problem.features.test[:2])


def test_arrays_without_an_encoder_take_features_only(tmp_path):
    rng = np.random.default_rng(0)
    x, a, y = rng.normal(size=(6, 8)), rng.normal(size=(6, 5)), [0, 0, 1, 1, 2, 2]
    problem = va.from_features(
        ["a", "b", "c"], x[:3], train=(x, y), auxiliary={"second": {"train": a}}
    )
    method = fit(AMUTuning(problem, epochs=2), problem)
    assert method.scores(np.hstack([x, a])).shape == (6, 3)
    picture = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="has no backbone"):
        method.scores(picture)


def test_bundles_of_the_same_images_are_paired(tmp_path):
    import json

    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    y = torch.arange(3).repeat_interleave(4)
    for name, width in (("first", 8), ("second", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "classnames.json").write_text(json.dumps(["a", "b", "c"]))
        x = torch.randn(12, width, generator=generator)
        arrays = {f"{s}_x": x.clone() for s in ("train", "val", "test")}
        arrays |= {f"{s}_y": y.clone() for s in ("train", "val", "test")}
        save_file(arrays | {"text": torch.eye(3, 8)}, tmp_path / name / "features.safetensors")
    options = dict(shots=2, seed=1)
    paired = va.FewShotProblem.from_bundle(tmp_path / "first", auxiliary="second", **options)
    alone = va.FewShotProblem.from_bundle(tmp_path / "first", **options)
    other = va.FewShotProblem.from_bundle(tmp_path / "first", auxiliary={"b": "second"}, **options)
    assert paired.auxiliary == ["second"] and other.auxiliary == ["b"]
    assert paired.provenance["auxiliary"] == {"second": "second"}
    assert "auxiliary" not in alone.provenance
    keys = {p.provenance["content"] for p in (paired, alone, other)}
    assert len(keys) == 3
    assert len(getattr(paired.features, ARRAY)) == 12
    fit(AMUTuning(paired, epochs=1), paired)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "targets"),
    [("base_to_new", ""), ("domain_generalisation", "targets: [mini-shapes-v2, mini-digits]")],
)
def test_experiments_take_a_second_encoder(experiment, targets):
    "New classes and other datasets are scored as zero-shot scores them, shifted images are not."
    folder = execute_now(f"""
experiment: {experiment}
parameters:
  methods: [ZeroShot, AMUTuning]
  views: 1
  fixed: {{AMUTuning: {{epochs: 1}}}}
  auxiliary: mini-rn
  {targets}
""")
    found = of_metric(read_results(folder), "accuracy")
    found = found.set_index(["evaluated_on", "class_split", "method"])["value"]
    same = {place: values.nunique() == 1 for place, values in found.groupby(level=[0, 1])}
    if experiment == "base_to_new":
        assert same == {("mini-digits", "base"): False, ("mini-digits", "new"): True}
    else:
        names = {"mini-shapes": False, "mini-shapes-v2": False, "mini-digits": True}
        assert {name: at for (name, _), at in same.items()} == names
