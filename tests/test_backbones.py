"Backbones by name, registration, checkpoint files, SigLIP, and files of a Hub that fails."

import http.server
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from collections import OrderedDict

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image
from safetensors.torch import load_file, save_file

import vlmadapt as va
from vlmadapt.cli import main
from vlmadapt.core.registry import UnknownName
from vlmadapt.methods.cards import card_backbone, read_card
from vlmadapt.models import backbones, pretrained
from vlmadapt.models.backbones import (
    BACKBONES,
    Backbone,
    BackboneSpec,
    backbone_spec,
    list_backbones,
    load_backbone,
    register_backbone,
)
from vlmadapt.models.image_tower import ImageTower
from vlmadapt.models.open_clip_import import import_open_clip
from vlmadapt.models.pixels import Pixels
from vlmadapt.models.text_tower import TextTower
from vlmadapt.models.tokens import TextTooLong

open_clip = import_open_clip()

VISION = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1}
TINY = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}


@pytest.fixture(scope="module", autouse=True)
def tiny_architecture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder)


@pytest.fixture(scope="module")
def state():
    "Random weights of the tiny architecture."
    torch.manual_seed(3)
    return open_clip.create_model("tiny", load_weights=False).state_dict()


@pytest.fixture
def registry(monkeypatch):
    "A registry that forgets what a test registers."
    list_backbones()
    monkeypatch.setattr(BACKBONES, "_items", dict(BACKBONES._items))


# Names


def test_list_of_backbones():
    names = list_backbones()
    assert {"RN50", "ViT-B-16", "mini", "mini-rn", "blip-tiny", "Salesforce/blip*"} <= set(names)
    longer = list_backbones(pretrained=True)
    assert longer[: len(names)] == names and len(set(longer)) == len(longer)
    assert {"ViT-B-16:openai", "ViT-SO400M-14-SigLIP-384:webli"} <= set(longer) - set(names)


def test_every_listed_name_is_known(monkeypatch):
    "And none of them reads weights."
    monkeypatch.setattr(backbones, "_load", lambda *_: pytest.fail("weights were read"))
    for name in list_backbones(pretrained=True):
        assert backbone_spec(name.replace("*", "-vqa-base"))


@pytest.mark.parametrize(
    "name, model, tag",
    [
        ("ViT-L-14-336", "ViT-L-14-336", "openai"),
        ("ViT-B-16-SigLIP", "ViT-B-16-SigLIP", "webli"),
        ("coca_ViT-L-14:laion2b_s13b_b90k", "coca_ViT-L-14", "laion2b_s13b_b90k"),
        ("CoCa-B-32:mscoco_finetuned_laion2b_s13b_b90k", "coca_ViT-B-32", None),
        ("hf-hub:org/name", "hf-hub:org/name", ""),
    ],
)
def test_names_of_open_clip(name, model, tag):
    spec = backbone_spec(name)
    assert spec.model == model
    assert spec.pretrained == (name.partition(":")[2] if tag is None else tag)


@pytest.mark.parametrize(
    "name, part",
    [
        ("ViT-B-16-Siglip", "did you mean 'ViT-B-16-SigLIP'?"),
        ("vit-b-16:openai", "unknown open_clip model 'vit-b-16'; did you mean 'ViT-B-16'?"),
        ("ViT-B-16:OpenAI", "did you mean 'openai'?"),
        ("ViT-B-16:zzz", "list_backbones(pretrained=True) lists them"),
        ("qqq:openai", "list_backbones(pretrained=True) lists them"),
        ("blip-tinny", "did you mean 'blip-tiny'?"),
        ("blip-tiny:x", "blip-tiny has weights of its own"),
        ("some-owner/some-long-repository", "did you mean 'hf-hub:some-owner/some-long-repo"),
        ("weights/mine.pt", "write the architecture first, as 'ViT-B-32:weights/mine.pt'"),
        ("ViT-S-32", "give 'ViT-S-32:/path/weights.safetensors', or 'ViT-S-32:' for random"),
        ("ViT-g-14", "choose ViT-g-14:TAG with one of laion2b_s12b_b42k, laion2b_s34b_b88k"),
    ],
)
def test_unknown_names(name, part):
    refused(lambda: load_backbone(name), part)


