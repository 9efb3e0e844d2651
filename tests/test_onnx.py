"Methods as ONNX files: the scores of ONNX Runtime are those of the method."

import json

import numpy as np
import pytest
import torch
from conftest import refused

import vlmadapt as va
from vlmadapt.models.onnx_files import TOLERANCE, write_onnx

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

FEATURES = [n for n in va.list_methods() if n in va.list_methods("features")]


@pytest.fixture(scope="module")
def problem():
    return va.few_shot("mini-digits", backbone="mini", shots=2, views=2, auxiliary="mini-rn")


def fitted(name, problem):
    known = va.method_info(name).hyper_parameters
    method = va.create_method(name, problem, **({"epochs": 1} if "epochs" in known else {}))
    return va.fit(method, problem)


def scores_of(path, x):
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return given.name, session.run(["scores"], {given.name: np.asarray(x, np.float32)})[0]


def texts_of(path):
    return {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}


@pytest.mark.parametrize("name", FEATURES)
def test_every_method_on_features(problem, tmp_path, name):
    method = fitted(name, problem)
    method.export_onnx(tmp_path / "m.onnx")
    x = method.inputs(problem, "test")[:17]
    given, found = scores_of(tmp_path / "m.onnx", x)
    expected = method.scores(x).numpy()
    assert given == "features" and found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()
    texts = texts_of(tmp_path / "m.onnx")
    assert json.loads(texts["class_names"]) == problem.class_names
    assert texts["method"] == name and texts["input"] == f"image features (N, {x.shape[1]})"
    assert x.shape[1] == (192 if name == "AMUTuning" else 96)


@pytest.mark.parametrize("name", ["TaskRes", "CoOp", "VPT", "MaPLe", "MuDPT", "PAdapter"])
def test_with_the_backbone(problem, tmp_path, name):
    "Pixels to scores, for methods on features and for those inside the towers."
    method = fitted(name, problem)
    method.export_onnx(tmp_path / "m.onnx", with_backbone=True)
    texts = texts_of(tmp_path / "m.onnx")
    size = json.loads(texts["preprocess"])["size"]
    images = [problem.images("test")[i] for i in range(5)]
    pixels = torch.stack([problem.backbone.preprocess(image) for image in images])
    assert pixels.shape[-1] == size and texts["backbone"] == "mini"
    expected = method.scores(images).numpy()
    if method.reads_images():  # one at a time
        assert texts["input"].startswith(f"RGB pixels (1, 3, {size}, {size})")
        found = [scores_of(tmp_path / "m.onnx", one[None])[1] for one in pixels]
        found = np.concatenate(found)
    else:
        given, found = scores_of(tmp_path / "m.onnx", pixels)
        assert given == "pixels"
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_a_loaded_method_and_features_without_a_backbone(problem, tmp_path):
    names, text = problem.class_names, problem.features.text
    train = problem.features.train, problem.labels["train"]
    own = va.from_features(names, text, train=train)
    method = fitted("LinearProbe", own)
    method.save(tmp_path / "m.safetensors")
    loaded = va.load_method(tmp_path / "m.safetensors")
    loaded.export_onnx(tmp_path / "m.onnx")
    found = scores_of(tmp_path / "m.onnx", problem.features.test[:3])[1]
    assert np.allclose(found, method.scores(problem.features.test[:3]), atol=1e-4)
    line = "has no backbone: give features (N, 96)"
    refused(lambda: loaded.export_onnx(tmp_path / "x.onnx", with_backbone=True), line)
    assert not (tmp_path / "x.onnx").exists()


def test_what_cannot_be_exported_is_refused(problem, tmp_path):
    vpt = va.create_method("VPT", problem)
    line = "VPT reads images, not features; pass with_backbone=True"
    refused(lambda: vpt.export_onnx(tmp_path / "m.onnx"), line)
    task = va.load_task("mini-vqa", backbone="mini", train=8)
    writer = va.create_method("Frozen", task)
    with pytest.raises(AttributeError, match="Frozen generates text and has no export_onnx"):
        writer.export_onnx(tmp_path / "m.onnx")


class FixedSize(torch.nn.Module):
    def forward(self, x):
        return torch.cat([x, torch.zeros(len(x), 1)], 1)


class Unsupported(torch.nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


class Moody(torch.nn.Module):
    "What is traced is not what is computed later."

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (FixedSize, "the file cannot be run"),
        (Unsupported, "cannot be written as ONNX"),
        (Moody, "differs from"),
    ],
)
def test_a_wrong_graph_is_refused(tmp_path, module, told):
    refused(lambda: write_onnx(module(), torch.randn(3, 4), tmp_path / "m.onnx"), "m.onnx: ", told)
    assert list(tmp_path.iterdir()) == []
