"Features, labels, cards and images from outside: converted, or refused in one line."

import copy
import pickle
import warnings
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import refused
from PIL import Image

import vlmadapt.methods.base
from vlmadapt.core.tensors import load_arrays, save_arrays
from vlmadapt.data.datasets import Dataset, load_dataset
from vlmadapt.data.images import Images
from vlmadapt.methods import METHODS
from vlmadapt.methods.generation import GENERATION_METHODS
from vlmadapt.methods.inputs import as_inputs
from vlmadapt.models.backbones import load_backbone
from vlmadapt.problems.base import SealedSplitError
from vlmadapt.problems.classification import FewShotProblem
from vlmadapt.problems.features import as_features, as_labels
from vlmadapt.problems.few_shot import few_shot
from vlmadapt.problems.generation import load_task
from vlmadapt.training.batched import fit_many
from vlmadapt.training.evaluation import evaluate
from vlmadapt.training.loop import fit
from vlmadapt.training.tuning import tune

K, D, SHOTS = 4, 16, 5
NAMES = ["ash", "birch", "cedar", "elm"]
RNG = np.random.default_rng(0)
TEXT = RNG.normal(size=(K, D))
Y = np.repeat(np.arange(K), SHOTS)
X = TEXT[Y] + 0.1 * RNG.normal(size=(K * SHOTS, D))


def features_problem(names=NAMES, text=TEXT, x=X, y=Y, **options):
    split = (x, y)
    return FewShotProblem.from_features(names, text, **{"train": split, "test": split, **options})


class Unreadable:
    "Labels that raise when they are read, and when they are counted."

    def __getattribute__(self, name):
        raise AssertionError("test labels were read")

    def __len__(self):
        raise AssertionError("test labels were counted")


# --- labels


ONE_HOT = np.eye(K)[Y]
SAME_LABELS = {
    "list": Y.tolist(),
    "uint8": Y.astype(np.uint8),
    "int16 tensor": torch.tensor(Y, dtype=torch.int16),
    "whole floats": Y.astype(np.float32),
    "bfloat16": torch.tensor(Y).bfloat16(),
    "column": Y[:, None],
    "column of a tensor": torch.tensor(Y)[:, None],
    "one-hot": ONE_HOT,
    "one-hot of truth values": ONE_HOT.astype(bool),
    "one-hot tensor": torch.tensor(ONE_HOT),
    "names": [NAMES[k] for k in Y],
    "array of names": np.array(NAMES)[Y],
    "object array of names": np.array(NAMES, dtype=object)[Y],
    "series": pd.Series(Y, index=range(100, 100 + len(Y))),
    "nullable series": pd.Series(Y, dtype="Int64"),
    "categorical": pd.Categorical([NAMES[k] for k in Y], categories=NAMES[::-1]),
}


@pytest.mark.parametrize("kind", SAME_LABELS)
def test_labels_of_every_form_give_the_same_numbers(kind):
    expected = evaluate(METHODS["TipAdapter"](features_problem()), features_problem())
    given = features_problem(y=SAME_LABELS[kind])
    assert (
        given.labels["train"].dtype == torch.int64 and given.labels["train"].tolist() == Y.tolist()
    )
    assert evaluate(METHODS["TipAdapter"](given), given) == expected


WRONG_LABELS = {
    "from 1": (Y + 1, "must lie in 0 .. 3, found 1 .. 4; they seem to run from 1, subtract 1"),
    "too high": (Y + 2, "must lie in 0 .. 3, found 2 .. 5"),
    "negative": (np.where(Y == 3, -1, Y), "must lie in 0 .. 3, found -1 .. 2"),
    "uint64": (Y.astype(np.uint64) + np.uint64(2**63), "must lie in 0 .. 3"),
    "fraction": (Y + 0.6, "must be whole numbers, but label 0 is 0.6"),
    "NaN": (np.where(Y == 3, np.nan, Y), "must be whole numbers, but label 15 is nan"),
    "infinite": (np.where(Y == 3, np.inf, Y), "must be whole numbers, but label 15 is inf"),
    "truth values": (Y > 1, "are truth values"),
    "list of truth values": ((Y > 1).tolist(), "are truth values"),
    "complex": (Y * 1j, "must be whole numbers, not complex128"),
    "two ones": (
        np.maximum(ONE_HOT, np.eye(K)[0]),
        "must be one-hot: one 1 and else 0, but 15 rows are not, the first is row 5",
    ),
    "soft": (ONE_HOT * 0.9 + 0.025, "must be one-hot: one 1 and else 0, but 20 rows are not"),
    "one-hot of more classes": (
        np.eye(K + 1)[Y],
        "have the shape (20, 5), expected (N,), or one-hot rows (N, 4)",
    ),
    "lying": (Y[None], "have the shape (1, 20)"),
    "ragged": ([[0], [1, 2]], "the rows have unequal lengths"),
    "unknown name": (
        ["ash", "brich"],
        "label 1: unknown class name 'brich'; did you mean 'birch'?",
    ),
    "digits": (["0", "1"], "label 0: unknown class name '0'"),
    "missing name": (["ash", None], "label 1 is None"),
    "masked": (np.ma.masked_equal(Y, 3), "hold masked values"),
    "one number": (3, "have the shape ()"),
    "tensors": ([torch.tensor([0, 1]), torch.tensor([2])], "unequal lengths"),
}