# Registration


def own_loader(name, device, precision):
    backbone = load_backbone("mini", device=device, precision=precision)
    return Backbone(name, backbone.model, "ViT-B-32", device, precision)


def test_registered_loader(registry):
    register_backbone("own", own_loader)
    register_backbone("family/*", f"{__name__}:own_loader")
    assert {"own", "family/*"} <= set(list_backbones())
    own = load_backbone("own", device="cpu")
    assert own.name == "own" and own.key == load_backbone("mini", device="cpu").key
    assert load_backbone("own", device="cpu") is own
    assert load_backbone("family/a", device="cpu").name == "family/a"
    refused(lambda: load_backbone("famly/a", device="cpu"), "unknown backbone")
    refused(lambda: load_backbone("own", device="cpu", compiled=True), "neither channels_last nor")


def test_decorated_loader(registry):
    @register_backbone("decorated")
    def load(name, device, precision):
        return own_loader(name, device, precision)

    assert load_backbone("decorated", device="cpu").name == "decorated"
    refused(lambda: register_backbone("decorated", own_loader), "registered already")
    register_backbone("decorated", BackboneSpec("tiny"), replace=True)
    assert load_backbone("decorated", device="cpu").feature_width == 16  # not the stored one


def test_registered_architecture(registry):
    register_backbone("alias", BackboneSpec("tiny"))
    register_backbone("built", BackboneSpec("tiny", build=f"{__name__}:build_tiny"))
    alias, built = (load_backbone(name, device="cpu") for name in ("alias", "built"))
    assert alias.key == load_backbone("tiny:", device="cpu").key != built.key
    assert backbone_spec("alias:") == BackboneSpec("tiny")
    refused(lambda: load_backbone("built:openai"), "built has weights of its own")


def build_tiny(model):
    torch.manual_seed(8)
    return open_clip.create_model(model, load_weights=False)


def test_wrong_registration(registry):
    refused(lambda: register_backbone("wrong", 3), "a BackboneSpec or a function is needed, got 3")
    register_backbone("wrong", lambda name, device, precision: torch.nn.Linear(1, 1))
    refused(lambda: load_backbone("wrong"), "returned an object of Linear, not a Backbone")


def test_entry_point_of_a_loader(registry, monkeypatch):
    "As another package registers it."
    BACKBONES._items["from-entry-point"] = own_loader  # what the registry does with a function
    assert load_backbone("from-entry-point", device="cpu").name == "from-entry-point"


# Checkpoints


@pytest.mark.parametrize("file", ["w.safetensors", "w.pt", "w.bin", "w:x.pt", r"C:\own\w.pt"])
@pytest.mark.parametrize("place", ["absolute", "relative", "home"])
def test_places_of_a_checkpoint(state, tmp_path, monkeypatch, file, place):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    if file.endswith(".safetensors"):
        save_file({name: x.contiguous() for name, x in state.items()}, file)
    else:
        torch.save(state, "plain")
        os.rename("plain", file)  # torch.save takes no colon and backslash
    written = {"absolute": tmp_path / file, "relative": file, "home": f"~/{file}"}[place]
    loaded = load_backbone(f"tiny:{written}", device="cpu")
    assert torch.equal(loaded.model.state_dict()["visual.proj"], state["visual.proj"])
    torch.save({name: x + 1 for name, x in state.items()}, "other.pt")
    assert load_backbone("tiny:other.pt", device="cpu").key != loaded.key


