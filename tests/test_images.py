"""Pictures from outside: opening, folders, split files, keys, small classes and copies."""

import json
import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from conftest import shared_data
from PIL import Image

from vlmadapt.data import photos
from vlmadapt.data.datasets import Dataset, load_dataset
from vlmadapt.data.images import CorruptImage, Images, image_suffixes, open_image
from vlmadapt.data.photos import open_photos, read_photos
from vlmadapt.data.sampling import few_shot_indices
from vlmadapt.data.splits import read_parts, read_split
from vlmadapt.methods import METHODS
from vlmadapt.models.backbones import load_backbone
from vlmadapt.models.pixels import Pixels, Views
from vlmadapt.problems.few_shot import few_shot
from vlmadapt.problems.own_data import from_folder
from vlmadapt.training.evaluation import evaluate
from vlmadapt.training.loop import fit
from vlmadapt.training.tuning import tune

COLORS = {"red": (200, 20, 20), "blue": (20, 20, 200), "green": (20, 200, 20)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLMADAPT_CACHE", str(tmp_path / "cache"))


def noise(rng, color=(100, 100, 100), size=(20, 20)):
    pixels = rng.normal(0, 20, (size[1], size[0], 3)) + color
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def fill(folder, number=4, colors=COLORS, ending="png"):
    "One class folder per colour with `number` pictures each, all different."
    rng = np.random.default_rng(sum(map(ord, folder.name + "".join(colors))))
    for name, color in colors.items():
        (folder / name).mkdir(parents=True)
        for i in range(number):
            noise(rng, color).save(folder / name / f"{i}.{ending}")
    return folder


def parts(tmp_path, names, number=4):
    root = tmp_path / "set"
    for name in names:
        fill(root / name, number)
    return root


def sizes(dataset):
    return {part: len(images) for part, images in dataset.splits.items()}


def warned(function):
    "What `function` returns, and its warnings."
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = function()
    return result, [str(w.message) for w in found]


# ---- arrays and modes


GRAY = np.array([[0, 51, 102], [153, 204, 255]], np.uint8)
BLUE = np.zeros((5, 7, 3), np.uint8)
BLUE[..., 2] = 250


@pytest.mark.parametrize(
    "array",
    [
        GRAY,
        GRAY[..., None],
        GRAY / 255,
        (GRAY / 255).astype(np.float32),
        GRAY.astype(np.float64),
        GRAY.astype(np.float16),
        GRAY.astype(np.int32),
        GRAY.astype(np.int64),
        GRAY.astype(np.uint32),
        GRAY.astype(np.uint16) * 257,
        (GRAY.astype(np.uint16) * 257).astype(">u2"),
        torch.tensor(GRAY),
        torch.tensor(GRAY / 255, requires_grad=True),
        torch.tensor(GRAY).to(torch.int64),
        torch.tensor(GRAY).to(torch.bfloat16).round(),
    ],
)
def test_numbers_of_any_type_make_the_same_picture(array):
    found = np.asarray(open_image(array))
    tolerance = 1 if getattr(array, "dtype", None) == torch.bfloat16 else 0  # 8 bits of mantissa
    assert found.shape == (2, 3, 3)
    assert np.abs(found[..., 0].astype(int) - GRAY).max() <= tolerance


@pytest.mark.parametrize(
    "array",
    [
        BLUE,
        BLUE.transpose(2, 0, 1),
        torch.tensor(BLUE).permute(2, 0, 1),
        torch.tensor(BLUE) / 255,
        BLUE.astype(float),
    ],
)
def test_channels_first_and_last(array):
    assert open_image(array).tobytes() == BLUE.tobytes()
    assert open_image(array).size == (7, 5)


def test_truth_values_and_transparency_in_arrays():
    assert np.asarray(open_image(GRAY > 100))[..., 0].tolist() == [[0, 0, 255], [255, 255, 255]]
    half = np.concatenate([BLUE, np.full((5, 7, 1), 0, np.uint8)], 2)
    assert open_image(half).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (GRAY * np.nan, "NaN or infinity"),
        (np.where(GRAY == 51, np.inf, 0.0), "NaN or infinity"),
        (GRAY / 127.5 - 1, "already preprocessed"),
        (torch.tensor(GRAY / 50.0 - 2), "already preprocessed"),
        (GRAY / 200, "scale it to 0 .. 1 or 0 .. 255"),
        (GRAY * 4.0, "scale it to 0 .. 1 or 0 .. 255"),
        (GRAY.astype(int) * 257, "give 16 bits as uint16"),
        (GRAY.astype(int) - 5, "from -5 to 250"),
        (GRAY * 1j, "not of complex128"),
        (np.array([["a", "b"]]), "not of <U1"),
        (BLUE[:0], "without pixels"),
        (BLUE[..., :0], "without pixels"),
        (BLUE[..., :2], "not (5, 7, 2)"),
        (BLUE[None], "not (1, 5, 7, 3)"),
        (np.ones((3, 5, 3), np.uint8), "channels first or last"),
        (np.ones((4, 9, 4), np.uint8), "channels first or last"),
        (b"bytes", "not bytes"),
        (None, "not NoneType"),
        ({"path": "a.png"}, "not dict"),
    ],
)
def test_arrays_that_need_a_guess_are_refused_in_one_line(array, message):
    with pytest.raises(ValueError) as error:
        open_image(array)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_stack_has_one_range():
    dark = np.where(GRAY > 200, 1.0, 0.0)  # values 0 and 1 of 0 .. 255
    names, images = open_photos(np.stack([GRAY.astype(float), dark])[..., None])
    assert names == ["image 0", "image 1"] and np.asarray(images[1]).max() == 1
    assert len(open_photos(torch.tensor(BLUE))[1]) == 1
    assert len(open_photos(torch.tensor(BLUE).permute(2, 0, 1)[None])[1]) == 1
    assert open_photos(np.zeros((0, 4, 4, 3), np.uint8)) == ([], [])


