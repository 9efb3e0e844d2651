"Generation tasks: official scores, independence of the batch, refusals when a task is built."

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors import safe_open

from vlmadapt.data.task_files import Example
from vlmadapt.data.tasks import read_karpathy, read_snli_ve, read_textcaps, read_vqa
from vlmadapt.data.text_metrics import METRICS, bleu, caption_scores, cider, rouge_l, vqa_accuracy
from vlmadapt.methods.generation import GENERATION_METHODS
from vlmadapt.models.backbones import load_backbone
from vlmadapt.models.decoding import stepper
from vlmadapt.models.searches import generate, greedy_search
from vlmadapt.models.tokens import END, prompt_tokens
from vlmadapt.problems.base import SealedSplitError
from vlmadapt.problems.generation import GenerationProblem, load_task
from vlmadapt.training.evaluation import evaluate

GOLDEN = ROOT / "tests/golden/vqa_accuracy.safetensors"


def warned(function):
    "The result of `function` and the messages of its warnings, but for unknown words."
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = function()
    messages = [str(w.message) for w in seen if "vlmadapt" in w.filename]
    return result, [message for message in messages if "does not know" not in message]


def picture(size=(32, 32), colour="red"):
    return Image.new("RGB", size, colour)


def a_task(metric="accuracy", candidates=(), backbone="mini", images=None, **answers):
    "A task with one image and a question for each list of answers, such as `train=[['red']]`."
    images = images or [picture()]
    splits = {}
    for split, people in answers.items():
        examples = [
            Example(0, f"what colour is it in {split} {n}?", a) for n, a in enumerate(people)
        ]
        splits[split] = images, examples
    return GenerationProblem(splits, metric, backbone, candidates)


