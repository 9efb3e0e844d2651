"""Full and read-only disks, paths that cannot exist, and files that another process left behind.

Saving fails in one line (`CannotWrite`) and leaves nothing behind. The cache of features never
fails: what cannot be stored stays in memory, one warning says why, and the next process completes
the work.
"""

import contextlib
import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from vlmadapt.core.files import CannotWrite, write_json
from vlmadapt.core.tensors import load_arrays, save_arrays
from vlmadapt.data import datasets
from vlmadapt.data.datasets import rebuild_split
from vlmadapt.methods import METHODS
from vlmadapt.problems import cache as feature_store
from vlmadapt.problems.cache import cached, cached_rows
from vlmadapt.problems.classification import FewShotProblem

WIDTH = 64
ROWS = torch.arange(4000.0)[:, None] * torch.ones(WIDTH)  # one megabyte
MORE = ROWS.repeat(4, 1)
SHARD = 1000  # rows, 256 kB


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    "An empty cache, and a process that has warned of none."
    monkeypatch.setenv("VLMADAPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(feature_store, "_warned_of", set())
    monkeypatch.setattr(feature_store, "_verified", {})
    feature_store._in_memory.clear()
    return tmp_path / "cache"


@pytest.fixture
def disk(tmp_path):
    "Function of a size in kB: a disk of its own; skipped where mounting is not permitted."
    mounted = []

    def mount(size):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting is not permitted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def read_only(folder):
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


def enlarge(folder, size):
    subprocess.run(["mount", "-o", f"remount,size={size}k", str(folder)], check=True)


@contextlib.contextmanager
def warned():
    "The messages of the warnings in the block."
    messages = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(w.message) for w in caught]


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def leftovers(folder):
    "Files that no reader looks for."
    return [name for name in files(folder) if name.endswith(".tmp")]


class Encoder:
    "Makes rows, and counts how often."

    def __init__(self, rows=ROWS):
        self.rows, self.calls = rows, 0

    def whole(self):
        self.calls += 1
        return self.rows

    def __call__(self, start, stop, batch_size):
        self.calls += 1
        return self.rows[start:stop]


def stored(encoder):
    "The rows of an encoder through the cache: whole, and in shards."
    x = cached(encoder.whole, what="disks")
    y = cached_rows(encoder, len(encoder.rows), lambda: 8, shard=SHARD, what="disks")
    return x, y


def unwritable(tmp_path):
    "Paths where no file can be made, also not by root."
    (tmp_path / "file").write_text("a file")
    return [
        tmp_path / "file/below",
        tmp_path / ("n" * 300),
        tmp_path / "/".join(["d" * 200] * 25),
        Path("/proc/none"),
        tmp_path / "a\0b",
    ]


def one_line(error, *parts):
    text = str(error.value)
    assert isinstance(error.value, CannotWrite) and len(text.splitlines()) == 1 and len(text) < 500
    for part in parts:
        assert part in text
    return text


# --- the cache


@pytest.mark.parametrize("number", range(5))
def test_a_cache_that_cannot_exist(tmp_path, monkeypatch, number):
    "Features are computed once, kept in memory, and one warning says so."
    path = unwritable(tmp_path)[number]
    if number != 4:  # the environment holds no NUL
        monkeypatch.setenv("VLMADAPT_CACHE", str(path))
    else:
        monkeypatch.setattr(feature_store, "cache_root", lambda: path)
    encoder = Encoder()
    with warned() as messages:
        x, y = stored(encoder)
        assert x.equal(ROWS) and y.equal(ROWS)
        again = stored(encoder)
    assert again[0] is x and again[1] is y and encoder.calls == 1 + 4
    assert len(messages) == 1 and len(messages[0].splitlines()) == 1
    assert "not stored for the next process" in messages[0] and "VLMADAPT_CACHE" in messages[0]
    assert not (tmp_path / "cache").exists()


def test_features_in_memory_are_freed_with_their_problem(tmp_path, monkeypatch):
    monkeypatch.setenv("VLMADAPT_CACHE", str(unwritable(tmp_path)[0]))
    encoder = Encoder(torch.ones(3, 2))
    with warned():
        cached(lambda: encoder.whole().clone(), what="freed")
        cached(lambda: encoder.whole().clone(), what="freed")
    assert encoder.calls == 2 and len(feature_store._in_memory) == 0