@pytest.mark.parametrize("kind", WRONG_LABELS)
def test_other_labels_are_refused_by_name(kind):
    y, told = WRONG_LABELS[kind]
    assert told in refused(partial(as_labels, y, NAMES, "val"))


@pytest.mark.parametrize("kind", ["from 1", "fraction", "truth values", "two ones"])
def test_test_labels_are_checked_when_they_are_opened(kind):
    y, told = WRONG_LABELS[kind]
    problem = features_problem(test=(X, y))
    method = METHODS["ZeroShot"](problem)
    assert told in refused(partial(evaluate, method, problem))


def test_names_of_two_classes_are_no_labels():
    assert "2 classes are called 'crane'" in refused(
        partial(as_labels, ["crane"], ["crane", "crane"], "train")
    )


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_as_many_labels_as_rows(split):
    told = refused(partial(features_problem, **{split: (X, Y[:-1])}))
    assert told == f"{split}: 20 feature rows but 19 labels"


def test_labels_of_a_dataset_go_through_the_same_door():
    images = RNG.integers(0, 255, (12, 8, 8, 3), dtype=np.uint8)
    y = np.arange(12) % 3

    def dataset(labels):
        part = Images(images, labels)
        return Dataset("toy", ["a", "b", "c"], dict(train=part, val=part, test=part), ["{}"])

    expected = few_shot(dataset(torch.tensor(y)), "mini", shots=2, views=2)
    for labels in (
        y.astype(np.uint8),
        np.eye(3)[y],
        np.array(["a", "b", "c"])[y],
        y.astype(float),
        y.tolist(),
    ):
        problem = few_shot(dataset(labels), "mini", shots=2, views=2)
        assert problem.labels["train"].tolist() == expected.labels["train"].tolist()
        assert problem.images("train").items.tobytes() == expected.images("train").items.tobytes()
        method = METHODS["ZeroShot"](problem)
        assert evaluate(method, problem) == evaluate(method, expected)
    assert "toy train labels must lie in 0 .. 2, found 1 .. 3" in refused(
        partial(few_shot, dataset(y + 1), "mini", shots=2)
    )


# --- features


CLOSE_FEATURES = {
    "float16": lambda x: x.astype(np.float16),
    "bfloat16": lambda x: torch.tensor(x).bfloat16(),
    "with gradient": lambda x: torch.tensor(x, requires_grad=True),
    "sparse": lambda x: torch.tensor(x).to_sparse(),
    "list": lambda x: x.tolist(),
    "list of tensors": lambda x: list(torch.tensor(x)),
    "data frame": pd.DataFrame,
    "nullable data frame": lambda x: pd.DataFrame(x).astype("Float64"),
    "long doubles": lambda x: x.astype(np.longdouble),
    "big-endian": lambda x: x.astype(">f4"),
    "reversed twice": lambda x: x[::-1].copy()[::-1],
    "read-only": lambda x: np.broadcast_to(x, x.shape),
    "integers": lambda x: (x * 40).round().astype(np.int8),
    "unsigned": lambda x: ((x + 4) * 8000).astype(np.uint16),
}