@pytest.mark.parametrize(
    "mode",
    [
        "1",
        "L",
        "LA",
        "La",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "RGBa",
        "RGBX",
        "CMYK",
        "YCbCr",
        "HSV",
        "LAB",
        "I",
        "F",
        "I;16",
    ],
)
def test_every_mode_becomes_the_colour_it_shows(mode):
    plain = Image.new("RGB", (6, 4), (255, 255, 255))
    if mode in ("La", "PA", "I", "F", "I;16", "LA", "1"):
        plain = plain.convert("LA" if mode in ("La", "LA", "PA") else "L")
    image = Image.new("I;16", (6, 4), 65535) if mode == "I;16" else plain.convert(mode)
    found = open_image(image)
    assert found.mode == "RGB" and found.size == (6, 4)
    assert np.abs(np.asarray(found).astype(int) - 255).max() <= 1


# ---- files


def write_pgm(file):
    file.write_bytes(
        b"P5 3 1 4095\n" + np.array([0, 2048, 4095], ">u2").tobytes()
    )  # 12 bits, and says so


FILES = {
    "sixteen.png": (
        lambda f: Image.fromarray(np.array([[0, 32896, 65535]], np.uint16)).save(f),
        [0, 128, 255],
    ),
    "sixteen.tif": (
        lambda f: Image.fromarray(np.array([[0, 32896, 65535]], np.uint16)).save(f),
        [0, 128, 255],
    ),
    "twelve.pgm": (write_pgm, [0, 128, 255]),
    "one.tif": (
        lambda f: Image.fromarray(np.array([[0, 0.2, 1]], np.float32)).save(f),
        [0, 51, 255],
    ),
    "bytes.tif": (
        lambda f: Image.fromarray(np.array([[0, 51, 255]], np.float32)).save(f),
        [0, 51, 255],
    ),
    "whole.tif": (
        lambda f: Image.fromarray(np.array([[0, 51, 255]], np.int32)).save(f),
        [0, 51, 255],
    ),
    "bit.png": (lambda f: Image.fromarray(np.array([[False, True, True]])).save(f), [0, 255, 255]),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_any_depth(name, tmp_path):
    save, expected = FILES[name]
    save(tmp_path / name)
    assert np.asarray(open_image(tmp_path / name))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_the_first_frame_or_page(name, tmp_path):
    rest = [Image.new("RGB", (8, 8), "black")] * 3
    Image.new("RGB", (8, 8), "white").save(tmp_path / name, save_all=True, append_images=rest)
    assert open_image(tmp_path / name).getpixel((4, 4)) == (255, 255, 255)


def test_exif_and_transparency_for_own_photos_and_tasks_but_not_for_benchmarks(tmp_path):
    image = Image.new("RGBA", (16, 8), (0, 0, 0, 0))
    exif = Image.Exif()
    exif[274] = 6
    image.save(tmp_path / "a.png", exif=exif)
    careful = Images([tmp_path / "a.png"], torch.zeros(1))
    assert careful[0].size == careful.size(0) == (8, 16) and careful[0].getpixel((0, 0)) == (
        255,
        255,
        255,
    )
    plain = Images([tmp_path / "a.png"], torch.zeros(1), plain=True)
    assert plain[0].tobytes() == Image.open(tmp_path / "a.png").convert("RGB").tobytes()
    assert plain[0].size == plain.size(0) == (16, 8)
    assert plain.key() != careful.key()
    assert plain.subset([0]).plain and not careful.subset([0]).plain
    preprocess = load_backbone("mini", device="cpu").preprocess
    task = Pixels(Images([str(tmp_path / "a.png")], None), preprocess)
    assert torch.equal(task[[0]][0], preprocess(careful[0]))


def test_an_image_that_is_handed_over_is_not_changed():
    image = Image.new("RGB", (16, 8))
    image.getexif()[274] = 6
    assert open_image(image).size == (8, 16)
    assert image.size == (16, 8) and image.getexif()[274] == 6


BROKEN = {
    "empty.jpg": (lambda f: f.touch(), "the file is empty"),
    "page.jpg": (lambda f: f.write_text("<html>404</html>"), "no image format that Pillow knows"),
    "folder.jpg": (lambda f: f.mkdir(), "a folder, not an image file"),
    "pipe.jpg": (os.mkfifo, "a pipe, socket or device"),
    "dangling.jpg": (
        lambda f: f.symlink_to("nowhere.jpg"),
        "a link to nowhere.jpg, which is not there",
    ),
    "circle.jpg": (lambda f: f.symlink_to(f), "cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_image_file_is_named_in_one_line(name, tmp_path):
    make, message = BROKEN[name]
    make(tmp_path / name)
    with pytest.raises(CorruptImage) as error:
        open_image(tmp_path / name)
    assert message in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("x" * 5000, "cannot be read"),
        ("a\0b.png", "cannot be read"),
        ("/dev/null", "a pipe, socket or device"),
    ],
)
def test_paths_that_cannot_be_opened(path, message):
    with pytest.raises(CorruptImage, match=message) as error:
        open_image(path)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_truncated_files_bombs_and_files_without_rights(tmp_path, monkeypatch):
    file = tmp_path / "a.jpg"
    noise(np.random.default_rng(0), size=(64, 48)).save(file)
    (tmp_path / "cut.jpg").write_bytes(file.read_bytes()[:-200])
    with pytest.raises(
        CorruptImage, match="cut.jpg: cannot be decoded as an image .image file is truncated"
    ):
        open_image(tmp_path / "cut.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(
        CorruptImage,
        match="a.jpg: cannot be decoded as an image .more pixels than Pillow's limit of 2000",
    ):
        open_image(file)
    monkeypatch.undo()
    if os.geteuid() != 0:
        file.chmod(0)
        with pytest.raises(CorruptImage, match="a.jpg: .*[Pp]ermission denied"):
            open_image(file)


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path / "set")
    assert read_photos("~/set").class_names == ["blue", "green", "red"]
    assert open_image("~/set/red/0.png").size == (20, 20)
    monkeypatch.chdir(tmp_path / "set")
    assert read_photos(".").name == "set"


