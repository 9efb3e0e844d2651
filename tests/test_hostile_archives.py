"A broken source costs one line, never the dataset: archives and servers from `hostile`."

import json
import os
import random
import resource
import signal
import threading
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from conftest import run_command
from hostile import (
    GOOD,
    IMAGES,
    SERVERS,
    Member,
    RawHost,
    fork,
    good_members,
    head,
    hostile_archives,
    join,
    make,
    make_tar,
    make_zip,
    serve,
    toy_benchmark,
    toy_split,
)

from vlmadapt.core.files import CannotWrite, remove
from vlmadapt.core.hashing import content_key
from vlmadapt.core.verbosity import progress_bar
from vlmadapt.data import archives, preparation, transfers
from vlmadapt.data.archives import unpack
from vlmadapt.data.benchmarks import BENCHMARKS, Source
from vlmadapt.data.errors import InvalidFileError, NotEnoughSpaceError, NotFoundError
from vlmadapt.data.fetch import read_pins
from vlmadapt.data.layout import lacks, missing_parts
from vlmadapt.data.preparation import prepare
from vlmadapt.data.transfers import Limits, resume_point

LIMITS = {
    "tries": 2,
    "wait": 0.01,
    "timeout": 1.0,
    "window": 0.4,
    "slowest": 1000,
    "largest": 5e6,
}
ARCHIVES = hostile_archives()


@pytest.fixture(scope="module")
def host():
    host = RawHost()
    yield host
    host.close()


@pytest.fixture(autouse=True)
def small_and_quiet(monkeypatch):
    "A zip bomb begins at one megabyte; no progress bars; the command has strict limits."
    monkeypatch.setattr(archives, "UNPACKED_FLOOR", 1 << 20)
    monkeypatch.setattr(archives, "progress_bar", partial(progress_bar, disable=True))
    monkeypatch.setattr(transfers, "progress_bar", partial(progress_bar, disable=True))
    monkeypatch.setattr(transfers, "Limits", partial(Limits, **LIMITS))


@pytest.fixture
def benchmark(host):
    "A dataset whose images come from a hostile and then from a sound address."
    benchmark, split = toy_benchmark(host.url, "hostile.zip", "good.zip")
    host.requests.clear()
    host.answers = {"/good.zip": serve(GOOD), "/split.json": serve(split)}
    return benchmark


def with_images(benchmark, *sources):
    return replace(benchmark, sources=benchmark.sources | {"images": sources})


@pytest.fixture
def hostile_only(benchmark):
    return with_images(benchmark, benchmark.sources["images"][0])


@pytest.fixture
def good_only(benchmark):
    return with_images(benchmark, benchmark.sources["images"][1])


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def command(data, monkeypatch, capsys):
    "Call the command for one dataset; returns the exit code and the lines of stderr."

    def run(benchmark, *arguments):
        monkeypatch.setitem(BENCHMARKS, "dtd", benchmark)
        code = guarded(run_command, "data", "dtd", *arguments, root=data)
        return code, capsys.readouterr().err.splitlines()

    return run


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


@pytest.fixture
def check_second_source(host, benchmark, data, capsys):
    def check():
        "The dataset is complete; the first source has one line and was requested a few times."
        dataset = guarded(prepare, "dtd", data, benchmark)
        assert dataset.note == "CoOp's split"
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"{host.url}/hostile.zip")
        assert lines[0].endswith("another source had it")
        assert lines[0].isprintable()
        assert len(lines[0]) < 500
        images = [f"dtd/images/{path}" for path in IMAGES]
        expected = [".downloads/dtd.lock", *images, "dtd/split.json", "downloads.json"]
        assert files_below(data) == sorted(expected)
        pins = json.loads((data / "downloads.json").read_text())
        assert list(pins) == [f"{host.url}/good.zip"]
        assert sum(n for path, n in host.requests.items() if "hostile" in path) <= 25
        assert host.requests["/good.zip"] == 1

    return check


@pytest.fixture
def check_only_source(host, hostile_only, data, tmp_path, command):
    def check():
        "The command fails with one line about the source; only parts to resume are left."
        before = files_below(tmp_path)
        code, lines = command(hostile_only)
        assert code == 1
        assert "Traceback" not in "".join(lines)
        assert len([line for line in lines if f"{host.url}/hostile.zip" in line]) == 1, lines
        assert not (data / "dtd").exists()
        left = set(files_below(tmp_path)) - set(before)
        allowed = ("data/.downloads/dtd.lock", ".part", ".part.json")
        assert all(name.endswith(allowed) for name in left), left
        for part in tmp_path.rglob("*.part"):
            assert resume_point(part, f"{host.url}/hostile.zip")[0] > 0

    return check


