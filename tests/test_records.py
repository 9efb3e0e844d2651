"""Every file format that is read, in many damaged forms: a right result, or one line that names it.

A seeded mutator changes one file of a valid set: fields of JSON documents, bytes, and what lies in
the file's place. Each reader must end within five seconds in a result that a validator of this file
accepts, or in one exception of a known type with one line.
"""

import contextlib
import copy
import json
import os
import random
import re
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from scipy.io import savemat

from vlmadapt.core.records import RecordError, read_json, read_json_lines, read_lines, read_text
from vlmadapt.core.tensors import load_arrays, save_arrays
from vlmadapt.data import annotations
from vlmadapt.data.bundles import read_bundle
from vlmadapt.data.images import CorruptImage, open_image
from vlmadapt.data.prompts import read_descriptions
from vlmadapt.data.splits import read_split
from vlmadapt.data.tasks import (
    karpathy_parts,
    read_coco,
    read_jsonl,
    read_karpathy,
    read_snli_ve,
    read_textcaps,
    read_vizwiz,
    read_vqa,
)
from vlmadapt.grid.logs import log_end
from vlmadapt.grid.params import read_runs
from vlmadapt.methods import METHODS
from vlmadapt.methods.cards import read_card
from vlmadapt.mini.models import untrained
from vlmadapt.models.adapted_models import add_adapters, load_adapters, save_adapters
from vlmadapt.problems.cache import cached_rows
from vlmadapt.problems.classification import FewShotProblem
from vlmadapt.reporting.checks import unfinished

FIELD_MUTATIONS = 45  # of each JSON format
BYTE_MUTATIONS = 20  # of each format, besides those that are always made
LONG = 10_000_000  # characters of one line


class Hang(BaseException):
    "A reader did not end."


@contextlib.contextmanager
def seconds(limit=5, waiting=120):
    """Stop a reader after `limit` seconds of processor time, or of `waiting` by the clock.

    Processor time, because a busy machine makes every reader slow; the clock for one that waits.
    """

    def stop(*_):
        raise Hang

    timers = {signal.ITIMER_PROF: signal.SIGPROF, signal.ITIMER_REAL: signal.SIGALRM}
    before = {number: signal.signal(number, stop) for number in timers.values()}
    signal.setitimer(signal.ITIMER_PROF, limit)
    signal.setitimer(signal.ITIMER_REAL, waiting)
    try:
        yield
    finally:
        for timer, number in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


# --- the formats


@dataclass
class Format:
    "A set of valid files, the one that is changed, its reader, and what a result must be."

    changed: str  # name of the file
    read: Callable  # of the folder
    check: Callable  # of the result: raises AssertionError outside the schema
    document: object = None  # of a JSON file
    lines: list | None = None  # of a JSON-lines file
    files: dict = field(default_factory=dict)  # further files: name -> text, JSON or function
    data: Callable | None = None  # of the folder: writes a file that is no text
    meta: Callable | None = None  # of the folder and a card: writes a file with this card


def are_texts(values):
    assert isinstance(values, list) and all(isinstance(v, str) and v.strip() for v in values)


def are_items(items, n_classes=None):
    assert isinstance(items, (list, tuple))
    for path, label, name in items:
        assert isinstance(path, str) and isinstance(name, str) and name.strip()
        parts = os.path.normpath(path).split("/")
        assert ".." not in parts and not os.path.isabs(path) and "\0" not in path
        assert type(label) is int and label >= 0
        assert n_classes is None or label < n_classes


def is_split(found):
    names, parts = found
    assert all(isinstance(name, str) and name.strip() for name in names) and parts
    for part, images in parts.items():
        assert part in ("train", "val", "test") and len(images.items) == len(images.labels) > 0
        assert all(0 <= label < len(names) for label in images.labels.tolist())
        for path in images.items:
            assert os.path.normpath(path).startswith("images/")


def are_descriptions(found):
    assert isinstance(found, dict)
    for texts in found.values():
        texts = list(texts.values()) if isinstance(texts, dict) else texts
        are_texts([texts] if isinstance(texts, str) else texts)
        assert texts


def are_examples(found):
    images, examples = found
    assert examples and all(isinstance(path, str) and os.path.isfile(path) for path in images)
    for example in examples:
        assert 0 <= example.image < len(images) and isinstance(example.prompt, str)
        assert isinstance(example.sort, str)
        are_texts(list(example.answers))
        assert example.answers


