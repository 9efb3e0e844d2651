"A broken source costs one line, never the dataset: archives and servers from `hostile`."

import functools
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT
from hostile import (
    GOOD,
    IMAGES,
    SERVERS,
    Member,
    RawHost,
    good_members,
    head,
    hostile_archives,
    make,
    make_tar,
    make_zip,
    serve,
)
from tqdm import tqdm

from vlmadapt.core.files import CannotWrite
from vlmadapt.core.hashing import content_key, digest
from vlmadapt.data import downloads
from vlmadapt.data.annotations import class_folders
from vlmadapt.data.benchmarks import BENCHMARKS, Benchmark, Source
from vlmadapt.data.downloads import (
    Gone,
    NoRoom,
    Refused,
    lacks,
    missing_parts,
    prepare,
    read_pins,
    resume_point,
    unpack,
    vlmadapt_data,
)

PARTS = ("train", "val", "test")
SPLIT = {
    part: [[p, int(p[0] == "d"), p.split("/")[0]] for p in IMAGES[k::4]]
    for k, part in enumerate(PARTS)
}
LIMITS = {
    "tries": 2,
    "wait": 0.01,
    "timeout": 1.0,
    "window": 0.4,
    "slowest": 1000,
    "largest": 20e6,
}
ARCHIVES = hostile_archives()


@pytest.fixture(scope="module")
def host():
    host = RawHost()
    yield host
    host.close()


@pytest.fixture(autouse=True)
def small_and_quiet(monkeypatch):
    "A zip bomb begins at one megabyte; no progress bars."
    monkeypatch.setattr(downloads, "UNPACKED_FLOOR", 1 << 20)
    monkeypatch.setattr(downloads, "tqdm", functools.partial(tqdm, disable=True))


@pytest.fixture
def row(host, tmp_path):
    split = json.dumps(SPLIT).encode()
    (tmp_path / "split").write_bytes(split)
    split_hash = digest(tmp_path / "split", "sha256")
    host.requests.clear()
    host.answers = {"/good.zip": serve(GOOD), "/split.json": serve(split)}
    sources = {
        "images": (Source(f"{host.url}/hostile.zip"), Source(f"{host.url}/good.zip")),
        "split.json": (Source(f"{host.url}/split.json", split_hash),),
    }
    return Benchmark(
        "dtd", "images", 2, (2, 2, 2), class_folders, "split.json", split_hash, sources=sources
    )


def with_images(row, *sources):
    return Benchmark(**{**vars(row), "sources": row.sources | {"images": sources}})


def guarded(function, *args, **kwargs):
    "Call in a thread that may take ten seconds."
    outcome = []

    def call():
        try:
            outcome.append(function(*args, **kwargs))
        except BaseException as e:
            outcome.append(e)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(10)
    assert outcome, "hangs"
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def files_below(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())


def check_second_source(host, row, tmp_path, capsys):
    "The dataset is complete, the first source has one line and was requested a few times."
    dataset = guarded(prepare, "dtd", tmp_path / "data", row, **LIMITS)
    assert dataset.note == "CoOp's split"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].endswith("another source had it"), lines
    assert (
        lines[0].startswith(f"{host.url}/hostile.zip")
        and lines[0].isprintable()
        and len(lines[0]) < 500
    )
    kept = files_below(tmp_path / "data")
    images = [f"dtd/images/{path}" for path in IMAGES]
    assert kept == sorted([".downloads/dtd.lock", *images, "dtd/split.json", "downloads.json"])
    pins = json.loads((tmp_path / "data/downloads.json").read_text())
    assert list(pins) == [f"{host.url}/good.zip"]
    assert sum(n for path, n in host.requests.items() if "hostile" in path) <= 25
    assert host.requests["/good.zip"] == 1