@pytest.mark.parametrize("kind", CLOSE_FEATURES)
def test_features_of_every_type(kind):
    convert = CLOSE_FEATURES[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem = features_problem(text=convert(TEXT), x=convert(X))
    assert (
        problem.features.train.dtype in (torch.float32, torch.float64)
        and not problem.features.train.requires_grad
    )
    assert evaluate(fit(METHODS["GDA"](problem), problem), problem)["accuracy"] == 100


def spoiled(row, value, x=X):
    x = x.copy()
    x[row] = value
    return x


WRONG_FEATURES = {
    "truth values": (X > 0, "must be real numbers, not bool"),
    "complex": (X * 1j, "must be real numbers, not complex128"),
    "complex tensor": (torch.tensor(X) * 1j, "must be real numbers, not complex128"),
    "texts": (X.astype(str), "must be real numbers, not <U"),
    "ragged": ([[0.0, 1.0], [1.0]], "the rows have unequal lengths"),
    "data frame with a name": (pd.DataFrame(X).assign(file="a.jpg"), "column 'file' holds"),
    "missing in a data frame": (
        pd.DataFrame(spoiled(3, np.nan)).astype("Float64"),
        "1 rows hold NaN or infinity, the first is row 3",
    ),
    "NaN": (spoiled((7, 2), np.nan), "1 rows hold NaN or infinity, the first is row 7"),
    "infinity": (spoiled((7, 2), -np.inf), "1 rows hold NaN or infinity, the first is row 7"),
    "zeros": (spoiled([2, 4], 0), "2 rows have length zero, the first is row 2"),
    "tiny": (spoiled(5, 1e-20), "1 rows are too short to be normalised"),
    "tiny in single precision": (
        spoiled(5, 1e-25).astype(np.float32),
        "1 rows are too short to be normalised",
    ),
    "huge in single precision": (
        spoiled(5, 1e30).astype(np.float32),
        "1 rows are too long to be normalised",
    ),
    "one row": (
        X[0],
        "have the shape (16,), expected (N, D) or (R, N, D); one image is a row, x[None]",
    ),
    "four dimensions": (X[None, None], "have the shape (1, 1, 20, 16)"),
    "transposed": (X.T, "have the shape (16, 20) and look transposed; give x.T"),
    "narrow": (X[:, :5], "train features are 5 wide, text features 16"),
    "no columns": (X[:, :0], "train features are 0 wide, text features 16"),
    "nothing": (None, "must be real numbers, not object"),
}


@pytest.mark.parametrize("kind", WRONG_FEATURES)
def test_other_features_are_refused_by_name(kind):
    x, told = WRONG_FEATURES[kind]
    message = refused(partial(features_problem, train=(x, Y)))
    assert told in message and "train features" in message


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_overflow_of_half_precision_is_named():
    told = refused(partial(features_problem, x=(X * 1e5).astype(np.float16)))
    assert (
        "20 rows hold NaN or infinity, the first is row 0; half precision holds at most 65504"
        in told
    )


@pytest.mark.parametrize("scale", [1e-10, 1e-3, 1.0, 1e5, 1e15])
def test_the_length_of_rows_changes_no_cosine(scale):
    plain, scaled = (
        features_problem(),
        features_problem(text=TEXT * scale, x=(X * scale).astype(np.float32)),
    )
    a, b = (METHODS["ZeroShot"](p).scores(p.features.test) for p in (plain, scaled))
    assert torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-3)


def test_text_rows_and_names_are_counted():
    more = np.vstack([TEXT, TEXT[:1]])
    assert refused(partial(features_problem, text=more)) == "4 class names but 5 text features"
    assert (
        refused(partial(features_problem, text_neg=TEXT[:3]))
        == "4 class names but 3 text_neg features"
    )
    assert "text features: 1 rows have length zero, the first is row 2" in refused(
        partial(features_problem, text=spoiled(2, 0, TEXT))
    )
    assert "look transposed" in refused(partial(features_problem, text=TEXT.T))


def test_views_come_first():
    views = np.stack([X, X + 0.01, X - 0.01])
    assert features_problem(train=(views, Y)).features.views.shape == (3, 20, D)
    assert "3 feature rows in 20 views (R, N, D)" in refused(
        partial(features_problem, train=(views.transpose(1, 0, 2), Y))
    )
    assert "the first is row 4 of view 2" in refused(
        partial(features_problem, train=(spoiled((2, 4), 0, views), Y))
    )


@pytest.mark.parametrize("names", ["abcd", [0, 1, 2, 3], [], None])
def test_class_names_are_texts(names):
    assert "class name" in refused(partial(features_problem, names=names))


def test_class_names_of_an_array():
    problem = features_problem(names=np.array(NAMES))
    assert problem.class_names == NAMES and type(problem.class_names[0]) is str


def test_a_logarithm_as_scale_is_named():
    with pytest.warns(UserWarning, match=r"CLIP's scale is exp\(4.6052\) = 100"):
        problem = features_problem(logit_scale=4.6052)
    assert problem.logit_scale == 4.6052
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert features_problem(logit_scale=torch.tensor(100.0)).logit_scale == 100
    for wrong in (0, -1, np.nan, "hundred"):
        assert "logit_scale" in refused(partial(features_problem, logit_scale=wrong))


def test_unit_rows_are_not_normalised_again():
    unit = torch.nn.functional.normalize(torch.tensor(TEXT, dtype=torch.float32), dim=-1)
    raw = torch.tensor(X, dtype=torch.float32)
    assert features_problem(text=unit, x=raw).features.text.equal(unit)
    assert as_features(raw, "x").data_ptr() == raw.data_ptr()


# --- sealed labels


@pytest.mark.parametrize(
    "peek",
    [
        list,
        np.asarray,
        torch.as_tensor,
        sorted,
        set,
        pd.Series,
        lambda y: y[0],
        lambda y: y == 1,
        lambda y: torch.zeros(3) == y,
        lambda y: 1 in y,
        lambda y: y.tolist(),
        bool,
        hash,
    ],
)
def test_sealed_labels_are_counted_and_nothing_else(peek):
    problem = few_shot("mini-digits", shots=1, views=1)
    images = problem.images("test")
    n = len(images)
    copies = copy.deepcopy(images).labels, pickle.loads(pickle.dumps(images)).labels
    for sealed in (
        problem.labels["test"],
        images.labels,
        features_problem().labels["test"],
        *copies,
    ):
        assert repr(sealed) == f"SealedLabels({len(sealed)})"
        with pytest.raises(SealedSplitError, match="sealed"):
            peek(sealed)
    part = images.subset(range(n))
    with pytest.raises(SealedSplitError, match="sealed"):
        peek(part.labels)
    assert len(part.labels) == n and "tensor" not in repr(images)