def folder_task(root, lines=None, **settings):
    "A task of JSON lines with one good example in each part; `lines` replaces parts."
    picture().save(root / "a.png")
    good = {part: [row(prompt=f"what is it in {part} ?")] for part in ("train", "val", "test")}
    for part, rows in {**good, **(lines or {})}.items():
        (root / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return load_task("jsonl", root=root, **{"backbone": "mini", **settings})


def row(**changes):
    return {"image": "a.png", "prompt": "what is it ?", "answers": ["red"], **changes}


# VQA accuracy

VQA_CASES = [  # prediction, answers, percent of the official program since March 2021
    ("the dog", ["the dog"] * 9 + ["cat"], 100),
    ("two", ["two"] * 6 + ["3"] * 4, 100),
    ("2", ["two"] * 2 + ["2"] * 2 + ["many"] * 6, 100),
    ("two", ["two"] * 10, 100),
    ("The red.", ["red"] * 10, 0),
    ("red", ["Red"] * 9 + ["blue"], 100),
    ("red", ["red"] * 10, 100),
    ("yes", ["yes"] * 3 + ["no"] * 7, 90),
    ("", ["", "", " "] + ["no"] * 7, 90),
    ("dont", ["don't\n"] * 10, 0),
    ("dont", ["don't\n"] * 9 + ["no"], 100),
]


@pytest.mark.parametrize("said, people, percent", VQA_CASES)
def test_vqa_accuracy_follows_the_program_of_march_2021(said, people, percent):
    assert vqa_accuracy([said], [people]) == pytest.approx(percent)


@pytest.mark.parametrize(
    "version, scores", [("2021", "scores"), ("before 2021", "scores_previous")]
)
def test_vqa_accuracy_equals_the_golden_numbers(version, scores):
    with safe_open(GOLDEN, "pt") as file:
        right = file.get_tensor(scores)
        overall = file.get_tensor(scores.replace("scores", "overall"))
        cases = {name: json.loads(file.metadata()[name]) for name in ("predictions", "answers")}
    pairs = list(zip(cases["predictions"], cases["answers"], strict=True))
    ours = [vqa_accuracy([said], [people], version=version) for said, people in pairs]
    assert len(ours) == 16
    assert ours == pytest.approx(right.tolist(), abs=1e-10)
    ours = vqa_accuracy(cases["predictions"], cases["answers"], version=version)
    assert ours == pytest.approx(overall.item(), abs=1e-10)


def test_the_versions_of_vqa_accuracy_differ_and_exact_strings_stay():
    people = ["the dog"] * 9 + ["cat"]
    scores = [vqa_accuracy(["the dog"], [people], version=v) for v in ("2021", "before 2021")]
    assert scores == [100, 0]
    assert vqa_accuracy(["The dog"], [people], normalise=False) == 0
    assert vqa_accuracy(["the dog"], [people], normalise=False) == 100
    with pytest.raises(ValueError, match="unknown version of the VQA program '2019'"):
        vqa_accuracy(["a"], [people], version="2019")


@pytest.mark.parametrize("metric", [vqa_accuracy, rouge_l, bleu, cider, METRICS["accuracy"]])
@pytest.mark.parametrize(
    "predicted, references, message",
    [
        (["red"], ["red"], r"references\[0\]: expected a list of texts, got 'red'"),
        ("red", [["red"] * 10], "predictions: expected a list, got 'red'"),
        (["red", "blue"], [["red"] * 10], "2 predictions, but 1 lists of references"),
        ([None], [["red"] * 10], r"predictions\[0\]: expected a text, got None"),
        (["red"], [[]], r"references\[0\]: expected a list of texts, got \[\]"),
        (["red"], [["red"] * 9 + [3]], r"references\[0\]: expected texts, got 3"),
        ([], [], "no predictions to score"),
    ],
)
def test_metrics_refuse_what_is_no_list_of_texts(metric, predicted, references, message):
    with pytest.raises(ValueError, match=message):
        metric(predicted, references)


def test_a_vqa_task_states_the_version_in_its_provenance():
    people = [["red"] * 10]
    assert a_task("vqa", val=people).provenance["vqa_version"] == "2021"
    assert "vqa_version" not in a_task("accuracy", val=people).provenance


def test_a_metric_that_cannot_score_is_refused_when_the_task_is_built():
    message = "val: 1 of 2 examples have fewer than four answers, example 1 has 3"
    with pytest.raises(ValueError, match=message):
        a_task("vqa", val=[["red"] * 4, ["red"] * 3])
    with pytest.raises(ValueError, match="test: 1 of 1 examples have fewer than four") as refused:
        a_task("vqa", test=[["crimson"]])
    assert "crimson" not in str(refused.value)
    a_task("vqa", train=[["red"]], val=[["red"] * 4])  # training needs no four answers


# Captions without a word

BLANK = ["", ".", "...", "?", "!!", "“ ”", "…", "😀"]
TWO = [["a dog runs on grass", "the dog runs"], ["two cats sleep on a bed", "cats on a bed"]]


@pytest.mark.parametrize("blank", BLANK)
def test_captions_without_a_word_score_zero(blank):
    for metric in (bleu, rouge_l, cider):
        assert metric([blank, blank], TWO) == 0
        assert metric([blank], [[blank]]) == 0
    half = rouge_l([blank, TWO[1][0]], TWO)
    assert half == pytest.approx(50)
    more = [[*TWO[0], blank], TWO[1]]
    assert rouge_l([TWO[0][0], TWO[1][0]], more) == pytest.approx(100)


@pytest.mark.parametrize("blank", ["", "...", "😀"])
def test_caption_scores_equal_pycocoevalcap_beside_empty_captions(blank):
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    said = ["a dog runs on the grass", "two cats sleep on a bed", blank]
    people = [[*TWO[0], blank], TWO[1], ["a red bus", "the bus is red"]]
    results = {i: ["" if text == blank else text] for i, text in enumerate(said)}
    truths = {i: ["" if t == blank else t for t in texts] for i, texts in enumerate(people)}
    ours = caption_scores(said, people)
    official = {
        "BLEU-4": 100 * Bleu(4).compute_score(truths, results, verbose=0)[0][3],
        "ROUGE-L": 100 * Rouge().compute_score(truths, results)[0],
        "CIDEr": 100 * Cider().compute_score(truths, results)[0],
    }
    assert ours == pytest.approx(official, abs=1e-6)
    one = cider(said[:1], people[:1])
    assert one == pytest.approx(100 * Cider().compute_score({0: truths[0]}, {0: results[0]})[0])


def test_captions_without_a_word_are_left_out_or_refused_when_a_task_is_built():
    captions = dict(train=[["a dog", "..."], ["😀", "a cat"]], test=[["a bus", "?"]])
    task, messages = warned(lambda: a_task("captions", **captions))
    assert task.labels["train"] == [("a dog",), ("a cat",)]
    assert messages == ["3 captions without a word, such as '...', are left out"]
    with pytest.raises(ValueError, match="val: no caption of example 1 has a word"):
        a_task("captions", val=[["a dog"], ["...", "😀"]])


def test_wordless_captions_of_a_file_are_counted(tmp_path):
    picture((8, 8)).save(tmp_path / "i.jpg")
    data = [dict(image_id="i", caption_str=text) for text in ("...", "a stop sign")]
    (tmp_path / "t.json").write_text(json.dumps(dict(data=data)))
    path = tmp_path / "t.json"
    (_, examples), messages = warned(lambda: read_textcaps(path, tmp_path, train=True))
    assert examples[0].answers == ("a stop sign",)
    assert messages == [f"1 empty answers are left out, the first in {path}, entry 1 of data"]


# Generation in batches


def double(name):
    "A backbone in float64, so that equal continuations stay equal."
    backbone = copy.copy(load_backbone(name))
    backbone.model = copy.deepcopy(backbone.model).double()
    return backbone


@pytest.fixture(scope="module", params=["mini", "blip-tiny"])
def writer(request):
    if request.param == "blip-tiny":
        pytest.importorskip("transformers")
    return double(request.param)


def mixed_prompts(writer):
    "Prompts of one token to the longest that the context holds."
    longest = ["red"] * (writer.model.context_length - 2)
    return ["a photo of", "what colour is it?", " ".join(longest), " ".join(longest[6:]), ""]


def noise(writer, n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, writer.size, writer.size, generator=generator).double()


@pytest.mark.parametrize("num_beams, cache", [(1, True), (3, True), (1, False), (3, False)])
def test_each_example_alone_equals_itself_in_a_mixed_batch(writer, num_beams, cache):
    prompts = mixed_prompts(writer)
    x = noise(writer, len(prompts))
    together = generate(writer, x, prompts, num_beams=num_beams, max_new_tokens=7, cache=cache)
    for n, prompt in enumerate(prompts):
        alone = generate(
            writer, x[n : n + 1], [prompt], num_beams=num_beams, max_new_tokens=7, cache=cache
        )
        assert alone == [together[n]], (n, prompt)
    assert any(together[:2])


def test_one_limit_for_all_rows_would_be_noticed(writer):
    "The control: the limit that the longest prompt leaves changes what the short ones say."
    prompts = mixed_prompts(writer)[:3]
    x = noise(writer, len(prompts))
    context = writer.model.context_length
    rows = [torch.tensor(row) for row in prompt_tokens(writer.tokenizer, prompts, context)]
    given = [len(row) for row in rows]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    end = getattr(writer.tokenizer, "end", END)
    limits = torch.tensor([min(7, context - n) for n in given])
    own = greedy_search(stepper(writer.model, x), tokens, limits, end)
    common = greedy_search(stepper(writer.model, x), tokens, int(limits.min()), end)
    first, cut = (found[0, given[0] :].tolist() for found in (own, common))
    first, cut = ([word for word in words if word not in (0, end)] for words in (first, cut))
    assert cut == first[:1] != first
    texts = generate(writer, x, prompts, max_new_tokens=7)
    assert texts[0] == writer.tokenizer.decode(first).strip()


@pytest.mark.parametrize(
    "settings",
    [dict(num_beams=3, min_new_tokens=4), dict(num_beams=4, length_penalty=0.0, min_new_tokens=2)],
)
def test_search_settings_do_not_mix_rows(writer, settings):
    prompts = mixed_prompts(writer)[:4]
    x = noise(writer, len(prompts), seed=2)
    together = generate(writer, x, prompts, max_new_tokens=6, **settings)
    alone = [
        generate(writer, x[n : n + 1], [p], max_new_tokens=6, **settings)[0]
        for n, p in enumerate(prompts)
    ]
    assert together == alone


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("extra", [-1, 0, 10, 200])
def test_a_prompt_that_does_not_fit_is_refused_with_both_lengths(writer, num_beams, extra):
    context = writer.model.context_length
    x = torch.zeros(2, 3, writer.size, writer.size).double()
    long = " ".join(["red"] * (context + extra))
    message = (
        f"task prompt 'red red.*is {context + extra + 1} tokens long, the decoder reads {context}"
    )
    with pytest.raises(ValueError, match=message):
        generate(writer, x, ["a photo of", long], num_beams=num_beams)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_beams=0), "num_beams: input should be greater than or equal to 1"),
        (dict(max_new_tokens=-3), "max_new_tokens: input should be greater than or equal to 1"),
        (
            dict(num_beams=3, min_new_tokens=-1),
            "min_new_tokens: input should be greater than or equal to 0",
        ),
        (dict(max_new_tokens=3, min_new_tokens=4), "min_new_tokens=4 is larger than max_new_t"),
        (dict(cache="perhaps"), "cache: "),
        (dict(beams=3), "unknown argument of the search 'beams'; .*num_beams"),
        (dict(prompts=["a", "b"]), "1 images, but 2 prompts"),
        (dict(prompts=[None]), "task prompt: expected a text, got None"),
    ],
)
def test_wrong_arguments_of_generate_are_refused(changes, message):
    backbone = load_backbone("mini")
    with pytest.raises(ValueError, match=message):
        generate(backbone, torch.zeros(1, 3, 32, 32), **changes)


