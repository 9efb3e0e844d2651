"Tasks from official and own files: shapes, held-out parts, faults, images, and answers in another process."

import csv
import json
import subprocess
import sys
import warnings

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import vlmadapt as va
from vlmadapt.core.records import RecordError
from vlmadapt.data.own_tasks import open_task, read_own_task
from vlmadapt.data.task_files import ImagePair
from vlmadapt.mini.models import registered

COLOURS = ("red", "blue", "green", "black", "white", "yellow")
PEOPLE = [{"answer": "red", "answer_confidence": "yes"}] * 10


def draw(*paths, size=(40, 32), colour="red"):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, colour).save(path)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def write_rows(path, rows):
    "Write rows as the ending of `path` says; lists in a table are JSON."
    if path.suffix == ".json":
        return write(path, rows)
    if path.suffix == ".jsonl":
        return write(path, "\n".join(map(json.dumps, rows)))
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        table.writerow(rows[0])
        for row in rows:
            table.writerow(json.dumps(x) if isinstance(x, list) else x for x in row.values())
    return path


def load(source, **arguments):
    "Load a task with `mini`; return it and the messages of its warnings."
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        task = va.load_task(source, "mini", **arguments)
    return task, [str(w.message) for w in seen if "vlmadapt" in w.filename]


# Official files, by the names of their archives


def vqav2(root):
    numbers = {"train": 9, "val": 73, "test": 74}
    listed = []
    for part, place in (("train", "train2014"), ("val", "val2014"), ("test", "val2014")):
        name = f"COCO_{place}_{numbers[part]:012d}.jpg"
        draw(root / place / name)
        file = {"filepath": place, "filename": name, "cocoid": numbers[part], "split": part}
        listed.append({**file, "sentences": [{"raw": "A red thing. "}]})
    write(root / "dataset_coco.json", {"images": listed})
    for place, own in (("train2014", [9]), ("val2014", [73, 74])):
        asked = [{"image_id": n, "question": "What is it?", "question_id": n} for n in own]
        told = [{"question_id": n, "answers": PEOPLE, "answer_type": "other"} for n in own]
        questions = {"data_subtype": place, "questions": asked}
        write(root / f"v2_OpenEnded_mscoco_{place}_questions.json", questions)
        write(root / f"v2_mscoco_{place}_annotations.json", {"annotations": told})


def vizwiz(root):
    for part in ("train", "val"):
        names = [f"VizWiz_{part}_{n:08d}.jpg" for n in range(4)]
        draw(*(root / part / name for name in names))
        rows = [{"image": n, "question": "What is it?", "answers": PEOPLE} for n in names]
        write(root / f"Annotations/{part}.json", rows)


def snli_ve(root):
    draw(root / "flickr30k_images/7.jpg")
    for part in ("train", "dev", "test"):
        row = {"gold_label": "neutral", "Flickr30K_ID": "7", "sentence2": f"It is {part}."}
        write(root / f"snli_ve_{part}.jsonl", json.dumps(row))


def nlvr2(root):
    for part in ("train", "dev", "test1"):
        row = {"identifier": f"{part}-3-1-0", "sentence": "Both are red.", "label": "True"}
        folder = root / part
        if part == "train":
            row["directory"] = 12
            folder = folder / "12"
        draw(*(folder / f"{part}-3-1-img{n}.png" for n in range(2)))
        write(root / f"{part}.json", json.dumps(row))


def textcaps(root):
    for part in ("train", "val"):
        names = [f"{part}{n}" for n in range(4)]
        draw(*(root / f"train_images/{name}.jpg" for name in names))
        data = [{"image_id": name, "caption_str": "A red thing."} for name in names]
        write(root / f"TextCaps_0.1_{part}.json", {"data": data})