def are_split_examples(found):
    assert found and set(found) <= {"train", "val", "test"}
    for split in found.values():
        are_examples(split)


def are_parts(found):
    for number, part in found.items():
        assert type(number) is int and number >= 0 and part in ("train", "val", "test")


def are_item_parts(found):
    for items in found.values():
        are_items(items)


def is_bundle(found):
    names, arrays = found
    assert isinstance(names, list) and names and all(isinstance(n, str) for n in names)
    assert "text" in arrays and set(arrays) <= {"text", "text_neg", "train", "val", "test"}
    for name, x in arrays.items():
        both = x if isinstance(x, tuple) else (x,)
        assert len(both) == (2 if name in ("train", "val", "test") else 1)
        assert all(isinstance(array, torch.Tensor) for array in both)


ROWS = torch.arange(25.0)[:, None] * torch.ones(3)


def are_rows(x):
    assert x.shape == ROWS.shape and x.equal(ROWS)


def is_card(card):
    assert isinstance(card["method"], str) and isinstance(card["hyper_parameters"], dict)
    assert isinstance(card["classnames"], list)
    assert all(isinstance(name, str) for name in card["classnames"])
    assert (card["backbone"] is None) == (card["backbone_key"] is None)
    assert card.get("precision") in (None, "fp32", "bf16", "fp16")
    assert isinstance(card.get("notes", {}), dict) and isinstance(card.get("problem", {}), dict)


def is_method(method):
    is_card({**method.card, "method": "TaskRes", "hyper_parameters": {}, "classnames": ["a"]})
    assert len(method.class_names) == 3 and method.logit_scale > 0
    assert all(isinstance(name, str) for name in method.class_names)
    assert method.scores(torch.eye(3, 8)).shape == (3, 3)


def is_adapted(model):
    assert model.adapter_card["kind"] == "p-adapter"


def is_array(x):
    assert isinstance(x, torch.Tensor)


PROBLEM = FewShotProblem.from_features(
    ["a", "b", "c"], torch.eye(3, 8), train=(torch.eye(3, 8), [0, 1, 2]), test=None
)
MODEL = untrained("mini", 300)


def load_method(folder):
    return METHODS["TaskRes"].load(folder / "method.safetensors")


def write_method(folder, card=None):
    path = folder / "method.safetensors"
    METHODS["TaskRes"](PROBLEM).save(path, accuracy=93.0)
    if card is not None:
        save_arrays(path, load_arrays(path)[0], card)


def write_adapters(folder, card=None):
    path = folder / "adapters.safetensors"
    save_adapters(add_adapters(MODEL, "p-adapter"), path)
    if card is not None:
        save_arrays(path, load_arrays(path)[0], card)


def write_bundle(folder):
    arrays = {"text": torch.eye(2, 4), "train_x": torch.eye(2, 4), "train_y": torch.arange(2)}
    save_file(arrays, folder / "features.safetensors")


def write_rows(folder):
    "A cache of rows in several shards."
    read_rows(folder)


def read_rows(folder):
    os.environ["VLMADAPT_CACHE"] = str(folder)
    return cached_rows(lambda a, b, size: ROWS[a:b], 25, lambda: 8, shard=10, what="records")


def write_half(folder):
    "A cache of rows that was interrupted after the first shard."
    os.environ["VLMADAPT_CACHE"] = str(folder)

    def build(start, stop, size):
        if start:
            raise KeyboardInterrupt
        return ROWS[start:stop]

    with contextlib.suppress(KeyboardInterrupt):
        cached_rows(build, 25, lambda: 8, shard=10, what="records")


def write_flowers(folder):
    savemat(folder / "imagelabels.mat", {"labels": np.array([[2, 1, 2]])})


def write_cars(folder):
    (folder / "devkit").mkdir()
    names = np.array(["AM General Hummer SUV 2000", "Audi TTS Coupe 2012"], dtype=object)
    savemat(folder / "devkit/cars_meta.mat", {"class_names": names})
    rows = np.array([[(2, "1.jpg"), (1, "2.jpg")]], dtype=[("class", "O"), ("fname", "O")])
    for name in ("devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"):
        savemat(folder / name, {"annotations": rows})


def coco_name(number):
    return f"val2014/COCO_val2014_{number:012d}.jpg"