# Texts that are too long

LONG = "is it " + "very " * 60 + "red ?"


@pytest.mark.parametrize("backbone", ["mini", "blip-tiny"])
@pytest.mark.parametrize("part", ["train", "val", "test"])
@pytest.mark.parametrize("candidates", [None, ("red", "blue")])
def test_long_prompts_are_found_when_the_task_is_built(tmp_path, backbone, part, candidates):
    if backbone == "blip-tiny":
        pytest.importorskip("transformers")
    lines = {part: [row() for _ in range(40)] + [row(prompt=LONG)]}
    message = f"{part}: example 40: task prompt 'is it very.*the context holds (32|48); shorten"
    with pytest.raises(ValueError, match=message):
        folder_task(tmp_path, lines, backbone=backbone, candidates=candidates)


def test_long_answers_are_refused_where_they_are_trained_on(tmp_path):
    with pytest.raises(ValueError, match="train: example 0: task prompt .* with 'very very"):
        folder_task(tmp_path, dict(train=[row(answers=["red", "very " * 60])]))
    folder_task(tmp_path, dict(test=[row(prompt="what ?", answers=["red", "very " * 60])]))
    with pytest.raises(ValueError, match="with 'very very.*2 more are too long"):
        a_task(val=[["red"]] * 3, candidates=["red", "very " * 30])