def test_results_do_not_depend_on_unreadable_test_labels():
    dataset = load_dataset("mini-digits")
    hidden = replace(
        dataset,
        splits={**dataset.splits, "test": replace(dataset.splits["test"], labels=Unreadable())},
    )
    options = dict(shots=2, views=2)
    open_problem, sealed_problem = few_shot(dataset, **options), few_shot(hidden, **options)
    for name in ("ZeroShot", "TipAdapter", "GDA"):
        chosen = [tune(METHODS[name], p, trials=2) for p in (open_problem, sealed_problem)]
        assert chosen[0] == chosen[1]
        scores = [
            fit(METHODS[name](p), p).scores(p.features.test) for p in (open_problem, sealed_problem)
        ]
        assert scores[0].equal(scores[1])
    with pytest.raises(AssertionError, match="were read"):
        evaluate(METHODS["ZeroShot"](sealed_problem), sealed_problem)
    arrays = features_problem(test=(X, Unreadable()))
    assert fit(METHODS["TipAdapter"](arrays), arrays).scores(X).shape == (20, K)


def test_labels_of_other_splits_stay_as_they_were():
    problem = few_shot("mini-digits", shots=1, views=1)
    for split in ("train", "val"):
        assert problem.images(split).labels is problem.labels[split]
    truth = load_dataset("mini-digits").splits["test"].labels
    assert problem.images("test").labels._labels.equal(truth)


# --- partners


@pytest.fixture(scope="module")
def digits():
    return {
        name: few_shot("mini-digits", backbone=name, shots=4, views=2)
        for name in ("mini", "mini-rn")
    }


@pytest.mark.parametrize("name", ["ZeroShot", "TipAdapter", "LinearProbe", "GDA"])
def test_another_backbone_of_equal_width(digits, name, tmp_path):
    own, other = digits["mini"], digits["mini-rn"]
    assert own.backbone.feature_width == other.backbone.feature_width
    method = fit(METHODS[name](own), own)
    method.save(tmp_path / "m.safetensors")
    for m in (method, METHODS[name].load(tmp_path / "m.safetensors")):
        told = refused(partial(evaluate, m, other))
        assert "was built on backbone mini (fp32" in told and "has backbone mini-rn (fp32" in told
        assert "has backbone mini-rn" in refused(partial(fit, m, other))
        assert evaluate(m, own) == evaluate(method, own)


@pytest.mark.parametrize("name", ["CoOp", "VPT"])
def test_methods_that_run_towers_compare_backbones(digits, name):
    method = METHODS[name](digits["mini"], epochs=1)
    assert "has backbone mini-rn" in refused(partial(evaluate, method, digits["mini-rn"]))


def in_order(order):
    place = {k: i for i, k in enumerate(order)}
    y = np.array([place[k] for k in Y])
    return features_problem([NAMES[k] for k in order], TEXT[order], y=y)


@pytest.mark.parametrize("name", ["TaskRes", "TipAdapter", "GDA", "LinearProbe"])
def test_classes_in_another_order(name):
    own, turned = in_order([0, 1, 2, 3]), in_order([3, 1, 2, 0])
    method = METHODS[name](own)
    told = refused(partial(fit, method, turned))
    assert "in another order: class 0 is 'ash' there and 'elm' in" in told
    fit(method, own)
    assert (
        evaluate(method, turned)["accuracy"] == evaluate(method, own)["accuracy"]
    )  # for testing, columns are selected


def test_fitting_wants_the_problem_that_the_method_was_built_on():
    own = features_problem()
    assert "4 classes" in refused(
        partial(fit, METHODS["TaskRes"](own), features_problem(NAMES[:3], TEXT[:3], X[:15], Y[:15]))
    )
    other_text = features_problem(text=TEXT[:, ::-1].copy(), x=X[:, ::-1].copy())
    assert "its 'text' is not that of" in refused(partial(fit, METHODS["TaskRes"](own), other_text))
    other_support = features_problem(x=X + 0.5)
    assert "its 'keys' is not that of" in refused(
        partial(fit, METHODS["TipAdapter"](own), other_support)
    )
    fit(METHODS["TaskRes"](own), other_support)  # it holds nothing of the support images


