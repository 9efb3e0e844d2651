"""Saved methods give the same scores to the bit in a new process; own photos of every kind.

Other backbones and altered files are refused.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from vlmadapt.core.files import DamagedFile
from vlmadapt.methods import METHODS
from vlmadapt.problems.few_shot import few_shot
from vlmadapt.problems.own_data import from_folder
from vlmadapt.training.evaluation import evaluate
from vlmadapt.training.loop import fit

FOLDS = {
    "ZeroShot",
    "LinearProbe",
    "LinearProbeScratch",
    "GDA",
    "TaskRes",
    "GraphAdapter",
    "AnchoredProbe",
    "ZSLP",
    "CLAP",
    "LPPlusPlus",
    "SSText",
    "CrossModal",
    "CoOp",
    "HeGraphAdapter T",
}
DOES_NOT_FOLD = {
    "AnchoredKernel",
    "TipAdapter",
    "TipAdapterF",
    "CLIPAdapter",
    "ProtoCLIP",
    "CoCoOp",
    "VPT",
    "MaPLe",
    "MuDPT",
    "PromptSRC",
    "HeGraphAdapter",
    "AMUTuning",
}
CASES = {name: (name, {}) for name in METHODS.classifiers()}
CASES["AMUTuning"] = ("AMUTuning", {"encoder": "own"})  # the problem has no second encoder
CASES["HeGraphAdapter T"] = ("HeGraphAdapter", {"variant": "T"})
LARGEST_FILE = 4 << 20  # bytes

PREDICT = """
import json
import sys
from pathlib import Path

import numpy as np
import torch

from vlmadapt.methods import METHODS
from vlmadapt.methods.cards import read_card

folder = Path(sys.argv[1])
features = torch.from_numpy(np.load(folder / "features.npy"))
images = list(np.load(folder / "images.npy"))
for path in sorted(folder.glob("*.safetensors")):
    method_class = METHODS[read_card(path)["method"]]
    method = method_class.load(path, backbone="mini")
    scores = method.scores(images if method_class.reads_images() else features)
    np.save(path.with_suffix(".npy"), scores.numpy())