OFFICIAL = {
    "vqav2": (vqav2, "vqa_accuracy", False),
    "vizwiz": (vizwiz, "vqa_accuracy", True),
    "snli-ve": (snli_ve, "accuracy", False),
    "nlvr2": (nlvr2, "accuracy", False),
    "coco-captions": (vqav2, "cider", False),
    "textcaps": (textcaps, "cider", True),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_files_become_tasks(tmp_path, name):
    make, metric, held = OFFICIAL[name]
    make(tmp_path)
    task, _ = load(name, root=tmp_path)
    assert list(task.labels) == ["train", "val", "test"]
    assert task.metric == metric
    assert task.provenance.get("held_out") == ({"val": 0.05, "seed": 0} if held else None)
    assert ("held out by image: val" in repr(task)) == held
    found = va.evaluate(va.create_method("Frozen", task), task)
    assert {metric, "n", "predictions"} <= found.keys()
    assert task.provenance.get("resize") == ("squash" if name == "nlvr2" else None)


def test_the_label_of_a_pair_is_true_or_false(tmp_path):
    nlvr2(tmp_path)
    row = {"identifier": "dev-3-1-0", "sentence": "Both are red.", "label": "Yes"}
    write(tmp_path / "dev.json", json.dumps(row))
    with pytest.raises(RecordError, match="dev.json, line 1: label 'Yes' is neither True nor"):
        load("nlvr2", root=tmp_path)


# Files of one's own


def six_shapes(name):
    "Twelve entries of one shape, about six images."
    rows = []
    for n in range(12):
        own = COLOURS[n % 6]
        image = {"image": f"{own}.png"}
        asked = {"question": ["what colour is it ?", "is it red ?"][n % 2]}
        rows.append(
            {
                "answer": {**image, **asked, "answer": own},
                "answers": {**image, "prompt": asked["question"], "answers": [own, own, "x", own]},
                "caption": {**image, "caption": f"a {own} thing"},
                "captions": {**image, "captions": [f"a {own} thing", "a picture"]},
                "statement": {**image, "hypothesis": "it is red.", "label": str(own == "red")},
                "pair": {
                    "images": [f"{own}.png", f"{COLOURS[(n + 1) % 6]}.png"],
                    "question": "are both red ?",
                    "answer": "no",
                },
            }[name]
        )
    return rows


SHAPES = {  # shape -> metric, candidates
    "answer": ("accuracy", []),
    "answers": ("vqa_accuracy", []),
    "caption": ("cider", []),
    "captions": ("cider", []),
    "statement": ("accuracy", ["correct", "incorrect"]),
    "pair": ("accuracy", []),
}


@pytest.fixture
def folder(tmp_path):
    for colour in COLOURS:
        draw(tmp_path / f"{colour}.png", colour=colour)
    return tmp_path


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv", ".tsv"])
@pytest.mark.parametrize("shape", SHAPES)
def test_own_files_of_six_shapes(folder, shape, ending):
    path = write_rows(folder / f"own{ending}", six_shapes(shape))
    task, splits = read_own_task(path)
    metric, candidates = SHAPES[shape]
    assert (task.metric, sorted(task.candidates)) == (metric, candidates)
    assert list(splits) == ["train", "val", "test"]
    assert splits.held_out == {"test": 0.2, "val": 0.125}
    images = [set(images) for images, _ in splits.values()]
    assert len(set.union(*images)) == sum(map(len, images)) == 6  # no image in two parts
    assert sum(len(examples) for _, examples in splits.values()) == 12
    assert isinstance(splits["train"][0][0], ImagePair) == (shape == "pair")


@pytest.mark.parametrize("shape", SHAPES)
def test_own_tasks_are_evaluated_with_every_metric_named(folder, shape):
    path = write_rows(folder / "own.jsonl", six_shapes(shape))
    task, _ = load(path)
    found = va.evaluate(va.create_method("Frozen", task), task)
    metric, candidates = SHAPES[shape]
    assert next(iter(found)) == metric == task.metric
    assert {"bleu4", "rouge_l"} <= found.keys() or metric != "cider"
    assert not candidates or set(found["predictions"]) <= set(candidates)
    assert task.provenance["held_out"] == {"test": 0.2, "val": 0.125, "seed": 0}


def test_the_seed_draws_other_images_and_the_same_ones_again(folder):
    path = write_rows(folder / "own.jsonl", six_shapes("answer"))
    held = [tuple(read_own_task(path, seed=seed)[1]["test"][0]) for seed in (0, 0, 1, 2, 3)]
    assert held[0] == held[1]
    assert len(set(held)) > 1


def test_parts_come_from_folders_mappings_objects_and_fields(folder):
    rows = six_shapes("answer")
    places = folder / "parts"
    places.mkdir()
    write_rows(places / "train.jsonl", rows[:8])
    write_rows(places / "validation.csv", rows[8:10])
    write_rows(places / "test.json", rows[10:])
    mapping = {"train": places / "train.jsonl", "test": places / "test.json"}
    write(folder / "object.json", {"train": rows[:8], "dev": rows[8:10], "test": rows[10:]})
    split = ["train"] * 8 + ["val"] * 2 + ["test"] * 2
    named = [{**row, "split": part} for row, part in zip(rows, split, strict=True)]
    write_rows(folder / "named.csv", named)
    sources = [(places, {}), (folder / "object.json", {}), (folder / "named.csv", {})]
    for source, held in [*sources, (mapping, {"val": 0.1})]:
        _, splits = read_own_task(source, root=folder)
        assert splits.held_out == held
        assert len(splits["test"][1]) == 2
        assert list(splits) == ["train", "val", "test"]
    _, splits = read_own_task({"train": places / "train.jsonl"}, root=folder)
    assert list(splits) == ["train", "val"]
    write_rows(places / "train.csv", rows)
    with pytest.raises(ValueError, match=r"train.csv and train.jsonl are both the train part"):
        read_own_task(places, root=folder)
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no file of examples there"):
        read_own_task(folder / "empty")
    with pytest.raises(ValueError, match="unknown part 'trian'; did you mean 'train'"):
        read_own_task({"trian": places / "train.jsonl"})
    with pytest.raises(ValueError, match="no examples for train"):
        read_own_task({"test": places / "test.json"}, root=folder)


GOOD = {"id": 1, "image": "red.png", "question": "what ?", "answer": "red"}


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({**GOOD, "id": 2, "image": "gone.png"}, r"own.jsonl, line 2: image .*gone.png is missing"),
        (GOOD, r"own.jsonl, line 2: id '1' occurs before, in .*own.jsonl, line 1"),
        ({"image": "red.png", "text": "x"}, "line 2: no question, caption or hypothesis among its"),
        (
            {"image": "red.png", "question": "x"},
            "line 2: no 'answers'; its fields are image, quest",
        ),
        ({"question": "x", "answer": "y"}, "line 2: no 'image'; its fields are question, answer"),
        ({"image": 7, "question": "x", "answer": "y"}, "line 2: 'image' should be a text, got 7"),
        (
            {"images": ["red.png"], "question": "x", "answer": "y"},
            "line 2: 'images' should be a li",
        ),
        ({"image": "red.png", "caption": "x"}, "line 2: a caption, but .*line 1 has a question"),
        ({**GOOD, "id": 2, "split": "tset"}, "line 2: split 'tset' is none of train, val, test"),
        ({**GOOD, "id": 2, "split": "val"}, "line 1: no 'split', which other entries have"),
        ({**GOOD, "id": 2, "answer": [""]}, "line 2: 'what \\?' has no answers"),
        ({**GOOD, "id": 2, "answer": {}}, "line 2: 'answers' should be texts"),
    ],
)
def test_faults_of_own_files_are_named_with_file_and_line(folder, wrong, message):
    path = write_rows(folder / "own.jsonl", [GOOD, wrong])
    with pytest.raises((RecordError, FileNotFoundError), match=message) as refused:
        read_own_task(path)
    assert "\n" not in str(refused.value)


