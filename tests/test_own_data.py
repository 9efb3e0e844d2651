"Own images: folders, datasets of other libraries, tables; class names, templates, descriptions."

import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import refused
from PIL import Image

from vlmadapt.data.datasets import load_dataset
from vlmadapt.methods import METHODS
from vlmadapt.models.backbones import load_backbone
from vlmadapt.models.open_clip_import import import_open_clip
from vlmadapt.problems.few_shot import few_shot
from vlmadapt.problems.own_data import from_dataset, from_folder
from vlmadapt.training.evaluation import evaluate

COLOURS = {"blue": (0, 0, 220), "green": (0, 200, 0), "red": (220, 0, 0)}
NAMES = list(COLOURS)


@pytest.fixture(scope="module")
def mini():
    return load_backbone("mini", device="cpu")


def picture(name, i):
    "A noisy picture of a colour."
    noise = np.random.default_rng([i, NAMES.index(name)]).integers(-25, 25, (12, 10, 3))
    return Image.fromarray((np.array(COLOURS[name]) + noise).clip(0, 255).astype(np.uint8))


def write_folder(root, count=6, start=0):
    "Write `count` pictures of each colour in a folder of its own."
    for name in NAMES:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(start, start + count):
            picture(name, i).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def folder(tmp_path):
    for start, part in enumerate(("train", "val", "test")):
        write_folder(tmp_path / "colours" / part, start=10 * start)
    return tmp_path / "colours"


def same_problem(a, b):
    "Check that two problems have the same images, labels and features."
    assert a.class_names == b.class_names
    for split in ("train", "val", "test"):
        assert torch.equal(getattr(a.features, split), getattr(b.features, split))
    assert torch.equal(a.labels["train"], b.labels["train"])
    assert evaluate(METHODS["ZeroShot"](a), a) == evaluate(METHODS["ZeroShot"](b), b)


class Pairs:
    "Images and labels by position; what is opened is recorded, test labels can be locked."

    classes = NAMES

    def __init__(self, count=6, start=0):
        self.targets = [k for k in range(3) for _ in range(count)]
        self.start = start
        self.count = count
        self.opened = []

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        self.opened.append(i)
        k, j = divmod(i, self.count)
        return picture(NAMES[k], self.start + j), k


class Locked(list):
    "Labels that can be counted, and raise when they are read."

    def _refuse(self, *args):
        raise AssertionError("test labels were read")

    __iter__ = __getitem__ = __contains__ = __eq__ = _refuse
    __hash__ = None


# Backbones


def test_real_images_never_fall_back_to_mini(folder):
    listed = ("such as backbone='ViT-B-16'", "RN50", "ViT-L-14", "'mini' for a trial")
    refused(lambda: few_shot("oxford_pets"), "dataset oxford_pets: name the backbone", *listed)
    refused(lambda: few_shot("imagenet", shots=1), "dataset imagenet", *listed)
    refused(lambda: from_folder(folder), "colours: name the backbone", *listed)
    refused(lambda: from_dataset(Pairs(), Pairs()), "own data: name the backbone", *listed)
    assert few_shot("mini-digits", shots=1).backbone.name == "mini"
    assert load_dataset("mini-digits").default_backbone == "mini"


# Names, templates and descriptions


def test_template_class_names_and_descriptions_of_a_folder(folder, mini, tmp_path):
    file = tmp_path / "cupl.json"
    texts = {"Sky_Blue": ["the colour of the sky."], "LEAF-GREEN": ["a leaf."], "red": ["a rose."]}
    file.write_text(json.dumps(texts))
    names = {"blue": "sky blue", "green": "leaf green"}
    options = dict(shots=2, views=1, class_names=names)
    problem = from_folder(folder, mini, template="paint of {}.", descriptions=file, **options)
    assert problem.class_names == ["sky blue", "leaf green", "red"]
    assert problem.features.owner.tolist() == [0, 0, 1, 1, 2, 2]
    expected = mini.encode_tokens(mini.tokenize(["paint of sky blue.", "the colour of the sky."]))
    assert torch.allclose(problem.features.sentences[:2], expected, atol=1e-5)
    found = {n: problem.provenance[n] for n in ("template", "descriptions", "class_names")}
    assert found == dict(template=["paint of {}."], descriptions=str(file), class_names="given")
    alone = from_folder(folder, mini, template=[], descriptions=texts, **options)
    assert alone.features.owner.tolist() == [0, 1, 2]
    described = problem.features.sentences[1::2]
    assert torch.allclose(alone.features.sentences, described, atol=1e-5)
    several = from_folder(folder, mini, template=["a {}.", "the {}."], **options)
    assert several.features.owner.tolist() == [0, 0, 1, 1, 2, 2]