def check_only_source(host, row, tmp_path, capsys, monkeypatch):
    "The command ends with code 1 and one line about the source; only parts to resume are left."
    monkeypatch.setitem(BENCHMARKS, "dtd", with_images(row, row.sources["images"][0]))
    receive = functools.partial(downloads.receive, **LIMITS)
    monkeypatch.setattr(downloads, "receive", lambda *a, **k: receive(*a, **{**LIMITS, **k}))
    before = files_below(tmp_path)
    assert guarded(vlmadapt_data, ["dtd"], root=str(tmp_path / "data")) == 1
    lines = capsys.readouterr().err.splitlines()
    assert "Traceback" not in "".join(lines)
    assert len([line for line in lines if f"{host.url}/hostile.zip" in line]) == 1, lines
    assert not (tmp_path / "data/dtd").exists()
    left = set(files_below(tmp_path)) - set(before)
    allowed = ("data/.downloads/dtd.lock", ".part", ".part.json")
    assert all(name.endswith(allowed) for name in left), left
    for part in tmp_path.rglob("*.part"):
        assert resume_point(part, f"{host.url}/hostile.zip")[0] > 0


@pytest.mark.parametrize("case", ARCHIVES)
def test_hostile_archive_before_a_good_one(host, row, tmp_path, capsys, case):
    host.answers["/hostile.zip"] = serve(ARCHIVES[case]())
    check_second_source(host, row, tmp_path, capsys)
    assert not Path("/tmp/vlmadapt-evil").exists() and not Path("/tmp/vlmadapt-evil.jpg").exists()
    assert host.requests["/hostile.zip"] == 1


@pytest.mark.parametrize("case", ARCHIVES)
def test_hostile_archive_alone(host, row, tmp_path, capsys, monkeypatch, case):
    host.answers["/hostile.zip"] = serve(ARCHIVES[case]())
    check_only_source(host, row, tmp_path, capsys, monkeypatch)
    assert not list(tmp_path.rglob("*.part*"))


@pytest.mark.parametrize("case", SERVERS)
def test_hostile_server_before_a_good_one(host, row, tmp_path, capsys, case):
    host.answers["/hostile.zip"] = host.answers["/hostile"] = SERVERS[case]
    check_second_source(host, row, tmp_path, capsys)


@pytest.mark.parametrize("case", SERVERS)
def test_hostile_server_alone(host, row, tmp_path, capsys, monkeypatch, case):
    host.answers["/hostile.zip"] = host.answers["/hostile"] = SERVERS[case]
    check_only_source(host, row, tmp_path, capsys, monkeypatch)