PICTURES = ["1.jpg", "2.jpg", "a.png", coco_name(1), coco_name(2)]
ANSWERS = [{"answer": "red", "answer_confidence": "yes"}, {"answer": "blue"}]
QUESTIONS = {
    "data_subtype": "val2014",
    "questions": [
        {"question_id": 11, "image_id": 1, "question": "What is it?"},
        {"question_id": 12, "image_id": 2, "question": "Which one?"},
    ],
}
PEOPLE = {
    "annotations": [
        {"question_id": 11, "answers": ANSWERS, "answer_type": "other"},
        {"question_id": 12, "answers": ANSWERS[:1], "answer_type": "other"},
    ]
}
KARPATHY = {
    "images": [
        {
            "cocoid": n,
            "split": split,
            "filepath": "val2014",
            "filename": f"COCO_val2014_{n:012d}.jpg",
            "sentences": [{"raw": "A red ball."}, {"raw": "Two balls."}],
        }
        for n, split in ((1, "restval"), (2, "test"))
    ]
}
COCO = {
    "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
    "annotations": [
        {"image_id": 1, "caption": "A ball.", "is_rejected": False},
        {"image_id": 2, "caption": "A cube."},
    ],
}
SPLIT = {
    "train": [["a/1.jpg", 0, "cat"], ["b/2.jpg", 1, "dog"]],
    "val": [["a/3.jpg", 0, "cat"]],
    "test": [["b/4.jpg", 1, "dog"]],
}
NLI = {"gold_label": "entailment", "sentence2": "A man sleeps.", "Flickr30K_ID": "1"}
EXAMPLE = {"image": "a.png", "prompt": "what?", "answers": ["red", "blue"], "sort": "colour"}
UCF = {
    "ucfTrainTestlist/classInd.txt": "1 ApplyEyeMakeup\n2 YoYo\n",
    "ucfTrainTestlist/trainlist01.txt": "YoYo/v_YoYo_g08_c01.avi 2\n",
    "ucfTrainTestlist/testlist01.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\n",
}
PLANES = {"variants.txt": "Cessna 172\n707-320\n"} | {
    f"images_variant_{part}.txt": "0034309 707-320\n1025794 Cessna 172\n"
    for part in ("train", "val", "test")
}
SUN = {
    "ClassName.txt": "/a/abbey\n/a/apse/indoor\n",
    "Training_01.txt": "/a/apse/indoor/sun_1.jpg\n",
    "Testing_01.txt": "/a/abbey/sun_2.jpg\n",
}
PETS = {f"annotations/{part}.txt": "Abyssinian_100 1 1 1\n" for part in ("trainval", "test")}


PARAMS = {
    "plugins": ["json"],
    "report": "few_shot",
    "parts": {
        "features": {
            "experiment": "few_shot",
            "grid": {"dataset": ["mini-digits", "mini-shapes"], "shots": [1, 2]},
            "parameters": {
                "backbone": "mini",
                "methods": [
                    "ZeroShot",
                    {"method": "TaskRes", "variant": "a", "hyper_parameters": {"alpha": 0.5}},
                ],
                "seeds": [1, 2],
                "trials": 0,
                "fixed": {"TaskRes": {"epochs": 2, "lr": 0.001}},
            },
            "fixed_by": {"shots": {"2": {"TaskRes": {"epochs": 3}}}},
        }
    },
}
RUN_PARAMS = {
    "experiment": "few_shot",
    "report": "few_shot",
    "methods": ["ZeroShot", {"method": "TaskRes", "variant": "a"}],
    "seeds": [1, 2],
}


def are_runs(runs):
    assert runs and len({run.name for run in runs}) == len(runs)
    for run in runs:
        given = run.parameters
        assert given["methods"] and given["seeds"]
        assert all(type(seed) is int and seed >= 0 for seed in given["seeds"])
        assert type(given["shots"]) is int and given["shots"] >= 1
        assert isinstance(given["dataset"], str) and isinstance(given["backbone"], str)
        assert isinstance(given["fixed"], dict) and type(given["trials"]) is int
        json.dumps(given)
        yaml.safe_dump(given)


def read_unfinished(folder):
    "What a run lacks; a damaged params.yml is named in a warning, which is raised here."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return unfinished(folder)
        except UserWarning as e:
            raise RecordError(str(e)) from None


def are_unfinished(table):
    assert list(table.columns) == ["run", "missing", "error"]
    assert all(isinstance(n, int) and n > 0 for n in table["missing"])
    assert all(text.isprintable() and 0 < len(text) <= 300 for text in table["error"])


