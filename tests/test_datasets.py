"The readers of fifteen benchmarks on miniatures; the published split files and few-shot lists."

import hashlib
import json
import pkgutil
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import ROOT, shared_data
from PIL import Image

from vlmadapt.data.annotations import class_folders, imagenet_names
from vlmadapt.data.benchmarks import BENCHMARKS
from vlmadapt.data.datasets import (
    DATASETS,
    benchmark_spec,
    load_dataset,
    read_benchmark,
    rebuild_split,
)
from vlmadapt.data.sampling import few_shot_indices, validation_images
from vlmadapt.data.splits import read_split
from vlmadapt.problems.few_shot import few_shot


def image(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade * 37 % 256, shade * 91 % 256, 128)).save(path)


# Per dataset: items of the split file in their order (path, label, name); the names expected; files
# that must not be read.
SPLITS = dict(
    caltech101=(
        [
            "accordion/image_0001.jpg 2 accordion",
            "Faces/image_0001.jpg 0 face",
            "Leopards/image_0001.jpg 1 leopard",
        ],
        ["face", "leopard", "accordion"],
        ["BACKGROUND_Google/image_0001.jpg", "Faces_easy/image_0001.jpg"],
    ),
    oxford_pets=(
        ["Abyssinian_{}.jpg 0 abyssinian", "yorkshire_terrier_{}.jpg 1 yorkshire_terrier"],
        ["abyssinian", "yorkshire terrier"],
        ["Abyssinian_900.jpg"],
    ),
    stanford_cars=(
        [
            "cars_train/{:05d}.jpg 1 2012_Audi_TTS_Coupe",
            "cars_train/1{:04d}.jpg 0 2000_AM_General_Hummer_SUV",
        ],
        ["2000 AM General Hummer SUV", "2012 Audi TTS Coupe"],
        ["cars_test/90000.jpg"],
    ),
    oxford_flowers=(
        [
            "image_0{}001.jpg 2 passion_flower",
            "image_0{}002.jpg 0 pink_primrose",
            "image_0{}003.jpg 1 globe_thistle",
        ],
        ["pink primrose", "globe thistle", "passion flower"],
        [],
    ),
    food101=(
        ["apple_pie/{}.jpg 0 apple_pie", "baby_back_ribs/{}.jpg 1 baby_back_ribs"],
        ["apple pie", "baby back ribs"],
        [],
    ),
    sun397=(
        ["a/abbey/sun_{}.jpg 0 abbey", "a/apse/indoor/sun_{}.jpg 1 indoor_apse"],
        ["abbey", "indoor apse"],
        [],
    ),
    dtd=(
        ["banded/banded_{}.jpg 0 banded", "polka-dotted/polka-dotted_{}.jpg 1 polka-dotted"],
        ["banded", "polka-dotted"],
        [],
    ),
    eurosat=(
        [
            "AnnualCrop/AnnualCrop_{}.jpg 0 Annual_Crop_Land",
            "Forest/Forest_{}.jpg 1 Forest",
            "SeaLake/SeaLake_{}.jpg 2 Sea_or_Lake",
        ],
        ["Annual Crop Land", "Forest", "Sea or Lake"],
        [],
    ),
    ucf101=(
        [
            "Apply_Eye_Makeup/v_ApplyEyeMakeup_g0{}_c01.jpg 0 Apply_Eye_Makeup",
            "Yo_Yo/v_YoYo_g0{}_c01.jpg 1 Yo_Yo",
        ],
        ["Apply Eye Makeup", "Yo Yo"],
        [],
    ),
)
COPIES = dict(train=5, val=2, test=3)
WNIDS = [
    "n01440764",
    "n03773504",
    "n04008634",
    "n15075141",
]  # tench, missile, the other missile, toilet paper
VARIANTS = dict(
    imagenet_sketch=WNIDS,
    imagenet_a=["n01440764", "n15075141"],
    imagenet_r=["n03773504", "n15075141"],
)