# ---- keys


@pytest.mark.parametrize("at", [0.1, 0.9])
def test_a_file_of_equal_size_and_time_has_another_key(at, tmp_path):
    file = tmp_path / "a.bmp"
    noise(np.random.default_rng(0), size=(100, 100)).save(file)
    os.utime(file, (1.7e9, 1.7e9))
    before = Images([file], None).key()
    content = bytearray(file.read_bytes())
    content[int(at * len(content))] ^= 255
    file.write_bytes(content)
    os.utime(file, (1.7e9, 1.7e9))
    assert Images([file], None).key() != before


def test_replaced_images_are_encoded_again(tmp_path):
    def write(colors):
        for part in ("train", "test"):
            for name, color in colors.items():
                (tmp_path / "set" / part / name).mkdir(parents=True, exist_ok=True)
                for i in range(3):
                    file = tmp_path / "set" / part / name / f"{i}.bmp"
                    noise(np.random.default_rng(i + 10 * len(part)), color).save(file)
                    os.utime(file, (1.7e9, 1.7e9))

    write({"red": (200, 20, 20), "blue": (20, 20, 200)})
    first = from_folder(tmp_path / "set", backbone="mini", shots=2, views=2).features.test.clone()
    write({"red": (20, 20, 200), "blue": (200, 20, 20)})
    second = from_folder(tmp_path / "set", backbone="mini", shots=2, views=2).features.test
    assert (first - second).abs().max() > 1e-3