print(json.dumps([name for name in ("ray", "papermill", "IPython") if name in sys.modules]))
"""


def few_epochs(name, epochs):
    "The hyper-parameters that shorten the training of a method."
    return {"epochs": epochs} if "epochs" in METHODS[name].recipe else {}


@pytest.fixture(scope="module")
def problem():
    return few_shot("mini-digits", shots=2, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def fitted(problem, folder):
    "Every method, fitted for an epoch and saved, with what it predicts."
    images = problem.images("test").items[:20]
    features = problem.features.test[:20]
    np.save(folder / "images.npy", images)
    np.save(folder / "features.npy", features.numpy())
    fitted = {}
    for case, (name, given) in CASES.items():
        method = METHODS[name](problem, **given, **few_epochs(name, 1))
        fit(method, problem, seed=1, progress=False)
        accuracy = evaluate(method, problem)["accuracy"]
        path = folder / f"{case}.safetensors"
        method.save(path, accuracy=accuracy, selection="defaults")
        scores = method.scores(list(images) if method.reads_images() else features)
        fitted[case] = (method, scores)
    return fitted


def test_new_process_gives_the_same_scores_to_the_bit(folder, fitted):
    "It imports neither Ray nor papermill nor IPython."
    threads = str(torch.get_num_threads())
    run = subprocess.run(
        [sys.executable, "-c", PREDICT, folder],
        text=True,
        capture_output=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads},
    )
    assert not run.returncode, run.stderr[-2000:]
    assert json.loads(run.stdout) == []
    differ = [
        case
        for case, (_, scores) in fitted.items()
        if np.load(folder / f"{case}.npy").tobytes() != scores.numpy().tobytes()
    ]
    assert not differ


def test_files_are_small(folder, fitted):
    sizes = {case: (folder / f"{case}.safetensors").stat().st_size for case in fitted}
    print(json.dumps(sizes))
    assert max(sizes.values()) < LARGEST_FILE


def test_linear_methods_fold_and_others_refuse(problem, fitted):
    folded = set()
    for case, (method, scores) in fitted.items():
        try:
            head = method.fold()
        except ValueError as e:
            assert "does not fold into one linear layer" in str(e)
            assert "\n" not in str(e)
            continue
        folded.add(case)
        assert head.weight.shape == (10, problem.features.text.shape[1])
        difference = (head(problem.features.test[:20]) - scores).abs().max()
        assert difference <= 1e-4 * scores.abs().max(), case
    assert folded >= FOLDS
    assert not folded & DOES_NOT_FOLD


def test_another_backbone_is_refused_in_one_line(folder, fitted):
    message = "was fitted on backbone mini .* with other weights than mini-rn"
    with pytest.raises(ValueError, match=message) as caught:
        METHODS["GDA"].load(folder / "GDA.safetensors", backbone="mini-rn")
    assert "\n" not in str(caught.value)


def test_altered_files_are_refused(folder, fitted, tmp_path):
    "One bit in the header or in the arrays is enough."
    whole = (folder / "GDA.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    in_header = range(0, length + 8, max(1, length // 60))
    for at in (*in_header, length + 20, len(whole) // 2, len(whole) - 1):
        changed = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        (tmp_path / "changed").write_bytes(changed)
        with pytest.raises(DamagedFile):
            METHODS["GDA"].load(tmp_path / "changed")
    (tmp_path / "cut").write_bytes(whole[:-3])
    with pytest.raises(DamagedFile):
        METHODS["GDA"].load(tmp_path / "cut")


# ---- own photos ----


def photo(rng, color, size):
    "Noise of one colour."
    pixels = rng.normal(0, 25, (size[1], size[0], 3)) + color
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def plain(image):
    return image


def sixteen_bits(image):
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def transparent(image):
    image = image.convert("RGBA")
    image.putalpha(128)
    return image


def floating_point(image):
    return image.convert("L").convert("F").point(lambda value: value * 0.0039)


def mode(name):
    return lambda image: image.convert(name)


def size(width, height):
    return lambda image: image.resize((width, height))


KINDS = {
    "plain.jpg": plain,
    "palette.png": mode("P"),
    "see-through.gif": mode("P"),
    "for print.jpg": mode("CMYK"),
    "Glas über Ω.png": transparent,
    "sixteen bits.png": sixteen_bits,
    "sixteen bits.tif": sixteen_bits,
    "gray.jpeg": mode("L"),
    "black and white.bmp": mode("1"),
    "gray with alpha.png": mode("LA"),
    "写真 1.JPG": plain,
    "large.webp": size(2100, 1400),
    "one dot.png": size(1, 1),
    "long.png": size(600, 12),
    "it's; $(echo) & 'quotes'.png": plain,
    "float.tiff": floating_point,
}
COLORS = {"rote Äpfel": (200, 40, 40), "ciel_bleu": (40, 60, 210)}


def album(folder):
    "Photos of two classes in every mode, size and name, one of them corrupt."
    rng = np.random.default_rng(0)
    turned = Image.Exif()
    turned[274] = 6
    for name, color in COLORS.items():
        (folder / name / "deeper").mkdir(parents=True)
        for i, (file, convert) in enumerate(KINDS.items()):
            image = convert(photo(rng, color, (30 + 7 * i, 60)))
            image.save(folder / name / ("deeper" if i % 2 else "") / file)
        photo(rng, color, (80, 40)).save(folder / name / "turned.jpg", exif=turned)
        (folder / name / "notes.txt").write_text("not a picture")
    whole = (folder / "ciel_bleu/plain.jpg").read_bytes()
    (folder / "ciel_bleu/halb kaputt.jpg").write_bytes(whole[:400])
    return folder


def test_own_photos_of_every_kind(tmp_path):
    root = album(tmp_path / "my photos ☀")
    with pytest.raises(ValueError, match=r"halb kaputt\.jpg: cannot be decoded"):
        from_folder(root, backbone="mini", shots=4)
    with pytest.warns(UserWarning, match=r"skipped: .*halb kaputt\.jpg"):
        problem = from_folder(root, backbone="mini", shots=4, on_corrupt="skip")
    assert set(problem.class_names) == {"ciel bleu", "rote Äpfel"}
    assert sum(len(problem.images(split)) for split in ("train", "val", "test")) > 20
    for name in ("GDA", "HeGraphAdapter", "CoOp", "VPT"):
        method = METHODS[name](problem, **few_epochs(name, 2))
        fit(method, problem, progress=False)
        print(name, evaluate(method, problem)["accuracy"])
    files = sorted(path for path in root.rglob("*") if path.suffix != ".txt" and path.is_file())
    with pytest.warns(UserWarning, match=r"halb kaputt\.jpg"):
        table = method.predict_table(files, on_corrupt="skip")
    assert len(table) == len(files) - 1
    assert np.isfinite(table[problem.class_names].to_numpy()).all()
