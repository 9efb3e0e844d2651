"Downloads from a server on this machine that cuts connections, changes its files, lies about them, or is not there."

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT

from vlmadapt.core.hashing import digest
from vlmadapt.data import downloads
from vlmadapt.data.annotations import class_folders
from vlmadapt.data.benchmarks import BENCHMARKS, Benchmark, Source
from vlmadapt.data.downloads import (
    Gone,
    NoRoom,
    Refused,
    fetch,
    prepare,
    resolve,
    state,
    unpack,
    vlmadapt_data,
)

IMAGES = [f"{c}/{c}_{i}.jpg" for c in ("banded", "dotted") for i in range(4)]
SPLIT = json.dumps(
    {
        part: [[p, int(p[0] == "d"), p.split("/")[0]] for p in IMAGES[k::4]]
        for k, part in enumerate(("train", "val", "test"))
    }
).encode()
FAST = dict(tries=3, wait=0.01, timeout=5)


class Host:
    "A server: `files` by path, `cut[path]` the bytes after which connections break, one per request; `asked` holds the Range of each request."

    def __init__(self):
        self.files, self.cut, self.etag, self.headers, self.asked, self.slow = (
            {},
            {},
            {},
            {},
            [],
            0.0,
        )
        host = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_HEAD(self):
                self.answer(False)

            def do_GET(self):
                self.answer(True)

            def answer(self, body):
                host.answer(self, self.path.partition("?")[0], body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, h, path, body):
        asked = h.headers.get("Range")
        if body:
            self.asked.append((path, asked))
        if path not in self.files:
            return h.send_error(404)
        data, tag = self.files[path], self.etag.get(path, '"1"')
        start = 0
        if asked and tag and h.headers.get("If-Range") == tag:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(data):
                h.send_response(416)
                h.send_header("Content-Range", f"bytes */{len(data)}")
                h.send_header("Content-Length", "0")
                return h.end_headers()
        h.send_response(206 if start else 200)
        if start:
            h.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if tag:
            h.send_header("ETag", tag)
        for k, v in self.headers.get(path, {}).items():
            h.send_header(k, v)
        h.send_header("Content-Length", str(len(data) - start))
        h.end_headers()
        if not body:
            return None
        cuts = self.cut.get(path) or [len(data)]
        end = cuts.pop(0) if path in self.cut else len(data)
        for at in range(start, end, 4096):
            h.wfile.write(data[at : min(at + 4096, end)])
            time.sleep(self.slow)
        h.close_connection = True


@pytest.fixture
def host():
    h = Host()
    yield h
    h.server.shutdown()
    h.server.server_close()


DATA = os.urandom(100_000)


def test_resume_after_a_cut_connection(host, tmp_path):
    host.files["/a.bin"] = DATA
    host.cut["/a.bin"] = [30_000, 70_000, 100_000]
    hash = "sha256:" + __import__("hashlib").sha256(DATA).hexdigest()
    fetch(Source(f"{host.url}/a.bin", hash), tmp_path / "a.bin", **FAST)
    assert (tmp_path / "a.bin").read_bytes() == DATA and [r for _, r in host.asked] == [
        None,
        "bytes=30000-",
        "bytes=70000-",
    ]  # nothing twice
    assert os.listdir(tmp_path) == ["a.bin"]


def test_resume_by_a_later_process(host, tmp_path):
    "A process that is killed in the middle leaves a part; the next one asks for the rest."
    host.files["/a.bin"] = DATA * 20
    host.slow = 0.005
    code = f"from pathlib import Path; from vlmadapt.data.benchmarks import Source; from vlmadapt.data.downloads import fetch; fetch(Source({host.url + '/a.bin'!r}), Path({str(tmp_path / 'a.bin')!r}))"
    run = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"},
    )
    part = tmp_path / "a.bin.part"
    until = time.time() + 60
    while not (part.exists() and part.stat().st_size > 300_000) and time.time() < until:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    host.slow = 0.0
    kept = part.stat().st_size
    assert 300_000 < kept < 2_000_000 and not (tmp_path / "a.bin").exists()
    fetch(Source(f"{host.url}/a.bin"), tmp_path / "a.bin", **FAST)
    assert (tmp_path / "a.bin").read_bytes() == DATA * 20 and host.asked[-1][1] == f"bytes={kept}-"


