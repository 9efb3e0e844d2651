"Bundles of features: shots and seeds, published lists, several prompts; real ones where present."

import json

import pytest
import torch
from conftest import shared_data
from safetensors.torch import save_file

from vlmadapt.core.records import RecordError
from vlmadapt.data.bundles import read_bundle
from vlmadapt.data.sampling import few_shot_indices
from vlmadapt.data.splits import read_parts
from vlmadapt.methods import METHODS
from vlmadapt.problems.classification import FewShotProblem, from_features
from vlmadapt.training.evaluation import evaluate
from vlmadapt.training.tuning import hold_out

BUNDLES = {
    # bundle: text, zero-shot test accuracy, stored shots
    "clip_vitb32_imagenet": ("text", 61.10, 4),
    "clip_vitb32_imagenet ensemble": ("text_ensemble", 65.65, 4),
    "clip_vitb32_stanford_cars": ("text", 59.71, 16),
    "clip_rn50_whurs19": ("text", 70.13, 16),
    "clip_vitb32_whurs19": ("text", 80.69, 16),
    "clip_vitl14_whurs19": ("text", 85.79, 16),
}


def arrays_of(labels, views=None, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.as_tensor(labels)
    shape = (len(labels), width) if views is None else (views, len(labels), width)
    return torch.randn(shape, generator=generator), labels


def write(folder, K=3, **arrays):
    folder.mkdir(exist_ok=True)
    (folder / "classnames.json").write_text(json.dumps([f"class {k}" for k in range(K)]))
    arrays = {name: x.contiguous() for name, x in arrays.items()}
    save_file(dict(text=torch.eye(K, 6), **arrays), folder / "features.safetensors")
    return folder


@pytest.fixture
def bundle(tmp_path):
    y = torch.arange(3).repeat(8)
    x, _ = arrays_of(y)
    val_x, val_y = arrays_of(torch.arange(3).repeat(6), seed=1)
    test_x, test_y = arrays_of(torch.arange(3).repeat(4), seed=2)
    return write(
        tmp_path / "toy",
        **dict(train_x=x, train_y=y, val_x=val_x, val_y=val_y, test_x=test_x, test_y=test_y),
    )


def test_shots_and_seed_draw_as_few_shot_does(bundle):
    everything = FewShotProblem.from_bundle(bundle)
    assert len(everything.labels["train"]) == 24 and "shots" not in everything.provenance
    y, val_y = everything.labels["train"], everything.labels["val"]
    for seed in (1, 2):
        problem = FewShotProblem.from_bundle(bundle, shots=5, seed=seed)
        support, validation = few_shot_indices(y, val_y, 5, seed)
        assert torch.equal(problem.features.train, everything.features.train[support])
        assert torch.equal(problem.features.val, everything.features.val[validation])
        assert torch.bincount(problem.labels["train"]).tolist() == [5, 5, 5]
        assert torch.bincount(problem.labels["val"]).tolist() == [4, 4, 4]
        assert torch.equal(problem.features.test, everything.features.test)
        assert str(problem) == f"toy, 5 shots, seed {seed}"
    one, two = (FewShotProblem.from_bundle(bundle, shots=5, seed=s) for s in (1, 2))
    assert one.provenance["content"] != two.provenance["content"]
    again = FewShotProblem.from_bundle(bundle, shots="5", seed=1.0)
    assert again.provenance == one.provenance
    whole = FewShotProblem.from_bundle(bundle, shots=5, whole_val=True)
    assert len(whole.labels["val"]) == 18 and whole.provenance["whole_val"] is True


def test_a_bundle_without_val_takes_images_that_are_no_shots(tmp_path):
    x, y = arrays_of(torch.arange(3).repeat(8), views=2)
    problem = FewShotProblem.from_bundle(write(tmp_path / "b", train_x=x, train_y=y), shots=2)
    support, validation = few_shot_indices(y, None, 2, 1)
    assert torch.equal(problem.features.views, x[:, support])
    assert torch.equal(problem.features.val, x[:, validation].mean(0))
    assert not set(support) & set(validation)


def test_what_shots_cannot_be_drawn_from_is_refused(bundle, tmp_path):
    place = "features.safetensors"
    with pytest.raises(ValueError, match=f"{place}: 9 shots requested, but class 'class 0' has 8"):
        FewShotProblem.from_bundle(bundle, shots=9)
    for shots, seed in ((0, 1), (-1, 1), (2, -1), (True, 1), (1.5, 1)):
        with pytest.raises(ValueError, match="shots|seed"):
            FewShotProblem.from_bundle(bundle, shots=shots, seed=seed)
    x, y = arrays_of(torch.arange(3).repeat(8))
    for wrong in (y + 1, y - 1, y.float(), y[:, None]):
        write(tmp_path / "b", train_x=x, train_y=wrong)
        with pytest.raises(RecordError, match=f"{place}: train_y must hold whole numbers"):
            FewShotProblem.from_bundle(tmp_path / "b", shots=2)
    write(tmp_path / "b", train_x=x[:5], train_y=y)
    with pytest.raises(RecordError, match=f"{place}: train_x has the shape"):
        FewShotProblem.from_bundle(tmp_path / "b", shots=2)
    small = torch.tensor([0, 0, 1, 1, 2])
    write(tmp_path / "b", train_x=x[:5], train_y=small)
    with pytest.warns(UserWarning, match="class 'class 2' has 1 train images; 1 small classes"):
        problem = FewShotProblem.from_bundle(tmp_path / "b", shots=2)
    assert problem.labels["train"].tolist() == [0, 0, 1, 1, 2]


def test_published_lists_take_the_place_of_the_draw(bundle, tmp_path):
    everything = FewShotProblem.from_bundle(bundle)
    lists = tmp_path / "lists"
    lists.mkdir()
    index = [3, 1, 23]  # classes 0, 1 and 2
    found = dict(data=[dict(label=k, impath="x") for k in range(3)], indices=index)
    path = lists / "shot_1-seed_2.json"
    path.write_text(json.dumps(dict(train=found)))
    problem = FewShotProblem.from_bundle(bundle, shots=1, seed=2, indices=lists)
    assert torch.equal(problem.features.train, everything.features.train[index])
    for indices, message in (
        ([1, 3, 23], "train: its labels are not those of the features"),
        ([3, 1, 24], "train: positions of 24 images expected"),
        ([3, 1], "train: positions of 24 images expected"),
        ([-3, 1, 23], r"\['train'\]\['indices'\]\[0\]|greater than or equal"),
    ):
        path.write_text(json.dumps(dict(train=found | dict(indices=indices))))
        with pytest.raises(RecordError, match=message):
            FewShotProblem.from_bundle(bundle, shots=1, seed=2, indices=lists)
    with pytest.raises(FileNotFoundError):
        FewShotProblem.from_bundle(bundle, shots=2, seed=2, indices=lists)


def test_texts_of_a_bundle_are_chosen_by_name(bundle, tmp_path):
    save_file({"text": torch.eye(3, 6).flip(0).contiguous()}, bundle / "text_ensemble.safetensors")
    problem = FewShotProblem.from_bundle(bundle, text="text_ensemble")
    assert torch.equal(problem.features.text, torch.eye(3, 6).flip(0))
    assert problem.provenance["text"] == "text_ensemble"
    plain = FewShotProblem.from_bundle(bundle)
    assert problem.provenance["content"] != plain.provenance["content"]
    with pytest.raises(ValueError, match="did you mean 'text_ensemble'"):
        FewShotProblem.from_bundle(bundle, text="text_ensembel")
    x, y = arrays_of([0, 1, 2])
    every = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(3))
    write(tmp_path / "b", train_x=x, train_y=y, text_all=every)
    problem = FewShotProblem.from_bundle(tmp_path / "b")
    assert problem.features.owner.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.equal(problem.features.sentences[5], every[1, 1])
    write(tmp_path / "b", train_x=x, train_y=y, text_all=every[:, :2])
    with pytest.raises(RecordError, match=r"text_all features have the shape \(4, 2, 6\), not"):
        FewShotProblem.from_bundle(tmp_path / "b")