def test_content_of_texts_is_the_key(folder, mini):
    def key(**texts):
        problem = from_folder(folder, mini, shots=1, views=1, **texts)
        return problem.provenance["prompt_set"], problem.provenance["split"]

    texts = {name: [name] for name in NAMES}
    plain = key()
    assert key(template="a photo of a {}.") == plain  # the default, given by name
    keys = [plain, key(template="a {}."), key(descriptions=texts)]
    keys.append(key(descriptions=texts | {"red": ["dark red"]}))
    assert len({k for k, _ in keys}) == 4
    assert len({split for _, split in keys}) == 1
    assert key(class_names=["b", "g", "r"])[1] != plain[1]


def test_texts_that_do_not_fit_are_named(folder, mini):
    def build(**texts):
        return from_folder(folder, mini, shots=1, **texts)

    refused(lambda: build(descriptions={"blue": "a", "gren": "b", "red": "c"}), "'green'", "'gren'")
    refused(lambda: build(descriptions={"blue": "a"}), "no description of class 'green' and 1 more")
    refused(lambda: build(descriptions=["a", "b"]), "descriptions must be a dict")
    refused(lambda: build(descriptions="gone.json"), "no such file of descriptions: gone.json")
    refused(lambda: build(template="a photo"), "exactly one {}")
    refused(lambda: build(template=[]), "no templates and no descriptions")
    refused(lambda: build(class_names=["a", "b"]), "2 class names for 3 classes: 'blue', 'green'")
    refused(lambda: build(class_names={"grean": "x"}), "did you mean 'green'?")
    refused(lambda: build(class_names={"red": "green"}), "'green' and 'red' both become 'green'")
    with pytest.warns(UserWarning, match="1 described names are no class and left out: 'pink'"):
        build(descriptions={name: name for name in [*NAMES, "pink"]})