def test_a_full_disk(disk, monkeypatch):
    "What does not fit stays in memory; what fits is stored; the next process makes only the rest."
    folder = disk(1400)  # the whole array, or five shards
    monkeypatch.setenv("VLMADAPT_CACHE", str(folder))
    encoder = Encoder()
    with warned() as messages:
        x, y = stored(encoder)
    assert x.equal(ROWS) and y.equal(ROWS) and encoder.calls == 5
    assert len(messages) == 1 and "No space left on device" in messages[0]
    assert not leftovers(folder)
    assert all(load_arrays(path) for path in folder.rglob("*.safetensors"))  # none is half
    shards = len(list(folder.rglob("*.shards/*.safetensors")))
    feature_store._in_memory.clear()
    enlarge(folder, 8000)
    with warned() as messages:
        again = stored(encoder)
    assert again[0].equal(ROWS) and again[1].equal(ROWS) and not messages
    assert encoder.calls == 5 + (4 - shards) and not list(folder.rglob("*.shards"))
    assert len(list(folder.rglob("*.npy"))) == 1 and not leftovers(folder)


def test_a_disk_that_holds_the_shards_but_not_the_whole(disk, monkeypatch):
    "The memory-mapped file is an error and not a bus error; the shards stay for the next process."
    folder = disk(5500)
    monkeypatch.setenv("VLMADAPT_CACHE", str(folder))
    encoder = Encoder(MORE)

    def rows():
        return cached_rows(encoder, len(MORE), lambda: 8, shard=SHARD, what="disks")

    with warned() as messages:
        x = rows()
    assert x.equal(MORE) and encoder.calls == 16 and len(messages) == 1
    assert ".npy cannot be written: No space left on device" in messages[0]
    assert not list(folder.rglob("*.npy*")) and not leftovers(folder)
    feature_store._in_memory.clear()
    enlarge(folder, 20_000)
    assert rows().equal(MORE) and encoder.calls == 16 and not list(folder.rglob("*.shards"))


def test_a_read_only_cache_that_holds_everything(disk, monkeypatch):
    folder = disk(8000)
    monkeypatch.setenv("VLMADAPT_CACHE", str(folder))
    encoder = Encoder()
    stored(encoder)
    read_only(folder)
    before = files(folder)
    with warned() as messages:
        x, y = stored(encoder)
    assert x.equal(ROWS) and y.equal(ROWS) and encoder.calls == 5 and not messages
    y[0] = 7  # a private copy
    assert stored(encoder)[1].equal(ROWS) and files(folder) == before


def test_a_read_only_cache_that_lacks_something(disk, monkeypatch):
    folder = disk(8000)
    monkeypatch.setenv("VLMADAPT_CACHE", str(folder))
    encoder = Encoder()
    x = cached(encoder.whole, what="disks")
    read_only(folder)
    with warned() as messages:
        again = stored(encoder)
        stored(encoder)
    assert again[0].equal(x) and again[1].equal(ROWS)
    assert encoder.calls == 5 and len(messages) == 1 and "Read-only" in messages[0]


def test_reading_takes_no_lock(cache):
    encoder = Encoder()
    stored(encoder)
    for lock in (cache / "locks").iterdir():
        lock.unlink()
    (cache / "locks").rmdir()
    (cache / "locks").write_text("no folder, so no lock")
    with warned() as messages:
        assert stored(encoder)[1].equal(ROWS)
    assert encoder.calls == 5 and not messages


def test_temporary_files_of_killed_processes_are_removed(cache):
    encoder = Encoder()
    stored(encoder)
    whole, rows = (next((cache / "features").glob(f"*.{end}")) for end in ("safetensors", "npy"))
    shards = rows.with_suffix(".shards")
    shards.mkdir()
    left = [
        whole.with_name(f".{whole.name}.0123456789ab.tmp"),
        rows.with_name(f".{rows.name}.0123456789ab.tmp"),
        rows.with_name(f".{rows.name}.json.0123456789ab.tmp"),
        shards / ".0.safetensors.0123456789ab.tmp",
        shards / ".plan.json.0123456789ab.tmp",
    ]
    other = whole.with_name(f".{'0' * 20}.safetensors.0123456789ab.tmp")  # of another key
    for path in (*left, other):
        path.write_bytes(b"half")
    whole.unlink()
    rows.unlink()
    stored(encoder)
    assert leftovers(cache) == [f"features/{other.name}"] and encoder.calls == 10