def test_a_file_that_changed_is_fetched_from_the_start(host, tmp_path):
    host.files["/a.bin"] = DATA
    host.cut["/a.bin"] = [30_000] * 3
    with pytest.raises(Gone, match="cut after 30,000 of 100,000 bytes"):
        fetch(Source(f"{host.url}/a.bin"), tmp_path / "a.bin", tries=1)
    host.files["/a.bin"], host.etag["/a.bin"] = DATA[::-1], '"2"'
    del host.cut["/a.bin"]
    fetch(Source(f"{host.url}/a.bin"), tmp_path / "a.bin", **FAST)
    assert (tmp_path / "a.bin").read_bytes() == DATA[::-1]


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_validator_nothing_is_resumed(host, tmp_path, etag):
    host.files["/a.bin"], host.etag["/a.bin"] = DATA, etag
    host.cut["/a.bin"] = [30_000, 100_000]
    fetch(Source(f"{host.url}/a.bin"), tmp_path / "a.bin", **FAST)
    assert (tmp_path / "a.bin").read_bytes() == DATA and [r for _, r in host.asked] == [None, None]


def test_a_part_that_is_whole_already(host, tmp_path):
    host.files["/a.bin"] = DATA
    (tmp_path / "a.bin.part").write_bytes(DATA)
    downloads.write_json(
        tmp_path / "a.bin.part.json", dict(url=f"{host.url}/a.bin", validator='"1"')
    )
    fetch(Source(f"{host.url}/a.bin"), tmp_path / "a.bin", **FAST)
    assert (tmp_path / "a.bin").read_bytes() == DATA and len(host.asked) == 1
    (tmp_path / "b.bin.part").write_bytes(DATA * 2)
    downloads.write_json(
        tmp_path / "b.bin.part.json", dict(url=f"{host.url}/a.bin", validator='"1"')
    )
    fetch(
        Source(f"{host.url}/a.bin"), tmp_path / "b.bin", **FAST
    )  # longer than the file: from the start
    assert (tmp_path / "b.bin").read_bytes() == DATA


def test_wrong_hash_is_refused(host, tmp_path):
    host.files["/a.bin"] = DATA
    for hash in ("sha256:" + "0" * 64, "md5:" + "0" * 32, "git:" + "0" * 40):
        with pytest.raises(Refused, match=f"its hash is {hash[:3]}.*, not {hash}"):
            fetch(Source(f"{host.url}/a.bin", hash), tmp_path / "a.bin", **FAST)
    assert os.listdir(tmp_path) == []  # no part is left to go on from
    pins = {f"{host.url}/a.bin": fetch(Source(f"{host.url}/a.bin"), tmp_path / "a.bin", **FAST)}
    assert list(pins.values()) == [digest(tmp_path / "a.bin", "sha256")]
    host.files["/a.bin"] = DATA[::-1]
    with pytest.raises(Refused):
        fetch(
            Source(f"{host.url}/a.bin"), tmp_path / "b.bin", pins, **FAST
        )  # not what it was the first time


def test_the_hash_that_the_hub_says(host, tmp_path, monkeypatch):
    "The Hugging Face hub names a file's sha256, or git's id, before it is downloaded."
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", host.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    path = "/some/where/resolve/main/a.zip"
    host.files[path] = DATA
    host.headers[path] = {
        "X-Linked-Etag": '"' + "0" * 64 + '"',
        "X-Linked-Size": "100000",
        "X-Repo-Commit": "1" * 40,
    }
    with pytest.raises(Refused, match="not sha256:000"):
        fetch(Source(host.url + path), tmp_path / "a.zip", **FAST)
    (tmp_path / "x").write_bytes(DATA)
    host.headers[path]["X-Linked-Etag"] = '"' + digest(tmp_path / "x", "sha256")[7:] + '"'
    fetch(Source(host.url + path), tmp_path / "a.zip", **FAST)
    host.files["/api/datasets/some/dtd/tree/main"] = json.dumps(
        [dict(type="file", path=p, size=3, oid="1" * 40) for p in ("README.md", "Textures.tar.gz")]
    ).encode()
    assert (
        resolve(Source(f"{host.url}/datasets/some/dtd")).url
        == f"{host.url}/datasets/some/dtd/resolve/main/Textures.tar.gz"
    )
    with pytest.raises(Gone):
        resolve(Source(f"{host.url}/datasets/some/nothing"))