def test_a_checkpoint_by_a_relative_path_is_found_from_other_folders(state, tmp_path, monkeypatch):
    "A stored method names it from the root; where it has moved, the message says what to pass."
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    torch.save(state, "w.pt")
    backbone = load_backbone("tiny:w.pt", device="cpu")
    problem = va.few_shot("mini-digits", backbone=backbone, shots=1, views=1)
    picture = problem.images("test").items[:2]
    method = va.adapt(problem, method="ZeroShot")
    method.save("m.safetensors")
    monkeypatch.chdir("other")
    assert read_card("../m.safetensors")["backbone"] == f"tiny:{tmp_path}/w.pt"
    assert va.load_method("../m.safetensors").predict(picture) == method.predict(picture)
    (tmp_path / "w.pt").rename("moved.pt")
    lost = va.load_method("../m.safetensors")
    with pytest.raises(ValueError) as caught:
        lost.predict(picture)
    assert f"its backbone 'tiny:{tmp_path}/w.pt' cannot be loaded" in str(caught.value)
    assert "backbone='tiny:/path/w.pt', on the command line --backbone" in str(caught.value)
    found = va.load_method("../m.safetensors", backbone="tiny:moved.pt")
    assert found.predict(picture) == method.predict(picture)
    card = {**read_card("../m.safetensors"), "backbone": "tiny:w.pt"}  # as version 0.1 wrote it
    with pytest.raises(ValueError, match=f"looked for in {tmp_path}/other"):
        card_backbone(card, "m.safetensors")
    Image.fromarray(np.asarray(picture[0])).save("photo.png")
    line = ["predict", "../m.safetensors", "photo.png", "--backbone"]
    assert main([*line, "tiny:moved.pt"]) == 0
    assert main([*line, "tiny:gone.pt"]) == 2


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Distraction:
    "Built so that the reader of tensors alone stops with a TypeError, and pickle goes on."

    def __reduce__(self):
        return OrderedDict, (), (None, {})


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch, suffix):
    "Even where the environment lets torch.load run code."
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for i, first in enumerate(([], [Distraction()])):
        path = tmp_path / f"{i}{suffix}"
        torch.save({"state_dict": [*first, Touch(tmp_path / f"ran{i}")]}, path, pickle_protocol=2)
        message = refused(lambda p=path: load_backbone(f"tiny:{p}"), path.name)
        assert re.search("more than tensors|no state dict", message)
        assert not (tmp_path / f"ran{i}").exists()
        assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    with pytest.raises(AttributeError), pytest.warns(UserWarning, match="forcing weights_only"):
        open_clip.factory.load_state_dict(str(path))  # control: by itself, open_clip runs it
    assert (tmp_path / "ran1").exists()


def test_kinds_of_wrong_files(state, tmp_path):
    scripted = torch.jit.script(torch.nn.Linear(2, 2))
    torch.jit.save(scripted, str(tmp_path / "script.pt"))
    refused(lambda: load_backbone(f"tiny:{tmp_path}/script.pt"), "a TorchScript archive")
    (tmp_path / "cut.safetensors").write_bytes(b"<html>")
    cut = f"tiny:{tmp_path}/cut.safetensors"
    refused(lambda: load_backbone(cut), "cut.safetensors is damaged", "save model.state_dict()")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps([1, 2], protocol=2))
    refused(lambda: load_backbone(f"tiny:{tmp_path}/plain.pt"), "plain.pt")
    torch.save({}, tmp_path / "empty.pt")
    refused(lambda: load_backbone(f"tiny:{tmp_path}/empty.pt"), "empty.pt is no state dict")
    folder = tmp_path / "folder"
    folder.mkdir()
    refused(lambda: load_backbone(f"tiny:{folder}"), "a folder, not a weight file")
    (folder / "open_clip_config.json").write_text("{}")
    refused(lambda: load_backbone(f"tiny:{folder}"), f"write 'local-dir:{folder}'")