@pytest.mark.parametrize("name", ["ZeroShot", "TipAdapter", "TaskRes"])
def test_features_of_another_width_or_scale(name):
    own = features_problem()
    method = METHODS[name](own)
    narrow = features_problem(text=TEXT[:, :8], x=X[:, :8])
    assert "was built on features 16 wide, but those of 4 classes are 8 wide" in refused(
        partial(evaluate, method, narrow)
    )
    assert "8 wide" in refused(partial(fit, method, narrow))
    assert "was built with logit_scale 100, but 4 classes has 50" in refused(
        partial(evaluate, method, features_problem(logit_scale=50))
    )
    assert (
        evaluate(method, features_problem(x=X + 0.01))["accuracy"] == 100
    )  # other images of the same width are fine


def test_other_data_and_part_of_the_classes_still_work(digits):
    own = digits["mini"]
    new = few_shot("mini-digits", shots=4, views=2, part="new")
    for name in ("TaskRes", "TipAdapter"):
        recipe = {"epochs": 1} if "epochs" in METHODS[name].recipe else {}
        method = fit(METHODS[name](own, **recipe), own)
        assert evaluate(method, new)["n"] == len(new.labels["test"])
    graph = fit(METHODS["GraphAdapter"](own, epochs=1), own)  # scores its own classes only
    assert "does not know" in refused(
        partial(evaluate, graph, few_shot("mini-shapes", shots=1, views=1))
    )
    again = few_shot("mini-digits", shots=4, views=2)
    assert evaluate(fit(METHODS["TipAdapter"](own), again), again) == evaluate(method, own)


def test_fit_many_and_loaded_methods_are_no_exception(digits, tmp_path):
    own = digits["mini"]
    runs = [
        (METHODS["TaskRes"], dict(epochs=1), own, 1),
        (METHODS["TaskRes"], dict(epochs=1), digits["mini-rn"], 1),
    ]
    first, second = fit_many(runs)
    assert evaluate(first, own)["n"] == evaluate(second, digits["mini-rn"])["n"]
    assert "has backbone mini (" in refused(partial(evaluate, second, own))


def test_every_method_can_be_fitted_twice_and_again_after_loading(tmp_path):
    problem = FewShotProblem(
        NAMES, features_problem().features, dict(train=Y, test=Y)
    )  # without provenance
    for name, cls in METHODS.classifiers().items():
        if cls.needs != {"features"} or "text_neg" in cls.defaults():
            continue
        recipe = {"epochs": 1} if "epochs" in cls.recipe else {}
        try:
            method = fit(cls(problem, **recipe), problem)
        except ValueError as error:
            assert "no 'text_neg' features" in str(error)
            continue
        scores = method.scores(X)
        assert fit(method, problem).scores(X).equal(scores), name
        method.save(tmp_path / "m.safetensors")
        loaded = cls.load(tmp_path / "m.safetensors")
        assert loaded.scores(X).equal(scores) and fit(loaded, problem).scores(X).equal(scores), name


def test_a_class_instead_of_a_method():
    problem = features_problem()
    for function in (fit, evaluate):
        message = refused(partial(function, METHODS["TaskRes"], problem))
        assert f"not the class TaskRes: {function.__name__}(TaskRes(problem), problem)" in message


def test_generation_and_classification_do_not_meet(digits):
    task = load_task("mini-vqa", train=8)
    tuner = GENERATION_METHODS["Adapter"](task)
    assert "generates text" in refused(partial(evaluate, tuner, digits["mini"]))
    assert "classifies" in refused(partial(evaluate, METHODS["ZeroShot"](digits["mini"]), task))


# --- prediction


@pytest.fixture(scope="module")
def zero_shot(digits):
    return METHODS["ZeroShot"](digits["mini"])


def test_features_of_every_form_are_features(zero_shot, digits):
    x = digits["mini"].features.test[:5]
    expected = zero_shot.scores(x)
    for given in (
        x.numpy(),
        x.tolist(),
        list(x),
        list(x.numpy()),
        pd.DataFrame(x.numpy()),
        x.double(),
        x.clone().requires_grad_(),
    ):
        assert zero_shot.scores(given).equal(expected)
        assert zero_shot.predict_proba(given).equal(expected.softmax(-1))
        table = zero_shot.predict_table(given)
        names = [zero_shot.class_names[k] for k in expected.argmax(1)]
        assert table["prediction"].tolist() == zero_shot.predict(given) == names


def test_pictures_of_every_form_are_pictures(zero_shot, digits, tmp_path):
    images = digits["mini"].images("test")
    array = images.items[:3]
    expected = zero_shot.scores([images[i] for i in range(3)])
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, pixels in zip(paths, array, strict=True):
        Image.fromarray(pixels).save(path)
    for given in (
        array,
        list(array),
        paths,
        [str(p) for p in paths],
        np.array([str(p) for p in paths]),
        pd.Series([str(p) for p in paths]),
        tuple(paths),
        (p for p in paths),
        images.subset(range(3)),
    ):
        assert zero_shot.scores(given).equal(expected)
    for one in (paths[0], str(paths[0]), array[0], images[0], array[:1]):
        assert zero_shot.scores(one).shape == (1, 10)
    grey = array[0, :, :, 0]
    assert zero_shot.scores(grey).equal(zero_shot.scores([grey]))
    assert zero_shot.scores(grey[..., None]).equal(zero_shot.scores(grey))