FORMATS = {
    "params": Format(
        "grid.yml", lambda f: read_runs(f / "grid.yml", out=f / "out"), are_runs, PARAMS
    ),
    "run params": Format("run/params.yml", read_unfinished, are_unfinished, RUN_PARAMS),
    "split": Format(
        "split.json", lambda f: read_split(f / "split.json", "images"), is_split, SPLIT
    ),
    "descriptions": Format(
        "d.json",
        lambda f: read_descriptions(f / "d.json"),
        are_descriptions,
        {"cat": ["small", "soft"], "dog": "large", "cow": {"size": "large"}},
    ),
    "flowers": Format(
        "cat_to_name.json",
        lambda f: annotations.flowers(None, f),
        are_item_parts,
        {"1": "pink primrose", "2": "thistle"},
        files={"imagelabels.mat": write_flowers},
    ),
    "questions": Format(
        "q.json",
        lambda f: read_vqa(f / "q.json", f / "p.json", f),
        are_examples,
        QUESTIONS,
        files={"p.json": PEOPLE},
    ),
    "people": Format(
        "p.json",
        lambda f: read_vqa(f / "q.json", f / "p.json", f),
        are_examples,
        PEOPLE,
        files={"q.json": QUESTIONS},
    ),
    "vizwiz": Format(
        "v.json",
        lambda f: read_vizwiz(f / "v.json", f),
        are_examples,
        [{"image": "1.jpg", "question": "What?", "answers": ANSWERS, "answer_type": "other"}],
    ),
    "karpathy": Format(
        "k.json", lambda f: read_karpathy(f / "k.json", f), are_split_examples, KARPATHY
    ),
    "parts": Format("k.json", lambda f: karpathy_parts(f / "k.json"), are_parts, KARPATHY),
    "coco": Format("c.json", lambda f: read_coco(f / "c.json", f), are_examples, COCO),
    "textcaps": Format(
        "t.json",
        lambda f: read_textcaps(f / "t.json", f),
        are_examples,
        {"data": [{"image_id": "1", "caption_str": "Stop."}, {"image_id": 2, "caption_str": "A"}]},
    ),
    "classnames": Format(
        "classnames.json",
        read_bundle,
        is_bundle,
        ["cat", "dog"],
        files={"features.safetensors": write_bundle},
    ),
    "entailment": Format(
        "e.jsonl", lambda f: read_snli_ve(f / "e.jsonl", f), are_examples, lines=[NLI, NLI]
    ),
    "jsonl": Format(
        "x.jsonl", lambda f: read_jsonl(f / "x.jsonl"), are_examples, lines=[EXAMPLE, EXAMPLE]
    ),
    "pets": Format(
        "annotations/trainval.txt", lambda f: annotations.pets(None, f), are_item_parts, files=PETS
    ),
    "actions": Format(
        "ucfTrainTestlist/classInd.txt",
        lambda f: annotations.actions(None, f),
        are_item_parts,
        files=UCF,
    ),
    "clips": Format(
        "ucfTrainTestlist/testlist01.txt",
        lambda f: annotations.actions(None, f),
        are_item_parts,
        files=UCF,
    ),
    "variants": Format(
        "variants.txt", lambda f: annotations.aircraft(None, f), are_item_parts, files=PLANES
    ),
    "planes": Format(
        "images_variant_val.txt",
        lambda f: annotations.aircraft(None, f),
        are_item_parts,
        files=PLANES,
    ),
    "scenes": Format(
        "Training_01.txt", lambda f: annotations.scenes(None, f), are_item_parts, files=SUN
    ),
    "card": Format(
        "method.safetensors",
        lambda f: read_card(f / "method.safetensors"),
        is_card,
        data=write_method,
        meta=write_method,
    ),
    "method": Format(
        "method.safetensors", load_method, is_method, data=write_method, meta=write_method
    ),
    "adapters": Format(
        "adapters.safetensors",
        lambda f: load_adapters(f / "adapters.safetensors", MODEL),
        is_adapted,
        data=write_adapters,
        meta=write_adapters,
    ),
    "bundle": Format(
        "features.safetensors",
        read_bundle,
        is_bundle,
        files={"classnames.json": ["cat", "dog"]},
        data=write_bundle,
    ),
    "flower labels": Format(
        "imagelabels.mat",
        lambda f: annotations.flowers(None, f),
        are_item_parts,
        files={"cat_to_name.json": {"1": "pink primrose", "2": "thistle"}},
        data=write_flowers,
    ),
    "car names": Format(
        "devkit/cars_meta.mat", lambda f: annotations.cars(None, f), are_item_parts, data=write_cars
    ),
    "car labels": Format(
        "cars_test_annos_withlabels.mat",
        lambda f: annotations.cars(None, f),
        are_item_parts,
        data=write_cars,
    ),
}