def test_checkpoint_of_another_architecture(state, tmp_path):
    path = tmp_path / "other.pt"
    other = {name: x for name, x in state.items() if "ln_final" not in name}
    other |= {"extra": torch.zeros(1), "visual.proj": torch.zeros(64, 8)}
    torch.save(other, path)
    refused(
        lambda: load_backbone(f"tiny:{path}"),
        f"{path} is other weights than the architecture has",
        "Missing keys: ln_final.weight, ln_final.bias",
        "Unexpected keys: extra",
        "Other shapes: visual.proj [64, 8] instead of [64, 16]",
    )
    torch.save({"a": torch.zeros(1)}, path)
    told = refused(lambda: load_backbone(f"tiny:{path}"), f"... ({len(state)})")
    assert "Unexpected keys: a" in told and "begins with" not in told
    torch.save({f"student.clip.{name}": x for name, x in state.items()}, path)
    hint = "every key begins with 'student.clip.': save the state dict without this prefix"
    refused(lambda: load_backbone(f"tiny:{path}"), hint)


# SigLIP


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    "A small model of SigLIP's classes with random weights, in a folder with its tokenizer."
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("siglip")
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "cat", "dog", "a"])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    special = {"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special)
    fast.save_pretrained(folder)
    published = open_clip.get_model_config("ViT-B-16-SigLIP")
    published["vision_cfg"] |= dict(timm_model_name="test_vit", image_size=160)
    published["text_cfg"] |= dict(width=64, heads=2, layers=2, vocab_size=8, context_length=6)
    published["text_cfg"]["hf_tokenizer_name"] = str(folder)
    config = {"model_cfg": published | {"embed_dim": 64}}
    config["preprocess_cfg"] = dict(mean=[0.5] * 3, std=[0.5] * 3, resize_mode="squash")
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    configs = tmp_path_factory.mktemp("configs")
    (configs / "tiny-SigLIP.json").write_text(json.dumps(config["model_cfg"]))
    open_clip.add_model_config(configs)
    torch.manual_seed(4)
    model = open_clip.create_model("tiny-SigLIP", load_weights=False).eval()
    model.logit_bias.data.fill_(-7.5)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model, folder


@pytest.fixture(scope="module")
def loaded_siglip(siglip):
    return load_backbone(f"local-dir:{siglip[1]}", device="cpu")


def test_siglip(siglip, loaded_siglip):
    model, _ = siglip
    loaded = loaded_siglip
    assert type(model).__name__ == "CustomTextCLIP"
    assert type(model.visual).__name__ == "TimmModel"
    assert loaded.logit_bias == -7.5 and loaded.feature_width == 64
    assert loaded.logit_scale == pytest.approx(float(model.logit_scale.exp()))
    assert load_backbone("mini", device="cpu").logit_bias == 0.0
    assert not loaded.is_vit and loaded.size == 160


def test_text_features_of_siglip(siglip, loaded_siglip):
    "The last position is read, padding included, and every word sees every other."
    model, _ = siglip
    tokens = loaded_siglip.tokenize(["a cat", "cat"])
    assert tokens.tolist() == [[5, 3, 1, 1, 1, 1], [3, 1, 1, 1, 1, 1]]
    features = loaded_siglip.encode_text(["a cat", "cat"])
    x = model.text.token_embedding(tokens) + model.text.positional_embedding
    x = model.text.ln_final(model.text.transformer(x))
    expected = model.text.text_projection(x[:, -1])
    torch.testing.assert_close(features, expected)
    assert (features - model.text.text_projection(x[:, 1])).abs().max() > 1e-3  # control
    with pytest.raises(TextTooLong, match="has 7 tokens, but the text tower reads 6"):
        loaded_siglip.encode_text(["a cat a cat a cat"])
    assert loaded_siglip.encode_text(["a cat a cat a"]).shape == (1, 64)


def test_prompts_refuse_siglip(siglip):
    model, _ = siglip
    refused(lambda: TextTower(model), "prompts need a causal text tower")
    refused(lambda: ImageTower(model), "which the image tower TimmModel is not")


def test_images_of_siglip(siglip, loaded_siglip):
    model, _ = siglip
    from PIL import Image

    image = Image.new("RGB", (300, 200), (255, 0, 128))
    image.paste((0, 255, 0), (0, 0, 20, 200))  # cut away where the middle is cropped
    pixels = next(iter(Pixels([image], loaded_siglip.preprocess).split(1, "cpu")))
    assert pixels.shape == (1, 3, 160, 160) and float(pixels.max()) == 1.0
    assert pixels[0, 1, 80, 2] > 0.9  # squashed, not cropped
    expected = model.encode_image(pixels)
    torch.testing.assert_close(loaded_siglip.encode_images([image]), expected)


def test_checkpoint_of_siglip(siglip, monkeypatch):
    "A file without configuration is prepared as the published weights are."
    model, folder = siglip
    name = f"tiny-SigLIP:{folder}/open_clip_model.safetensors"
    monkeypatch.setattr(pretrained, "tag_configs", lambda _: {})
    assert load_backbone(name, device="cpu").preprocess_cfg.resize_mode == "shortest"
    backbones._load.cache_clear()
    published = open_clip.get_pretrained_cfg("ViT-B-16-SigLIP", "webli")
    monkeypatch.setattr(pretrained, "tag_configs", lambda _: {"webli": published})
    own = load_backbone(name, device="cpu")
    assert own.preprocess_cfg.resize_mode == "squash"
    assert tuple(own.preprocess_cfg.mean) == (0.5, 0.5, 0.5)
    assert own.logit_bias == -7.5
    backbones._load.cache_clear()


def test_checkpoint_without_logit_bias(siglip, tmp_path):
    "As of a model trained without it."
    state = load_file(siglip[1] / "open_clip_model.safetensors")
    del state["logit_bias"]
    save_file(state, tmp_path / "w.safetensors")
    loaded = load_backbone(f"tiny-SigLIP:{tmp_path}/w.safetensors", device="cpu")
    assert loaded.logit_bias == 0.0


def test_published_siglip_architectures_keep_their_tokenizer(monkeypatch):
    "Without its files, one line names the model and the way out."
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(
        lambda: from_tokenizer("ViT-B-16-SigLIP"),
        "tokenizer of ViT-B-16-SigLIP",
        "HF_HUB_OFFLINE is set",
        "'local-dir:/path/folder'",
    )


def from_tokenizer(name):
    model = open_clip.create_model("tiny", load_weights=False)
    return Backbone(name, model, name, "cpu", "fp32")


# A Hub that fails


class Hub:
    "A local server in place of the Hub; `answer(path)` gives a status and bytes, or waits."

    def __init__(self, answer):
        hub = self
        self.asked = []
        self.closed = threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                hub.asked.append((self.command, self.path))
                found = answer(self.path)
                if found is None:
                    hub.closed.wait(60)
                    return
                status, body = found
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", f'"{abs(hash(self.path))}"')
                self.send_header("X-Repo-Commit", "a" * 40)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self):
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    "Return a function that starts a local Hub, with an empty cache."
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    started = []

    def start(answer):
        started.append(Hub(answer))
        monkeypatch.setattr(constants, "ENDPOINT", started[-1].url)
        template = started[-1].url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        return started[-1]

    yield start
    for one in started:
        one.close()


