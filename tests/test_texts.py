"Texts, class names, descriptions, backbones and devices: converted, or refused in one line."

import json
import os
import pickle
import types
import warnings
from dataclasses import replace

import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from golden_clip import golden_clip, golden_problem, load_golden
from PIL import Image

from vlmadapt.data import hub_cache
from vlmadapt.data.datasets import load_dataset
from vlmadapt.data.hub_cache import from_hub
from vlmadapt.data.prompts import check_class_names, class_prompts, fill, read_descriptions
from vlmadapt.grid import memory
from vlmadapt.methods import METHODS
from vlmadapt.mini import models as mini_models
from vlmadapt.models import backbones, pretrained
from vlmadapt.models.backbones import Backbone, backbone_spec, load_backbone
from vlmadapt.models.devices import check_device, default_precision
from vlmadapt.models.open_clip_import import import_open_clip
from vlmadapt.models.tokens import TextTooLong, token_counts, tokenize
from vlmadapt.problems.batches import Batch
from vlmadapt.problems.classification import FewShotProblem
from vlmadapt.problems.few_shot import few_shot

LONG = (
    "in this picture , which was taken with a very old camera on a rainy day by a friend of my "
    "aunt , one can clearly and without any doubt see a {}."
)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("mini-digits")


@pytest.fixture(scope="module")
def mini():
    return load_backbone("mini", device="cpu")


def problem_of(dataset, **settings):
    return few_shot(dataset, load_backbone("mini", device="cpu"), shots=1, views=1, **settings)


def warnings_of(function):
    "What `function` returns, and the messages of its warnings."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    return result, [str(w.message) for w in caught if "vlmadapt" in w.filename]


# Length of texts


def words(n):
    return " ".join(["word"] * n)