def archive(folder, kind="zip", name="dtd", base="dtd"):
    "The images of a small dataset packed."
    for p in IMAGES:
        (folder / "pack" / base / "images" / p).parent.mkdir(parents=True, exist_ok=True)
        (folder / "pack" / base / "images" / p).write_text(p)
    return Path(shutil.make_archive(folder / name, kind, folder / "pack")).read_bytes()


@pytest.fixture
def row(host, tmp_path):
    host.files |= {"/dtd.zip": archive(tmp_path), "/split.json": SPLIT}
    (tmp_path / "split").write_bytes(SPLIT)
    hash = digest(tmp_path / "split", "sha256")
    return Benchmark(
        "dtd",
        "images",
        2,
        (2, 2, 2),
        class_folders,
        "split.json",
        hash,
        sources={
            "images": (Source(f"{host.url}/dtd.zip"),),
            "split.json": (Source(f"{host.url}/split.json", hash),),
        },
    )


def with_images(row, *sources):
    return Benchmark(**{**vars(row), "sources": row.sources | {"images": sources}})


def test_first_source_dead_and_second_used(host, tmp_path, row, capsys):
    dead = [
        Source("http://127.0.0.1:9/dtd.zip"),
        Source(f"{host.url}/none.zip"),
        Source(f"{host.url}/dtd.zip", "md5:" + "0" * 32),
    ]
    d = prepare("dtd", tmp_path / "data", with_images(row, *dead, *row.sources["images"]), **FAST)
    told = capsys.readouterr().err
    assert (
        [len(x) for x in d.splits.values()] == [2, 2, 2]
        and "127.0.0.1:9/dtd.zip" in told
        and "none.zip: 404" in told
        and "its hash is md5" in told
    )
    assert sorted(os.listdir(tmp_path / "data/dtd")) == ["images", "split.json"] and not list(
        (tmp_path / "data/.downloads").rglob("*.*ip")
    )
    asked = len(host.asked)
    prepare("dtd", tmp_path / "data", row)
    assert len(host.asked) == asked  # a folder that is whole is left alone


def test_no_source_left(host, tmp_path, row):
    with pytest.raises(Gone) as e:
        prepare("dtd", tmp_path / "data", with_images(row, Source(f"{host.url}/none.zip")), **FAST)
    for said in (
        "data/dtd/images is missing",
        "none.zip: 404",
        "vlmadapt_data dtd --use FILE",
        str(tmp_path / "data/dtd"),
    ):
        assert said in str(e.value)
    assert not (tmp_path / "data/dtd").exists()


def test_own_archive_and_own_split_file(tmp_path, row, host):
    (tmp_path / "mine.tgz").write_bytes(archive(tmp_path, "gztar", base="downloaded/Textures"))
    host.files.clear()
    with pytest.raises(Gone, match="split.json is missing"):
        prepare("dtd", tmp_path / "data", row, use=tmp_path / "mine.tgz", **FAST)
    (tmp_path / "any.json").write_bytes(SPLIT)
    assert prepare("dtd", tmp_path / "data", row, use=tmp_path / "any.json").note == "CoOp's split"


def test_a_page_instead_of_an_archive(host, tmp_path, row):
    host.files["/page.zip"] = b"<html>Quota exceeded</html>"
    with pytest.raises(Gone, match="page.zip: neither a zip nor a tar archive"):
        prepare("dtd", tmp_path / "data", with_images(row, Source(f"{host.url}/page.zip")), **FAST)