def split_miniature(root, name):
    "A dataset with a split file; its items differ by a number in the path."
    lines, names, unread = SPLITS[name]
    row = BENCHMARKS[name]
    folder = root / row.folder
    parts, i = {}, 0
    for part, n in COPIES.items():
        parts[part] = []
        for line in lines:
            for _ in range(n):
                i += 1
                path, label, called = line.format(i).split(" ")
                if "{" not in line:
                    path = path.replace("0001", f"{i:04d}")
                parts[part].append(
                    [
                        path,
                        int(label),
                        called
                        if name in ("food101", "oxford_pets", "ucf101")
                        else called.replace("_", " "),
                    ]
                )
    if name == "stanford_cars":
        parts["test"] = [
            [p.replace("cars_train", "cars_test"), k, c]
            for p, k, c in parts["test"][::2] + parts["test"][1::2]
        ]
    for s in parts:
        for p, k, _ in parts[s]:
            image(folder / row.images / p, k)
    for p in unread:
        image(folder / row.images / p)
    (folder / row.split).write_text(json.dumps(parts))
    return (
        replace(row, classes=len(names), sizes=tuple(len(names) * n for n in COPIES.values())),
        names,
        parts,
    )


def aircraft_miniature(root):
    row = BENCHMARKS["fgvc_aircraft"]
    folder, names = root / row.folder, ["Cessna 172", "707-320", "F-16A/B"]
    folder.mkdir()
    (folder / "variants.txt").write_text("\n".join(names) + "\n")
    parts, i = {}, 0
    for part, n in COPIES.items():
        parts[part] = []
        for k in (1, 0, 2):
            for _ in range(n):
                i += 1
                image(folder / f"images/{i:07d}.jpg", k)
                parts[part].append([f"{i:07d}.jpg", k, names[k]])
        (folder / f"images_variant_{part}.txt").write_text(
            "".join(f"{p[:-4]} {name}\n" for p, _, name in parts[part])
        )
    return replace(row, classes=3, sizes=tuple(3 * n for n in COPIES.values())), names, parts


def imagenet_miniature(root, name):
    row, names = BENCHMARKS[name], imagenet_names()
    images = root / row.folder / row.images
    if name == "imagenet":
        for k, w in enumerate(WNIDS):
            for part, n in (("train", 9), ("val", 3)):
                for i in range(n):
                    image(images / part / w / f"{w}_{9 - i}.JPEG", 10 * k + i)
        return replace(row, classes=4, sizes=(36, 0, 12)), [names[w] for w in WNIDS]
    wnids = VARIANTS[name]
    (images.parent if name == "imagenet_sketch" else images).mkdir(parents=True)
    for w in wnids:
        for i in range(3):
            image(images / w / f"{i}.jpg", 10 * WNIDS.index(w) + i)
    (images / "README.txt").write_text("not a class")
    return replace(row, classes=len(wnids), sizes=(0, 0, 3 * len(wnids))), [names[w] for w in wnids]


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("VLMADAPT_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", SPLITS)
def test_reader_of_a_dataset_with_a_split_file(root, name, monkeypatch):
    row, names, parts = split_miniature(root, name)
    monkeypatch.setitem(DATASETS, name, benchmark_spec(name, row))
    d = load_dataset(name)
    assert (
        d.class_names == names
        and d.templates == [row.template]
        and list(d.splits) == ["train", "val", "test"]
    )
    for s, items in parts.items():
        assert [
            str(Path(p).relative_to(root / row.folder / row.images)) for p in d.splits[s].items
        ] == [p for p, _, _ in items]  # the file's order
        assert d.splits[s].labels.tolist() == [k for _, k, _ in items]
    assert d.splits["train"][0].size == (8, 8) and "not CoOp's file" in d.note
    train, _ = few_shot_indices(d.splits["train"].labels, d.splits["val"].labels, 2, 1)
    seen = list(dict.fromkeys(d.splits["train"].labels.tolist()))
    assert list(dict.fromkeys(d.splits["train"].labels[train].tolist())) == seen and len(
        train
    ) == 2 * len(names)  # groups in order of first appearance


@pytest.mark.parametrize(
    "name, order",
    [("oxford_flowers", [2, 0, 1]), ("stanford_cars", [1, 0]), ("caltech101", [2, 0, 1])],
)
def test_labels_of_the_miniatures_are_not_in_order(root, name, order):
    _, _, parts = split_miniature(root, name)
    assert list(dict.fromkeys(label for _, label, _ in parts["train"])) == order


def test_reader_of_aircraft(root):
    row, names, parts = aircraft_miniature(root)
    d = read_benchmark("fgvc_aircraft", row)
    assert d.class_names == names and d.splits["val"].labels.tolist() == [
        k for _, k, _ in parts["val"]
    ]
    assert [Path(p).name for p in d.splits["test"].items] == [p for p, _, _ in parts["test"]]
    (root / row.folder / "images/0000001.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match="1 of 30 images are missing, the first is .*0000001.jpg"
    ):
        read_benchmark("fgvc_aircraft", row)