def test_array_keys_are_those_of_0_1():
    assert (
        load_dataset("mini-digits").splits["test"].key() == "fcc9d6cc3304ea2c6454"
    )  # of version 0.1
    assert load_dataset("mini-shapes").splits["test"].key() == "4e39a518d6805259344b"


def test_sealed_labels_are_carried():
    class Sealed:
        def __init__(self, index=None):
            self.index = index

        def subset(self, index):
            return Sealed(index)

        def __getitem__(self, index):
            raise PermissionError("sealed")

    images = Images(np.zeros((3, 4, 4, 3), np.uint8), Sealed())
    assert images.subset([2, 0]).labels.index == [2, 0]


# ---- folders


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train", "val", "test"], {"train": 12, "val": 12, "test": 12}),
        (["Train", "VALID", "Test"], {"train": 12, "val": 12, "test": 12}),
        (["training", "validation", "testing"], {"train": 12, "val": 12, "test": 12}),
        (["train", "dev", "test"], {"train": 12, "val": 12, "test": 12}),
        (["Train", "Testing"], {"train": 12, "test": 12}),
        (["train", "validation"], {"train": 12, "val": 12}),
        (["train"], {"train": 6, "val": 3, "test": 3}),
    ],
)
def test_part_names_in_any_spelling(names, expected, tmp_path):
    (dataset, messages) = warned(lambda: read_photos(parts(tmp_path, names)))
    assert (
        dataset.class_names == ["blue", "green", "red"]
        and sizes(dataset) == expected
        and messages == []
    )


def test_validation_images_come_from_what_is_left_of_train(tmp_path):
    root = parts(tmp_path, ["train", "test"], number=6)
    problem = from_folder(root, backbone="mini", shots=2, views=1, seed=3)
    labels = read_photos(root).splits["train"].labels
    train, val = few_shot_indices(labels, None, 2, 3)
    files = read_photos(root).splits["train"].items
    assert problem.images("train").items == [files[i] for i in train]
    assert problem.images("val").items == [files[i] for i in val]
    assert len(val) == 6 and not set(train) & set(val)
    assert tune(METHODS["TipAdapter"], problem).selection == "few_shot_val"


def test_a_problem_without_test_part_fits_and_does_not_evaluate(tmp_path):
    problem = from_folder(parts(tmp_path, ["train", "val"]), backbone="mini", shots=2, views=1)
    method = fit(METHODS["TipAdapter"](problem), problem)
    with pytest.raises(ValueError, match="has no test split"):
        evaluate(method, problem)


def two(root, *names):
    for name in names:
        (root / name).mkdir(parents=True)
        noise(np.random.default_rng(len(name)), size=(9, 9)).save(root / name / "a.png")


def rename(root, old, new):
    (root / old).rename(root / new)


REFUSED = {
    "one level too deep": (
        lambda r: fill(r / "photos"),
        r"one class folder only, .photos.; .*the classes \(blue, green, red\)\? Then give .*photos",
    ),
    "one class": (lambda r: two(r, "cat"), "one class folder only, 'cat'; a classifier needs two"),
    "one level too deep in the parts": (
        lambda r: (fill(r / "train/images"), fill(r / "test/images")),
        r"one class folder only, 'images'; .*Then give .*train/images",
    ),
    "flat parts": (
        lambda r: two(r, "train", "test"),
        "test: images without class folders; put them into test/<class>/",
    ),
    "parts by other names": (
        lambda r: two(r, "train_set", "Test set"),
        "parts or classes[?] Call the parts train, val and test",
    ),
    "two train folders": (
        lambda r: (fill(r / "train"), fill(r / "Training")),
        "'Training' and 'train' are both train folders",
    ),
    "no train folder": (lambda r: fill(r / "test"), "no train folder beside test"),
    "underscore": (lambda r: two(r, "a_b", "a b", "c"), "'a b' and 'a_b' become one class name"),
    "capitals": (lambda r: two(r, "Cat", "cat", "dog"), "'Cat' and 'cat' become one class name"),
    "two spellings of an umlaut": (
        lambda r: two(r, "A\u0308pfel", "\u00c4pfel", "dog"),
        "become one class name",
    ),
    "parts within classes": (
        lambda r: (two(r / "cat", "train", "test"), two(r / "dog", "train", "test")),
        "put the parts outside: set/train/cat/",
    ),
    "a part beside a class": (
        lambda r: (fill(r / "train"), two(r, "bus")),
        "is 'train' a part or a class beside 'bus'",
    ),
    "no class folders": (
        lambda r: (r.mkdir(), noise(np.random.default_rng(0)).save(r / "a.png")),
        "no class folders in it, but 1 images",
    ),
    "other files": (
        lambda r: (two(r, "cat", "dog"), (r / "dog/a.png").rename(r / "dog/a.heic")),
        "dog: no images in this class folder, only files that end in .heic",
    ),
    "class of test": (
        lambda r: (fill(r / "train"), fill(r / "test"), two(r / "test", "zebra")),
        "class 'zebra' has no images in train/; add images of it to",
    ),
    "misspelt class": (
        lambda r: (fill(r / "train"), fill(r / "test"), rename(r / "test", "green", "gren")),
        "'gren' has no images in train/; is it 'green', which has none here",
    ),
}