def test_a_process_killed_while_it_writes(cache):
    "The file that it was writing is removed by the next process that makes it."
    program = """
        import os, torch
        from vlmadapt.core import files
        from vlmadapt.problems.cache import cached_rows

        def die(moment, path):
            if path.suffix == ".npy":
                os._exit(9)

        files.write_hooks.append(die)
        rows = torch.arange(4000.0)[:, None] * torch.ones(64)
        cached_rows(lambda a, b, n: rows[a:b], 4000, lambda: 8, shard=1000, what="disks")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
    assert done.returncode == 9 and len(leftovers(cache)) == 1
    encoder = Encoder()
    x = cached_rows(encoder, 4000, lambda: 8, shard=SHARD, what="disks")
    assert x.equal(ROWS) and encoder.calls == 0 and not leftovers(cache)


def test_the_digest_of_a_memory_map_is_compared_once_and_when_the_file_changes(cache, monkeypatch):
    encoder, compared = Encoder(), []
    hash_file = feature_store.hash_file

    def counted(path, kind):
        compared.append(path)
        return hash_file(path, kind)

    monkeypatch.setattr(feature_store, "hash_file", counted)

    def rows():
        return cached_rows(encoder, 4000, lambda: 8, shard=SHARD, what="disks")

    for _ in range(3):
        assert rows().equal(ROWS)
    assert len(compared) == 1 and encoder.calls == 4
    (path,) = cache.rglob("*.npy")
    content = path.read_bytes()
    path.write_bytes(content)  # the same content, another time
    assert rows().equal(ROWS) and len(compared) == 2


def other_shape(path):
    np.save(path, np.zeros((2000, 2 * WIDTH), np.float32))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def without_record(path):
    path.with_name(f"{path.name}.json").unlink()


def record_of_another_shape(path):
    file = path.with_name(f"{path.name}.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shape": [2000, 128]}))


@pytest.mark.parametrize(
    "damage, message",
    [
        (flip, "content and digest differ"),
        (empty, "0 bytes, 1024128 expected"),
        (cut, "1024028 bytes, 1024128 expected"),
        (other_shape, "content and digest differ"),
        (without_record, "no such file"),
        (record_of_another_shape, "shape or type are not as recorded"),
    ],
)
def test_a_damaged_memory_map_is_named_and_encoded_again(cache, damage, message):
    encoder = Encoder()

    def rows():
        return cached_rows(encoder, 4000, lambda: 8, shard=SHARD, what="disks")

    rows()
    (path,) = cache.rglob("*.npy")
    damage(path)
    with warned() as messages:
        assert rows().equal(ROWS)
    assert len(messages) == 1 and path.name in messages[0] and message in messages[0]
    assert messages[0].endswith("encoding again") and encoder.calls == 8
    with warned() as messages:
        assert rows().equal(ROWS)
    assert not messages and encoder.calls == 8


# --- what is saved on request


def small_method():
    x = torch.eye(3, 8)
    return METHODS["TaskRes"](
        FewShotProblem.from_features(["a", "b", "c"], x, train=(x, [0, 1, 2]))
    )


SAVERS = {
    "method": lambda path: small_method().save(path),
    "arrays": lambda path: save_arrays(path, {"x": ROWS}),
    "JSON": lambda path: write_json(path, {"x": list(range(100_000))}),
}


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
@pytest.mark.parametrize("number", range(5))
def test_saving_where_no_file_can_be(tmp_path, save, number):
    path = unwritable(tmp_path)[number]
    before = files(tmp_path)
    with pytest.raises(CannotWrite) as error:
        save(path)
    one_line(error, "cannot be written")
    assert files(tmp_path) == before


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
def test_saving_over_a_folder(tmp_path, save):
    (tmp_path / "there").mkdir()
    with pytest.raises(CannotWrite) as error:
        save(tmp_path / "there")
    one_line(error, "there cannot be written")
    assert files(tmp_path) == []


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
def test_saving_on_a_full_disk(disk, save):
    "The file that was there stays, and nothing else; with space the same call succeeds."
    folder = disk(40)
    (folder / "filler").write_bytes(b"0" * 36_000)
    (folder / "old").write_text("old")
    with pytest.raises(CannotWrite) as error:
        save(folder / "old")
    one_line(error, "old cannot be written")
    assert files(folder) == ["filler", "old"] and (folder / "old").read_text() == "old"
    enlarge(folder, 4000)
    save(folder / "old")
    assert files(folder) == ["filler", "old"] and (folder / "old").stat().st_size > 3


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
def test_saving_on_a_read_only_disk(disk, save):
    folder = disk(100)
    read_only(folder)
    with pytest.raises(CannotWrite) as error:
        save(folder / "new")
    assert "Read-only file system" in one_line(error, "new cannot be written")


def flowers_on(folder):
    "The lists of OxfordFlowers, made for so many images."
    from scipy.io import savemat

    own = folder / "oxford_flowers"
    own.mkdir()
    savemat(own / "imagelabels.mat", {"labels": np.arange(4000)[None] % 4 + 1})
    names = {str(k): f"flower {k}" for k in range(1, 5)}
    (own / "cat_to_name.json").write_text(json.dumps(names))
    return own


def test_a_split_is_rebuilt_whole_or_not_at_all(disk):
    folder = disk(100)
    own = flowers_on(folder)
    before = files(folder)
    with pytest.raises(CannotWrite) as error:
        rebuild_split("oxford_flowers", folder)
    assert "No space left" in one_line(error, datasets.REBUILT)
    assert files(folder) == before
    enlarge(folder, 4000)
    path = rebuild_split("oxford_flowers", folder)
    assert path == own / datasets.REBUILT and len(json.loads(path.read_text())["train"]) == 2000
    path.unlink()
    read_only(folder)
    with pytest.raises(CannotWrite) as error:
        rebuild_split("oxford_flowers", folder)
    one_line(error, "Read-only file system")


LIMITED = """
    import json, os, resource, sys, warnings
    from pathlib import Path
    import torch
    from vlmadapt.core.files import CannotWrite, write_json
    from vlmadapt.core.tensors import save_arrays
    from vlmadapt.problems.cache import cached, cached_rows

    folder, limit = Path(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    rows = torch.arange(4000.0)[:, None] * torch.ones(64)
    report = {}
    for name, save in (
        ("arrays", lambda path: save_arrays(path, {"x": rows})),
        ("json", lambda path: write_json(path, list(range(200_000)))),
    ):
        try:
            save(folder / name)
        except CannotWrite as e:
            report[name] = str(e)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        x = cached(lambda: rows, what="limit")
        y = cached_rows(lambda a, b, n: rows[a:b], 4000, lambda: 8, shard=1000, what="limit")
    report["equal"] = x.equal(rows) and y.equal(rows)
    report["warnings"] = [str(w.message) for w in found]
    print(json.dumps(report))
"""


@pytest.mark.parametrize("limit", [100_000, 500_000])
def test_files_that_may_not_grow(tmp_path, cache, limit):
    "A limit of the process is met like a full disk: neither a signal nor a bus error ends it."
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", textwrap.dedent(LIMITED), str(tmp_path / "out"), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert (
        report["equal"]
        and len(report["warnings"]) == 1
        and "File too large" in report["warnings"][0]
    )
    assert "File too large" in report["json"] and "arrays cannot be written" in report["arrays"]
    assert files(tmp_path / "out") == [] and not leftovers(cache)
    encoder = Encoder()
    x = cached_rows(encoder, 4000, lambda: 8, shard=SHARD, what="limit")
    assert x.equal(ROWS) and encoder.calls == (4 if limit < 250_000 else 0)


# --- where things are written


def test_nothing_is_written_outside_the_cache(tmp_path, cache):
    "What a key is made of never becomes part of a path."
    before = files(tmp_path)
    for name in ("../../outside", "/etc/outside", "a/b", "nul\0", ".", "x" * 5000):
        assert cached(lambda: torch.ones(1), what=name, backbone=name).equal(torch.ones(1))
    assert before == [] and all(name.startswith("cache/") for name in files(tmp_path))
    assert all(len(path.stem) == 20 for path in (cache / "features").iterdir())


@pytest.mark.parametrize("name", ["../outside", "/etc", "a/b", ""])
def test_names_of_datasets_are_not_paths(tmp_path, name):
    with pytest.raises(ValueError, match="unknown dataset"):
        rebuild_split(name, tmp_path)
    assert os.listdir(tmp_path) == []