def test_reader_of_imagenet(root):
    row, names = imagenet_miniature(root, "imagenet")
    d = read_benchmark("imagenet", row)
    assert d.class_names == names == ["tench", "missile", "missile", "toilet paper"] and list(
        d.splits
    ) == ["train", "test"]
    assert [Path(p).name for p in d.splits["train"].items[:3]] == [
        "n01440764_1.JPEG",
        "n01440764_2.JPEG",
        "n01440764_3.JPEG",
    ]  # sorted, wherever it runs
    assert all("/val/" in p for p in d.splits["test"].items)
    p = few_shot(d, "mini", shots=4, seed=1)
    train, val = (set(p.images(s).items) for s in ("train", "val"))
    assert (
        len(train) == len(val) == 16
        and not train & val
        and all("/train/" in i for i in train | val)
    )  # val is no part of the test set


@pytest.mark.parametrize("name", VARIANTS)
def test_reader_of_the_variants(root, name):
    row, names = imagenet_miniature(root, name)
    d = read_benchmark(name, row)
    assert (
        d.class_names == names
        and list(d.splits) == ["test"]
        and d.splits["test"].labels.tolist() == [k for k in range(len(names)) for _ in range(3)]
    )


def test_reader_of_imagenetv2(root):
    row = BENCHMARKS["imagenetv2"]
    for k in range(1000):
        (root / row.folder / row.images / str(k)).mkdir(parents=True)
        (root / row.folder / row.images / f"{k}/x.jpeg").touch()
    d = read_benchmark("imagenetv2", replace(row, sizes=(0, 0, 1000)))
    assert (
        d.splits["test"].labels.tolist() == list(range(1000))
        and Path(d.splits["test"].items[10]).parent.name == "10"
        and d.class_names[10] == "brambling"
    )
    with pytest.raises(ValueError, match="dataset imagenetv2: 1000 test images, 10000 expected"):
        load_dataset("imagenetv2")


def test_counts_are_asserted(root):
    row, *_ = split_miniature(root, "dtd")
    for wrong, message in (
        (dict(classes=3), "2 classes, 3 expected"),
        (dict(sizes=(10, 5, 6)), "4 val images, 5 expected"),
    ):
        with pytest.raises(ValueError, match=message):
            read_benchmark("dtd", replace(row, **wrong))
    with pytest.raises(ValueError, match="2 classes, 47 expected"):
        load_dataset("dtd")


def test_copies_with_other_names(root):
    "Another ending, capitals, a folder within a folder."
    row, names, parts = split_miniature(root, "eurosat")
    (root / "eurosat/2750").rename(root / "eurosat/moved")
    (root / "eurosat/2750").mkdir()
    (root / "eurosat/moved").rename(root / "eurosat/2750/2750")
    (root / "eurosat").rename(root / "EuroSAT")
    for p in (root / "EuroSAT").rglob("*.jpg"):
        p.rename(p.with_suffix(".PNG"))
    d = read_benchmark("eurosat", row)
    assert [Path(p).stem for p in d.splits["train"].items] == [
        Path(p).stem for p, _, _ in parts["train"]
    ] and d.class_names == names


def test_a_rebuilt_split_is_reported_and_has_the_sizes(root):
    row, names, _ = split_miniature(root, "eurosat")
    (root / row.folder / row.split).unlink()
    with pytest.raises(
        FileNotFoundError, match="split_zhou_EuroSAT.json is missing; `vlmadapt data eurosat`"
    ):
        read_benchmark("eurosat", row)
    rebuild_split("eurosat")
    with pytest.warns(UserWarning, match="no split of CoOp's"):
        d = read_benchmark("eurosat", row)
    assert d.class_names == names
    assert [len(d.splits[s]) for s in COPIES] == [15, 6, 9]
    assert "rebuilt" in d.note


@pytest.mark.parametrize("name", ["caltech101", "food101", "dtd", "eurosat"])
def test_names_of_the_split_file_follow_from_the_folders(root, name):
    row, _, parts = split_miniature(root, name)
    items = {p: (k, c.replace("_", " ")) for p, k, c in row.listing(row, root / row.folder)["all"]}
    assert {p: (k, c.replace("_", " ")) for part in parts.values() for p, k, c in part} == items