def test_the_logit_bias_is_kept_and_changes_no_score(tmp_path):
    x, y = arrays_of(torch.arange(3).repeat(8))
    arrays = dict(train=(x, y), test=(x, y))
    plain = from_features(list("abc"), torch.eye(3, 6), **arrays)
    biased = from_features(list("abc"), torch.eye(3, 6), logit_bias=-12.9, **arrays)
    assert (plain.logit_bias, biased.logit_bias, hold_out(biased).logit_bias) == (0, -12.9, -12.9)
    scores = [METHODS["ZeroShot"](p).scores(x) for p in (plain, biased)]
    assert torch.equal(*scores)
    METHODS["ZeroShot"](biased).save(tmp_path / "m.safetensors")
    loaded = METHODS["ZeroShot"].load(tmp_path / "m.safetensors")
    assert loaded.card["problem"]["logit_bias"] == -12.9
    with pytest.raises(ValueError, match="logit_bias: "):
        from_features(list("abc"), torch.eye(3, 6), logit_bias=float("nan"))


# The bundles of real features


@pytest.mark.parametrize("name", BUNDLES)
def test_real_bundles(name):
    text, zero_shot, stored = BUNDLES[name]
    folder = shared_data("data", name.split()[0])
    problem = FewShotProblem.from_bundle(folder, text=text)
    accuracy = evaluate(METHODS["ZeroShot"](problem), problem)["accuracy"]
    assert accuracy == pytest.approx(zero_shot, abs=0.06)
    assert ("sentences" in problem.features) == ("whurs19" in name)
    assert torch.bincount(problem.labels["train"]).tolist() == [stored] * problem.K
    few = [FewShotProblem.from_bundle(folder, text=text, shots=2, seed=s) for s in (1, 2)]
    for drawn in few:
        assert torch.bincount(drawn.labels["train"]).tolist() == [2] * problem.K
        assert torch.equal(drawn.features.test, problem.features.test)
    assert not torch.equal(few[0].features.train, few[1].features.train)
    above = dict(shots=2 * stored, seed=1)
    with pytest.raises(ValueError, match=f"no class has more than {stored}"):
        FewShotProblem.from_bundle(folder, text=text, **above)