@pytest.fixture(scope="module")
def hugging_face_folder(tmp_path_factory):
    "A tokenizer of one word, [CLS] before and [SEP] behind the text."
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "word"]
    vocabulary = {token: i for i, token in enumerate(special)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    names |= {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    folder = tmp_path_factory.mktemp("tokenizer")
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)
    return str(folder)


def open_clip_tokenizer(_):
    return import_open_clip().tokenizer.SimpleTokenizer(context_length=8)


def mini_tokenizer(_):
    return mini_models.tokenizer("mini")


def hugging_face_tokenizer(folder):
    return import_open_clip().tokenizer.HFTokenizer(folder, context_length=8)


def clips_tokenizer(folder):
    functions = import_open_clip().tokenizer
    return functions.HFTokenizer(folder, context_length=8, tokenizer_mode="clips")


@pytest.mark.parametrize(
    "make, most, added",
    [
        (open_clip_tokenizer, 8, 2),
        (mini_tokenizer, 32, 2),
        (hugging_face_tokenizer, 8, 2),
        (clips_tokenizer, 8, 3),
    ],
)
def test_text_that_fits_and_text_that_does_not(make, most, added, hugging_face_folder):
    tokenizer = make(hugging_face_folder)
    fits, long = words(most - added), words(most - added + 1)
    assert token_counts(tokenizer, [fits, long, "word"]) == [most, most + 1, 1 + added]
    assert torch.equal(tokenize(tokenizer, [fits, "word"]), tokenizer([fits, "word"]))
    refused(lambda: tokenize(tokenizer, [fits, long]), f"{most + 1} tokens", f"reads {most}")
    cut, caught = warnings_of(lambda: tokenize(tokenizer, [long, "word"], truncate=True))
    assert torch.equal(cut, tokenizer([long, "word"])) and len(caught) == 1


def test_cut_texts_are_reported_once():
    tokenizer = open_clip_tokenizer(None)
    texts = ["a b c d e f", "b c d e f g h", "c d e f g h i j", "d"]
    cut, caught = warnings_of(lambda: tokenize(tokenizer, texts, truncate=True))
    assert torch.equal(cut, tokenizer(texts))
    assert (
        len(caught) == 1 and "2 of 4 texts are cut" in caught[0] and "'b c d e f g h'" in caught[0]
    )


@pytest.mark.parametrize("texts", ["a photo", {"a": 1}, {"a"}, [3], [None], [b"a"], 3, None, []])
def test_what_is_no_list_of_texts(mini, texts):
    refused(lambda: mini.encode_text(texts), "text")


def test_encoding_is_the_model_s_own(mini):
    texts = ["a photo of a star.", "a red circle"]
    with torch.no_grad():
        expected = mini.model.encode_text(mini.tokenizer(texts), normalize=False)
    assert torch.equal(mini.encode_text(iter(texts)), expected)
    assert torch.equal(mini.encode_text(np.array(texts)), expected)


def test_long_template(digits):
    problem = problem_of(replace(digits, templates=[LONG]))
    expected = (
        "class prompt 'in this picture",
        "see a zero.'",
        "reads 32",
        "(9 more are too long)",
    )
    refused(lambda: problem.features.text, *expected, error=TextTooLong)


def test_long_template_that_is_cut_to_one_prompt(digits):
    problem = problem_of(replace(digits, templates=[LONG]), truncate=True)
    with pytest.warns(UserWarning, match="10 of 10 class prompts are cut"):
        refused(lambda: problem.features.text, "all 10 class prompts are the same")


def test_long_description(digits, tmp_path):
    path = tmp_path / "long.json"
    tail = " , and then there is more to say than fits into the text tower of a model"
    path.write_text(json.dumps({name: [f"a {name}{tail * 2}"] for name in digits.class_names}))
    refused(lambda: problem_of(digits, prompts=path).features.text, "class prompt 'a zero")
    problem = problem_of(digits, prompts=path, truncate=True)
    text, caught = warnings_of(lambda: problem.features.text)
    assert text.isfinite().all() and problem.provenance["truncate"] is True
    assert len(caught) == 1 and "10 of 20 class prompts are cut" in caught[0]
    again = problem_of(digits, prompts=path)  # what was cut lies in the cache and is still refused
    refused(lambda: again.features.text, "class prompt 'a zero")


@pytest.fixture(scope="module")
def long_names(digits):
    head = "a sample of the hand written kind that the office collected in the long winter of 1989"
    names = [f"{head} and scanned later on , namely {name}" for name in digits.class_names]
    return replace(digits, class_names=names)


@pytest.mark.parametrize(
    "method, settings",
    [("ZeroShot", {}), ("VPT", {}), ("PAdapter", {"towers": ("vision", "text")})],
)
def test_long_class_names(long_names, method, settings):
    problem = problem_of(long_names)

    def text():
        found = METHODS[method](problem, **settings)
        return found.text(problem.class_names)

    refused(text, "class prompt", "reads 32", error=TextTooLong)


@pytest.mark.parametrize("method", ["CoOp", "CoCoOp", "MuDPT"])
def test_long_context(digits, method):
    names = digits.class_names
    tokens = max(token_counts(mini_models.tokenizer("mini"), [f"{name}." for name in names]))
    problem = problem_of(digits)
    found = METHODS[method](problem, n_ctx=32 - tokens)
    assert found.plan(names).ids.shape[-1] == 32
    found = METHODS[method](problem, n_ctx=33 - tokens)
    both = ("has 33 tokens", "reads 32", f"{33 - tokens} of them are context: lower n_ctx")
    refused(lambda: found.plan(names), *both, error=TextTooLong)


def test_long_initial_context(digits):
    refused(lambda: METHODS["CoOp"](problem_of(digits), words=words(40)), "initial context", "42")
    refused(lambda: METHODS["CoOp"](problem_of(digits), words=3), "CoOp words", "valid string")


# Templates and class names


@pytest.mark.parametrize(
    "template, prompt",
    [
        ("a photo of a {}.", "a photo of a tabby cat."),
        ("{}", "tabby cat"),
        ("100 % {} {{x}}", "100 % tabby cat {x}"),
        ("%s {}, 50%", "%s tabby cat, 50%"),
        ("{{{}}}", "{tabby cat}"),
    ],
)
def test_template(template, prompt):
    assert fill(["tabby_cat"], [template]) == [[prompt]]
    assert fill(["tabby_cat"], template) == [[prompt]]


@pytest.mark.parametrize(
    "template", ["a photo", "", "{c}", "{0}", "{}, {}", "{} {c}", "{:s}", "{!r}", "{{}}", "{0.a}"]
)
def test_wrong_template(template):
    refused(lambda: fill(["cat"], [template]), repr(template), "exactly one {} is needed")


@pytest.mark.parametrize("template", ["a { of {}", "a } of {}"])
def test_lone_brace(template):
    refused(lambda: fill(["cat"], [template]), "write {{ and }} for braces")


@pytest.mark.parametrize("templates", [[], None, 3, [None], [["a {}"]]])
def test_wrong_templates(digits, templates):
    refused(lambda: class_prompts(replace(digits, templates=templates)), "template")


def test_braces_in_a_class_name():
    assert fill(["{x} 100%"], ["a {}."]) == [["a {x} 100%."]]


@pytest.mark.parametrize(
    "names",
    [
        ["cat", "dog"],
        ("cat", "dog"),
        (name for name in ["cat", "dog"]),
        pd.Series(["cat", "dog"], index=[7, 3]),
        np.array(["cat", "dog"]),
        {"cat": 0, "dog": 1}.keys(),
    ],
)
def test_class_names(names):
    found = check_class_names(names)
    assert found == ["cat", "dog"] and all(type(name) is str for name in found)


@pytest.mark.parametrize(
    "names, part",
    [
        ("cat", "a list of class names is needed, got str 'cat'"),
        ({"cat": 0}, "a list of class names is needed, got dict"),
        ({"cat"}, "a list of class names is needed, got set"),
        (None, "a list of class names is needed, got None"),
        ([0, 1], "class name 0 must be a string, got 0; write [str(name)"),
        (["cat", None], "class name 1 must be a string, got None"),
        (["cat", float("nan")], "class name 1 must be a string, got nan"),
        (["cat", ""], "class name 1 is blank"),
        (["cat", " _ "], "class name 1 is blank"),
        ([], "there are no class names"),
    ],
)
def test_wrong_class_names(names, part):
    refused(lambda: check_class_names(names), part)
    text = torch.eye(2)
    refused(lambda: FewShotProblem.from_features(names, text, (text, [0, 1])), part)


def test_repeated_class_names(digits):
    names = [*digits.class_names[:9], digits.class_names[0]]
    prompts = class_prompts(replace(digits, class_names=names))
    assert prompts[0] == prompts[9] != prompts[1]
    same = replace(digits, class_names=["crane"] * 10)
    refused(lambda: class_prompts(same), "all 10 classes have the same prompt")


# Descriptions


@pytest.fixture
def pets(digits):
    return replace(digits, class_names=["St. Bernard", "tabby_cat"], templates=["a {}."])


def described(dataset, tmp_path, content, prompts="d.json"):
    path = tmp_path / prompts
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return class_prompts(dataset, str(path))


@pytest.mark.parametrize(
    "content",
    [
        {"St. Bernard": ["large"], "tabby_cat": ["small"]},
        {"st_bernard": ["large"], "Tabby Cat": ["small"]},
        {"St. Bernard": "large", "tabby cat": "small"},
        {"ST-BERNARD": {"0": "large"}, "tabby-cat": {"size": "small"}},
        b'\xef\xbb\xbf{"tabby cat": ["small"], "St Bernard": ["large"]}',
    ],
)
def test_forms_of_descriptions(pets, tmp_path, content):
    expected = [["a St. Bernard.", "large"], ["a tabby cat.", "small"]]
    assert described(pets, tmp_path, content) == expected


@pytest.mark.parametrize(
    "change, part",
    [
        ({"tabby_cat": []}, "class 'tabby_cat': its list of descriptions is empty"),
        ({"tabby_cat": {}}, "class 'tabby_cat': its list of descriptions is empty"),
        ({"tabby_cat": [None]}, "class 'tabby_cat': description 0 must be a text, got None"),
        ({"tabby_cat": ["small", 3]}, "class 'tabby_cat': description 1 must be a text, got 3"),
        ({"tabby_cat": [" "]}, "class 'tabby_cat': description 0 must be a text, got ' '"),
        ({"tabby_cat": ""}, "class 'tabby_cat': description 0 must be a text"),
        ({"tabby_cat": [["small"]]}, "class 'tabby_cat': description 0 must be a text"),
        ({"tabby_cat": None}, "class 'tabby_cat': a list of texts is needed, got None"),
        ({"tabby_cat": 3}, "class 'tabby_cat': a list of texts is needed, got 3"),
    ],
)
def test_wrong_description(pets, tmp_path, change, part):
    content = {"St. Bernard": ["large"], **change}
    refused(lambda: described(pets, tmp_path, content), "d.json", part)


@pytest.mark.parametrize(
    "content, part",
    [
        ({"St. Bernhard": ["x"], "tabby cat": ["x"]}, "is it 'St. Bernhard'?"),
        ({}, "no description of class 'St. Bernard' and 1 more"),
        ([["large"], ["small"]], 'holds a list; the form is {"class name": ["text", ...]'),
        (b"null", "holds a NoneType"),
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (b"{'a': 1}", "at line 1, column 2"),
        (b'{"a": ["x"],\n', "at line 2, column 1"),
        ('{"a":\n"caf\xe9"}'.encode("latin-1"), "line 2: not UTF-8 (byte 10)"),
        ('{"a": "x"}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": "x", "a": "y"}', "the name 'a' occurs twice"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_wrong_file_of_descriptions(pets, tmp_path, content, part):
    refused(lambda: described(pets, tmp_path, content), "d.json", part)


def test_ambiguous_descriptions(pets, tmp_path):
    two = {"st bernard": ["x"], "ST. BERNARD": ["y"], "tabby_cat": ["z"]}
    refused(lambda: described(pets, tmp_path, two), "both match class 'St. Bernard'")
    with pytest.warns(UserWarning, match="2 described names are no class"):
        exact = described(pets, tmp_path, two | {"St. Bernard": ["w"]})
    assert exact[0] == ["a St. Bernard.", "w"]
    languages = replace(pets, class_names=["C++", "C#"])
    assert described(languages, tmp_path, {"C#": "sharp", "C++": "plus"})[0] == ["a C++.", "plus"]
    refused(lambda: described(languages, tmp_path, {"c": "x"}), "class 'C++' and class 'C#'")


def test_additional_descriptions(pets, tmp_path):
    content = {"St. Bernard": ["x"], "tabby_cat": ["y"], "unicorn": ["z"], "gnu": ["z"]}
    _, caught = warnings_of(lambda: described(pets, tmp_path, content))
    assert (
        len(caught) == 1
        and "2 described names are no class" in caught[0]
        and "'unicorn'" in caught[0]
    )


def test_descriptions_of_all_classes_for_one_half(digits, tmp_path):
    path = tmp_path / "all.json"
    path.write_text(json.dumps({name: [f"{name}!"] for name in digits.class_names}))
    for part in ("base", "new"):
        problem, caught = warnings_of(lambda part=part: problem_of(digits, prompts=path, part=part))
        assert not caught and problem.K == 5


def test_content_of_descriptions_is_part_of_the_provenance(digits, tmp_path):
    keys = []
    for text in ("one", "two"):
        path = tmp_path / "same.json"
        path.write_text(json.dumps({name: [text] for name in digits.class_names}))
        keys.append(problem_of(digits, prompts=str(path)).provenance["prompt_set"])
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    "prompts, part",
    [
        ("Template", "did you mean 'template'?"),
        ("description", "did you mean 'descriptions'?"),
        ("descriptions.txt", "did you mean 'descriptions'?"),
        ("", "there are template, ensemble"),
        (None, "got None; your own texts are given as template="),
        (["a {}"], "got ['a {}']"),
        (3, "got 3"),
        (True, "got True"),
        ("gone.json", "no such file of descriptions: gone.json"),
        ("x" * 300 + ".json", "cannot be read"),
        ("a\0.json", "cannot be read"),
    ],
)
def test_wrong_prompts(digits, prompts, part):
    refused(lambda: class_prompts(digits, prompts), part)


def test_folder_as_file_of_descriptions(tmp_path):
    folder = tmp_path / "folder.json"
    folder.mkdir()
    refused(lambda: read_descriptions(folder), "folder.json: a folder, not a file")


# Backbones by name and path


@pytest.fixture(scope="module")
def tiny_architectures(tmp_path_factory):
    "Two small architectures that open_clip knows: with GELU and with QuickGELU."
    folder = tmp_path_factory.mktemp("configs")
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    for name, quick in (("tiny-texts", False), ("tiny-texts-quickgelu", True)):
        (folder / f"{name}.json").write_text(json.dumps(config | {"quick_gelu": quick}))
    import_open_clip().add_model_config(folder)
    return config


@pytest.fixture(scope="module")
def own_weights(tiny_architectures, tmp_path_factory):
    "A model with its own weights, and files that hold them."
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(5)
    model = import_open_clip().create_model("tiny-texts-quickgelu", load_weights=False).eval()
    state = model.state_dict()
    torch.save(state, folder / "plain.pt")
    trained = {f"module.{name}": x for name, x in state.items()}
    torch.save({"epoch": 3, "state_dict": trained}, folder / "checkpoint.pt")
    save_file({name: x.contiguous() for name, x in state.items()}, folder / "w.safetensors")
    local = folder / "local"
    local.mkdir()
    config = {"model_cfg": tiny_architectures | {"quick_gelu": True}, "preprocess_cfg": {}}
    (local / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "w.safetensors").rename(local / "open_clip_model.safetensors")
    return model, folder


@pytest.mark.parametrize(
    "name",
    [
        "tiny-texts-quickgelu:{}/plain.pt",
        "tiny-texts-quickgelu:{}/checkpoint.pt",
        "tiny-texts-quickgelu:{}/local/open_clip_model.safetensors",
        "local-dir:{}/local",
    ],
)
def test_own_weights(own_weights, name):
    model, folder = own_weights
    own = Backbone("own", model, "tiny-texts-quickgelu", "cpu", "fp32")
    loaded = load_backbone(name.format(folder), device="cpu")
    assert loaded.key == own.key
    assert torch.equal(loaded.encode_text(["a cat"]), own.encode_text(["a cat"]))
    assert set(pretrained.quick_gelu_blocks(loaded.model)) == {True}


def test_home_folder_in_a_path(own_weights, monkeypatch):
    monkeypatch.setenv("HOME", str(own_weights[1]))
    assert load_backbone("tiny-texts-quickgelu:~/plain.pt", device="cpu").feature_width == 16
    assert load_backbone("local-dir:~/local", device="cpu").feature_width == 16


def test_file_that_changes_under_its_name(own_weights, tmp_path):
    model, _ = own_weights
    path = tmp_path / "mine.pt"
    keys = []
    for factor in (1, 2):
        torch.save({name: x * factor for name, x in model.state_dict().items()}, path)
        os.utime(path, ns=(factor, factor))
        keys.append(load_backbone(f"tiny-texts:{path}", device="cpu").key)
    assert keys[0] != keys[1]


class Touch:
    "Runs a command when it is unpickled."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_pickled_code_is_not_run(tiny_architectures, tmp_path):
    torch.save({"state_dict": Touch(tmp_path / "ran")}, tmp_path / "bad.pt")
    refused(lambda: load_backbone(f"tiny-texts:{tmp_path}/bad.pt"), "bad.pt", "more than tensors")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    refused(lambda: load_backbone(f"tiny-texts:{tmp_path}/plain.pt"), "plain.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name, content",
    [("none.pt", None), ("cut.pt", b"PK"), ("cut.safetensors", b"xx"), ("empty.bin", b"")],
)
def test_wrong_weight_file(tiny_architectures, tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(lambda: load_backbone(f"tiny-texts:{tmp_path}/{name}"), name)


def test_weights_of_another_architecture(tiny_architectures, tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    refused(lambda: load_backbone(f"tiny-texts:{tmp_path}/other.pt"), "other.pt", "Missing key")


def test_local_folder_without_weights(own_weights, tmp_path):
    refused(lambda: load_backbone(f"local-dir:{tmp_path}"), "there is no", "open_clip_config.json")
    config = (own_weights[1] / "local" / "open_clip_config.json").read_text()
    (tmp_path / "open_clip_config.json").write_text(config)
    refused(lambda: load_backbone(f"local-dir:{tmp_path}"), "could not be loaded")


def test_random_weights_are_the_same_every_time(tiny_architectures):
    keys = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        backbones._load.cache_clear()
        keys.append(load_backbone("tiny-texts:", device="cpu").key)
        assert torch.initial_seed() == seed
    assert keys[0] == keys[1]
    assert load_backbone("tiny-texts-quickgelu:", device="cpu").key != keys[0]


@pytest.mark.parametrize(
    "name, part",
    [
        ("ViT-B/32", "did you mean 'ViT-B-32'?"),
        ("vit-b-32", "did you mean 'ViT-B-32'?"),
        ("ViT-B-32 ", "did you mean 'ViT-B-32'?"),
        ("ViT-B-32:openai ", "did you mean 'openai'?"),
        ("ViT-B-32:laion2b", "did you mean 'laion2b_e16'?"),
        ("ViT-B-61:openai", "did you mean 'ViT-B-16"),
        ("mini:", "write 'mini'"),
        ("hf-hub:", "names no model"),
        ("local-dir:", "names no model"),
        ("", "there are RN50"),
        (None, "got None"),
        (3, "got 3"),
    ],
)
def test_wrong_backbone_name(name, part):
    refused(lambda: load_backbone(name), part)


def test_logit_bias(tiny_architectures, mini):
    assert mini.logit_bias == 0.0
    open_clip = import_open_clip()
    model = open_clip.create_model("tiny-texts", load_weights=False, init_logit_bias=-10.0)
    assert Backbone("biased", model, "tiny-texts", "cpu", "fp32").logit_bias == -10.0


# Files of the Hugging Face Hub


@pytest.mark.parametrize("name", ["ViT-B-32", "hf-hub:no-such-owner/no-such-model"])
@pytest.mark.parametrize(
    "offline, part", [(True, "HF_HUB_OFFLINE is set"), (False, "cannot be reached")]
)
def test_no_network(monkeypatch, tmp_path, name, offline, part):
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    refused(lambda: load_backbone(name), name, "not in the local cache", part)
    assert constants.HF_HUB_OFFLINE is offline


def test_cache_before_network(monkeypatch):
    monkeypatch.setattr(hub_cache, "hub_problem", lambda path: pytest.fail("asked the network"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert from_hub(huggingface_hub.is_offline_mode, "state") is True


def test_network_where_the_cache_has_nothing(monkeypatch):
    monkeypatch.setattr(hub_cache, "hub_problem", lambda path: "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    missing = huggingface_hub.errors.LocalEntryNotFoundError

    def build():
        if huggingface_hub.is_offline_mode():
            raise RuntimeError("wrapped") from missing("not in the cache")
        return "downloaded"

    assert from_hub(build, "weights") == "downloaded"


# Devices and memory


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu"), torch.device("cpu", 0)])
def test_spellings_of_the_cpu(mini, device):
    loaded = load_backbone("mini", device=device)
    assert loaded is load_backbone("mini", device="cpu")
    assert not loaded.channels_last and loaded.precision == "fp32"
    own = Backbone("mini", mini.model, "ViT-B-32", device, "fp32")
    assert own.device == "cpu" and own.key == mini.key
    assert own.find_batch_size() == mini.find_batch_size()


@pytest.mark.parametrize("device", ["gpu", "tpu", "mps", "cuda:99", "", "meta", 99, [1]])
def test_device_that_is_not_there(device):
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has it")
    refused(lambda: check_device(device), f"no device {str(device)!r} here; there is cpu")
    refused(lambda: load_backbone("mini", device=device), "there is cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has it")
def test_cuda_that_is_not_there():
    refused(lambda: load_backbone("mini", device="cuda"), "no device 'cuda' here; there is cpu")


def test_precision_of_devices():
    assert [default_precision(device) for device in ("cpu:0", "mps", "mps:0")] == ["fp32"] * 3


def test_apple_device_takes_no_cuda_settings(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    made = {}
    monkeypatch.setattr(backbones, "_load", lambda *arguments: made.update(arguments=arguments))
    load_backbone("mini", device=torch.device("mps"))
    assert made["arguments"] == (backbone_spec("mini"), "mini", "mps", "fp32", False, False, None)


@pytest.mark.parametrize("precision, most", [("fp16", 0.01), ("bf16", 0.08)])
def test_half_precision_on_a_cpu(mini, precision, most):
    half = load_backbone("mini", device="cpu", precision=precision)
    noise = np.random.default_rng(0).integers(0, 255, (3, 40, 40, 3), dtype=np.uint8)
    images = [Image.fromarray(x) for x in noise]
    texts = ["a photo of a star.", "a red circle"]
    for found, expected in (
        (half.encode_images(images), mini.encode_images(images)),
        (half.encode_text(texts), mini.encode_text(texts)),
    ):
        gap = (F.normalize(found, dim=-1) - F.normalize(expected, dim=-1)).norm(dim=-1)
        assert found.dtype == torch.float32 and gap.max() < most


class NoProc(type(memory.Path())):
    "A path that finds no /proc, as on macOS."

    def read_text(self, *arguments, **settings):
        if str(self).startswith("/proc"):
            raise FileNotFoundError(self)
        return super().read_text(*arguments, **settings)


@pytest.mark.parametrize("unit", [1, 1024])
def test_peak_memory_in_bytes_and_in_kilobytes(monkeypatch, unit):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    truth = 2 * memory.psutil.Process().memory_info().rss
    usage = types.SimpleNamespace(ru_maxrss=truth // unit)
    fake = types.SimpleNamespace(getrusage=lambda who: usage, RUSAGE_SELF=0)
    monkeypatch.setattr(memory, "Path", NoProc)
    monkeypatch.setattr(memory, "resource", fake)
    assert memory.peak()["peak_memory_mb"] == pytest.approx(truth / 2**20, rel=1e-3)


def test_prompt_methods_without_page_counts(monkeypatch, digits):
    real = os.sysconf

    def sysconf(name):
        if name == "SC_AVPHYS_PAGES":
            raise ValueError("unrecognized configuration name")
        return real(name)

    monkeypatch.setattr(os, "sysconf", sysconf)
    problem = problem_of(digits)
    for name in ("CoOp", "VPT"):
        assert METHODS[name](problem).budget > 0


# CoOp's token order, against the official program


@pytest.fixture(scope="module")
def tiny_clip():
    return golden_clip()


@pytest.mark.parametrize("names", ["classnames", "safe_classnames"])
@pytest.mark.parametrize("kind", ["generic", "class"])
@pytest.mark.parametrize("place", ["end", "middle", "front"])
def test_coop_equals_the_official_program(tiny_clip, place, kind, names):
    golden, metadata = load_golden("coop")
    clip, _ = load_golden("clip_tiny")
    problem = golden_problem(metadata[names], tiny_clip)
    specific = kind == "class"
    method = METHODS["CoOp"](problem, n_ctx=4, place=place, class_specific=specific).double()
    method.context = torch.nn.Parameter(golden[f"ctx_{kind}"])
    logits = method.logits(Batch(clip["image_features"]))
    loss = F.cross_entropy(logits, clip["labels"])
    (gradient,) = torch.autograd.grad(loss, method.context)
    key = f"{place}_{kind}" + ("_safe" if names == "safe_classnames" else "")
    assert (logits - golden[f"logits_{key}"]).abs().max() < 1e-9
    assert (loss - golden[f"loss_{key}"]).abs() < 1e-9
    assert (gradient - golden[f"grad_{key}"]).abs().max() < 1e-9


def test_coop_from_words_equals_the_official_program(tiny_clip):
    golden, metadata = load_golden("coop")
    clip, _ = load_golden("clip_tiny")
    problem = golden_problem(metadata["classnames"], tiny_clip)
    method = METHODS["CoOp"](problem, n_ctx=4, words="a photo of a").double()
    assert torch.equal(method.context, golden["ctx_words"])
    logits = method.logits(Batch(clip["image_features"]))
    assert (logits - golden["logits_words"]).abs().max() < 1e-9