# Candidates


@pytest.mark.parametrize(
    "candidates, message",
    [
        ("yes,no", r"expected a list of answers, got 'yes,no'; write \['yes', 'no'\]"),
        (("yes", "no", "Yes ."), "'yes' and 'Yes .' are the same answer"),
        (("yes", "yes"), "'yes' and 'yes' are the same answer"),
        (("yes", None), "candidates: expected texts, got None"),
        (("yes", " "), "candidates: expected texts, got ' '"),
    ],
)
def test_wrong_candidates_are_refused(candidates, message):
    with pytest.raises(ValueError, match=message):
        a_task(candidates=candidates, val=[["yes"], ["no"]])


def test_captions_take_no_candidates():
    with pytest.raises(ValueError, match="takes no candidates"):
        a_task("captions", candidates=("a dog",), val=[["a dog"]])


def test_candidates_and_answers_are_compared_without_capitals_and_full_stops():
    _, messages = warned(lambda: a_task(candidates=("yes .", "no"), val=[["Yes"], ["NO."]]))
    assert messages == []
    scores = METRICS["accuracy"](["yes .", "no", "-1"], [("Yes",), ("no", "yes"), ("1",)])
    assert scores["accuracy"] == pytest.approx(200 / 3)


def test_candidates_that_nobody_said_and_answers_that_are_no_candidate_are_counted_once():
    answers = dict(train=[["yes"], ["perhaps"]], val=[["maybe"]], test=[["secret"]])
    _, messages = warned(lambda: a_task(candidates=["yes", "no", "unsure"], **answers))
    assert messages == [
        "train and val: 2 of 3 candidates equal no answer ('no', 'unsure'); "
        "2 of 3 examples have no answer among the candidates ('perhaps')"
    ]