def test_a_split_file_in_an_archive_must_be_coops(host, tmp_path, row):
    shutil.copytree(tmp_path / "pack", tmp_path / "other")
    (tmp_path / "other/dtd/split.json").write_text("{}")
    host.files["/dtd.zip"] = Path(
        shutil.make_archive(tmp_path / "other", "zip", tmp_path / "other")
    ).read_bytes()
    assert (
        prepare("dtd", tmp_path / "data", row, **FAST).note == "CoOp's split"
    )  # fetched from its own address


def bad_tar(path, name="../evil.jpg", kind=tarfile.REGTYPE, link=""):
    with tarfile.open(path, "w:gz") as t:
        for n in ("dtd/images/banded/a.jpg", name):
            m = tarfile.TarInfo(n)
            if n == name:
                m.type, m.linkname = kind, link
            m.size = 1 if m.isreg() else 0
            t.addfile(m, io.BytesIO(b"x"))


def bad_zip(path, name="../evil.jpg", mode=0):
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("dtd/images/banded/a.jpg", "x")
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        z.writestr(info, "/etc")


BAD = dict(
    tar_up=(bad_tar, {}),
    tar_absolute=(bad_tar, dict(name="/tmp/vlmadapt-evil")),
    tar_deep=(bad_tar, dict(name="a/../../evil")),
    tar_device=(bad_tar, dict(name="dev", kind=tarfile.CHRTYPE)),
    tar_link_up=(bad_tar, dict(name="a", kind=tarfile.SYMTYPE, link="../../..")),
    tar_link_absolute=(bad_tar, dict(name="a", kind=tarfile.SYMTYPE, link="/etc")),
    tar_hard_link=(bad_tar, dict(name="a", kind=tarfile.LNKTYPE, link="../../x")),
    zip_up=(bad_zip, {}),
    zip_absolute=(bad_zip, dict(name="/tmp/vlmadapt-evil")),
    zip_backslash=(bad_zip, dict(name="..\\evil")),
    zip_drive=(bad_zip, dict(name="C:/evil")),
    zip_link=(bad_zip, dict(name="a", mode=0o120777)),
)


@pytest.mark.parametrize("case", BAD)
def test_unsafe_archives_are_refused(host, tmp_path, row, case):
    make, given = BAD[case]
    make(tmp_path / "bad.zip", **given)
    host.files["/bad.zip"] = (tmp_path / "bad.zip").read_bytes()
    outside = {p for p in tmp_path.rglob("*")}
    with pytest.raises(Gone, match="bad.zip: "):
        prepare(
            "dtd", tmp_path / "data/deep", with_images(row, Source(f"{host.url}/bad.zip")), **FAST
        )
    assert {
        p for p in tmp_path.rglob("*") if "data" not in p.relative_to(tmp_path).parts
    } == outside and not Path("/tmp/vlmadapt-evil").exists()
    assert not (tmp_path / "data/deep/dtd").exists() and not list(
        (tmp_path / "data/deep/.downloads/dtd").iterdir()
    )


@pytest.fixture
def small_disk(monkeypatch):
    def of(free):
        monkeypatch.setattr(
            downloads.shutil,
            "disk_usage",
            lambda path: shutil._ntuple_diskusage(10**12, 10**12 - free, free),
        )

    return of


def test_disk_too_small_is_said_before_the_start(host, tmp_path, row, small_disk):
    host.files["/dtd.zip"] += (
        b"\0" * 10_000_000
    )  # a file of 10 MB needs that and as much again unpacked
    small_disk(15_000_000)
    with pytest.raises(NoRoom, match=r"dtd.zip needs 0.02 GB in .*, and 0.0[12] GB are free"):
        prepare("dtd", tmp_path / "data", row, **FAST)
    assert not (tmp_path / "data/dtd").exists() and not list(
        (tmp_path / "data").rglob("*.part")
    )  # not a byte was written