def test_texts_of_one_half_of_the_classes():
    texts = {f"{i}!": "x" for i in range(10)}
    names = [str(i) for i in range(10)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem = few_shot(
            "mini-digits", shots=1, views=1, part="new", class_names=names, descriptions=texts
        )
    assert problem.class_names == ["5", "6", "7", "8", "9"]


# torchvision and datasets with positions


def test_a_dataset_with_positions_is_lazy_and_sealed(mini):
    train, val, test = Pairs(), Pairs(start=10), Pairs(start=20)
    test.targets = Locked(test.targets)
    problem = from_dataset(train, test, None, mini, val, shots=2, views=1)
    assert train.opened == val.opened == test.opened == []
    before = problem.features.test.clone()
    assert sorted(test.opened) == sorted(
        [*range(18), *range(18)]
    )  # once for the key, once to be encoded
    assert repr(problem.labels["test"]) == "SealedLabels(18)"
    method = METHODS["TipAdapter"](problem)
    assert method.outputs(problem, "test").shape == (18, 3)
    with pytest.raises(AssertionError, match="test labels were read"):
        evaluate(method, problem)
    test.opened.clear()
    open_problem = from_dataset(train, Pairs(start=20), None, mini, val, shots=2, views=1)
    assert torch.equal(open_problem.features.test, before)
    assert evaluate(METHODS["TipAdapter"](open_problem), open_problem)["n"] == 18


def test_keys_follow_the_content(mini):
    class Brighter(Pairs):
        def __getitem__(self, i):
            image, label = super().__getitem__(i)
            return image.point(lambda v: min(255, v + 9)), label

    problems = [from_dataset(s(), s(), None, mini, shots=1, views=1) for s in (Pairs, Brighter)]
    keys = [p.images("test").key() for p in problems]
    assert keys[0] != keys[1]
    again = from_dataset(Pairs(), Pairs(), None, mini, shots=1, views=1)
    assert again.images("test").key() == keys[0]


def test_image_folder_gives_the_problem_of_the_folder(folder, mini):
    import_open_clip()
    datasets = pytest.importorskip("torchvision.datasets")
    parts = [datasets.ImageFolder(folder / part) for part in ("train", "test", "val")]
    train, test, val = parts
    options = dict(shots=2, seed=3, views=2)
    problem = from_dataset(train, test, None, mini, val, **options)
    own = from_folder(folder, mini, **options)
    same_problem(problem, own)
    assert problem.images("test").key() == own.images("test").key()  # encoded once for both
    subset = torch.utils.data.Subset(train, range(0, 18, 2))
    halved = from_dataset(subset, test, None, mini, shots=2, views=1)
    assert set(halved.images("train").items) <= {path for path, _ in train.samples[::2]}
    bad = datasets.ImageFolder(folder / "train", transform=print)
    refused(lambda: from_dataset(bad, test, None, mini), "train: ImageFolder has a transform")


def test_cifar_and_fake_data(mini):
    import_open_clip()
    datasets = pytest.importorskip("torchvision.datasets")

    class Cifar(datasets.CIFAR10):
        "CIFAR-10 without its files."

        def __init__(self, seed):
            rng = np.random.default_rng(seed)
            self.data = rng.integers(0, 255, (20, 32, 32, 3), dtype=np.uint8)
            self.targets = [i % 2 for i in range(20)]
            self.classes = ["cat", "dog"]
            self.transform = self.target_transform = None

    train, test = Cifar(0), Cifar(1)
    problem = from_dataset(train, test, None, mini, shots=2, views=1, name="tiny-cifar")
    assert (problem.provenance["dataset"], problem.class_names) == ("tiny-cifar", ["cat", "dog"])
    expected = mini.encode_images([Image.fromarray(x) for x in test.data])
    assert torch.allclose(problem.features.test, expected, atol=1e-4)
    fake = datasets.FakeData(8, (3, 16, 16), 2)
    refused(lambda: from_dataset(fake, None, None, mini, shots=1), "give class_names=[...]")
    named = from_dataset(fake, None, ["zero", "one"], mini, shots=1, views=1)
    assert named.class_names == ["zero", "one"] and "test" not in named.labels


def test_what_does_not_fit_is_named(mini):
    train = Pairs()

    def build(train=train, test=None, class_names=None, **options):
        return from_dataset(train, test, class_names, mini, shots=1, **options)

    other = Pairs()
    other.classes = ["blue", "red", "green"]
    refused(lambda: build(test=other), "class 1 is 'green' in train and 'red' in test")
    other.classes = ["blue", "green"]
    refused(lambda: build(test=other), "train has 3 classes, test 2")
    wrong = Pairs()
    wrong.targets[4] = 3
    refused(lambda: build(wrong), "own data train labels must lie in 0 .. 2, found 0 .. 3")
    wrong.targets[4] = "blu"
    refused(lambda: build(wrong), "own data train")
    wrong.targets = [1 + y for y in Pairs().targets]
    refused(lambda: build(wrong), "they seem to run from 1, subtract 1")
    refused(lambda: build(class_names=["a"]), "1 class names for 3 classes")
    refused(lambda: build(None), "give train=..., test=..., or both")
    refused(lambda: build([]), "train: the dataset is empty")
    refused(lambda: build(iter([])), "train: expected a dataset of torchvision or Hugging Face")
    with pytest.raises(ValueError, match="own data train: image 0 cannot be opened"):
        pairs = [(np.full((4, 4, 3), -1.0), 0), (np.zeros((4, 4, 3)), 1)]
        build(pairs, None, NAMES[:2]).images("train").key()


# Tables


def table_of(folder):
    rows = [
        dict(path=str(path), label=path.parent.name, split=path.parent.parent.name)
        for path in sorted(folder.rglob("*.png"))
    ]
    return pd.DataFrame(rows)


def test_a_table_gives_the_problem_of_the_folder(folder, mini, tmp_path):
    own = from_folder(folder, mini, shots=2, views=1)
    table = table_of(folder)
    same_problem(from_dataset(table, backbone=mini, shots=2, views=1), own)
    relative = table.assign(path=[str(p)[len(str(folder)) + 1 :] for p in table["path"]])
    relative.to_csv(folder / "list.csv", index=False)
    from_csv = from_dataset(folder / "list.csv", backbone=mini, shots=2, views=1)
    same_problem(from_csv, own)
    assert from_csv.provenance["dataset"] == "list"
    renamed = relative.rename(columns={"path": "file", "label": "colour"})
    columns = dict(image_column="file", label_column="colour", root=folder)
    same_problem(from_dataset(renamed, backbone=mini, shots=2, views=1, **columns), own)
    numbers = table.assign(label=[NAMES.index(name) for name in table["label"]])
    same_problem(from_dataset(numbers, None, NAMES, mini, shots=2, views=1), own)
    parts = {p: rows.drop(columns="split") for p, rows in table.groupby("split")}
    by_part = from_dataset(
        parts["train"], parts["test"], None, mini, parts["val"], shots=2, views=1
    )
    same_problem(by_part, own)


def test_underscores_are_spaces_in_folders_and_in_tables(folder, mini):
    for part in ("train", "val", "test"):
        (folder / part / "red").rename(folder / part / "dark_red")
    own = from_folder(folder, mini, shots=2, views=1)
    table = table_of(folder)
    assert "dark_red" in set(table["label"])
    tabled = from_dataset(table, backbone=mini, shots=2, views=1)
    assert tabled.class_names == own.class_names and "dark red" in own.class_names
    same_problem(own, tabled)
    named = from_dataset(table, backbone=mini, shots=2, class_names={"dark_red": "dark_blood"})
    assert "dark_blood" in named.class_names  # as it is written
    labels = table["label"].where(table.index % 2 == 0, table["label"].str.replace("_", " "))
    mixed = table.assign(label=labels)
    refused(
        lambda: from_dataset(mixed, backbone=mini, shots=2),
        "'dark red' and 'dark_red' become one class name; rename one",
    )


def test_a_table_without_splits_is_cut(folder, mini):
    table = table_of(folder).drop(columns="split")
    problem = from_dataset(table, backbone=mini, shots=2, views=1)
    assert {s: len(y) for s, y in problem.labels.items()} == dict(train=6, val=6, test=15)


def test_test_labels_of_a_table_are_sealed(folder, mini):
    table = table_of(folder)
    wrong = table.copy()
    wrong.loc[wrong["split"] == "test", "label"] = "purple"
    problem = from_dataset(wrong, backbone=mini, shots=2, views=1)
    method = METHODS["ZeroShot"](problem)
    own = from_dataset(table, backbone=mini, shots=2, views=1)
    assert torch.equal(
        method.outputs(problem, "test"), METHODS["ZeroShot"](own).outputs(own, "test")
    )
    refused(lambda: evaluate(method, problem), "unknown class name 'purple'")


def test_rows_that_cannot_be_read_are_named(folder, mini):
    table = table_of(folder)
    path = folder / "list.csv"

    def build(**columns):
        table.assign(**columns).to_csv(path, index=False)
        return from_dataset(path, backbone=mini, shots=1)

    paths = table["path"].tolist()
    missing = [*paths[:3], str(folder / "gone.png"), *paths[4:]]
    refused(lambda: build(path=missing), "list.csv: line 5:", "gone.png", error=FileNotFoundError)
    refused(lambda: build(label=["", *table["label"][1:]]), "list.csv: line 2: no label")
    refused(lambda: build(path=[*paths[:-2], "", ""]), "and 1 more: no path")
    refused(lambda: build(split=["tset", *table["split"][1:]]), "line 2: split 'tset' is none of")
    (folder / "broken.png").write_bytes(b"")
    refused(lambda: build(path=[str(folder / "broken.png"), *paths[1:]]), "line 2:", "empty")
    refused(lambda: build(path=[paths[-1], *paths[1:]]), "the same file twice")
    table.rename(columns={"label": "lable"}).to_csv(path, index=False)
    refused(
        lambda: from_dataset(path, backbone=mini),
        "unknown column of",
        "'label'; did you mean 'lable'?",
    )
    path.write_text("path,label\n")
    refused(lambda: from_dataset(path, backbone=mini), "list.csv: the table has no rows")
    refused(lambda: from_dataset(folder, backbone=mini), "a folder, not a table; use from_folder")
    gone = folder / "gone.csv"
    refused(lambda: from_dataset(gone, backbone=mini), "no such table", error=FileNotFoundError)


def test_labels_that_look_empty_or_like_numbers(folder, mini):
    table = table_of(folder)
    names = dict(blue="NA", green="None", red="01")
    table.assign(label=table["label"].map(names)).to_csv(folder / "list.csv", index=False)
    problem = from_dataset(folder / "list.csv", backbone=mini, shots=1, views=1)
    assert problem.class_names == ["01", "NA", "None"]


# Hugging Face datasets


class Value:
    "A feature of numbers or texts."


class ClassLabel:
    "A stand-in for the feature of Hugging Face datasets."

    def __init__(self, names):
        self.names = names


class ImageFeature:
    "A stand-in for the image feature."


ImageFeature.__name__ = "Image"  # found by the name of its type


class HubDataset:
    "A stand-in for a Hugging Face dataset: columns, features, a fingerprint."

    def __init__(self, start=0, names=NAMES, **extra):
        self._pairs = Pairs(start=start)
        self.features = {"image": ImageFeature(), "label": ClassLabel(names), **extra}
        self.column_names = [*self.features]
        self.format = {"type": None}
        self._fingerprint = f"fingerprint-{start}"

    def __len__(self):
        return len(self._pairs)

    def __getitem__(self, key):
        if key == "label":
            return list(self._pairs.targets)
        return {"image": self._pairs[key][0], "label": self._pairs.targets[key]}


def test_hugging_face_datasets(mini, folder):
    own = from_folder(folder, mini, shots=2, views=1)
    parts = {"train": HubDataset(), "validation": HubDataset(10), "test": HubDataset(20)}
    problem = from_dataset(parts, backbone=mini, shots=2, views=1)
    assert problem.images("train").items[0].fingerprint == "fingerprint-0"
    keys = problem.images("test").key()
    assert parts["test"]._pairs.opened == []  # the key needs no image
    same_problem(problem, own)
    assert HubDataset(20)._pairs.opened == [] and keys == problem.images("test").key()
    by_part = from_dataset(parts["train"], parts["test"], NAMES, mini, shots=2, views=1)
    assert by_part.class_names == NAMES
    changed = HubDataset(20)
    changed._fingerprint = "other"
    other = from_dataset(parts["train"], changed, None, mini, shots=2)
    assert other.images("test").key() != keys


def test_columns_of_hugging_face_datasets(mini):
    def build(dataset, **columns):
        return from_dataset(dataset, backbone=mini, shots=1, views=1, **columns)

    two = HubDataset(coarse=ClassLabel(["warm", "cold"]))
    refused(lambda: build(two), "2 columns of type ClassLabel; give label_column=..., one of label")
    assert build(two, label_column="label").class_names == NAMES
    refused(lambda: build(two, label_column="labels"), "did you mean 'label'?")
    transformed = HubDataset()
    transformed.format = {"type": "custom"}
    refused(lambda: build(transformed), "has a transform", "reset_format()")
    streaming = HubDataset()
    streaming_type = type(
        "Streaming", (), dict(features=streaming.features, column_names=["image"])
    )
    refused(lambda: build(streaming_type()), "load it with streaming=False")
    plain = HubDataset()
    plain.features["label"] = Value()
    refused(lambda: build(plain), "0 columns of type ClassLabel; give label_column=...")
    refused(lambda: build(plain, label_column="label"), "give class_names=[...]")
    assert (
        from_dataset(plain, None, NAMES, mini, shots=1, label_column="label").class_names == NAMES
    )


def test_the_package_datasets_where_it_is_installed(mini, folder):
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=NAMES)
    features = datasets.Features(image=datasets.Image(), label=label)
    parts = {}
    for part in ("train", "validation", "test"):
        paths = sorted((folder / part.replace("validation", "val")).rglob("*.png"))
        rows = dict(
            image=[str(p) for p in paths], label=[NAMES.index(p.parent.name) for p in paths]
        )
        parts[part] = datasets.Dataset.from_dict(rows, features=features)
    parts = datasets.DatasetDict(parts)
    problem = from_dataset(parts, backbone=mini, shots=2, views=1)
    same_problem(problem, from_folder(folder, mini, shots=2, views=1))
    shuffled = from_dataset(
        parts["train"].shuffle(seed=0), parts["test"], None, mini, shots=2, views=1
    )
    assert shuffled.images("test").key() == problem.images("test").key()
    streaming = parts["train"].to_iterable_dataset()
    refused(lambda: from_dataset(streaming, backbone=mini), "streaming=False")
    transformed = parts["train"].with_transform(lambda rows: rows)
    refused(lambda: from_dataset(transformed, backbone=mini), "has a transform")