@pytest.mark.parametrize("kind", ["zip", "tar", "tgz", "tbz", "txz"])
def test_changed_bytes(tmp_path, kind):
    "Archives with random changes unpack or are refused in one line, and write nowhere else."
    rng = random.Random(kind)
    sound = make(good_members() + [Member("dtd/é", b"x")], kind)
    refused = 0
    for _ in range(100):
        data = bytearray(sound)
        for _ in range(rng.choice((1, 3, 20))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        (tmp_path / "a.zip").write_bytes(data)
        try:
            unpack(tmp_path / "a.zip", tmp_path / "out/deep/er")
        except (Refused, NoRoom) as e:
            refused += 1
            assert str(e).isprintable() and str(e).startswith("a.zip"), str(e)
        downloads._remove(tmp_path / "out/deep/er")
        assert files_below(tmp_path) == ["a.zip"]
    assert refused > 20


def test_links_within_become_files(tmp_path):
    members = [
        Member("d/a.jpg", b"content"),
        Member("d/soft.jpg", kind=b"2", link="a.jpg"),
        Member("d/e/up.jpg", kind=b"2", link="../soft.jpg"),
        Member("d/hard.jpg", kind=b"1", link="d/a.jpg"),
    ]
    (tmp_path / "a.tar").write_bytes(make_tar(members))
    unpack(tmp_path / "a.tar", tmp_path / "out")
    for name in ("a.jpg", "soft.jpg", "e/up.jpg", "hard.jpg"):
        path = tmp_path / "out/d" / name
        assert path.read_bytes() == b"content" and not path.is_symlink()
        assert path.stat().st_nlink == 1


@pytest.mark.parametrize("time", ["1000000000", "-1e300", "1e300", "nan"])
def test_times_in_a_tar(tmp_path, time):
    "The time of a file is kept; one that no disk can store is not."
    member = Member("a.jpg", b"x", pax={"mtime": time})
    (tmp_path / "a.tar").write_bytes(make_tar([member]))
    unpack(tmp_path / "a.tar", tmp_path / "out")
    assert ((tmp_path / "out/a.jpg").stat().st_mtime == 1e9) == (time == "1000000000")


def test_separators_of_windows(tmp_path):
    (tmp_path / "a.zip").write_bytes(make_zip([Member("dtd\\images\\a.jpg", b"x")]))
    unpack(tmp_path / "a.zip", tmp_path / "out")
    assert files_below(tmp_path / "out") == ["dtd/images/a.jpg"]


def test_hash_is_stored_only_after_counting(host, row, tmp_path):
    "A page comes first from the only address; the archive that comes later is accepted."
    only = with_images(row, row.sources["images"][0])
    host.answers["/hostile.zip"] = serve(b"<html>busy</html>")
    with pytest.raises(Gone):
        prepare("dtd", tmp_path / "data", only, **LIMITS)
    assert not (tmp_path / "data/downloads.json").exists()
    host.answers["/hostile.zip"] = serve(GOOD)
    assert prepare("dtd", tmp_path / "data", only, **LIMITS).note == "CoOp's split"
    assert list(read_pins(tmp_path / "data/downloads.json")) == [f"{host.url}/hostile.zip"]


def test_enough_images_of_other_names(host, row, tmp_path, capsys):
    "The count is right, but the split file, which comes later, names others."
    other = [Member(f"images/x/{i}.jpg", b"x") for i in range(8)]
    host.answers["/hostile.zip"] = serve(make_zip(other))
    check_second_source(host, row, tmp_path, capsys)


def test_enough_images_of_other_names_alone(host, row, tmp_path):
    other = [Member(f"images/x/{i}.jpg", b"x") for i in range(8)]
    host.answers["/hostile.zip"] = serve(make_zip(other))
    with pytest.raises(Gone, match="its 'images' lacks 6 of 6 images"):
        prepare("dtd", tmp_path / "data", with_images(row, row.sources["images"][0]), **LIMITS)
    assert os.listdir(tmp_path / "data/dtd") == ["split.json"]
    assert not (tmp_path / "data/downloads.json").exists()


def half(folder, count=3):
    for path in IMAGES[:count]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("mine")


def link_to_nowhere(folder):
    folder.symlink_to("nowhere")


@pytest.mark.parametrize("make_images", [half, link_to_nowhere, Path.touch, Path.mkdir])
@pytest.mark.parametrize("with_split", [True, False])
def test_half_a_dataset_is_not_complete(row, tmp_path, capsys, make_images, with_split):
    "What a user had is renamed, not removed."
    folder = tmp_path / "data/dtd"
    folder.mkdir(parents=True)
    if with_split:
        (folder / "split.json").write_text(json.dumps(SPLIT))
    make_images(folder / "images")
    assert missing_parts(row, tmp_path / "data")[0] == "images"
    prepare("dtd", tmp_path / "data", with_images(row, row.sources["images"][1]), **LIMITS)
    assert missing_parts(row, tmp_path / "data") == []
    kept = folder / "images.incomplete"
    assert os.path.lexists(kept) == (make_images is not Path.mkdir)
    if make_images is half:
        assert len(files_below(kept)) == 3
        assert f"{folder}/images was incomplete" in capsys.readouterr().err


DAMAGED_SPLITS = ["", "{", "[]", "null", "{}", '{"train": 3}', '{"train": [[1]]}', "\0", "NaN"]


@pytest.mark.parametrize("text", DAMAGED_SPLITS)
def test_damaged_split_file_is_missing(row, tmp_path, text):
    folder = tmp_path / "data/dtd"
    half(folder / "images", 8)
    (folder / "split.json").write_text(text)
    assert missing_parts(row, tmp_path / "data") == ["split.json"]
    assert prepare("dtd", tmp_path / "data", row, **LIMITS).note == "CoOp's split"


def test_lists_without_a_split(tmp_path):
    row = BENCHMARKS["fgvc_aircraft"]
    folder = tmp_path / "fgvc_aircraft"
    half(folder / "images")
    assert lacks(row, folder, "images", folder / "images") == "holds 3 images, 10,000 are needed"
    (folder / "variants.txt").write_text("A 1\n")
    for part in PARTS:
        path = folder / f"images_variant_{part}.txt"
        path.write_text(f"{part} A 1\n")
        assert lacks(row, folder, path.name, path) == ""
        (folder / f"images/{part}.jpg").write_text("x")
    assert missing_parts(row, tmp_path) == []
    (folder / "images/val.jpg").write_text("")
    problem = lacks(row, folder, "images", folder / "images")
    assert problem == "lacks 1 of 3 images, such as 'val.jpg'"


# ---- locks, state files, own files ----


def test_link_in_place_of_the_lock(row, tmp_path):
    place = tmp_path / "data/.downloads"
    place.mkdir(parents=True)
    (tmp_path / "thesis.txt").write_text("years of work")
    (place / "dtd.lock").symlink_to(tmp_path / "thesis.txt")
    with pytest.raises(Refused, match="dtd.lock"):
        prepare("dtd", tmp_path / "data", row, **LIMITS)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def part_folder(row, tmp_path):
    "Where parts of the good archive are stored."
    url = row.sources["images"][1].url
    return tmp_path / "data/.downloads/dtd" / content_key(url=url)[:8]


def test_link_in_place_of_a_part(host, row, tmp_path):
    "Neither a part nor its state is written through a link."
    place = part_folder(row, tmp_path)
    place.mkdir(parents=True)
    for name in ("good.zip.part", "good.zip.part.json"):
        (tmp_path / name).write_text("years of work")
        (place / name).symlink_to(tmp_path / name)
    (place.parent / "unpacked-x").symlink_to(tmp_path)
    prepare("dtd", tmp_path / "data", with_images(row, row.sources["images"][1]), **LIMITS)
    for name in ("good.zip.part", "good.zip.part.json"):
        assert (tmp_path / name).read_text() == "years of work"


DAMAGED = ["", "{", "[]", "null", "3", '"a"', '{"url": 3}', "{}", '{"url": null}', "\0", "folder"]


def damage(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    if text == "folder":
        path.mkdir()
    else:
        path.write_text(text)


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_state_of_a_part(row, tmp_path, text):
    place = part_folder(row, tmp_path)
    damage(place / "good.zip.part.json", text)
    (place / "good.zip.part").write_bytes(b"x" * 100)
    only = with_images(row, row.sources["images"][1])
    assert prepare("dtd", tmp_path / "data", only, **LIMITS).note == "CoOp's split"
    assert files_below(tmp_path / "data/.downloads") == ["dtd.lock"]


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_hashes(row, tmp_path, capsys, text):
    damage(tmp_path / "data/downloads.json", text)
    only = with_images(row, row.sources["images"][1])
    assert prepare("dtd", tmp_path / "data", only, **LIMITS).note == "CoOp's split"
    lines = capsys.readouterr().err.splitlines()
    assert all("downloads.json" in line for line in lines)
    assert len(lines) == {"{}": 0, "folder": 2}.get(text, 1)


def encrypted(path):
    path.write_bytes(ARCHIVES["zip, encrypted"]())


def split_of_another(path):
    path.write_text("{}")


OWN_FILES = [os.mkfifo, Path.mkdir, Path.touch, encrypted, split_of_another]


@pytest.mark.parametrize("make_file", OWN_FILES)
@pytest.mark.parametrize("name", ["own.zip", "own.json"])
def test_own_file_that_is_none(row, tmp_path, capsys, monkeypatch, make_file, name):
    monkeypatch.setitem(BENCHMARKS, "dtd", row)
    make_file(tmp_path / name)
    use = str(tmp_path / name)
    assert guarded(vlmadapt_data, ["dtd"], root=str(tmp_path / "data"), use=use) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and name in lines[0]
    assert not (tmp_path / "data/dtd").exists()


@pytest.mark.parametrize("use", ["nowhere.zip", "a" * 300, "nul\0", ""])
def test_own_file_with_an_impossible_name(row, tmp_path, capsys, monkeypatch, use):
    monkeypatch.setitem(BENCHMARKS, "dtd", with_images(row))
    assert guarded(vlmadapt_data, ["dtd"], root=str(tmp_path / "data"), use=use) == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("place", ["data", "data/.downloads", "data/.downloads/dtd", "data/dtd"])
def test_file_where_a_folder_is_expected(row, tmp_path, capsys, monkeypatch, place):
    monkeypatch.setitem(BENCHMARKS, "dtd", with_images(row, row.sources["images"][1]))
    damage(tmp_path / place, "mine")
    assert guarded(vlmadapt_data, ["dtd"], root=str(tmp_path / "data")) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "data" in lines[0]
    assert (tmp_path / place).read_text() == "mine"


def test_no_permission(row, tmp_path, capsys, monkeypatch):
    "As on a folder of somebody else."
    only = with_images(row, row.sources["images"][1])
    monkeypatch.setitem(BENCHMARKS, "dtd", only)

    def refuse(*args):
        raise PermissionError(13, "Permission denied", str(args[0]))

    monkeypatch.setattr(downloads.os, "replace", refuse)
    assert vlmadapt_data(["dtd"], root=str(tmp_path / "data")) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "cannot be written: Permission denied" in lines[0]


def test_complete_dataset_on_a_read_only_disk(row, tmp_path, monkeypatch):
    only = with_images(row, row.sources["images"][1])
    prepare("dtd", tmp_path / "data", only, **LIMITS)

    def refuse(*args):
        raise AssertionError("nothing is to be written")

    monkeypatch.setattr(downloads, "workplace", refuse)
    assert prepare("dtd", tmp_path / "data", only).note == "CoOp's split"


# ---- full disks and interruptions ----

CHILD = """
import json, os, resource, signal, sys, zipfile
import vlmadapt.data.downloads as downloads
from vlmadapt.data.annotations import class_folders
from vlmadapt.data.benchmarks import BENCHMARKS, Benchmark, Source
images, split, split_hash, root, event = sys.argv[1:]
sources = {"images": (Source(images),), "split.json": (Source(split, split_hash),)}
BENCHMARKS["dtd"] = Benchmark("dtd", "images", 2, (2, 2, 2), class_folders, "split.json",
                              split_hash, sources=sources)
if event.isdecimal():
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(event), int(event)))
elif event:
    opened = []
    plain = zipfile.ZipFile.open
    def interrupted(*args, **kwargs):
        opened.append(1)
        if len(opened) == 4:
            os.kill(os.getpid(), getattr(signal, event))
        return plain(*args, **kwargs)
    zipfile.ZipFile.open = interrupted
sys.exit(downloads.vlmadapt_data(["dtd"], root=root))
"""


def run_child(host, row, tmp_path, event):
    source = row.sources["split.json"][0]
    arguments = [f"{host.url}/large.zip", source.url, source.hash, str(tmp_path / "data"), event]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    command = [sys.executable, "-c", CHILD, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def completes(host, row, tmp_path):
    only = with_images(row, Source(f"{host.url}/large.zip"))
    dataset = prepare("dtd", tmp_path / "data", only, **LIMITS)
    assert dataset.note == "CoOp's split"
    assert files_below(tmp_path / "data/.downloads") == ["dtd.lock"]


@pytest.mark.parametrize("limit", ["50000", "150000"])
def test_full_disk(host, row, tmp_path, limit):
    "The download (200 kB) does not fit, or one image of the archive (300 kB) does not."
    big = Member("dtd/big.jpg", bytes(range(250)) * 1200)
    size = {"50000": 200_000, "150000": 100_000}[limit]
    padding = Member("dtd/padding", random.Random(0).randbytes(size))
    host.answers["/large.zip"] = serve(make_zip([*good_members(), padding, big]))
    run = run_child(host, row, tmp_path, limit)
    assert run.returncode == 1, run.stderr
    assert len(run.stderr.splitlines()) == 1 and "cannot be written: File too large" in run.stderr
    assert not (tmp_path / "data/dtd").exists()
    left = files_below(tmp_path / "data")
    assert all(name.endswith((".lock", ".part", ".part.json")) for name in left), left
    completes(host, row, tmp_path)


def cut_once(handler, start, host):
    "A server that supports ranges; its first connection is cut."
    if start:
        span = f"bytes {start}-{len(GOOD) - 1}/{len(GOOD)}"
        rest = GOOD[start:]
        handler.wfile.write(head(206, len(rest), ETag='"1"', Content_Range=span) + rest)
    else:
        handler.wfile.write(head(200, len(GOOD), ETag='"1"') + GOOD[:500])


def test_part_is_kept_through_failures(host, row, tmp_path):
    "A part stays while its server is away, and while another address of the same name fails."
    first, second = Source(f"{host.url}/a/x.zip"), Source(f"{host.url}/b/x.zip")
    only = with_images(row, first, second)
    host.answers["/a/x.zip"] = cut_once
    for _ in range(2):
        with pytest.raises(Gone, match="x.zip"):
            prepare("dtd", tmp_path / "data", only, **LIMITS | {"tries": 1})
        (part,) = (tmp_path / "data").rglob("*.part")
        assert part.stat().st_size == 500
        host.answers.pop("/a/x.zip", None)
    host.answers["/a/x.zip"] = cut_once
    assert prepare("dtd", tmp_path / "data", only, **LIMITS).note == "CoOp's split"
    assert files_below(tmp_path / "data/.downloads") == ["dtd.lock"]


def test_https_without_a_certificate(host, row, tmp_path):
    host.answers["/hostile.zip"] = serve(GOOD)
    secure = Source(f"{host.url}/hostile.zip".replace("http:", "https:"))
    with pytest.raises(Gone, match="https://127.0.0.1"):
        prepare("dtd", tmp_path / "data", with_images(row, secure), **LIMITS | {"timeout": 0.3})


@pytest.mark.parametrize("event", ["SIGINT", "SIGTERM"])
def test_interrupted_unpacking(host, row, tmp_path, event):
    host.answers["/large.zip"] = serve(GOOD)
    run = run_child(host, row, tmp_path, event)
    assert run.returncode == 130, run.stderr
    assert run.stderr.splitlines() == ["stopped; the same command goes on from here"]
    assert not (tmp_path / "data/dtd").exists()
    assert not list((tmp_path / "data/.downloads/dtd").glob("unpacked-*"))
    completes(host, row, tmp_path)


def test_disk_that_is_full_while_unpacking(host, row, tmp_path, monkeypatch):
    def full(*args):
        raise CannotWrite(28, "images cannot be written: No space left on device")

    only = with_images(row, row.sources["images"][1])
    with monkeypatch.context() as patch:
        patch.setattr(downloads, "_save", full)
        with pytest.raises(CannotWrite, match="No space left"):
            prepare("dtd", tmp_path / "data", only, **LIMITS)
    assert prepare("dtd", tmp_path / "data", only, **LIMITS).note == "CoOp's split"