@pytest.mark.parametrize("layout", REFUSED)
def test_layouts_that_need_a_guess_are_refused_in_one_line(layout, tmp_path):
    make, message = REFUSED[layout]
    make(tmp_path / "set")
    with pytest.raises(ValueError, match=message) as error:
        read_photos(tmp_path / "set")
    assert "\n" not in str(error.value)


def test_class_names_agree_across_parts_whatever_their_spelling(tmp_path):
    root = parts(tmp_path, ["train", "test"])
    rename(root / "test", "green", "GREEN")
    dataset = read_photos(root)
    assert (
        dataset.class_names == ["blue", "green", "red"]
        and dataset.splits["test"].labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    )


def test_a_class_may_be_called_train_and_classes_may_be_nested(tmp_path):
    two(tmp_path / "set", "train", "bus", "car/blue/old")
    shutil.copytree(fill(tmp_path / "elsewhere", 2) / "red", tmp_path / "far")
    (tmp_path / "set/car/linked").symlink_to(tmp_path / "far")
    (tmp_path / "far/round").symlink_to(tmp_path / "far")
    dataset, messages = warned(lambda: read_photos(tmp_path / "set"))
    assert dataset.class_names == ["bus", "car", "train"] and sum(sizes(dataset).values()) == 5


def test_system_folders_are_no_classes_and_other_files_are_named_once(tmp_path):
    root = fill(tmp_path / "set")
    for name in (
        "__MACOSX",
        ".ipynb_checkpoints",
        "red/.ipynb_checkpoints",
        "red/__MACOSX",
        ".hidden",
    ):
        (root / name).mkdir()
        shutil.copy(root / "red/0.png", root / name / "0.png")
    (root / "red/._0.png").write_bytes(b"resource fork")
    (root / "red/Thumbs.db").write_bytes(b"thumbs")
    for name in ("red/a.heic", "red/b.txt", "blue/c.mov"):
        (root / name).write_bytes(b"no image")
    shutil.copy(root / "red/0.png", root / "stray.png")
    dataset, messages = warned(lambda: read_photos(root))
    assert dataset.class_names == ["blue", "green", "red"] and sum(sizes(dataset).values()) == 12
    assert (
        len(messages) == 1
        and "4 files or folders are left out" in messages[0]
        and "stray.png" in messages[0]
    )


def test_folders_beside_the_parts_are_named(tmp_path):
    root = parts(tmp_path, ["train", "test", "extra"])
    dataset, messages = warned(lambda: read_photos(root))
    assert sizes(dataset) == {"train": 12, "test": 12}
    assert (
        len(messages) == 1
        and "1 files or folders are left out, which are no images of a class: extra" in messages[0]
    )


@pytest.mark.parametrize(
    "ending", ["jfif", "jpe", "JPG", "pgm", "avif", "jp2", "tga", "ico", "dib", "qoi"]
)
def test_every_format_that_pillow_decodes_is_read(ending, tmp_path):
    if f".{ending.lower()}" not in image_suffixes():
        pytest.skip(f"this Pillow does not read {ending}")
    root = tmp_path / "set"
    for k, name in enumerate(("a", "b")):
        (root / name).mkdir(parents=True)
        for i in range(2):
            noise(np.random.default_rng(10 * k + i), size=(32, 32)).convert(
                "L" if ending == "pgm" else "RGB"
            ).save(root / name / f"{i}.{ending}")
    assert sum(sizes(read_photos(root)).values()) == 4