NAMES = ["ViT-B-32:laion2b_e16", "hf-hub:org/name"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "answer, part", [(None, "no answer within 5 seconds"), ((503, b""), "answers with status 503")]
)
def test_hub_that_hangs_or_fails(hub, name, answer, part):
    server = hub(lambda path: answer)
    message = refused(lambda: load_backbone(name), name, "not in the local cache", part, server.url)
    assert re.search("give a local (file: 'ViT-B-32:/path|folder: 'local-dir:/path)", message)
    assert len(server.asked) == 1  # no retries


@pytest.mark.parametrize("name", NAMES)
def test_hub_that_serves_a_wrong_file(hub, name):
    hub(lambda path: (200, b"<html>please log in</html>"))
    refused(lambda: load_backbone(name), name, "damaged")


def test_damaged_file_of_the_cache(hub, tmp_path, state):
    "The message names the file; without it, the next call fetches it again."
    answers = [b"<html>please log in</html>"]
    server = hub(lambda path: (200, answers[0]))
    name = "tiny:published"
    message = refused(lambda: with_tag(name), "delete this file, and it is fetched again")
    file = re.search(r"published: (\S+) is damaged", message)[1]
    assert file.startswith(str(tmp_path / "cache"))
    refused(lambda: with_tag(name), file)  # from the cache
    before = len(server.asked)
    os.remove(file)
    save_file({key: x.contiguous() for key, x in state.items()}, tmp_path / "good")
    answers[0] = (tmp_path / "good").read_bytes()
    built = with_tag(name)
    assert len(server.asked) > before
    assert torch.equal(built.state_dict()["visual.proj"], state["visual.proj"])
    before = len(server.asked)
    with_tag(name)
    assert len(server.asked) == before  # the cache is enough