def test_other_names_of_fields_and_unknown_ones(folder):
    rows = [{"photo": f"{c}.png", "ask": "what ?", "reply": c, "b": c} for c in COLOURS]
    path = write_rows(folder / "own.csv", rows)
    names = dict(image="photo", question="ask", answer="reply")
    assert load(path, fields=names)[0].labels["train"][0][0] in COLOURS
    with pytest.raises(ValueError, match="unknown field of .*own.csv for 'image': 'photos'; did y"):
        read_own_task(path, fields={**names, "image": "photos"})
    with pytest.raises(ValueError, match="unknown field 'quesion'; did you mean 'question'"):
        read_own_task(path, fields={"quesion": "ask"})
    with pytest.raises(ValueError, match="fields: 'image' is the name of a field, not 3"):
        read_own_task(path, fields={"image": 3})
    pairs = [
        {"before": f"{c}.png", "after": "red.png", "ask": "same ?", "reply": "no"} for c in COLOURS
    ]
    write_rows(path, pairs)
    fields = dict(images=("before", "after"), question="ask", answer="reply")
    image = read_own_task(path, fields=fields)[1]["train"][0][0]
    assert image.right.endswith("red.png")


def test_encodings_tables_and_names_that_are_no_task(folder):
    path = folder / "own.csv"
    text = "image,question,answer\r\nred.png,caf\u00e9 ?,red\r\nblue.png,what ?,blue\r\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert open_task(str(path))[0] == "own"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RecordError, match=r"own.csv, line 2: not UTF-8 \(byte"):
        read_own_task(path)
    write(path, "image,question,answer\nred.png,what ?\n")
    with pytest.raises(RecordError, match="own.csv, line 2: 2 cells, but line 1 names 3 columns"):
        read_own_task(path)
    write(folder / "own.json", {"trian": []})
    with pytest.raises(RecordError, match="own.json: 'trian' is none of the parts"):
        read_own_task(folder / "own.json")
    with pytest.raises(ValueError, match="unknown task 'vqav3'; did you mean 'vqav2'"):
        va.load_task("vqav3", "mini")
    with pytest.raises(ValueError, match="task .*own.csv: name the backbone"):
        va.load_task(path)
    write_rows(path, [dict(image="red.png", question="x", answer="y")])
    with pytest.raises(ValueError, match="of a single image none can be held out as test"):
        read_own_task(path)


# Images through one door


def wide_task(folder, **arguments):
    "A task of an image with EXIF orientation, a transparent one and a wide one."
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.new("RGB", (40, 32), "red")
    turned.paste("blue", (0, 0, 20, 32))
    turned.save(folder / "turned.jpg", exif=exif, quality=95)
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(folder / "clear.png")
    wide = Image.new("RGB", (96, 32), "green")
    wide.paste("red", (0, 0, 32, 32))
    wide.save(folder / "wide.png")
    rows = [
        {"image": name, "question": "what is it ?", "answer": "red", "split": part}
        for part in ("train", "val")
        for name in ("turned.jpg", "clear.png", "wide.png")
    ]
    return load(write_rows(folder / "own.jsonl", rows), **arguments)


@pytest.mark.parametrize("resize", [None, "pad", "squash"])
def test_images_of_a_task_are_upright_opaque_and_whole_where_asked(tmp_path, resize):
    task, messages = wide_task(tmp_path, resize=resize)
    turned, clear, wide = next(task.pixels("val").split(3))
    assert (clear == clear.max()).all()  # transparent is white
    middle = turned.shape[-1] // 2
    assert turned[2, 4, middle] > turned[0, 4, middle]  # blue on top once upright
    assert turned[0, -5, middle] > turned[2, -5, middle]
    red = wide[0] - wide[1]
    assert (red.max() > 0.5) == (resize is not None)  # the crop cuts the red third off
    cropped = [message for message in messages if "lose more than half" in message]
    assert len(cropped) == (resize is None)
    method = va.create_method("Frozen", task)
    images = [tmp_path / name for name in ("turned.jpg", "clear.png", "wide.png")]
    assert method.predict(images, "what is it ?") == method.outputs(task, "val")


def test_pairs_are_seen_side_by_side(folder):
    task, _ = load(write_rows(folder / "own.jsonl", six_shapes("pair")))
    pixels = next(task.pixels("val").split(1))[0]
    left, right = task.images("val")[0]
    whole = va.side_by_side(left, right)
    torch.testing.assert_close(pixels, task.transform(whole))
    method = va.create_method("Frozen", task)
    assert method.predict([whole], task.prompts["val"][:1]) == method.outputs(task, "val")[:1]


# Words


def test_unknown_words_are_named_once_and_never_those_of_the_test_answers(folder):
    rows = [dict(image=f"{c}.png", question="is it a quokka ?", answer=c) for c in COLOURS]
    rows[0]["answer"] = "xylophonist"
    for row, part in zip(rows, ["train", "train", "train", "val", "test", "test"], strict=True):
        row["split"] = part
    rows[-1]["answer"] = "wombat"
    _, messages = load(write_rows(folder / "own.jsonl", rows))
    about = [message for message in messages if "does not know" in message]
    assert about == [
        "words that mini does not know: 'quokka', 'xylophonist'; it reads them as one and does "
        "not generate them"
    ]


def test_texts_that_do_not_fit_are_refused_when_the_task_is_made(folder):
    rows = [dict(image=f"{c}.png", question="is it " * 40, answer="x") for c in COLOURS]
    with pytest.raises(ValueError, match="example 0: task prompt 'is it .* the context holds 32"):
        load(write_rows(folder / "own.jsonl", rows))


# The whole way, in two processes


def small_coca(folder):
    "Store a small random CoCa of open_clip in `folder`; return its name."
    layers = dict(width=32, layers=2, heads=2)
    vision = dict(image_size=32, patch_size=16, width=32, layers=1, head_width=16)
    vision |= dict(attentional_pool=True, attn_pooler_heads=2, output_tokens=True)
    config = dict(
        embed_dim=32,
        vision_cfg=vision,
        text_cfg=dict(context_length=24, vocab_size=49408, output_tokens=True, **layers),
        multimodal_cfg=dict(context_length=24, vocab_size=49408, **layers),
        custom_text=True,
    )
    torch.manual_seed(0)
    model = registered().CoCa(32, config["multimodal_cfg"], config["text_cfg"], vision)
    with torch.no_grad():
        model.text_decoder.text_projection.normal_(std=0.5)
    folder.mkdir()
    transform = dict(mean=[0.5] * 3, std=[0.5] * 3, interpolation="bilinear", resize_mode="squash")
    write(folder / "open_clip_config.json", dict(model_cfg=config, preprocess_cfg=transform))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


SCRIPT = """
import json, sys
import vlmadapt as va
path, images, questions = json.loads(sys.argv[1])
method = va.load_method(path)
print(json.dumps(method.predict(images, questions)))
"""


@pytest.mark.parametrize("backbone", ["mini", "open_clip", "blip-tiny"])
@pytest.mark.parametrize("candidates", [None, COLOURS], ids=["open", "ranked"])
def test_an_adapted_method_answers_the_same_in_another_process(folder, backbone, candidates):
    if backbone == "blip-tiny":
        pytest.importorskip("transformers")
    if backbone == "open_clip":
        backbone = small_coca(folder / "coca")
    path = write_rows(folder / "own.jsonl", six_shapes("answer"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = va.load_task(path, backbone, candidates=candidates)
    space = dict(lr=[1e-3, 1e-2], p=[1.25, 1.75], hidden=[8])
    fixed = dict(epochs=2, batch_size=4)
    tuned = va.tune("PAdapter", task, trials=3, fixed=fixed, space=space)
    assert len(tuned.trials) == 3 and {"lr", "p", "hidden", "value"} <= set(tuned.trials)
    assert tuned.metric == "accuracy" and tuned.method is not None
    method = va.adapt(task, "PAdapter", trials=2, fixed=fixed, space=dict(lr=[1e-3, 1e-2]))
    assert method.card["selection"]["metric"] == "accuracy"
    assert va.evaluate(method, task).keys() >= {"accuracy", "n", "predictions"}
    images = [str(folder / f"{colour}.png") for colour in COLOURS]
    answers = method.predict(images, "what colour is it ?")
    assert answers == method.predict(images, ["what colour is it ?"] * 6)
    method.save(folder / "method.safetensors")
    given = json.dumps([str(folder / "method.safetensors"), images, "what colour is it ?"])
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, given]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == answers
