"Adapted models as files: the same scores to the bit in a new process, other backbones and altered files refused; own photos of every kind."

import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from vlmadapt.core.files import DamagedFile
from vlmadapt.methods import METHODS
from vlmadapt.problems.few_shot import few_shot, from_folder
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
    "CoOp",
    "HeGraphAdapter T",
}
CASES = {
    **{name: (name, {}) for name in METHODS},
    "HeGraphAdapter T": ("HeGraphAdapter", dict(variant="T")),
}
PREDICT = """
import json, sys, numpy as np, torch
from pathlib import Path
from vlmadapt.methods import METHODS
from vlmadapt.methods.base import read_card
folder, out = Path(sys.argv[1]), {}
x, images = torch.from_numpy(np.load(folder/"x.npy")), np.load(folder/"images.npy")
for path in sorted(folder.glob("*.safetensors")):
    cls = METHODS[read_card(path)["method"]]
    np.save(path.with_suffix(".npy"), cls.load(path, backbone="mini").predict(list(images) if cls.reads_images() else x).numpy())
print(json.dumps([m for m in ("ray", "papermill", "IPython") if m in sys.modules]))
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    "Every method, fitted for an epoch, saved, and what it predicts."
    folder, problem = tmp_path_factory.mktemp("shared"), few_shot("mini-digits", shots=2, seed=1)
    images, x, fitted = problem.images("test").items[:20], problem.features.test[:20], {}
    np.save(folder / "images.npy", images)
    np.save(folder / "x.npy", x.numpy())
    for case, (name, hyper) in CASES.items():
        recipe = dict(epochs=1) if "epochs" in METHODS[name].recipe else {}
        method = fit(METHODS[name](problem, **hyper, **recipe), problem, seed=1, progress=False)
        method.save(
            folder / f"{case}.safetensors",
            accuracy=evaluate(method, problem)["accuracy"],
            selection="defaults",
        )
        fitted[case] = method, method.predict(list(images) if method.reads_images() else x)
    return folder, problem, fitted


def test_a_new_process_gives_the_same_scores_to_the_bit(shared):
    folder, _, fitted = shared
    run = subprocess.run(
        [sys.executable, "-c", PREDICT, folder],
        text=True,
        capture_output=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert not run.returncode, run.stderr[-2000:]
    assert json.loads(run.stdout) == []
    differ = [
        case
        for case, (_, scores) in fitted.items()
        if np.load(folder / f"{case}.npy").tobytes() != scores.numpy().tobytes()
    ]
    assert not differ
    sizes = {case: (folder / f"{case}.safetensors").stat().st_size for case in fitted}
    print(json.dumps(sizes))
    assert max(sizes.values()) < 4 << 20


def test_the_linear_ones_fold_and_the_others_refuse(shared):
    _, problem, fitted = shared
    folded = set()
    for case, (method, scores) in fitted.items():
        try:
            head = method.fold()
        except ValueError as e:
            assert "does not fold into one linear layer" in str(e) and "\n" not in str(e)
            continue
        folded.add(case)
        assert head.weight.shape == (10, problem.features.text.shape[1])
        assert (
            head(problem.features.test[:20]) - scores
        ).abs().max() <= 1e-4 * scores.abs().max(), case
    assert folded >= FOLDS and not folded & {
        "TipAdapter",
        "TipAdapterF",
        "CLIPAdapter",
        "ProtoCLIP",
        "CoCoOp",
        "VPT",
        "MaPLe",
        "MuDPT",
        "HeGraphAdapter",
    }


def test_other_backbones_and_altered_files_are_refused_in_one_line(shared, tmp_path):
    folder, *_ = shared
    with pytest.raises(
        ValueError, match="was fitted on backbone mini .* with other weights than mini-rn"
    ) as told:
        METHODS["GDA"].load(folder / "GDA.safetensors", backbone="mini-rn")
    assert "\n" not in str(told.value)
    whole = (folder / "GDA.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for at in (
        *range(0, length + 8, max(1, length // 60)),
        length + 20,
        len(whole) // 2,
        len(whole) - 1,
    ):
        (tmp_path / "bent").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DamagedFile):
            METHODS["GDA"].load(tmp_path / "bent")
    (tmp_path / "cut").write_bytes(whole[:-3])
    with pytest.raises(DamagedFile):
        METHODS["GDA"].load(tmp_path / "cut")


def photo(rng, color, size):
    "Noise of one colour."
    x = rng.normal(0, 25, (size[1], size[0], 3)) + color
    return Image.fromarray(x.clip(0, 255).astype(np.uint8))


def album(folder):
    "Photos of two classes in every mode, size and name, one of them corrupt."
    rng = np.random.default_rng(0)
    turned = Image.Exif()
    turned[274] = 6
    deep = lambda im: Image.fromarray(np.asarray(im.convert("L")).astype(np.uint16) * 257)
    glass = lambda im: (im := im.convert("RGBA"), im.putalpha(128))[0]
    kinds = {
        "plain.jpg": lambda im: im,
        "palette.png": lambda im: im.convert("P"),
        "see-through.gif": lambda im: im.convert("P"),
        "for print.jpg": lambda im: im.convert("CMYK"),
        "Glas über Ω.png": glass,
        "sixteen bits.png": deep,
        "sixteen bits.tif": deep,
        "gray.jpeg": lambda im: im.convert("L"),
        "black and white.bmp": lambda im: im.convert("1"),
        "gray with alpha.png": lambda im: im.convert("LA"),
        "写真 1.JPG": lambda im: im,
        "large.webp": lambda im: im.resize((2100, 1400)),
        "one dot.png": lambda im: im.resize((1, 1)),
        "long.png": lambda im: im.resize((600, 12)),
        "it's; $(echo) & 'quotes'.png": lambda im: im,
        "float.tiff": lambda im: im.convert("L").convert("F").point(lambda v: v * 0.0039),
    }
    for name, color in {"rote Äpfel": (200, 40, 40), "ciel_bleu": (40, 60, 210)}.items():
        (folder / name / "deeper").mkdir(parents=True)
        for i, (file, convert) in enumerate(kinds.items()):
            convert(photo(rng, color, (30 + 7 * i, 60))).save(
                folder / name / ("deeper" if i % 2 else "") / file
            )
        photo(rng, color, (80, 40)).save(folder / name / "turned.jpg", exif=turned)
        (folder / name / "notes.txt").write_text("not a picture")
    (folder / "ciel_bleu" / "halb kaputt.jpg").write_bytes(
        (folder / "ciel_bleu" / "plain.jpg").read_bytes()[:400]
    )
    return folder


def test_own_photos_of_every_kind(tmp_path):
    root = album(tmp_path / "my photos ☀")
    with pytest.raises(ValueError, match="halb kaputt.jpg: cannot be decoded"):
        from_folder(root, shots=4)
    with pytest.warns(UserWarning, match="skipped: .*halb kaputt.jpg"):
        problem = from_folder(root, shots=4, on_corrupt="skip")
    assert (
        set(problem.classnames) == {"ciel bleu", "rote Äpfel"}
        and sum(len(problem.images(s)) for s in ("train", "val", "test")) > 20
    )
    files = sorted(p for p in root.rglob("*") if p.suffix != ".txt" and p.is_file())
    for name in ("GDA", "HeGraphAdapter", "CoOp", "VPT"):
        method = METHODS[name](
            problem, **(dict(epochs=2) if "epochs" in METHODS[name].recipe else {})
        )
        accuracy = evaluate(fit(method, problem, progress=False), problem)["accuracy"]
        print(name, accuracy)
    with pytest.warns(UserWarning, match="halb kaputt.jpg"):
        table = method.predict_table(files, on_corrupt="skip")
    assert len(table) == len(files) - 1 and np.isfinite(table[problem.classnames].to_numpy()).all()