@pytest.mark.parametrize("name", [name for name in BROKEN if name != "folder.jpg"])
def test_corrupt_files_are_refused_or_skipped_in_one_warning(name, tmp_path):
    root = fill(tmp_path / "set")
    make, _ = BROKEN[name]
    for folder in ("red", "blue"):
        make(root / folder / name)
    with pytest.raises(CorruptImage, match=name):
        read_photos(root)
    dataset, messages = warned(lambda: read_photos(root, on_corrupt="skip"))
    assert (
        sum(sizes(dataset).values()) == 12
        and len(messages) == 1
        and messages[0].count(name) == 2
        and "skipped: 2 of 14 files" in messages[0]
    )


def test_a_class_without_a_whole_image_is_refused(tmp_path):
    root = fill(tmp_path / "set", 1)
    (root / "red/0.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="class 'red' has no image that can be decoded"):
        warned(lambda: read_photos(root, on_corrupt="skip"))


def test_files_are_decoded_once(tmp_path, monkeypatch):
    root = fill(tmp_path / "set", 2)
    calls = []

    def counted(item):
        calls.append(item)
        return open_image(item)

    monkeypatch.setattr(photos, "open_image", counted)
    read_photos(root)
    assert len(calls) == 6
    read_photos(root)
    assert len(calls) == 6
    noise(np.random.default_rng(77)).save(root / "red/0.png")
    read_photos(root)
    assert len(calls) == 7


# ---- small classes


def test_classes_without_test_or_val_picture_are_named_in_one_warning(tmp_path):
    root = tmp_path / "set"
    for name, number in {"one": 1, "two": 2, "three": 3, "ten": 10}.items():
        fill(root, number, {name: (9, 9, 9)})
    dataset, messages = warned(lambda: read_photos(root))
    assert sizes(dataset) == {"train": 1 + 1 + 2 + 5, "val": 0 + 0 + 1 + 2, "test": 0 + 1 + 0 + 3}
    assert len(messages) == 1
    assert "2 of 4 classes have no val picture: 'one' (1), 'two' (2)" in messages[0]
    assert "2 of 4 classes have no test picture: 'one' (1), 'three' (3)" in messages[0]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (1, {"train": 3}),
        (2, {"train": 3, "test": 3}),
        (3, {"train": 3, "val": 3}),
        (5, {"train": 3, "val": 3, "test": 6}),
    ],
)
def test_empty_parts_are_left_out(number, expected, tmp_path):
    root = fill(tmp_path / "set", number)
    problem, _ = warned(lambda: from_folder(root, backbone="mini", shots=1, views=1))
    assert {part: len(labels) for part, labels in problem.labels.items()} == expected
    tuned = tune(METHODS["TipAdapter"], problem)
    assert tuned.selection == ("few_shot_val" if "val" in expected else "defaults")
    if "test" not in expected:
        with pytest.raises(ValueError, match="has no test split"):
            evaluate(fit(METHODS["TipAdapter"](problem), problem), problem)


def test_all_of_train_may_become_shots(tmp_path):
    problem = from_folder(parts(tmp_path, ["train", "test"]), backbone="mini", shots=4, views=1)
    assert {part: len(labels) for part, labels in problem.labels.items()} == {
        "train": 12,
        "test": 12,
    }
    empty = Dataset("empty", ["a"], {}, ["{}"])
    with pytest.raises(ValueError, match="empty has neither train nor test images"):
        few_shot(empty, "mini")


# ---- the same picture twice


def test_copies_are_warned_of_and_the_same_file_is_refused(tmp_path):
    root = parts(tmp_path, ["train", "val", "test"])
    assert warned(lambda: read_photos(root))[1] == []
    for i in range(2):
        shutil.copy(root / f"train/red/{i}.png", root / f"test/red/{i}.png")
    shutil.copy(root / "val/blue/3.png", root / "test/blue/3.png")
    shutil.copy(root / "train/green/0.png", root / "train/red/again.png")  # two classes
    _, messages = warned(lambda: read_photos(root))
    assert len(messages) == 1 and "4 pictures are in two places with the same bytes" in messages[0]
    assert "(train/red)" in messages[0] and "(test/red)" in messages[0]
    (root / "test/red/1.png").unlink()
    (root / "test/red/1.png").symlink_to(root / "train/red/1.png")
    with pytest.raises(
        ValueError, match=r"the same file twice: .*1.png \(train/red\) and .*1.png \(test/red\)"
    ):
        read_photos(root)