def run_experiment(name, **given):
    "The cells of an experiment in this process, with other parameters."
    names = {}
    for cell in nbformat.read(ROOT / f"nbs/experiments/{name}.ipynb", 4).cells:
        if cell.cell_type != "code":
            continue
        exec(cell.source, names)
        if "parameters" in cell.metadata.get("tags", []):
            names.update(given)
    return names


def test_methods_fitted_on_imagenet_are_tested_on_its_variants(root, monkeypatch):
    for name in ("imagenet", *VARIANTS):
        row, *_ = imagenet_miniature(root, name)
        monkeypatch.setitem(DATASETS, name, benchmark_spec(name, row))
    done = run_experiment(
        "domain_generalisation",
        dataset="imagenet",
        targets=[*VARIANTS],
        shots=2,
        methods=["ZeroShot", "TipAdapter", "TaskRes"],
        views=2,
    )
    assert done["table"].shape == (3, 4) and done["table"].notna().all(axis=None)
    assert {n: p.K for n, p in done["shifted"].items()} == dict(
        imagenet_sketch=4, imagenet_a=2, imagenet_r=2
    )


@pytest.mark.parametrize("name, method", [("nodes", "HeGraphAdapter"), ("prompts", "VPT")])
def test_looking_at_imagenet_needs_no_val_part(root, monkeypatch, name, method):
    "Validation images come from the train folders, and are support images of no seed."
    row, *_ = imagenet_miniature(root, "imagenet")
    monkeypatch.setitem(DATASETS, "imagenet", benchmark_spec("imagenet", row))
    done = run_experiment(
        name,
        dataset="imagenet",
        shots=2,
        seeds=[1, 2],
        methods=[method],
        fixed={method: {"epochs": 1}},
        views=2,
    )
    looked_at = set(validation_images(done["loaded"], 2, [1, 2]).items)
    assert len(looked_at) >= 4 and len(done["store"].units) == 2
    assert all("/train/" in item for item in looked_at)
    for seed in (1, 2):
        assert not looked_at & set(done["problem_of"](seed).images("train").items)


def test_classes_of_a_and_r_are_selected_by_what_they_are():
    "An ImageNet classifier selects by name the columns of the WordNet ids that timm lists."
    from vlmadapt.methods.base import Method

    names = imagenet_names()
    wnids = list(names)
    fitted = type("Fitted", (), dict(class_names=list(names.values()), columns=Method.columns))()
    for letter in "ar":
        ids = pkgutil.get_data("timm.data", f"_info/imagenet_{letter}_synsets.txt").decode().split()
        assert len(ids) == 200 and ids == sorted(ids)
        assert fitted.columns([names[w] for w in ids]) == [wnids.index(w) for w in ids]


def short_hash(index):
    return hashlib.sha256(",".join(map(str, index)).encode()).hexdigest()[:12]


# The first 12 digits of sha256 over the positions drawn, train / val, for seeds 1 to 3, of the
# published few-shot lists.
PUBLISHED = {
    (
        "oxford_pets",
        1,
    ): "2c88a8f6ef71 dc0b2850c2c7 96c0c131159e 38013de168d3 04a1601fc267 575c59556f3a",
    (
        "oxford_pets",
        16,
    ): "abf213c93416 10395826946e 81b5ccc705cd 76db13e619a7 c19832450d80 4f0437043a36",
    ("eurosat", 1): "9f8f7936d1ea 05bfdb269a5d dc4c00489d76 ab04277fcb69 0ad38bccccc7 5d2d3cfc8ca0",
    (
        "eurosat",
        16,
    ): "d0eded86733d ee2120ce8234 8cdddbc39a1a 5997ed4727c8 05ff8da9bfd8 a7952bb2f6b3",
    ("dtd", 1): "058f63711800 f9e045ecd287 db760b596bf0 fcceec4b1c8f f8cbd2714d19 efa6dce979b8",
    ("dtd", 16): "6aa4d669856a 884be17ce408 68595428c5c9 ee5bdff8013a 1a91bd3b5e6f 43114ad34354",
    ("food101", 1): "bb825d37553c b3e6165db73c 7fcf8174586d 4b5b35fccb6e 2ef8f8aea6c3 6349a5b816e1",
    (
        "food101",
        16,
    ): "cefcf523a76e 892fda665784 5b5b486ec8c0 3945531b0320 0f534b408257 af55490c4144",
    ("sun397", 1): "c19021009116 b6fe8a2df4f1 a4cfc2e56141 f53b3c456745 885ace6ee7a4 29789077699d",
    ("sun397", 16): "79b0e313e24a ebf342dea4b7 1c63049ba3d7 877994df0089 16fc485aeacb 99fb12f9d945",
}