WIDE = np.ones((3, 96))
NO_INPUT = {
    "narrow": (WIDE[:, :5], "features (N, 96) of floats, got float64 (3, 5)"),
    "transposed": (WIDE.T, "got float64 (96, 3); it looks transposed, give x.T"),
    "one row": (WIDE[0], "got float64 (96,); one image's features are a row, x[None]"),
    "integers": (WIDE.astype(np.int64), "got int64 (3, 96)"),
    "16-bit integers": (
        WIDE.astype(np.uint16),
        "got uint16 (3, 96); a grey picture has the shape (H, W, 1)",
    ),
    "truth values": (WIDE > 0, "got bool (3, 96)"),
    "rows of integers": (WIDE.astype(int).tolist(), "as item 0 of a list"),
    "empty list": ([], "got an empty list"),
    "mixed": (["a.jpg", WIDE[0]], "item 0 is a picture, item 1 a row"),
    "batches of features": ([WIDE, WIDE], "got float64 (3, 96) (ndarray) as item 0 of a list"),
    "numbers": ([0.5, 0.5], "got 0.5 (float) as item 0"),
    "none": (None, "got NoneType"),
    "dict": ({"a": 1}, "got dict"),
    "none in a list": (["a.jpg", None], "got None (NoneType) as item 1"),
    "NaN": (np.where(WIDE > 0, np.nan, 0), "3 rows hold NaN or infinity"),
    "zeros": (WIDE * 0, "3 rows have length zero"),
}


@pytest.mark.parametrize("kind", NO_INPUT)
@pytest.mark.parametrize("verb", ["predict", "predict_table", "scores"])
def test_what_is_neither_is_refused(zero_shot, kind, verb):
    given, told = NO_INPUT[kind]
    assert told in refused(partial(getattr(zero_shot, verb), given))


def test_methods_that_read_images_refuse_features(digits):
    method = METHODS["VPT"](digits["mini"], epochs=1)
    for verb in (method.predict, method.scores, method.predict_table):
        assert "VPT reads images, not features" in refused(partial(verb, WIDE))


@pytest.fixture()
def alive(monkeypatch):
    "The largest number of opened pictures that were alive at once."
    seen = {"now": 0, "most": 0, "total": 0}
    opened = vlmadapt.methods.inputs.open_image

    def closed():
        seen["now"] -= 1

    def counting(item):
        image = opened(item)
        weakref.finalize(image, closed)
        seen["now"] += 1
        seen["total"] += 1
        seen["most"] = max(seen["most"], seen["now"])
        return image

    monkeypatch.setattr(vlmadapt.methods.inputs, "open_image", counting)
    return seen


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    "Forty photos, two of them broken and one missing."
    folder = tmp_path_factory.mktemp("album")
    files = [folder / f"{i:02}.png" for i in range(40)]
    for i, file in enumerate(files):
        Image.fromarray(RNG.integers(0, 255, (60, 60, 3), dtype=np.uint8)).save(file)
        if i in (3, 17):
            file.write_bytes(file.read_bytes()[:100])
    files[30].unlink()
    return files


@pytest.mark.parametrize("name", ["ZeroShot", "VPT"])
def test_photos_are_opened_one_by_one(digits, album, alive, name):
    good = [f for i, f in enumerate(album) if i not in (3, 17, 30)]
    method = METHODS[name](digits["mini"])
    plain = method.predict_table(good)
    assert alive["most"] <= 3 and alive["total"] == 37
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        table = method.predict_table(album, on_corrupt="skip")
    (skipped,) = [str(w.message) for w in told if "skipped" in str(w.message)]
    assert "skipped: 3 of 40 files" in skipped
    assert all(f"{number}.png" in skipped for number in ("03", "17", "30"))
    assert alive["most"] <= 3
    pd.testing.assert_frame_equal(table, plain)
    assert list(table.index) == [str(f) for f in good]
    with pytest.raises(ValueError, match="03.png: cannot be decoded"):
        method.predict_table(album)


def test_nothing_can_be_opened(zero_shot, album):
    with pytest.warns(UserWarning, match="skipped"):
        table = zero_shot.predict_table([album[3], album[17]], on_corrupt="skip")
    assert len(table) == 0 and list(table.columns[2:]) == zero_shot.class_names
    assert "on_corrupt" in refused(
        partial(zero_shot.predict_table, [album[0]], on_corrupt="ignore")
    )


def test_streaming_gives_the_same_scores_to_the_bit(digits, album):
    good = [f for i, f in enumerate(album) if i not in (3, 17, 30)]
    images = [Image.open(f).convert("RGB") for f in good]
    backbone = digits["mini"].backbone
    method = fit(METHODS["TipAdapter"](digits["mini"]), digits["mini"])
    x = backbone.encode_images(images)
    assert method.predict(good) == method.predict(x)
    assert method.scores(good).equal(method.scores(x))
    names = method.class_names[::-1]
    assert method.scores(good, names).equal(method.scores(x, names))