# --- mutations


def places(document, path=()):
    "Every place in a document."
    yield path
    children = ()
    if isinstance(document, dict):
        children = document.items()
    elif isinstance(document, list):
        children = enumerate(document)
    for key, value in children:
        yield from places(value, (*path, key))


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


VALUES = {
    "null": None,
    "number": 7,
    "negative": -1,
    "fraction": 0.5,
    "huge": 10**30,
    "larger than 64 bits": 2**63,
    "thousands of digits": 10**4000,
    "NaN": float("nan"),
    "Infinity": float("inf"),
    "true": True,
    "empty text": "",
    "blank text": " \t",
    "text": "x",
    "lines": "one\ntwo\rthree\u2028four",
    "control characters": "a\0b\x1b[31m",
    "half a surrogate": "\ud800",
    "way out": "../../../etc/passwd",
    "absolute": "/etc/passwd",
    "long text": "y" * 100_000,
    "markup": "<img src=x onerror=alert(1)>",
    "empty list": [],
    "list": [1, "a", None],
    "empty object": {},
    "object": {"a": [1]},
    "deep": deep(150),
    "deeper": deep(600),
}


def changed_document(document, rng):
    "One random change of a field: what was changed, and the new document."
    document = copy.deepcopy(document)
    path = rng.choice(list(places(document)))
    kind = rng.choice(["absent", "wrapped", "twin", *VALUES])
    if not path:
        return kind, None, {"wrapped": [document]}.get(kind, VALUES.get(kind, document))
    holder = document
    for key in path[:-1]:
        holder = holder[key]
    key = path[-1]
    if kind == "absent":
        del holder[key]
    elif kind == "wrapped":
        holder[key] = [holder[key]]
    elif kind == "twin" and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[key]))
    else:
        holder[key] = VALUES.get(kind)
    return kind, next((k for k in reversed(path) if isinstance(k, str)), None), document


def fixed_bytes(content):
    "Changes of a file's bytes that are always made."
    yield "empty", b""
    yield "blank", b" \n\n\t "
    yield "utf-16", content.decode("latin-1").encode("utf-16")
    yield "utf-16 without a mark", content.decode("latin-1").encode("utf-16-le")
    yield "mark", b"\xef\xbb\xbf" + content
    yield "two marks", b"\xef\xbb\xbf" * 2 + content
    yield "latin-1", content + "é".encode("latin-1")
    yield "NUL", content + b"\0"
    yield "carriage returns", content.replace(b"\n", b"\r\n")
    yield "twice", content * 2
    yield "nested", b"[" * 100_000
    yield "nested objects", b'{"a":' * 100_000
    yield "page of a server", b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>"


def changed_bytes(content, rng):
    kind = rng.choice(["cut", "flipped", "inserted", "removed", "repeated key"])
    at = rng.randrange(len(content))
    if kind == "cut":
        return kind, content[:at]
    if kind == "flipped":
        return kind, content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[
            at + 1 :
        ]
    if kind == "inserted":
        junk = rng.choice([b"\xff", b"\n", b'"', b"}", b"0", b"\xe2\x80\xa8", b"NaN"])
        return kind, content[:at] + junk + content[at:]
    if kind == "removed":
        return kind, content[:at] + content[at + rng.randrange(1, 20) :]
    keys = re.findall(rb'"\w+": ?', content)
    if not keys:
        return "cut", content[:at]
    key = rng.choice(keys)
    return kind, content.replace(key, key + b"0, " + key, 1)


def put_folder(path):
    path.mkdir()


def put_nothing(path):
    pass


def put_link_to_itself(path):
    path.symlink_to(path)


def put_link_to_nothing(path):
    path.symlink_to(path.with_name("nowhere"))


def put_device(path):
    path.symlink_to("/dev/zero")


IN_PLACE = {
    "folder": put_folder,
    "pipe": os.mkfifo,
    "nothing": put_nothing,
    "link to itself": put_link_to_itself,
    "link to nothing": put_link_to_nothing,
    "device": put_device,
}