def test_given_candidates_are_ranked_in_vqa_tasks_too():
    people = [["red"] * 6 + ["blue"] * 4]
    task = a_task("vqa", candidates=["red", "blue"], train=people, test=people)
    result = evaluate(GENERATION_METHODS["Frozen"](task), task)
    assert result["predictions"][0] in ("red", "blue")
    assert result["vqa_accuracy"] == 100


# Images


def test_task_images_are_turned_and_put_on_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.new("RGB", (40, 32), "red")
    turned.paste("blue", (0, 0, 20, 32))
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    paths = [str(tmp_path / name) for name in ("turned.jpg", "clear.png")]
    examples = [Example(n, "what is it?", "red") for n in range(2)]
    task = GenerationProblem(dict(val=(paths, examples)), "accuracy", "mini")
    upright, clear = task.pixels("val").images
    assert upright.size == (32, 40)
    top, bottom = upright.getpixel((16, 5)), upright.getpixel((16, 35))
    assert top[2] > 200 and bottom[0] > 200
    assert clear.getpixel((3, 3)) == (255, 255, 255)


def test_images_that_lose_more_than_half_to_the_crop_are_counted_once():
    images = [picture(size) for size in ((400, 100), (100, 400), (200, 100), (32, 32))]
    examples = [Example(n, "what is it?", "red") for n in range(4)]
    splits = dict(train=(images, examples), val=(images[2:], examples[:2]))
    _, messages = warned(lambda: GenerationProblem(splits, "accuracy", "mini"))
    assert len(messages) == 1
    assert messages[0].startswith("2 of 4 images lose more than half to the central crop of mini")
    assert "400 x 100" in messages[0]