# --- cards


@pytest.fixture(scope="module")
def stored(digits, tmp_path_factory):
    "A file of TaskRes on mini, its tensors and its card."
    path = tmp_path_factory.mktemp("stored") / "m.safetensors"
    method = fit(METHODS["TaskRes"](digits["mini"], epochs=1), digits["mini"])
    method.save(path, accuracy=50.0)
    return path, *load_arrays(path), method


def written(path, tensors, card):
    save_arrays(path, tensors, card)
    return path


WRONG_CARDS = {
    "no class": (lambda t, c: c.pop("method"), "its card does not name one"),
    "another class": (
        lambda t, c: c.update(method="GDA"),
        "holds a method of class GDA, not TaskRes",
    ),
    "no names": (lambda t, c: c.pop("classnames"), "the card lacks 'classnames'"),
    "no trained": (lambda t, c: c.pop("trained"), "the card lacks 'trained'"),
    "no key": (lambda t, c: c.pop("backbone_key"), "the card lacks 'backbone_key'"),
    "key of nothing": (
        lambda t, c: c.update(backbone_key=None),
        "'backbone' and 'backbone_key', or neither",
    ),
    "names of another type": (
        lambda t, c: c.update(classnames="abc"),
        "card: classnames: input should be a valid list",
    ),
    "a name of another type": (
        lambda t, c: c["classnames"].__setitem__(2, 7),
        "card: classnames[2]: input should be a valid string",
    ),
    "fewer names": (
        lambda t, c: c["classnames"].pop(),
        "has 9 class names, but the tensors 10 classes",
    ),
    "more names": (
        lambda t, c: c["classnames"].append("ten"),
        "has 11 class names, but the tensors 10 classes",
    ),
    "negative scale": (
        lambda t, c: c.update(logit_scale=-1),
        "card: logit_scale: input should be greater than 0",
    ),
    "infinite scale": (
        lambda t, c: c.update(logit_scale=float("inf")),
        "card: logit_scale: input should be a finite number",
    ),
    "scale as text": (lambda t, c: c.update(logit_scale=None), "card: logit_scale"),
    "unknown precision": (lambda t, c: c.update(precision="int8"), "card: precision"),
    "unknown hyper-parameter": (
        lambda t, c: c["hyper_parameters"].update(alpah=1.0),
        "unknown TaskRes parameter 'alpah'; did you mean 'alpha'",
    ),
    "missing hyper-parameter": (
        lambda t, c: c["hyper_parameters"].pop("alpha"),
        "lacks the hyper-parameter 'alpha' of TaskRes",
    ),
    "hyper-parameter of another type": (
        lambda t, c: c["hyper_parameters"].update(alpha="much"),
        "much",
    ),
    "trained without tensor": (
        lambda t, c: c["trained"].append("W"),
        "calls 'W' trained, but the file holds no such tensor",
    ),
    "tensor lost": (
        lambda t, c: (t.pop("X"), c["trained"].clear()),
        "the tensors do not fit TaskRes",
    ),
    "constant lost": (lambda t, c: t.pop("text"), "the tensors do not fit TaskRes"),
    "another shape": (
        lambda t, c: t.update(X=t["X"][:, :7].clone()),
        "the tensors do not fit TaskRes",
    ),
    "fewer rows": (lambda t, c: t.update(X=t["X"][:9].clone()), "the tensors do not fit TaskRes"),
}


@pytest.mark.parametrize("kind", WRONG_CARDS)
def test_a_card_that_does_not_fit_is_refused(stored, tmp_path, kind):
    _, tensors, card, _ = stored
    tensors, card = dict(tensors), copy.deepcopy(card)
    change, told = WRONG_CARDS[kind]
    change(tensors, card)
    path = written(tmp_path / "forged.safetensors", tensors, card)
    message = refused(partial(METHODS["TaskRes"].load, path))
    assert told in message and str(path) in message


def test_a_file_that_is_no_method(tmp_path):
    path = written(tmp_path / "x.safetensors", {"x": torch.ones(2)}, {})
    assert "holds no method" in refused(partial(METHODS["TaskRes"].load, path))
    assert "holds no method" in refused(partial(vlmadapt.methods.cards.read_card, path))


def test_the_backbone_of_the_card_is_loaded_when_an_image_comes(stored, digits, monkeypatch):
    path, _, _, method = stored
    x, images = digits["mini"].features.test[:3], digits["mini"].images("test").subset(range(3))
    loaded = METHODS["TaskRes"].load(path)
    assert (
        loaded.backbone is None
        and loaded.scores(x).equal(method.scores(x))
        and loaded.backbone is None
    )
    assert (
        loaded.scores(images).equal(method.scores(images))
        and loaded.backbone.key == digits["mini"].backbone.key
    )

    def offline(*arguments, **options):
        raise OSError("no network\nand a long\ntraceback")

    monkeypatch.setattr(vlmadapt.methods.cards.card_backbone, "__defaults__", (offline,))
    told = refused(partial(METHODS["TaskRes"].load(path).predict, images))
    assert (
        "its backbone 'mini' cannot be loaded (no network and a long traceback); "
        "give features, or load the method with backbone=..." in told
    )


