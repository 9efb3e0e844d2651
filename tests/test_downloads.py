"""Downloads from a server that cuts connections, changes its files, lies about them, or is gone."""

import hashlib
import json
import os
import random
import shutil
import signal
import threading
import time
import zipfile
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import run_command
from hostile import IMAGES, fork, join, toy_benchmark

from vlmadapt.core.files import write_json
from vlmadapt.core.hashing import hash_file
from vlmadapt.data import transfers
from vlmadapt.data.archives import unpack
from vlmadapt.data.benchmarks import BENCHMARKS, Source
from vlmadapt.data.downloads import state
from vlmadapt.data.errors import InvalidFileError, NotEnoughSpaceError, NotFoundError
from vlmadapt.data.fetch import fetch
from vlmadapt.data.hub import resolve
from vlmadapt.data.preparation import prepare
from vlmadapt.data.transfers import Limits

DATA = random.Random(0).randbytes(100_000)
FAST = {"tries": 3, "wait": 0.01, "timeout": 5}


class Host:
    """A server with ranges.

    `files`, `etags` and `headers` are given by path; `cuts[path]` holds the byte at which each of
    the next connections breaks; `requests` lists path and range of each request.
    """

    def __init__(self):
        self.files = {}
        self.etags = {}
        self.headers = {}
        self.cuts = {}
        self.pause = 0.0  # seconds after each block
        self.requests = []
        host = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_HEAD(self):
                host.send_head(self)

            def do_GET(self):
                host.send_file(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def send_head(self, handler):
        "Send status and headers; return the path and the first byte, or None without a body."
        path = handler.path.partition("?")[0]
        if path not in self.files:
            handler.send_error(404)
            return None
        length = len(self.files[path])
        etag = self.etags.get(path, '"1"')
        requested = handler.headers.get("Range")
        start = 0
        if requested and etag and handler.headers.get("If-Range") == etag:
            start = int(requested.removeprefix("bytes=").rstrip("-"))
        status = 416 if start >= length else 206 if start else 200
        headers = {"Content-Length": 0 if status == 416 else length - start}
        if status == 416:
            headers["Content-Range"] = f"bytes */{length}"
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{length - 1}/{length}"
        if etag:
            headers["ETag"] = etag
        handler.send_response(status)
        for name, value in (headers | self.headers.get(path, {})).items():
            handler.send_header(name, str(value))
        handler.end_headers()
        return None if status == 416 else (path, start)

    def send_file(self, handler):
        self.requests.append((handler.path, handler.headers.get("Range")))
        sent = self.send_head(handler)
        if not sent:
            return
        path, start = sent
        data = self.files[path]
        cuts = self.cuts.get(path)
        end = cuts.pop(0) if cuts else len(data)
        for at in range(start, end, 4096):
            handler.wfile.write(data[at : min(at + 4096, end)])
            time.sleep(self.pause)
        handler.close_connection = True

    def ranges(self):
        return [requested for _, requested in self.requests]


@pytest.fixture
def host():
    host = Host()
    yield host
    host.server.shutdown()
    host.server.server_close()


@pytest.fixture
def source(host):
    "A file of 100 kB on the server."
    host.files["/a.bin"] = DATA
    return Source(f"{host.url}/a.bin")


# ---- one file ----


def test_cut_connections_are_resumed(host, source, tmp_path):
    host.cuts["/a.bin"] = [30_000, 70_000, 100_000]
    source = replace(source, hash="sha256:" + hashlib.sha256(DATA).hexdigest())
    fetch(source, tmp_path / "a.bin", **FAST)
    assert (tmp_path / "a.bin").read_bytes() == DATA
    assert host.ranges() == [None, "bytes=30000-", "bytes=70000-"]
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_later_process_resumes(host, source, tmp_path):
    "A process that is killed leaves a partial file; the next one requests the rest."
    host.files["/a.bin"] = DATA * 20
    host.pause = 0.005
    child = fork(fetch, source, tmp_path / "a.bin")
    part = tmp_path / "a.bin.part"
    deadline = time.time() + 60
    while time.time() < deadline and not (part.exists() and part.stat().st_size > 300_000):
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    assert join(child)[0] == -signal.SIGKILL
    host.pause = 0.0
    stored = part.stat().st_size
    assert 300_000 < stored < 2_000_000
    assert not (tmp_path / "a.bin").exists()
    fetch(source, tmp_path / "a.bin", **FAST)
    assert (tmp_path / "a.bin").read_bytes() == DATA * 20
    assert host.ranges()[-1] == f"bytes={stored}-"


def test_changed_file_is_fetched_from_the_start(host, source, tmp_path):
    host.cuts["/a.bin"] = [30_000]
    with pytest.raises(NotFoundError, match="cut after 30,000 of 100,000 bytes"):
        fetch(source, tmp_path / "a.bin", tries=1)
    host.files["/a.bin"] = DATA[::-1]
    host.etags["/a.bin"] = '"2"'
    fetch(source, tmp_path / "a.bin", **FAST)
    assert (tmp_path / "a.bin").read_bytes() == DATA[::-1]


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_validator_nothing_is_resumed(host, source, tmp_path, etag):
    host.etags["/a.bin"] = etag
    host.cuts["/a.bin"] = [30_000, 100_000]
    fetch(source, tmp_path / "a.bin", **FAST)
    assert (tmp_path / "a.bin").read_bytes() == DATA
    assert host.ranges() == [None, None]


@pytest.mark.parametrize(("copies", "requests"), [(1, 1), (2, 2)])
def test_part_that_is_whole_or_longer(host, source, tmp_path, copies, requests):
    "A part that is longer than the file is fetched from the start."
    (tmp_path / "a.bin.part").write_bytes(DATA * copies)
    write_json(tmp_path / "a.bin.part.json", {"url": source.url, "validator": '"1"'})
    fetch(source, tmp_path / "a.bin", **FAST)
    assert (tmp_path / "a.bin").read_bytes() == DATA
    assert len(host.requests) == requests


def test_file_that_is_there_is_checked_and_not_requested(host, source, tmp_path):
    (tmp_path / "a.bin").write_bytes(DATA)
    known = replace(source, hash=hash_file(tmp_path / "a.bin", "md5"))
    fetch(known, tmp_path / "a.bin", **FAST)
    assert host.requests == []
    (tmp_path / "a.bin").write_bytes(b"damaged")
    fetch(known, tmp_path / "a.bin", **FAST)
    assert (tmp_path / "a.bin").read_bytes() == DATA


@pytest.mark.parametrize("known", ["sha256:" + "0" * 64, "md5:" + "0" * 32, "git:" + "0" * 40])
def test_wrong_hash_is_refused(source, tmp_path, known):
    with pytest.raises(InvalidFileError, match=f"{source.url}: .*hash.* {known}"):
        fetch(replace(source, hash=known), tmp_path / "a.bin", **FAST)
    assert os.listdir(tmp_path) == []


def test_file_that_is_not_what_it_was_the_first_time(host, source, tmp_path):
    pins = {source.url: fetch(source, tmp_path / "a.bin", **FAST)}
    assert pins[source.url] == hash_file(tmp_path / "a.bin", "sha256")
    host.files["/a.bin"] = DATA[::-1]
    with pytest.raises(InvalidFileError, match=r"remove it from downloads\.json"):
        fetch(source, tmp_path / "b.bin", pins, **FAST)


# ---- the Hugging Face hub ----

HUB_PATH = "/some/where/resolve/main/a.zip"


@pytest.fixture
def hub(host, monkeypatch):
    "The server as a hub with one file."
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", host.url)
    template = host.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    host.files[HUB_PATH] = DATA
    host.headers[HUB_PATH] = {
        "X-Linked-Etag": f'"{hashlib.sha256(DATA).hexdigest()}"',
        "X-Linked-Size": "100000",
        "X-Repo-Commit": "1" * 40,
    }
    return host


def test_file_of_the_hub(hub, tmp_path):
    got = fetch(Source(hub.url + HUB_PATH), tmp_path / "a.zip")
    assert got == hash_file(tmp_path / "a.zip", "sha256")
    assert (tmp_path / "a.zip").read_bytes() == DATA
    assert os.listdir(tmp_path) == ["a.zip"]


def test_hub_names_another_hash(hub, tmp_path):
    hub.headers[HUB_PATH]["X-Linked-Etag"] = '"' + "0" * 64 + '"'
    with pytest.raises(InvalidFileError, match="expected sha256:000"):
        fetch(Source(hub.url + HUB_PATH), tmp_path / "a.zip")
    assert os.listdir(tmp_path) == []


def test_file_that_the_hub_does_not_have(hub, tmp_path):
    url = f"{hub.url}/some/where/resolve/main/none.zip"
    with pytest.raises(NotFoundError, match=rf"{url}: .*404"):
        fetch(Source(url), tmp_path / "a.zip")


def test_hub_file_that_does_not_fit(hub, tmp_path, small_disk):
    small_disk(150_000)
    with pytest.raises(NotEnoughSpaceError, match="a.zip needs 0.00 GiB"):
        fetch(Source(hub.url + HUB_PATH), tmp_path / "a.zip", reserve=1)


def test_the_one_archive_of_a_repository(hub):
    names = ("README.md", "Textures.tar.gz")
    listing = [{"type": "file", "path": name, "size": 3, "oid": "1" * 40} for name in names]
    hub.files["/api/datasets/some/dtd/tree/main"] = json.dumps(listing).encode()
    url = f"{hub.url}/datasets/some/dtd"
    assert resolve(Source(url)).url == f"{url}/resolve/main/Textures.tar.gz"
    with pytest.raises(NotFoundError):
        resolve(Source(f"{hub.url}/datasets/some/nothing"))


# ---- a dataset ----


def pack(folder, kind="zip", base="dtd"):
    "The images of a small dataset packed."
    for path in IMAGES:
        (folder / "pack" / base / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "pack" / base / "images" / path).write_text(path)
    return Path(shutil.make_archive(str(folder / "dtd"), kind, folder / "pack")).read_bytes()


@pytest.fixture
def benchmark(host, tmp_path):
    "A dataset on the server."
    benchmark, split = toy_benchmark(host.url, "dtd.zip")
    host.files |= {"/dtd.zip": pack(tmp_path), "/split.json": split}
    return benchmark


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


def with_images(benchmark, *sources):
    return replace(benchmark, sources=benchmark.sources | {"images": sources})


def test_dead_sources_are_named_and_the_next_is_used(host, data, benchmark, capsys):
    dead = {
        Source("http://127.0.0.1:9/dtd.zip"): "127.0.0.1:9/dtd.zip: ",
        Source(f"{host.url}/none.zip"): "none.zip: 404",
        Source(f"{host.url}/dtd.zip", "md5:" + "0" * 32): "dtd.zip: MD5 hash",
    }
    sources = (*dead, *benchmark.sources["images"])
    dataset = prepare("dtd", data, with_images(benchmark, *sources), **FAST)
    assert [len(images) for images in dataset.splits.values()] == [2, 2, 2]
    printed = capsys.readouterr().err
    assert all(line in printed for line in dead.values())
    assert sorted(os.listdir(data / "dtd")) == ["images", "split.json"]
    assert os.listdir(data / ".downloads/dtd") == []
    requests = len(host.requests)
    prepare("dtd", data, benchmark)
    assert len(host.requests) == requests  # what is complete is left alone


def test_no_source_left(host, data, benchmark):
    dead = with_images(benchmark, Source(f"{host.url}/none.zip"))
    with pytest.raises(NotFoundError) as caught:
        prepare("dtd", data, dead, **FAST)
    parts = ("images is missing", "none.zip: 404", "vlmadapt data dtd --use FILE", f"{data}/dtd")
    assert all(part in str(caught.value) for part in parts)
    assert not (data / "dtd").exists()


def test_own_archive_and_own_split_file(host, tmp_path, data, benchmark):
    (tmp_path / "own.tgz").write_bytes(pack(tmp_path, "gztar", "downloaded/Textures"))
    (tmp_path / "own.json").write_bytes(host.files["/split.json"])
    host.files.clear()
    with pytest.raises(NotFoundError, match=r"split\.json is missing"):
        prepare("dtd", data, benchmark, use=tmp_path / "own.tgz", **FAST)
    dataset = prepare("dtd", data, benchmark, use=tmp_path / "own.json", **FAST)
    assert dataset.note == "CoOp's split"


def test_archives_are_kept_on_request(host, data, benchmark):
    prepare("dtd", data, benchmark, keep=True, **FAST)
    assert (data / ".downloads/dtd/dtd.zip").read_bytes() == host.files["/dtd.zip"]
    assert os.listdir(data / ".downloads/dtd") == ["dtd.zip"]


def test_split_file_in_an_archive_must_be_coops(host, tmp_path, data, benchmark):
    "Another one is ignored, and CoOp's is fetched from its own address."
    (tmp_path / "pack/dtd/split.json").write_text("{}")
    host.files["/dtd.zip"] = pack(tmp_path)
    assert prepare("dtd", data, benchmark, **FAST).note == "CoOp's split"


# ---- full disks ----


@pytest.fixture
def small_disk(monkeypatch):
    def set_free(free):
        usage = shutil._ntuple_diskusage(10**12, 10**12 - free, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    return set_free


def test_disk_that_is_too_small_for_a_download(host, data, benchmark, small_disk):
    "A file of 10 MB needs that much twice, once unpacked; not a byte is written."
    host.files["/dtd.zip"] += bytes(10_000_000)
    small_disk(15_000_000)
    with pytest.raises(
        NotEnoughSpaceError, match=r"dtd\.zip needs 0\.02 GiB, but .* only 0\.01 GiB free"
    ):
        prepare("dtd", data, benchmark, **FAST)
    assert not (data / "dtd").exists()
    assert not list(data.rglob("*.part"))


@pytest.mark.parametrize("kind", ["zip", "gztar"])
def test_disk_that_is_too_small_for_what_comes_out(tmp_path, small_disk, kind):
    (tmp_path / "zeros").mkdir()
    (tmp_path / "zeros/a").write_bytes(bytes(50_000_000))
    archive = shutil.make_archive(str(tmp_path / "bomb"), kind, tmp_path / "zeros")
    small_disk(20_000_000)
    with pytest.raises(NotEnoughSpaceError, match=r"0\.05 GiB"):
        unpack(archive, tmp_path / "out")
    assert not any(path.is_file() for path in (tmp_path / "out").rglob("*"))


def test_killed_while_unpacking(host, data, benchmark, monkeypatch):
    "No folder of the dataset stands there, and the next run neither fetches nor leaves anything."
    plain = zipfile.ZipFile.open
    opened = []

    def open_or_die(*args, **kwargs):
        opened.append(1)
        if len(opened) > 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "open", open_or_die)
        code, printed = join(fork(prepare, "dtd", data, benchmark))
    assert code == -signal.SIGKILL, printed
    (left,) = (data / ".downloads/dtd").glob("unpacked-*")
    assert list(left.rglob("*.jpg"))
    assert not (data / "dtd").exists()
    host.requests.clear()
    prepare("dtd", data, benchmark, **FAST)
    assert [path for path, _ in host.requests] == ["/split.json"]
    assert len(list((data / "dtd/images").rglob("*.jpg"))) == len(IMAGES)
    assert os.listdir(data / ".downloads/dtd") == []


# ---- the command ----


@pytest.fixture
def command(data, benchmark, monkeypatch, capsys):
    "The command with the small dataset as dtd; returns the exit code and what is printed."
    monkeypatch.setitem(BENCHMARKS, "dtd", benchmark)
    monkeypatch.setattr(transfers, "Limits", partial(Limits, **FAST))

    def run(*arguments):
        code = run_command("data", *arguments, root=data)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_command(command, data):
    code, printed = command("dtd")
    assert (code, "dtd: 2 classes, 2 train, 2 val, 2 test" in printed) == (0, True)
    code, printed = command("dtd", "--check")
    assert (code, "1 of 1 complete" in printed) == (0, True)
    assert command("--check")[0] == 0  # what is absent is no error
    (data / "dtd/images/banded/banded_0.jpg").unlink()
    code, printed = command("dtd", "--check")
    assert (code, "1 of 6 images are missing, the first is" in printed) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["imagenet", "mini-digits"], 1, "needs an account"),
        (["dtdd"], 2, "did you mean 'dtd'?"),
        ([], 2, "--list shows what there is"),
        (["all", "--use", "a.zip"], 2, "--use goes with the name of one dataset"),
    ],
)
def test_command_says_what_to_do(command, arguments, code, part):
    returned, printed = command(*arguments)
    assert returned == code
    assert part in printed


def test_command_lists_every_benchmark(command):
    code, printed = command("--list")
    assert code == 0
    assert len([line for line in printed.splitlines() if " classes " in line]) == 15


def test_rebuilt_where_the_split_file_cannot_be_had(host, command, data, benchmark):
    del host.files["/split.json"]
    code, printed = command("dtd")
    assert (code, "--rebuild-split" in printed) == (1, True)
    with pytest.warns(UserWarning, match="no split of CoOp's"):
        code, printed = command("dtd", "--rebuild-split")
    assert (code, "not CoOp's file" in printed) == (0, True)
    with pytest.warns(UserWarning):
        assert state("dtd", benchmark, data)[0] == "other split"


def test_the_cause_of_an_unreachable_host_is_found_in_the_errors_of_requests(tmp_path):
    with pytest.raises(NotFoundError, match="refused") as caught:
        fetch(Source("http://127.0.0.1:1/a.zip"), tmp_path / "a.zip", tries=1)
    assert "HTTPConnectionPool" not in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