@pytest.fixture(scope="module")
def labels():
    "Train and val labels of a dataset in the order of its split file."

    def of(name):
        row = BENCHMARKS[name]
        if name in ("food101", "sun397"):
            return [
                np.repeat(np.arange(row.classes), n // row.classes) for n in row.sizes[:2]
            ]  # known without the file
        parts = read_split(shared_data("data/splits", row.split), "")[1]
        return [parts[s].labels for s in ("train", "val")]

    return of


@pytest.mark.parametrize("name, shots", PUBLISHED)
def test_few_shot_lists_image_for_image(labels, name, shots):
    train, val = labels(name)
    found = []
    for seed in (1, 2, 3):
        found += map(short_hash, few_shot_indices(train, val, shots, seed))
    assert " ".join(found) == PUBLISHED[name, shots]


def test_all_published_lists_of_dtd():
    _, splits = read_split(shared_data("data/splits", BENCHMARKS["dtd"].split), "")
    parts = {part: splits[part] for part in ("train", "val")}
    train, val = (images.labels for images in parts.values())
    files = sorted(shared_data("data/fewshot_indices/dtd").glob("*.json"))
    assert len(files) == 15
    for f in files:
        shots = int(f.stem.split("-")[0].partition("_")[2])
        seed = int(f.stem.rpartition("_")[2])
        published = json.loads(f.read_text())
        for part, drawn in zip(parts, few_shot_indices(train, val, shots, seed), strict=True):
            assert drawn == published[part]["indices"]
            paths = [item["impath"].split("/images/")[1] for item in published[part]["data"]]
            assert [parts[part].items[i] for i in drawn] == paths


@pytest.mark.parametrize("name", ["oxford_pets", "eurosat", "dtd"])
def test_real_split_files(root, name):
    "CoOp's own file, with empty files for the images: sizes, names, disjoint parts, the hash."
    row = BENCHMARKS[name]
    file = shared_data("data/splits", row.split)
    parts = json.loads(file.read_text())
    folder = root / row.folder
    folder.mkdir()
    (folder / row.split).write_bytes(file.read_bytes())
    paths = [p for part in parts.values() for p, _, _ in part]
    assert len(set(paths)) == len(paths)
    for d in {(folder / row.images / p).parent for p in paths}:
        d.mkdir(parents=True, exist_ok=True)
    for p in paths:
        (folder / row.images / p).touch()
    d = load_dataset(name)
    assert (
        d.note == "CoOp's split"
        and tuple(len(d.splits[s]) for s in ("train", "val", "test")) == row.sizes
        and len(d.class_names) == row.classes
    )
    if row.listing is class_folders:  # the name rule gives what the file says
        assert {(k, c) for _, k, c in row.listing(row, folder)["all"]} == {
            (k, c) for part in parts.values() for _, k, c in part
        }
    if name == "oxford_pets":  # lists in the authors' form give the same labels and names
        listed = {
            part: "".join(
                f"{p[:-4]} {k + 1} 1 1\n" for p, k, _ in sum((parts[s] for s in splits), [])
            )
            for part, splits in dict(trainval=("train", "val"), test=("test",)).items()
        }
        (folder / "annotations").mkdir()
        for part, text in listed.items():
            (folder / f"annotations/{part}.txt").write_text(text)
        assert {tuple(i) for part in row.listing(row, folder).values() for i in part} == {
            tuple(i) for part in parts.values() for i in part
        }
    (folder / row.split).write_text(json.dumps(parts))
    assert "not CoOp's file" in load_dataset(name).note


def test_the_table_is_whole():
    "Every row has sources or instructions, a hash of its split file, a template with one {}."
    for name, row in BENCHMARKS.items():
        assert row.template.count("{}") == 1, name
        assert row.sources, name
        assert row.manual or all(row.sources.values()), name
        assert bool(row.split) == bool(row.split_hash), name
        if row.split:
            assert {source.hash for source in row.sources[row.split]} == {row.split_hash}, name
        for source in (source for part in row.sources.values() for source in part):
            assert source.url.startswith(("https://", "http://")), name
            assert "drive.google" not in source.url, name
    assert len({row.folder for row in BENCHMARKS.values()}) == 15