def test_a_method_on_features_has_no_backbone_to_load(tmp_path):
    problem = features_problem()
    METHODS["GDA"](problem).save(tmp_path / "m.safetensors")
    loaded = METHODS["GDA"].load(tmp_path / "m.safetensors")
    assert loaded.feature_width == D and loaded.scores(X).shape == (20, K)
    assert "was fitted on features and has no backbone: give features (N, 16)" in refused(
        partial(loaded.predict, np.zeros((8, 8, 3), np.uint8))
    )
    assert "was fitted on features without a backbone" in refused(
        partial(METHODS["GDA"].load, tmp_path / "m.safetensors", backbone="mini")
    )


def test_the_precision_is_that_of_the_card(tmp_path):
    problem = few_shot("mini-digits", load_backbone("mini", precision="bf16"), shots=2, views=1)
    method = METHODS["TaskRes"](problem, epochs=1)
    method.save(tmp_path / "m.safetensors")
    images = problem.images("test").subset(range(3))
    for backbone in (None, "mini"):
        loaded = METHODS["TaskRes"].load(tmp_path / "m.safetensors", backbone=backbone)
        assert (
            loaded.scores(images).equal(method.scores(images))
            and loaded.backbone.precision == "bf16"
        )
    told = refused(
        partial(
            METHODS["TaskRes"].load,
            tmp_path / "m.safetensors",
            backbone=load_backbone("mini", precision="fp32"),
        )
    )
    assert "not in fp32; use load_backbone('mini', precision='bf16')" in told


def test_generation_cards(tmp_path):
    task = load_task("mini-entailment", load_backbone("mini", precision="bf16"), train=8)
    tuner = GENERATION_METHODS["Adapter"](task)
    path = tmp_path / "t.safetensors"
    tuner.save(path, score=1.0)
    images, texts = task.images("val")[:4], task.prompts["val"][:4]
    for backbone in (None, "mini"):
        loaded = GENERATION_METHODS["Adapter"].load(path, backbone)
        assert loaded.backbone.precision == "bf16" and loaded.card["notes"] == {"score": 1.0}
        assert loaded.predict(images, texts) == tuner.predict(images, texts)
    assert set(tuner.predict(images, texts)) <= {"yes", "no", "open"}
    assert "precision='bf16'" in refused(
        partial(GENERATION_METHODS["Adapter"].load, path, load_backbone("mini", precision="fp32"))
    )
    assert "holds a method of class Adapter, not LoRA" in refused(
        partial(GENERATION_METHODS["LoRA"].load, path)
    )
    assert "has backbone mini (fp32" in refused(
        partial(evaluate, loaded, load_task("mini-entailment", train=8))
    )


WRONG_TUNERS = {
    "tensor lost": (lambda t, c: t.pop(sorted(t)[0]), "is missing"),
    "tensor too much": (lambda t, c: t.update(more=torch.ones(1)), "'more' is unknown"),
    "another shape": (
        lambda t, c: t.update({sorted(t)[0]: torch.ones(1, 2, 3, 4)}),
        "is (1, 2, 3, 4), not",
    ),
    "no key": (lambda t, c: c.pop("backbone_key"), "lacks 'backbone_key'"),
    "unknown hyper-parameter": (lambda t, c: c["hyper_parameters"].update(rnk=1), "unknown"),
    "names of another type": (lambda t, c: c.update(classnames=None), "card: classnames"),
}


@pytest.mark.parametrize("kind", WRONG_TUNERS)
def test_a_generation_card_that_does_not_fit_is_refused(tmp_path, kind):
    path = tmp_path / "t.safetensors"
    GENERATION_METHODS["BitFit"](load_task("mini-vqa", train=8)).save(path)
    tensors, card = load_arrays(path)
    change, told = WRONG_TUNERS[kind]
    change(tensors, card)
    assert told in refused(partial(GENERATION_METHODS["BitFit"].load, written(path, tensors, card)))


def test_inputs_without_a_known_width():
    assert as_inputs(WIDE).shape == (3, 96)


@pytest.mark.parametrize("name", GENERATION_METHODS)
def test_a_generation_method_refuses_a_classification_problem(name):
    problem = few_shot("mini-digits", shots=1)
    told = refused(partial(GENERATION_METHODS[name], problem))
    assert f"generates text, but {problem!r} is for a method that classifies" in told


@pytest.mark.parametrize("name", METHODS.classifiers())
def test_a_classifier_refuses_a_generation_problem(name):
    problem = load_task("mini-vqa", train=8)
    told = refused(partial(METHODS.classifiers()[name], problem))
    assert f"{name} classifies, but {problem!r} is for a method that generates text" in told
