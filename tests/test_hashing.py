"Content keys: keys of stored results stay, different values have different keys."

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from vlmadapt.core.hashing import _canonical, content_key
from vlmadapt.core.tensors import load_arrays, save_arrays

FLOATS = np.arange(6.0).reshape(2, 3)
STORED = [  # keys of version 0.1
    ("485b7f38b26eac58a22e", dict(a=1, b=2.5, c=None, d=True, e="x")),
    ("81a13e013a4dc1b8ac2d", dict(a=[1, "x", (2,)], b={"c": []})),
    ("4130cadfdcee96fea935", dict(x=FLOATS)),
    ("6e2261b14bf3e52fc8f7", dict(x=torch.ones(2, 3))),
    ("b95f928c5e73a6813612", dict(x=torch.tensor(2))),
    ("1da99ef29991dddc0b81", dict(x=np.zeros((0, 3), np.int32))),
    ("2fae6b7b2f12c0c058ec", dict(x=np.array(["a", "bc"]))),
    ("09a4453de971474ced28", dict(x=np.array(["2020-01-01"], "M8[D]"))),
    ("4130cadfdcee96fea935", dict(x=np.asfortranarray(FLOATS))),
    ("851b59556831c523190f", dict(x=np.array(True))),
]


@pytest.mark.parametrize(("key", "parts"), STORED)
def test_keys_of_stored_results_stay(key, parts):
    assert content_key(**parts) == key


@pytest.mark.parametrize(
    "value",
    [
        np.array([object()], dtype=object),
        np.array(["a", None], dtype=object),
        np.array([(1, "x")], dtype=[("n", "i4"), ("o", object)]),
        {1: "x"},
        {1: "x", "1": "y"},
        {("a", "b"): 1},
        Path("x"),
        b"x",
        {1, 2},
        np.datetime64("2020-01-01"),
        np.complex64(1),
        torch.eye(2).to_sparse(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_content_is_refused(value):
    with pytest.raises(TypeError, match="content key"):
        content_key(a=value)


def test_a_list_is_not_taken_for_an_array():
    array = np.ones(2)
    form = _canonical(array)
    values = (array, form, ["list", *form], ["list", "list", *form])
    assert len({content_key(a=value) for value in values}) == len(values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_tensors_of_types_that_numpy_lacks(dtype, tmp_path):
    x = torch.tensor([[1.0, 2.0], [3.0, -4.0]]).to(dtype)
    other = x.clone()
    other[0, 0] = 2
    assert content_key(x=x) == content_key(x=x.T.contiguous().T) != content_key(x=other)
    assert content_key(x=x) != content_key(x=x.view(torch.int8 if x.itemsize == 1 else torch.int16))
    assert content_key(x=x[0, 0]) != content_key(x=x[0, :1])
    save_arrays(tmp_path / "adapter.safetensors", {"x": x})
    (loaded, _) = load_arrays(tmp_path / "adapter.safetensors")
    assert torch.equal(loaded["x"].float(), x.float()) and loaded["x"].dtype == dtype


@pytest.mark.parametrize(
    ("scalar", "value"),
    [(np.int64(3), 3), (np.float32(0.5), 0.5), (np.float64(0.1), 0.1), (np.bool_(True), True)],
    ids=repr,
)
def test_numpy_scalars_count_as_their_values(scalar, value):
    assert content_key(a=scalar) == content_key(a=value)


def test_views_of_tensors_have_the_key_of_their_values():
    z = torch.tensor([1 + 2j, 3 - 1j])
    assert content_key(a=z.conj()) == content_key(a=z.conj().resolve_conj())
    assert content_key(a=z.conj().imag) == content_key(a=-z.imag)


def test_hashing_copies_no_contiguous_array():
    x = np.zeros(2**24, dtype=np.uint8)
    tracemalloc.start()
    try:
        content_key(x=x)
        assert tracemalloc.get_traced_memory()[1] < x.nbytes / 4
    finally:
        tracemalloc.stop()