def with_tag(name):
    "Build a model with a tag whose weights lie in the repository org/tiny."
    config = {"hf_hub": "org/tiny/"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"published": config})
        return pretrained.build_model(*name.split(":"))


def test_repository(hub, tmp_path, state):
    save_file({key: x.contiguous() for key, x in state.items()}, tmp_path / "good")
    files = {
        "open_clip_config.json": json.dumps({"model_cfg": TINY, "preprocess_cfg": {}}).encode(),
        "open_clip_model.safetensors": (tmp_path / "good").read_bytes(),
    }

    def answer(path):
        file = files.get(path.rpartition("/")[2])
        return (404, b"") if file is None else (200, file)

    server = hub(answer)
    loaded = load_backbone("hf-hub:org/tiny", device="cpu")
    assert torch.equal(loaded.model.state_dict()["visual.proj"], state["visual.proj"])
    backbones._load.cache_clear()
    asked = len(server.asked)
    again = load_backbone("hf-hub:org/tiny", device="cpu")
    assert again.key == loaded.key and len(server.asked) == asked
    shutil.rmtree(tmp_path / "cache")
    backbones._load.cache_clear()
    files["open_clip_config.json"] = b"{}"
    refused(lambda: load_backbone("hf-hub:org/tiny", device="cpu"), "'model_cfg' not found")


def test_proxy_that_does_not_answer(tmp_path):
    "In a process of its own, whose environment names the proxy."
    server = Hub(lambda path: None)
    code = """if True:
        from vlmadapt.models.backbones import backbone_spec, load_backbone
        from vlmadapt.models.open_clip_import import import_open_clip
        import_open_clip()
        try:
            load_backbone("ViT-B-32")
        except ValueError as e:
            print(e)
        """
    environment = dict(os.environ, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path))
    environment |= dict(HF_ENDPOINT="http://hub.invalid", HTTP_PROXY=server.url)
    environment |= dict(http_proxy=server.url, NO_PROXY="", no_proxy="")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    server.close()
    message = done.stdout.decode().strip().splitlines()[-1]
    assert "ViT-B-32:openai: its files are not in the local cache" in message
    assert "http://hub.invalid" in message and "cannot be reached" in message
    assert len(server.asked) == 1


def test_unknown_names_are_of_one_kind():
    with pytest.raises(UnknownName):
        backbone_spec("ViT-B-61:openai")


def test_images_are_encoded_from_paths_and_pictures_alike(tmp_path):
    backbone = load_backbone("mini")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 32, 3), dtype=np.uint8)
    pictures = [Image.fromarray(x) for x in pixels]
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)
    features = backbone.encode_images(pictures)
    assert torch.equal(backbone.encode_images(files), features)
    assert torch.allclose(backbone.encode_images(str(files[0])), features[:1], atol=1e-4)
    with pytest.raises(FileNotFoundError, match="c.png"):
        backbone.encode_images([tmp_path / "c.png"])