# --- what every reader must do


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(content):
        content(path.parent)
    elif isinstance(content, str):
        path.write_text(content)
    else:
        path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "A folder of valid files for each format, made when it is first needed."
    made = {}

    def folder_of(name):
        if name in made:
            return made[name]
        form, folder = FORMATS[name], tmp_path_factory.mktemp(name.replace(" ", "-"))
        for picture in PICTURES if form.document or form.lines else ():
            (folder / picture).parent.mkdir(exist_ok=True)
            Image.new("RGB", (4, 4)).save(folder / picture)
        for other, content in form.files.items():
            write(folder / other, content)
        if form.data is not None:
            form.data(folder)
        elif form.lines is not None:
            write(folder / form.changed, "\n".join(json.dumps(line) for line in form.lines))
        elif form.document is not None:
            write(folder / form.changed, form.document)
        made[name] = folder
        return folder

    return folder_of


def outcome(form, folder, mutation, key=None):
    "Read once; return 'read', 'refused', or the text of a fault."
    name = Path(form.changed).name
    try:
        with seconds(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = form.read(folder)
            form.check(found)
        return "read"
    except AssertionError as e:
        return f"{mutation}: accepted outside the schema {e!r}"
    except Hang:
        return f"{mutation}: hangs"
    except (ValueError, FileNotFoundError) as e:
        text = str(e)
    except BaseException as e:  # noqa: BLE001, what may never come out of a reader
        return f"{mutation}: {type(e).__name__}: {str(e)[:200]}"
    if len(text.splitlines()) != 1 or not text.isprintable():
        return f"{mutation}: not one printable line: {text[:200]!r}"
    if len(text) > 1000:
        return f"{mutation}: {len(text)} characters: {text[:200]}"
    if not any(Path(other).name in text for other in (name, *form.files)):
        return f"{mutation}: no file in {text!r}"
    place = re.search(r"line \d|entry \d|byte \d|column \d|\[\d|: \S", text)
    if place is None and not text.startswith("no such file"):
        return f"{mutation}: no place in {text!r}"
    item = r"line \d|entry \d|\[\d|: '|: class '"
    if key is not None and key not in text and not re.search(item, text):
        known = ("not JSON", "nested too deeply", "holds no method", "no class", "damaged file")
        extra = ("no examples", "no name of class", "do not", "other frozen", "lacks", "card: ")
        if not any(part in text for part in known + extra):
            return f"{mutation}: no field in {text!r}"
    return "refused"


def run(form, folder, mutations):
    "Read every mutation of the file; return how often it was read and refused."
    path = folder / form.changed
    whole = path.read_bytes()
    counts, faults = {"read": 0, "refused": 0}, []
    try:
        for mutation, key, content in mutations:
            if callable(content):
                path.unlink(missing_ok=True)
                content(path)
            else:
                path.write_bytes(content)
            found = outcome(form, folder, mutation, key)
            if found in counts:
                counts[found] += 1
            else:
                faults.append(found)
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            elif os.path.lexists(path):
                path.unlink()
    finally:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(whole)
    assert not faults, "\n".join(faults[:10])
    return counts


def field_mutations(form, rng):
    for _ in range(FIELD_MUTATIONS):
        if form.lines is not None:
            at = rng.randrange(len(form.lines))
            kind, key, line = changed_document(form.lines[at], rng)
            lines = [*form.lines[:at], line, *form.lines[at + 1 :]]
            text = "\n".join(json.dumps(line) for line in lines)
        else:
            kind, key, document = changed_document(form.document, rng)
            text = json.dumps(document, ensure_ascii=rng.random() < 0.8 or "surrogate" in kind)
        yield f"{key} {kind}", key, text.encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("name", FORMATS)
def test_the_valid_files_are_read(folders, name):
    form = FORMATS[name]
    assert outcome(form, folders(name), "valid") == "read"


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.document or f.lines])
def test_changed_fields(folders, name):
    form, rng = FORMATS[name], random.Random(f"fields {name}")
    counts = run(form, folders(name), field_mutations(form, rng))
    assert sum(counts.values()) == FIELD_MUTATIONS and counts["refused"] > FIELD_MUTATIONS // 4


@pytest.mark.parametrize("name", FORMATS)
def test_changed_bytes(folders, name):
    form, rng, folder = FORMATS[name], random.Random(f"bytes {name}"), folders(name)
    whole = (folder / form.changed).read_bytes()
    mutations = [(kind, None, content) for kind, content in fixed_bytes(whole)]
    for _ in range(BYTE_MUTATIONS):
        kind, content = changed_bytes(whole, rng)
        mutations.append((kind, None, content))
    counts = run(form, folder, mutations)
    assert sum(counts.values()) == len(mutations)