def test_room_for_what_comes_out_of_an_archive(tmp_path, small_disk):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a", b"\0" * 50_000_000)
    with tarfile.open(tmp_path / "bomb.tgz", "w:gz") as t:
        m = tarfile.TarInfo("a")
        m.size = 50_000_000
        t.addfile(m, io.BytesIO(b"\0" * m.size))
    small_disk(20_000_000)
    for name in ("bomb.zip", "bomb.tgz"):
        with pytest.raises(NoRoom, match="0.05 GB"):
            unpack(tmp_path / name, tmp_path / "out")
        assert not list((tmp_path / "out").iterdir())


def test_interrupted_unpacking_leaves_no_half_dataset(host, tmp_path, row, monkeypatch):
    "Killed while it unpacks: no folder of the dataset stands there, and the next run makes it whole."
    code = (
        f"import vlmadapt.data.downloads as d, os, signal, zipfile\nfrom vlmadapt.data.benchmarks import *\nextract, n = zipfile.ZipFile.open, []\n"
        f"def slow(*a, **k):\n n.append(1)\n if len(n) > 5: os.kill(os.getpid(), signal.SIGKILL)\n return extract(*a, **k)\nzipfile.ZipFile.open = slow\n"
        f"d.prepare('dtd', {str(tmp_path / 'data')!r}, Benchmark('dtd', 'images', 2, (2, 2, 2), None, 'split.json', 'md5:', sources=dict(images=(Source({host.url + '/dtd.zip'!r}),))))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    left = list((tmp_path / "data/.downloads/dtd").glob("unpacked-*"))
    assert left and list(left[0].rglob("*.jpg")) and not (tmp_path / "data/dtd").exists()
    d = prepare("dtd", tmp_path / "data", row, **FAST)
    assert (
        sum(len(x) for x in d.splits.values()) == 6
        and len(list((tmp_path / "data/dtd/images").rglob("*.jpg"))) == 8
        and not list((tmp_path / "data/.downloads/dtd").glob("unpacked-*"))
    )


def test_the_command(host, tmp_path, row, monkeypatch, capsys):
    monkeypatch.setitem(BENCHMARKS, "dtd", row)
    monkeypatch.setattr(
        downloads, "receive", lambda *a, f=downloads.receive, **k: f(*a, **k, **FAST)
    )
    assert vlmadapt_data(["dtd"], root=str(tmp_path / "data")) == 0
    assert "dtd: 2 classes, 2 train, 2 val, 2 test" in capsys.readouterr().out
    assert (
        vlmadapt_data(["dtd"], root=str(tmp_path / "data"), check=True) == 0
        and "1 of 1 complete" in capsys.readouterr().out
    )
    assert vlmadapt_data(root=str(tmp_path / "data"), check=True) == 0  # what is absent is no error
    (tmp_path / "data/dtd/images/banded/banded_0.jpg").unlink()
    assert (
        vlmadapt_data(["dtd"], root=str(tmp_path / "data"), check=True) == 1
        and "1 of 6 images are missing, the first is" in capsys.readouterr().out
    )
    assert (
        vlmadapt_data(["imagenet", "mini-digits"], root=str(tmp_path / "data")) == 1
        and "needs an account" in capsys.readouterr().err
    )
    assert vlmadapt_data(["dtdd"]) == 2 and "did you mean 'dtd'?" in capsys.readouterr().err
    assert (
        vlmadapt_data(list=True) == 0
        and len([line for line in capsys.readouterr().out.splitlines() if " classes " in line])
        == 15
    )


def test_rebuilt_where_the_split_file_cannot_be_had(host, tmp_path, row, monkeypatch, capsys):
    del host.files["/split.json"]
    monkeypatch.setitem(BENCHMARKS, "dtd", row)
    assert (
        vlmadapt_data(["dtd"], root=str(tmp_path / "data")) == 1
        and "--rebuild_split" in capsys.readouterr().err
    )
    with pytest.warns(UserWarning, match="no split of CoOp's"):
        assert vlmadapt_data(["dtd"], root=str(tmp_path / "data"), rebuild_split=True) == 0
    assert "not CoOp's file" in capsys.readouterr().out
    with pytest.warns(UserWarning):
        assert state("dtd", row, tmp_path / "data")[0] == "other split"