def test_a_link_to_a_file_of_another_class_is_refused(tmp_path):
    root = fill(tmp_path / "set")
    (root / "red/x.png").symlink_to(root / "blue/0.png")
    with pytest.raises(
        ValueError, match=r"the same file twice: .*0.png \(.*/blue\) and .*x.png \(.*/red\)"
    ):
        read_photos(root)


# ---- split files


def split(tmp_path, **found):
    (tmp_path / "split.json").write_text(json.dumps(found))
    return tmp_path / "split.json"


CAT, DOG = ["c/1.jpg", 0, "cat"], ["d/1.jpg", 1, "dog"]


@pytest.mark.parametrize(
    "found",
    [
        {"train": [CAT], "val": [], "test": [DOG]},
        {"train": [CAT], "test": [DOG]},
        {"Training": [CAT], "Test": [DOG]},
        {"train": [["c\\1.jpg", 0, "cat"]], "test": [DOG]},
        {"train": [["c/1.jpg", 1, "cat"]], "test": [["d/1.jpg", 2, "dog"]]},
        {"train": [["c/1.jpg", "0", "cat"]], "test": [["d/1.jpg", "1", "dog"]]},
        {"train": [["c/1.jpg", 0.0, "cat"]], "test": [["d/1.jpg", 1.0, "dog"]]},
    ],
)
def test_split_files_that_leave_no_doubt(found, tmp_path):
    names, splits = read_split(split(tmp_path, **found), tmp_path)
    assert names == ["cat", "dog"] and list(splits) == ["train", "test"]
    assert splits["train"].items == [str(tmp_path / "c/1.jpg")] and splits[
        "test"
    ].labels.tolist() == [1]


def test_copies_in_a_split_file_of_own_photos(tmp_path):
    fill(tmp_path, 2)
    shutil.copy(tmp_path / "red/0.png", tmp_path / "blue/copy.png")
    found = {
        "train": [["red/0.png", 0, "a"], ["blue/0.png", 1, "b"]],
        "test": [["blue/copy.png", 1, "b"]],
    }
    (_, splits), messages = warned(
        lambda: read_split(split(tmp_path, **found), tmp_path, plain=False)
    )
    assert len(messages) == 1 and "1 pictures are in two places with the same bytes" in messages[0]
    assert not splits["train"].plain
    found["test"][0][0] = "blue/gone.png"
    with pytest.raises(FileNotFoundError, match="no such image file: .*gone.png"):
        read_split(split(tmp_path, **found), tmp_path, plain=False)