@pytest.mark.parametrize("name", FORMATS)
def test_something_else_in_the_place_of_the_file(folders, name):
    form, folder = FORMATS[name], folders(name)
    counts = run(form, folder, [(kind, None, put) for kind, put in IN_PLACE.items()])
    absent = ("nothing", "link to itself", "link to nothing")  # a run that has not started
    read = len(absent) if name == "run params" else 0
    assert counts == {"read": read, "refused": len(IN_PLACE) - read}


@pytest.mark.parametrize("name", ["split", "descriptions", "jsonl", "planes", "bundle", "method"])
def test_one_line_of_ten_megabytes(folders, name):
    form = FORMATS[name]
    contents = (b"x" * LONG, b'"' + b"x" * LONG + b'"', b"[" + b"1," * (LONG // 2) + b"1]")
    mutations = [(f"long {n}", None, content) for n, content in enumerate(contents)]
    counts = run(form, folders(name), mutations)
    assert counts == {"read": 0, "refused": 3}


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.meta])
def test_changed_cards(folders, name):
    "The digest is right, but the card was written by another program."
    form, rng, folder = FORMATS[name], random.Random(f"cards {name}"), folders(name)
    path = folder / form.changed
    whole, card = path.read_bytes(), load_arrays(path)[1]
    faults = []
    for _ in range(2 * FIELD_MUTATIONS):
        kind, key, changed = changed_document(card, rng)
        if kind in ("half a surrogate", "thousands of digits", "deeper"):
            continue  # these cannot be written
        path.write_bytes(whole)
        save_arrays(path, load_arrays(path)[0], changed if isinstance(changed, dict) else {})
        found = outcome(form, folder, f"{key} {kind}", key)
        faults += [] if found in ("read", "refused") else [found]
    path.write_bytes(whole)
    assert not faults, "\n".join(faults[:10])


@pytest.mark.parametrize("kind", [".npy", ".npy.json", "plan.json", "0.safetensors"])
def test_damaged_caches_are_named_and_made_again(tmp_path, kind, monkeypatch):
    "Features in the cache are never an error: the damaged file is named, and made again."
    rng = random.Random(f"cache {kind}")
    monkeypatch.setenv("VLMADAPT_CACHE", str(tmp_path))
    half = kind in ("plan.json", "0.safetensors")
    for number in range(26):
        (write_half if half else write_rows)(tmp_path)
        (path,) = (p for p in tmp_path.rglob("*") if p.name.endswith(kind))
        whole = path.read_bytes()
        if number < len(IN_PLACE):
            mutation, put = list(IN_PLACE.items())[number]
            path.unlink()
            put(path)
        elif kind.endswith("json") and number < 16:
            mutation, _, document = changed_document(json.loads(whole), rng)
            path.write_text(json.dumps(document))
        else:
            mutation, content = changed_bytes(whole, rng)
            path.write_bytes(content)
        with seconds(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            are_rows(read_rows(tmp_path))
        messages = [str(w.message) for w in caught]
        assert all(len(m.splitlines()) == 1 and str(tmp_path) in m for m in messages), mutation
        for left in sorted(tmp_path.rglob("*"), reverse=True):
            if left.is_dir() and not left.is_symlink():
                left.rmdir()
            else:
                left.unlink()


def test_any_log_has_a_last_line(tmp_path):
    "A log is text that programs print: any bytes give one printable line."
    rng = random.Random("logs")
    path = tmp_path / "log.txt"
    whole = b"\n2026-01-01 run\nTaskRes, seed 1: accuracy 50.0\nValueError: no such thing\n"
    contents = [content for _, content in fixed_bytes(whole)]
    contents += [changed_bytes(whole, rng)[1] for _ in range(100)]
    contents += [b"x" * LONG, b"\x1b[31m\n" * 10_000, b"a\r" * 10_000, bytes(range(256)) * 100]
    for content in contents:
        path.write_bytes(content)
        with seconds():
            line = log_end(path)
        assert line.isprintable() and len(line) <= 300
    path.unlink()
    for put in IN_PLACE.values():
        put(path)
        with seconds():
            assert log_end(path) == ""
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        path.unlink(missing_ok=True)


def test_what_json_cannot_hold_in_a_params_file(tmp_path):
    head = "experiment: few_shot\nparameters: {backbone: mini, seeds: [1], methods: [ZeroShot], "
    bomb = "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    for text, told in (
        ("a0: &a0 [1, 1]\n" + bomb, "unfolds to more than"),
        ("a: &a [*a]", "line 1: a value that holds itself"),
        (head + "prompts: 2024-99-99}", "line 2: 2024-99-99"),
        (head + "shots: 1" + "0" * 5000 + "}", "line 2: 1000"),
        (head + "shots: !!python/object:os.system x}", "line 2 is not YAML"),
        (head + "? [1]\n: 2}", "is not YAML"),
        ("--- 1\n--- 2", "is not YAML"),
        ("%TAG ! x", "is not YAML"),
    ):
        (tmp_path / "grid.yml").write_text(text)
        with seconds(), pytest.raises(ValueError) as refused:
            read_runs(tmp_path / "grid.yml")
        text = str(refused.value)
        assert text.startswith(f"{tmp_path}/grid.yml: ") and told in text
        assert len(text.splitlines()) == 1 and len(text) < 1000