def test_no_warning_for_the_mini_tasks():
    for name in ("mini-vqa", "mini-entailment", "mini-captions"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_task(name)


def test_blip_squeezes_images_and_warns_of_no_crop():
    pytest.importorskip("transformers")
    build = lambda: a_task(images=[picture((400, 100))], backbone="blip-tiny", val=[["red"]])  # noqa: E731
    assert warned(build)[1] == []


# Leaks and seals


def test_the_same_question_about_the_same_image_in_train_and_test_is_counted(tmp_path):
    same = {part: [row()] for part in ("train", "val", "test")}
    _, messages = warned(lambda: folder_task(tmp_path, same))
    assert len(messages) == 1
    assert messages[0].startswith(
        "1 of 1 test examples ask the same about the same image as train or val"
    )
    assert "a.png" in messages[0]
    other = dict(test=[row(prompt="is it round ?")])
    assert warned(lambda: folder_task(tmp_path, other))[1] == []


def test_leaks_are_found_among_arrays_and_whatever_the_case_of_the_prompt():
    x = np.full((32, 32, 3), 7, np.uint8)
    splits = dict(
        train=([x], [Example(0, "What is it?", "red")]),
        test=([x.copy()], [Example(0, "what  is it", "red")]),
    )
    assert (
        "1 of 1 test examples"
        in warned(lambda: GenerationProblem(splits, "accuracy", "mini"))[1][0]
    )
    splits["test"] = [x + 1], splits["test"][1]
    assert warned(lambda: GenerationProblem(splits, "accuracy", "mini"))[1] == []


def test_test_answers_and_sorts_are_sealed():
    task = load_task("mini-entailment")
    for sealed in (task.labels["test"], task.sorts["test"]):
        assert len(sealed) == 384
        for read in (lambda s=sealed: s[0], lambda s=sealed: list(s)):
            with pytest.raises(SealedSplitError, match="sealed"):
                read()
    assert task.sorts["val"][0] in ("sketch", "painted")
    assert "secret" not in repr(a_task(test=[["secret"]]))


# Examples and files


@pytest.mark.parametrize(
    "example, message",
    [
        (
            Example(0, "what?", None),
            "val: example 0: expected a list of texts as answers to 'what\\?'",
        ),
        (Example(0, "what?", (3,)), "val: example 0: expected a list of texts"),
        (Example(0, "what?", ()), "val: example 0 has no answer to 'what\\?'"),
        (Example(0, "what?", ("", " ")), "val: example 0 has no answer"),
        (Example(0, None, ("red",)), "val: example 0: expected a text as prompt, got None"),
        (Example(5, "what?", ("red",)), "val: example 0: there is no image 5, only 1 images"),
        (Example(-1, "what?", ("red",)), "val: example 0: image: input should be greater"),
        (Example("a", "what?", ("red",)), "val: example 0: image: input should be a number"),
    ],
)
def test_wrong_examples_are_refused(example, message):
    with pytest.raises(ValueError, match=message):
        GenerationProblem(dict(val=([picture()], [example])), "accuracy", "mini")


def test_one_answer_as_text_is_one_answer_and_empty_ones_are_counted():
    task, messages = warned(lambda: a_task(train=["red", ["blue", "", " "]]))
    assert task.labels["train"] == [("red",), ("blue",)]
    assert messages == ["train: 2 empty answers are left out"]


def test_splits_without_examples_or_of_another_name_are_refused():
    with pytest.raises(ValueError, match="val: there are no examples"):
        GenerationProblem(dict(val=([picture()], [])), "accuracy", "mini")
    with pytest.raises(ValueError, match="unknown split 'valid'; did you mean 'val'"):
        GenerationProblem(dict(valid=([picture()], [Example(0, "a", "b")])), "accuracy", "mini")


@pytest.mark.parametrize(
    "line, message",
    [
        (row(answers=None), "'answers' should be texts, one or a list of them, got null"),
        (row(answers=3), "'answers' should be texts, one or a list of them, got 3"),
        (row(answers=["red", 3]), "'answers' should be texts"),
        (row(answers={"a": 1}), "'answers' should be texts"),
        (row(answers=[]), "'what is it \\?' has no answers"),
        (row(answers=""), "'what is it \\?' has no answers"),
        (row(prompt=7), "'prompt' should be a text, got 7"),
        (row(image=None), "'image' should be a text, got null"),
        (row(image=""), "image .* is missing"),
        (row(image="b.png"), "image .*b.png is missing"),
        (row(sort=["x"]), "'sort' should be a text"),
        ({"image": "a.png", "prompt": "p"}, "no 'answers'"),
        (["a.png"], "expected fields in braces"),
    ],
)
def test_wrong_lines_are_named_with_file_and_line(tmp_path, line, message):
    with pytest.raises(
        (ValueError, FileNotFoundError), match=f"val.jsonl, line 2: {message}"
    ) as refused:
        folder_task(tmp_path, dict(val=[row(), line]))
    assert "\n" not in str(refused.value)


def test_files_of_other_encodings_and_with_line_separators_in_texts(tmp_path):
    folder_task(tmp_path)
    text = json.dumps(row(answers=["red\u2028blue"]), ensure_ascii=False)
    (tmp_path / "val.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_task("jsonl", "mini", root=tmp_path).labels["val"] == [("red\u2028blue",)]
    (tmp_path / "val.jsonl").write_bytes(
        json.dumps(row(prompt="é"), ensure_ascii=False).encode("latin-1")
    )
    with pytest.raises(ValueError, match=r"val.jsonl, line 1: not UTF-8 \(byte"):
        load_task("jsonl", "mini", root=tmp_path)
    (tmp_path / "val.jsonl").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="val.jsonl, line 1: nested too deeply"):
        load_task("jsonl", "mini", root=tmp_path)
    (tmp_path / "val.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="val.jsonl: no examples"):
        load_task("jsonl", "mini", root=tmp_path)
    (tmp_path / "val.jsonl").unlink()
    with pytest.raises(ValueError, match="of a single image none can be held out as val"):
        load_task("jsonl", "mini", root=tmp_path)
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(ValueError, match="has no examples for test"):
        load_task("jsonl", "mini", root=tmp_path)


@pytest.mark.parametrize(
    "questions, people, message",
    [
        (dict(question=None), {}, "entry 1 of questions: 'question' should be a text, got null"),
        (dict(image_id="x"), {}, "entry 1 of questions: 'image_id': input should be a number"),
        (dict(question_id=[1]), {}, "entry 1 of questions: 'question_id'"),
        ({}, dict(answers=None), "entry 1 of annotations: 'answers' should be a list, got null"),
        ({}, dict(answers=["red"]), 'expected fields in braces, not "red"'),
        (
            {},
            dict(answers=[dict(answer=2)]),
            "entry 1 of annotations, answers: 'answer' should be a text",
        ),
    ],
)
def test_wrong_fields_of_vqa_files_are_named(tmp_path, questions, people, message):
    asked = dict(question_id=1, image_id=9, question="what?") | questions
    answered = dict(question_id=1, answers=[dict(answer="red")]) | people
    (tmp_path / "train2014").mkdir()
    picture().save(tmp_path / "train2014/COCO_train2014_000000000009.jpg")
    q, a = tmp_path / "q.json", tmp_path / "a.json"
    q.write_text(json.dumps(dict(data_subtype="train2014", questions=[asked])))
    a.write_text(json.dumps(dict(annotations=[answered])))
    with pytest.raises(ValueError, match=message):
        read_vqa(q, a, tmp_path)


def test_labels_and_splits_of_other_readers_are_checked(tmp_path):
    picture().save(tmp_path / "1.jpg")
    path = tmp_path / "x.jsonl"
    for label, message in (
        (["entailment"], "'gold_label' should be a text"),
        ("-", "label '-' is none of"),
    ):
        path.write_text(json.dumps(dict(gold_label=label, Flickr30K_ID="1", sentence2="a dog")))
        with pytest.raises(ValueError, match=f"x.jsonl, line 1: {message}"):
            read_snli_ve(path, tmp_path)
    image = dict(filepath=".", filename="1.jpg", split="trian", sentences=[dict(raw="a dog")])
    path.write_text(json.dumps(dict(images=[image])))
    with pytest.raises(
        ValueError, match="entry 1 of images: split 'trian' is none of train, restval"
    ):
        read_karpathy(path, tmp_path)


def test_tasks_of_real_images_need_a_named_backbone(tmp_path):
    for name in ("vqav2", "jsonl"):
        with pytest.raises(ValueError, match=f"task {name}: name the backbone .*'CoCa-B-32'"):
            load_task(name, root=tmp_path)
    assert load_task("mini-vqa", train=4).backbone.name == "mini"


def test_mini_tasks_refuse_arguments_that_they_cannot_use(tmp_path):
    with pytest.raises(ValueError, match="takes no root"):
        load_task("mini-vqa", root=tmp_path)
    with pytest.raises(
        ValueError, match="train: input should be greater than or equal to 1, got 0"
    ):
        load_task("mini-vqa", train=0)
    with pytest.raises(ValueError, match="unknown metric 'vqaa'"):
        load_task("mini-vqa", metric="vqaa")
    with pytest.raises(ValueError, match="fewer than four answers"):
        load_task("mini-entailment", metric="vqa")


def test_another_metric_and_other_candidates_are_part_of_the_provenance(tmp_path):
    plain = folder_task(tmp_path).provenance
    assert "metric" not in plain
    assert "candidates" not in plain
    one, two = (
        folder_task(tmp_path, candidates=words).provenance["candidates"]
        for words in (["red", "blue"], ["red", "green"])
    )
    assert one != two
    assert folder_task(tmp_path, metric="captions").provenance["metric"] == "cider"
    own = load_task("mini-entailment").provenance
    assert not {"metric", "candidates"} & own.keys()