def test_absolute_paths_within_the_image_folder(tmp_path):
    found = {"train": [[str(tmp_path / "c/1.jpg"), 0, "cat"], DOG]}
    assert read_split(split(tmp_path, **found), tmp_path)[1]["train"].items[0] == str(
        tmp_path / "c/1.jpg"
    )


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"train": [CAT], "test": [CAT]}, r"'c/1.jpg' is in train and in test"),
        ({"train": [CAT], "test": [["c/./1.jpg", 0, "cat"]]}, r"is in train and in test"),
        ({"train": [CAT, ["c/1.jpg", 1, "dog"]]}, r"'c/1.jpg' has the labels 0 and 1"),
        ({"train": [CAT, ["d/1.jpg", 1, "cat"]]}, r"the labels 0 and 1 are both called 'cat'"),
        ({"train": [CAT, ["d/1.jpg", 0, "dog"]]}, r"label 0 is called 'dog', and 'cat' before"),
        ({"train": [CAT, ["d/1.jpg", 2, "dog"]]}, r"labels are not 0 .. 1, 1 is missing"),
        ({"train": [["/etc/passwd", 0, "cat"]]}, r"'/etc/passwd' is no file in the image folder"),
        ({"train": [["../a.jpg", 0, "cat"]]}, r"'../a.jpg' is no file in the image folder"),
        ({"train": [["a/../../a.jpg", 0, "cat"]]}, r"is no file in the image folder"),
        ({"train": [["C:\\a.jpg", 0, "cat"]]}, r"is no file in the image folder"),
        ({"train": [["", 0, "cat"]]}, r"is no file in the image folder"),
        (
            {"train": [["a.jpg", -1, "cat"]]},
            r"train\[0\]\[1\]: input should be greater than or equal to 0",
        ),
        ({"train": [["a.jpg", 0.5, "cat"]]}, r"train\[0\]\[1\]"),
        ({"train": [["a.jpg", True, "cat"]]}, r"train\[0\]\[1\]"),
        ({"train": [["a.jpg", None, "cat"]]}, r"train\[0\]\[1\]"),
        ({"train": [["a.jpg", 0]]}, r"train\[0\]"),
        ({"train": [["a.jpg", 0, 7]]}, r"train\[0\]\[2\]: input should be a valid string"),
        ({"train": {"a.jpg": 0}}, r"train: input should be a valid list"),
        ({"train": None}, r"train: input should be a valid list"),
        ({"train": [], "test": []}, r"no items under 'train', 'val' or 'test'"),
        ({}, r"no items under 'train', 'val' or 'test'"),
        ({"train": [CAT], "Training": [DOG]}, r"'train' and 'Training' are both the train part"),
    ],
)
def test_split_files_that_are_refused_in_one_line(found, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        read_split(split(tmp_path, **found), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{", b"[1, 2]", b"null", b"[" * 100_000])
def test_files_that_are_no_split_file(content, tmp_path):
    (tmp_path / "split.json").write_bytes(content)
    with pytest.raises(ValueError, match="split.json") as error:
        read_parts(tmp_path / "split.json")
    assert "\n" not in str(error.value)


def test_unknown_parts_are_left_out_with_a_warning_and_a_byte_order_mark_is_read(tmp_path):
    text = json.dumps({"train": [CAT, DOG], "extra": [CAT], "info": []})
    (tmp_path / "split.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    found, messages = warned(lambda: read_parts(tmp_path / "split.json"))
    assert (
        list(found) == ["train"]
        and len(messages) == 1
        and "2 parts are left out, for example 'extra', 'info'" in messages[0]
    )


@pytest.mark.parametrize(
    "name",
    [
        "split_zhou_DescribableTextures.json",
        "split_zhou_EuroSAT.json",
        "split_zhou_OxfordPets.json",
    ],
)
def test_published_split_files_are_read_as_they_are(name):
    file = shared_data("data/splits", name)
    raw = json.loads(file.read_text())
    names, splits = read_split(file, "images")
    assert list(splits) == ["train", "val", "test"]
    for part, images in splits.items():
        assert images.items == [f"images/{path}" for path, _, _ in raw[part]] and images.plain
        assert images.labels.tolist() == [label for _, label, _ in raw[part]]
        assert [names[label] for label in images.labels] == [
            c.replace("_", " ") for _, _, c in raw[part]
        ]


# ---- pictures that lose more than half


def test_wide_pictures_are_counted_when_they_are_encoded(tmp_path):
    root, rng = tmp_path / "set", np.random.default_rng(0)
    for folder in ("train/a", "train/b", "test/a", "test/b"):
        (root / folder).mkdir(parents=True)
        for i, size in enumerate([(400, 100), (30, 20), (40, 80)]):
            noise(rng, size=size).save(root / folder / f"{i}.png")
    problem = from_folder(root, backbone="mini", shots=1, views=1)
    _, messages = warned(lambda: problem.features.test)
    assert len(messages) == 1
    assert (
        "2 of 6 pictures lose more than half of their area to the centre crop" in messages[0]
        and "test/a/0.png" in messages[0]
    )
    files = problem.images("test").items
    _, messages = warned(
        lambda: problem.backbone.encode_images(Images(files, torch.zeros(6), plain=True))
    )
    assert messages == []  # a benchmark's protocol is what it is


def test_random_views_are_cut_from_what_is_shown(tmp_path):
    "Crops come from the picture as it is turned and composed, not from what lies in the file."
    lying = Image.new("RGB", (16, 8))
    lying.putpixel((0, 0), (250, 0, 0))
    lying.getexif()[274] = 6  # turn right
    lying.save(tmp_path / "a.png", exif=lying.getexif())
    photo = Images([tmp_path / "a.png"] * 4, torch.zeros(4))
    crop = load_backbone("mini", device="cpu").train_transform()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        views = torch.cat(list(Views(photo, crop, 2).split(4)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        plain = torch.stack([torch.stack([crop(image) for image in photo]) for _ in range(2)])
    assert torch.equal(views.unflatten(0, (-1, 2)).transpose(0, 1), plain)