# --- single rules


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"a": 1, "b": 2, "a": 3}', "f.json: not JSON (the name 'a' occurs twice)"),
        (b'[{"a": 1, "a": 3, "a": 4}]', "f.json: not JSON (the name 'a' occurs 3 times)"),
        (b"[1e400]", "f.json: not JSON (1e400 is no finite number)"),
        (b"[-Infinity]", "f.json: not JSON (-Infinity is no finite number)"),
        (b'["\\udc00"]', "f.json: not JSON (half of a pair of surrogates in a text)"),
        (b'"a\xff"', "f.json, line 1: not UTF-8 (byte 2); save it as UTF-8"),
        (b'{\n"a": "\0"}', "f.json, line 2: NUL characters, so it is not UTF-8 (byte 8)"),
        (b"", "f.json: the file is empty"),
        (b"\xef\xbb\xbf ", "f.json: the file is empty"),
        (b"[1, 2", "f.json: not JSON (Expecting ',' delimiter at line 1, column 6)"),
    ],
)
def test_json(tmp_path, content, message):
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(RecordError) as refused:
        read_json(tmp_path / "f.json")
    assert message in str(refused.value)


def test_numbers_that_are_not_finite_where_they_are_allowed(tmp_path):
    (tmp_path / "f.json").write_text('{"loss": NaN, "best": -Infinity}')
    found = read_json(tmp_path / "f.json", finite=False)
    assert found["loss"] != found["loss"] and found["best"] == float("-inf")


def test_lines_end_at_newlines_only(tmp_path):
    separators = "a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g"
    path = tmp_path / "lines.txt"
    path.write_bytes(f"\ufeff{separators}\r\n\n  last  ".encode())
    assert read_lines(path) == [(1, separators), (3, "  last  ")]
    path.write_bytes(json.dumps({"a": separators}, ensure_ascii=False).encode())
    assert read_json_lines(path) == [(1, {"a": separators})]
    write(tmp_path / "variants.txt", "Cessna\u2028172\n")
    for part in ("train", "val", "test"):
        write(tmp_path / f"images_variant_{part}.txt", "1 Cessna\u2028172\n")
    assert annotations.aircraft(None, tmp_path)["val"] == [("1.jpg", 0, "Cessna\u2028172")]


@pytest.mark.parametrize("put", IN_PLACE.values(), ids=IN_PLACE)
def test_images_and_texts_use_one_check_of_files(tmp_path, put):
    put(tmp_path / "x")
    messages = []
    for read, kinds in (
        (read_text, (RecordError, FileNotFoundError)),
        (open_image, (CorruptImage, FileNotFoundError)),
    ):
        with seconds(), pytest.raises(kinds) as refused:
            read(tmp_path / "x")
        messages.append(str(refused.value).replace("an image file", "a file"))
    assert messages[0] == messages[1].replace("image file", "file")


def test_names_with_newlines_give_one_line(tmp_path):
    row = {"image": "a\nb.png", "prompt": "p", "answers": "a"}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    with pytest.raises(FileNotFoundError) as refused:
        read_jsonl(tmp_path / "x.jsonl")
    assert str(refused.value).isprintable() and "line 1: image" in str(refused.value)


def test_a_bundle_that_does_not_fit_names_its_file(tmp_path):
    write_bundle(tmp_path)
    (tmp_path / "classnames.json").write_text('["cat", "dog", "cow"]')
    with pytest.raises(RecordError, match="features.safetensors: 3 class names but 2 text"):
        FewShotProblem.from_bundle(tmp_path)
    (tmp_path / "classnames.json").write_text('["cat", "dog"]')
    assert FewShotProblem.from_bundle(tmp_path).K == 2