@pytest.mark.parametrize("shots", [1, 16])
def test_the_published_lists_of_dtd(tmp_path, shots):
    parts = read_parts(shared_data("data/splits/split_zhou_DescribableTextures.json"))
    lists = shared_data("data/fewshot_indices/dtd")
    labels = {part: [label for _, label, _ in items] for part, items in parts.items()}
    arrays = {}
    for part in ("train", "val"):
        arrays[f"{part}_x"], arrays[f"{part}_y"] = arrays_of(labels[part], width=48)
    folder = tmp_path / "dtd"
    folder.mkdir()
    (folder / "classnames.json").write_text(json.dumps([f"texture {k}" for k in range(47)]))
    save_file(dict(text=torch.eye(47, 48), **arrays), folder / "features.safetensors")
    for seed in (1, 3):
        drawn = read_bundle(folder, shots, seed)[1]
        listed = read_bundle(folder, shots, seed, indices=lists)[1]
        for part in ("train", "val"):
            assert torch.equal(drawn[part][0], listed[part][0])
    arrays["train_y"] = arrays["train_y"].flip(0).contiguous()
    save_file(dict(text=torch.eye(47, 48), **arrays), folder / "features.safetensors")
    with pytest.raises(RecordError, match="are they in another order"):
        read_bundle(folder, shots, 1, indices=lists)