@pytest.mark.parametrize("case", ARCHIVES)
def test_hostile_archive_before_a_good_one(host, check_second_source, case):
    host.answers["/hostile.zip"] = serve(ARCHIVES[case]())
    check_second_source()
    assert not Path("/tmp/vlmadapt-evil").exists()
    assert not Path("/tmp/vlmadapt-evil.jpg").exists()
    assert host.requests["/hostile.zip"] == 1


@pytest.mark.parametrize("case", ARCHIVES)
def test_hostile_archive_alone(host, data, check_only_source, case):
    host.answers["/hostile.zip"] = serve(ARCHIVES[case]())
    check_only_source()
    assert files_below(data) == [".downloads/dtd.lock"]


@pytest.mark.parametrize("case", SERVERS)
def test_hostile_server_before_a_good_one(host, check_second_source, case):
    host.answers["/hostile.zip"] = host.answers["/hostile"] = SERVERS[case]
    check_second_source()


@pytest.mark.parametrize("case", SERVERS)
def test_hostile_server_alone(host, check_only_source, case):
    host.answers["/hostile.zip"] = host.answers["/hostile"] = SERVERS[case]
    check_only_source()


# ---- archives ----


def changed(sound, rng):
    "The bytes of an archive with a few of them changed, and sometimes cut."
    data = bytearray(sound)
    for _ in range(rng.choice((1, 3, 20))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    if rng.random() < 0.2:
        del data[rng.randrange(len(data)) :]
    return bytes(data)


@pytest.mark.parametrize("kind", ["zip", "tar", "tgz", "tbz", "txz"])
def test_changed_bytes(tmp_path, kind):
    "Archives with random changes unpack or are refused in one line, and write nowhere else."
    rng = random.Random(kind)
    sound = make([*good_members(), Member("dtd/é", b"x")], kind)
    refused = 0
    for _ in range(100):
        (tmp_path / "a.zip").write_bytes(changed(sound, rng))
        try:
            unpack(tmp_path / "a.zip", tmp_path / "out/deep/er")
        except (InvalidFileError, NotEnoughSpaceError) as e:
            refused += 1
            assert str(e).isprintable(), str(e)
            assert str(e).startswith("a.zip"), str(e)
        remove(tmp_path / "out/deep/er")
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
        assert path.read_bytes() == b"content"
        assert not path.is_symlink()
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


# ---- parts of a dataset ----


def test_hash_is_stored_only_after_counting(host, data, hostile_only):
    "A page comes first from the only address; the archive that comes later is accepted."
    host.answers["/hostile.zip"] = serve(b"<html>busy</html>")
    with pytest.raises(NotFoundError, match=r"hostile\.zip: neither a zip nor a tar archive"):
        prepare("dtd", data, hostile_only)
    assert not (data / "downloads.json").exists()
    host.answers["/hostile.zip"] = serve(GOOD)
    assert prepare("dtd", data, hostile_only).note == "CoOp's split"
    assert list(read_pins(data / "downloads.json")) == [f"{host.url}/hostile.zip"]


OTHER_NAMES = make_zip([Member(f"images/x/{i}.jpg", b"x") for i in range(8)])


def test_enough_images_of_other_names(host, check_second_source):
    "The count is right, but the split file, which comes later, names others."
    host.answers["/hostile.zip"] = serve(OTHER_NAMES)
    check_second_source()


def test_enough_images_of_other_names_alone(host, data, hostile_only):
    host.answers["/hostile.zip"] = serve(OTHER_NAMES)
    with pytest.raises(NotFoundError, match="its 'images' lacks 6 of 6 images"):
        prepare("dtd", data, hostile_only)
    assert os.listdir(data / "dtd") == ["split.json"]
    assert not (data / "downloads.json").exists()


def half(folder, count=3):
    for path in IMAGES[:count]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("own")


def link_to_nowhere(folder):
    folder.symlink_to("nowhere")


@pytest.mark.parametrize("make_images", [half, link_to_nowhere, Path.touch, Path.mkdir])
@pytest.mark.parametrize("with_split", [True, False])
def test_half_a_dataset_is_completed(good_only, data, capsys, make_images, with_split):
    "What a user had is renamed, not removed."
    folder = data / "dtd"
    folder.mkdir(parents=True)
    if with_split:
        (folder / "split.json").write_text(json.dumps(toy_split()))
    make_images(folder / "images")
    assert missing_parts(good_only, data)[0] == "images"
    prepare("dtd", data, good_only)
    assert missing_parts(good_only, data) == []
    renamed = folder / "images.incomplete"
    assert os.path.lexists(renamed) == (make_images is not Path.mkdir)
    if make_images is half:
        assert len(files_below(renamed)) == 3
        assert f"{folder}/images was incomplete" in capsys.readouterr().err


DAMAGED_SPLITS = ["", "{", "[]", "null", "{}", '{"train": 3}', '{"train": [[1]]}', "\0", "NaN"]


@pytest.mark.parametrize("text", DAMAGED_SPLITS)
def test_damaged_split_file_is_missing(benchmark, data, text):
    half(data / "dtd/images", 8)
    (data / "dtd/split.json").write_text(text)
    assert missing_parts(benchmark, data) == ["split.json"]
    assert prepare("dtd", data, benchmark).note == "CoOp's split"


def test_lists_without_a_split(tmp_path):
    benchmark = BENCHMARKS["fgvc_aircraft"]
    folder = tmp_path / "fgvc_aircraft"
    half(folder / "images")
    problem = lacks(benchmark, folder, "images", folder / "images")
    assert problem == "holds 3 images, 10,000 are needed"
    (folder / "variants.txt").write_text("A 1\n")
    for part in ("train", "val", "test"):
        path = folder / f"images_variant_{part}.txt"
        path.write_text(f"{part} A 1\n")
        assert lacks(benchmark, folder, path.name, path) == ""
        (folder / f"images/{part}.jpg").write_text("x")
    assert missing_parts(benchmark, tmp_path) == []
    (folder / "images/val.jpg").write_text("")
    problem = lacks(benchmark, folder, "images", folder / "images")
    assert problem == "lacks 1 of 3 images, such as 'val.jpg'"


# ---- locks, state files, own files ----


def test_link_in_place_of_the_lock(benchmark, data, tmp_path):
    (data / ".downloads").mkdir(parents=True)
    (tmp_path / "thesis.txt").write_text("years of work")
    (data / ".downloads/dtd.lock").symlink_to(tmp_path / "thesis.txt")
    with pytest.raises(InvalidFileError, match=r"dtd\.lock"):
        prepare("dtd", data, benchmark)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.fixture
def part_folder(data, good_only):
    "Where parts of the good archive are stored."
    url = good_only.sources["images"][0].url
    return data / ".downloads/dtd" / content_key(url=url)[:8]


def test_link_in_place_of_a_part(good_only, data, tmp_path, part_folder):
    "Neither a part nor its state is written through a link."
    part_folder.mkdir(parents=True)
    names = ("good.zip.part", "good.zip.part.json")
    for name in names:
        (tmp_path / name).write_text("years of work")
        (part_folder / name).symlink_to(tmp_path / name)
    (part_folder.parent / "unpacked-x").symlink_to(tmp_path)
    prepare("dtd", data, good_only)
    assert [(tmp_path / name).read_text() for name in names] == ["years of work"] * 2


DAMAGED = ["", "{", "[]", "null", "3", '"a"', '{"url": 3}', "{}", '{"url": null}', "\0", "folder"]


def damage(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    if text == "folder":
        path.mkdir()
    else:
        path.write_text(text)


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_state_of_a_part(good_only, data, part_folder, text):
    damage(part_folder / "good.zip.part.json", text)
    (part_folder / "good.zip.part").write_bytes(b"x" * 100)
    assert prepare("dtd", data, good_only).note == "CoOp's split"
    assert files_below(data / ".downloads") == ["dtd.lock"]


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_hashes(good_only, data, capsys, text):
    damage(data / "downloads.json", text)
    assert prepare("dtd", data, good_only).note == "CoOp's split"
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
def test_own_file_that_is_none(benchmark, data, tmp_path, command, make_file, name):
    make_file(tmp_path / name)
    code, lines = command(benchmark, "--use", str(tmp_path / name))
    assert code == 1
    assert len(lines) == 1
    assert name in lines[0]
    assert not (data / "dtd").exists()


@pytest.mark.parametrize("use", ["nowhere.zip", "a" * 300, "nul\0", ""])
def test_own_file_with_an_impossible_name(benchmark, command, use):
    code, lines = command(with_images(benchmark), "--use", use)
    assert code == 1
    assert "Traceback" not in "".join(lines)


@pytest.mark.parametrize("place", ["data", "data/.downloads", "data/.downloads/dtd", "data/dtd"])
def test_file_where_a_folder_is_expected(good_only, tmp_path, command, place):
    damage(tmp_path / place, "own")
    code, lines = command(good_only)
    assert code == 1
    assert len(lines) == 1
    assert "data" in lines[0]
    assert (tmp_path / place).read_text() == "own"


def test_no_permission(good_only, command, monkeypatch):
    "As on a folder of somebody else."

    def refuse(*args):
        raise PermissionError(13, "Permission denied", str(args[0]))

    monkeypatch.setattr(os, "replace", refuse)
    code, lines = command(good_only)
    assert code == 1
    assert len(lines) == 1
    assert "cannot be written: Permission denied" in lines[0]


def test_complete_dataset_on_a_read_only_disk(good_only, data, monkeypatch):
    prepare("dtd", data, good_only)

    def refuse(*args):
        raise AssertionError("nothing is to be written")

    monkeypatch.setattr(preparation, "work_folder", refuse)
    assert prepare("dtd", data, good_only).note == "CoOp's split"


# ---- full disks and interruptions ----


def completes(data, benchmark):
    "The next call goes on from what is there."
    assert prepare("dtd", data, benchmark).note == "CoOp's split"
    assert files_below(data / ".downloads") == ["dtd.lock"]


@pytest.fixture
def command_in_child(data, benchmark, monkeypatch):
    "Call the command in a fork, with `function` called first; returns exit code and stderr."

    def run(benchmark, function):
        def call():
            function()
            return run_command("data", "dtd", root=data)

        monkeypatch.setitem(BENCHMARKS, "dtd", benchmark)
        code, printed = join(fork(call))
        return code, printed.splitlines()

    return run


@pytest.mark.parametrize(("limit", "padding"), [(50_000, 200_000), (150_000, 100_000)])
def test_full_disk(host, good_only, data, command_in_child, limit, padding):
    "The download (200 kB) does not fit, or one image of the archive (300 kB) does not."
    members = [
        *good_members(),
        Member("dtd/padding", random.Random(0).randbytes(padding)),
        Member("dtd/big.jpg", bytes(range(250)) * 1200),
    ]
    host.answers["/good.zip"] = serve(make_zip(members))
    largest = (limit, limit)
    shrink = partial(resource.setrlimit, resource.RLIMIT_FSIZE, largest)
    code, lines = command_in_child(good_only, shrink)
    assert code == 1
    assert len(lines) == 1
    assert "cannot be written: File too large" in lines[0]
    assert not (data / "dtd").exists()
    left = [name for name in files_below(data) if not name.endswith((".lock", ".part.json"))]
    assert [Path(name).name for name in left] == [
        "good.zip.part" if padding > limit else "good.zip"
    ]
    completes(data, good_only)


@pytest.mark.parametrize("event", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_unpacking(host, good_only, data, command_in_child, event):
    plain = zipfile.ZipFile.open
    opened = []

    def open_and_interrupt(*args, **kwargs):
        opened.append(1)
        if len(opened) == 4:
            signal.raise_signal(event)
        return plain(*args, **kwargs)

    def patch():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the own shell ignores
        zipfile.ZipFile.open = open_and_interrupt

    code, lines = command_in_child(good_only, patch)
    assert code == 128 + event
    assert lines == ["stopped; the same command goes on from here"]
    assert not (data / "dtd").exists()
    assert not list((data / ".downloads/dtd").glob("unpacked-*"))
    completes(data, good_only)


def test_disk_that_is_full_while_unpacking(good_only, data, monkeypatch):
    def full(*args):
        raise CannotWrite(28, "images cannot be written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(archives, "write_all", full)
        with pytest.raises(CannotWrite, match="No space left"):
            prepare("dtd", data, good_only)
    completes(data, good_only)


def cut_once(handler, start, host):
    "A server that supports ranges; its first connection is cut."
    if start:
        span = f"bytes {start}-{len(GOOD) - 1}/{len(GOOD)}"
        rest = GOOD[start:]
        handler.wfile.write(head(206, len(rest), ETag='"1"', Content_Range=span) + rest)
    else:
        handler.wfile.write(head(200, len(GOOD), ETag='"1"') + GOOD[:500])


def test_part_is_kept_through_failures(host, benchmark, data):
    "A part stays while its server is away, and while another address of the same name fails."
    sources = [Source(f"{host.url}/{folder}/x.zip") for folder in ("a", "b")]
    both = with_images(benchmark, *sources)
    host.answers["/a/x.zip"] = cut_once
    for _ in range(2):
        with pytest.raises(NotFoundError, match=r"x\.zip"):
            prepare("dtd", data, both, tries=1)
        (part,) = data.rglob("*.part")
        assert part.stat().st_size == 500
        host.answers.pop("/a/x.zip", None)
    host.answers["/a/x.zip"] = cut_once
    completes(data, both)


def test_https_without_a_certificate(host, benchmark, data):
    host.answers["/hostile.zip"] = serve(GOOD)
    secure = Source(f"{host.url}/hostile.zip".replace("http:", "https:"))
    with pytest.raises(NotFoundError, match=r"https://127\.0\.0\.1"):
        prepare("dtd", data, with_images(benchmark, secure), timeout=0.3)
