"""Archives and servers that are broken in every way that we know of, and a small dataset.

What is random is made from a seed.
"""

import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import socket
import socketserver
import struct
import sys
import tarfile
import tempfile
import threading
import traceback
import warnings
import zipfile
from dataclasses import dataclass, field
from typing import IO

from vlmadapt.data.annotations import class_folders
from vlmadapt.data.benchmarks import Benchmark, Source

# ---- a small dataset ----

CLASSES = ("banded", "dotted")
IMAGES = [f"{name}/{name}_{i}.jpg" for name in CLASSES for i in range(4)]


def toy_split():
    "Six of the images in the form of CoOp's split files."
    items = [[path, CLASSES.index(path.split("/")[0]), path.split("/")[0]] for path in IMAGES]
    return {"train": items[0::4], "val": items[1::4], "test": items[2::4]}


def toy_benchmark(url, *archives):
    "A dataset whose images come from `archives` at `url`; also the bytes of its split file."
    split = json.dumps(toy_split()).encode()
    split_hash = "sha256:" + hashlib.sha256(split).hexdigest()
    sources = {
        "images": tuple(Source(f"{url}/{name}") for name in archives),
        "split.json": (Source(f"{url}/split.json", split_hash),),
    }
    sizes = (2, 2, 2)
    benchmark = Benchmark(
        "dtd", "images", 2, sizes, class_folders, "split.json", split_hash, sources=sources
    )
    return benchmark, split


# ---- another process ----


@dataclass
class Child:
    "A fork of this process, and what it prints to stderr."

    pid: int
    printed: IO[str]


def fork(function, *args, **kwargs):
    "Call `function` in a fork of this process; an integer that it returns is the exit code."
    printed = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed by `join`
    pid = os.fork()
    if pid:
        return Child(pid, printed)
    code = 1
    try:
        sys.stderr = printed
        returned = function(*args, **kwargs)
        code = returned if isinstance(returned, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        printed.flush()
        os._exit(code)


def join(child):
    "Wait for a child; return its exit code (minus the signal that ended it) and what it printed."
    _, status = os.waitpid(child.pid, 0)
    child.printed.seek(0)
    with child.printed:
        return os.waitstatus_to_exitcode(status), child.printed.read()


# ---- archives ----

TAR_MODES = {"tar": "w", "tgz": "w:gz", "tbz": "w:bz2", "txz": "w:xz"}


@dataclass
class Member:
    "One member of an archive that is to be written."

    name: str
    data: bytes = b""
    kind: bytes = tarfile.REGTYPE
    link: str = ""
    pax: dict = field(default_factory=dict)


def good_members(seed=0, base="dtd"):
    rng = random.Random(seed)
    return [Member(f"{base}/images/{path}", rng.randbytes(200)) for path in IMAGES]


def make_tar(members, mode="w"):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode, format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.type = member.kind
            info.linkname = member.link
            info.pax_headers = member.pax
            info.size = len(member.data)
            tar.addfile(info, io.BytesIO(member.data))
    return stream.getvalue()


ZIP_KINDS = {
    tarfile.REGTYPE: 0o100644,
    tarfile.SYMTYPE: 0o120777,
    tarfile.FIFOTYPE: 0o010644,
    tarfile.CHRTYPE: 0o020644,
    tarfile.BLKTYPE: 0o060644,
    tarfile.DIRTYPE: 0o040755,
}


def make_zip(members, method=zipfile.ZIP_DEFLATED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for member in members:
            is_folder = member.kind == tarfile.DIRTYPE
            info = zipfile.ZipInfo(member.name + "/" * is_folder)
            info.external_attr = ZIP_KINDS[member.kind] << 16
            info.compress_type = method
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a name may be there twice
                archive.writestr(info, member.link or member.data)
    return stream.getvalue()


def make(members, kind):
    return make_zip(members) if kind == "zip" else make_tar(members, TAR_MODES[kind])


def _extra(*members):
    return lambda: good_members() + list(members)


def _images_as(kind, link=""):
    folder = Member("dtd/images", kind=kind, link=link)
    others = [Member(f"dtd/pictures/{path}", b"x") for path in IMAGES]
    return lambda: others + [folder]


# kinds of members, for every format that can hold them
MEMBERS = {
    "empty images folder": lambda: [Member("dtd/images", kind=tarfile.DIRTYPE)],
    "no images folder": lambda: [Member("dtd/readme.txt", b"x")],
    "images is a file": lambda: [Member("dtd/images", b"x")],
    "half of the images": lambda: good_members()[:3],
    "empty image files": lambda: [Member(m.name) for m in good_members()],
    "no members": list,
    "climbs out": _extra(Member("../evil.jpg", b"x")),
    "climbs out within": _extra(Member("dtd/../../evil.jpg", b"x")),
    "climbs out with backslashes": _extra(Member("dtd\\..\\..\\evil.jpg", b"x")),
    "absolute name": _extra(Member("/tmp/vlmadapt-evil.jpg", b"x")),
    "drive letter": _extra(Member("C:\\evil.jpg", b"x")),
    "network share": _extra(Member("\\\\host\\share\\evil.jpg", b"x")),
    "300 letters": _extra(Member("dtd/" + "a" * 300, b"x")),
    "300 bytes of UTF-8": _extra(Member("dtd/" + "é" * 150, b"x")),
    "long path": _extra(Member("dtd/" + "/".join(["a" * 200] * 20), b"x")),
    "100 levels": _extra(Member("a/" * 100 + "x", b"x")),
    "twice": _extra(Member("dtd/images/banded/banded_0.jpg", b"other")),
    "differs in capitals": _extra(Member("dtd/images/Banded/BANDED_0.jpg", b"other")),
    "differs in Unicode form": _extra(
        Member("dtd/\u00e9.jpg", b"x"), Member("dtd/e\u0301.jpg", b"y")
    ),
    "file and folder": _extra(Member("dtd/images/banded", b"x")),
    "file below a file": _extra(Member("dtd/images/banded/banded_0.jpg/x", b"x")),
    "FIFO": _extra(Member("dtd/pipe", kind=tarfile.FIFOTYPE)),
    "character device": _extra(Member("dtd/null", kind=tarfile.CHRTYPE)),
    "block device": _extra(Member("dtd/disk", kind=tarfile.BLKTYPE)),
    "dangling link": _images_as(tarfile.SYMTYPE, "nowhere"),
    "folder link": _images_as(tarfile.SYMTYPE, "pictures"),
    "link to itself": _images_as(tarfile.SYMTYPE, "images"),
    "absolute link": _images_as(tarfile.SYMTYPE, "/etc"),
    "link out": _images_as(tarfile.SYMTYPE, "../../../.."),
    "bomb": lambda: [Member("dtd/images/zeros.jpg", bytes(8_000_000))],
    "hostile archive within": lambda: [
        Member("dtd/images.zip", make_zip([Member("../../evil", b"x")]))
    ],
    "page as archive within": lambda: [Member("dtd/images.zip", b"<html>")],
}
TAR_MEMBERS = {
    "hard link to nothing": _images_as(tarfile.LNKTYPE, "nowhere"),
    "hard link out": _images_as(tarfile.LNKTYPE, "../../etc/passwd"),
    "links in a circle": _extra(
        Member("a", kind=tarfile.SYMTYPE, link="b"), Member("b", kind=tarfile.SYMTYPE, link="a")
    ),
    "below a link": _extra(
        Member("d", kind=tarfile.SYMTYPE, link="/tmp"), Member("d/vlmadapt-evil", b"x")
    ),
    "unknown kind": _extra(Member("dtd/what", kind=b"Z")),
    "NUL in the name": _extra(Member("dtd/a", b"x", pax={"path": "dtd/a\0.jpg"})),
    "large header": _extra(Member("dtd/a", b"x", pax={"comment": "c" * 3_000_000})),
    "path in a header": _extra(Member("dtd/a", b"x", pax={"path": "../../evil"})),
    "size in a header": _extra(Member("dtd/a", b"x", pax={"size": "999999999999999"})),
    "negative size": _extra(Member("dtd/a", b"x", pax={"size": "-512"})),
    "sparse": _extra(
        Member(
            "dtd/a",
            b"1\n0\n1\n".ljust(512, b"\0") + b"x",
            pax={
                "GNU.sparse.major": "1",
                "GNU.sparse.minor": "0",
                "GNU.sparse.name": "dtd/a",
                "GNU.sparse.realsize": "999999999999999",
            },
        )
    ),
}


def _patched(data, offset, form, value):
    "All local and central headers of a zip file with another value at `offset` of the latter."
    data = bytearray(data)
    for signature, shift in ((b"PK\x01\x02", 0), (b"PK\x03\x04", -2)):
        at = data.find(signature)
        while at >= 0:
            struct.pack_into(form, data, at + offset + shift, value)
            at = data.find(signature, at + 4)
    return bytes(data)


def _nul_zip():
    data = make_zip([*good_members(), Member("dtd/a_b.jpg", b"x")])
    return data.replace(b"dtd/a_b.jpg", b"dtd/a\0b.jpg")


def _stored_with_wrong_checksum():
    return make_zip(good_members(), zipfile.ZIP_STORED).replace(
        good_members()[0].data, b"\0" * len(good_members()[0].data)
    )


def _cut(kind, end):
    return lambda: make(good_members(), kind)[:end]


def _damaged(kind):
    "A run of bytes in the middle is overwritten."

    def build():
        data = bytearray(make(good_members(), kind))
        middle = len(data) // 2
        data[middle : middle + 60] = b"\xff" * 60
        return bytes(data)

    return build


def _cut_member():
    return make(good_members()[:3], "tar")[:1500]


BYTES = {
    "empty file": lambda: b"",
    "page": lambda: b"<!doctype html><html>Quota exceeded</html>" * 20,
    "pointer of Git LFS": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "7z": lambda: b"7z\xbc\xaf\x27\x1c" + bytes(500),
    "zstd": lambda: b"\x28\xb5\x2f\xfd" + bytes(500),
    "gzip of a page": lambda: gzip.compress(b"<html>" * 200),
    "xz of nothing": lambda: lzma.compress(b""),
    "only the end of a zip": lambda: b"PK\x05\x06" + bytes(18),
    "zip, encrypted": lambda: _patched(make_zip(good_members()), 8, "<H", 1),
    "zip, unknown compression": lambda: _patched(make_zip(good_members()), 10, "<H", 99),
    "zip, other size": lambda: _patched(make_zip(good_members()), 24, "<I", 9),
    "zip, size of 4 GB": lambda: _patched(make_zip(good_members()), 24, "<I", 0xFFFFFFF0),
    "zip, no size": lambda: _patched(make_zip(good_members()), 20, "<I", 0),
    "zip, checksum": lambda: _patched(make_zip(good_members()), 16, "<I", 7),
    "zip, other content": _stored_with_wrong_checksum,
    "zip, wrong offsets": lambda: (
        _patched(make_zip(good_members())[:-22], 42, "<I", 9) + make_zip(good_members())[-22:]
    ),
    "zip, NUL in a name": _nul_zip,
    "tar, cut in a member": _cut_member,
    **{f"{kind}, cut in half": _cut(kind, 700) for kind in ("zip", "tgz", "tbz", "txz")},
    **{f"{kind}, end is missing": _cut(kind, -30) for kind in ("zip", "tgz", "tbz", "txz")},
    **{f"{kind}, damaged": _damaged(kind) for kind in ("zip", "tar", "tgz", "tbz", "txz")},
}


def hostile_archives():
    "Name -> function that returns the bytes of an archive, for all kinds and formats."
    cases = dict(BYTES)
    for name, members in MEMBERS.items():
        for kind in ("zip", "tar", "tgz"):
            if kind == "tar" and name == "bomb":
                continue  # nothing is compressed in it
            cases[f"{kind}: {name}"] = lambda members=members, kind=kind: make(members(), kind)
    for name, members in TAR_MEMBERS.items():
        for kind in ("tar", "tgz", "txz"):
            cases[f"{kind}: {name}"] = lambda members=members, kind=kind: make(members(), kind)
    return cases


# ---- servers ----


class RawHost:
    "A server that answers with what `answers[path](send, requested)` sends; `requests` counts."

    def __init__(self):
        self.answers = {}
        self.requests = {}
        self.stopped = threading.Event()
        host = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                head = b""
                while b"\r\n\r\n" not in head:
                    block = self.rfile.readline()
                    if not block:
                        return
                    head += block
                with contextlib.suppress(OSError):
                    host.answer(self, head.decode("latin-1"))

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            block_on_close = False

        self.server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, handler, head):
        path = head.split()[1]
        self.requests[path] = self.requests.get(path, 0) + 1
        behaviour = self.answers.get(path) or self.answers.get(path.rstrip("0123456789"))
        if behaviour is None:
            handler.wfile.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        range_line = [x for x in head.splitlines() if x.lower().startswith("range:")]
        start = int(range_line[0].partition("bytes=")[2].rstrip("-")) if range_line else 0
        behaviour(handler, start, self)

    def close(self):
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()


def serve(data):
    "The behaviour of a sound server."
    return lambda handler, start, host: handler.wfile.write(head(200, len(data)) + data)


def head(status, length=None, **headers):
    lines = [f"HTTP/1.1 {status} Whatever"]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _send(*blocks):
    return lambda handler, start, host: handler.wfile.write(b"".join(blocks))


def _for_ever(first, block, pause=0.0):
    def behave(handler, start, host):
        handler.wfile.write(first)
        while not host.stopped.wait(pause):
            handler.wfile.write(block)

    return behave


def _silent(first=b""):
    def behave(handler, start, host):
        handler.wfile.write(first)
        handler.wfile.flush()
        host.stopped.wait(20)

    return behave


def _reset(first=b""):
    "Close the connection with a reset."

    def behave(handler, start, host):
        handler.wfile.write(first)
        linger = struct.pack("ii", 1, 0)
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        handler.connection.close()

    return behave


def _partial(**headers):
    "The first connection is cut; the rest comes with a wrong 206."

    def behave(handler, start, host):
        if not start:
            handler.wfile.write(head(200, 300_000, ETag='"1"') + bytes(100_000))
            return
        sent = {k: v.format(start=start) for k, v in headers.items()}
        handler.wfile.write(head(206, 1000, ETag='"1"', **sent) + bytes(1000))

    return behave


def _one_byte_each(handler, start, host):
    "Every connection brings one more byte of a huge file."
    if start:
        span = f"bytes {start}-99999999/100000000"
        handler.wfile.write(head(206, 1000, ETag='"1"', Content_Range=span) + b"x")
        return
    handler.wfile.write(head(200, 100_000_000, ETag='"1"') + b"x")


def _redirect(to):
    return lambda handler, start, host: handler.wfile.write(head(302, 0, Location=to))


def _next_page(handler, start, host):
    count = sum(host.requests.values())
    handler.wfile.write(head(302, 0, Location=f"/hostile{count}"))


def _endless_redirect_body(handler, start, host):
    handler.wfile.write(head(302, Location="/none"))
    while not host.stopped.is_set():
        handler.wfile.write(bytes(100_000))


GOOD = make_zip(good_members(1))
SERVERS = {
    "404": _send(head(404, 0)),
    "403 with a page": _send(head(403, 6), b"<html>"),
    "500": _send(head(500, 0)),
    "429": _send(head(429, 0, Retry_After="100000")),
    "reason with control characters": _send(b"HTTP/1.1 404 \x1b[31mgone\x07\r\n\r\n"),
    "204": _send(head(204)),
    "304": _send(head(304)),
    "416 always": _send(head(416, 0, Content_Range="bytes */0")),
    "nothing at all": _send(b""),
    "reset at once": _reset(),
    "reset in the body": _reset(head(200, 9000) + bytes(3000)),
    "no HTTP": _send(b"220 ftp ready\r\n" * 3),
    "old HTTP": _send(b"HTTP/0.5\r\n\r\n" + GOOD[:100]),
    "binary headers": _send(b"HTTP/1.1 200 OK\r\n\xff\xfe\x00: \x01\r\n\r\n", GOOD[:100]),
    "200 and nothing": _send(head(200, 0)),
    "length too small": _send(head(200, 700), GOOD),
    "length too large": _send(head(200, len(GOOD) + 50), GOOD),
    "length in letters": _send(head(200, "many"), GOOD[:700]),
    "length below zero": _send(head(200, -5), GOOD[:700]),
    "length of an exabyte": _send(head(200, 10**18), GOOD),
    "length of 400 digits": _send(head(200, "9" * 400), GOOD[:700]),
    "length of 5000 digits": _send(head(200, "9" * 5000), GOOD[:700]),
    "gzip": _send(head(200, Content_Encoding="gzip"), gzip.compress(GOOD)),
    "unknown coding": _send(head(200, Content_Encoding="br"), GOOD),
    "chunks of nonsense": _send(head(200, Transfer_Encoding="chunked"), b"zz\r\n" + GOOD),
    "chunk of an exabyte": _send(head(200, Transfer_Encoding="chunked"), b"f" * 15 + b"\r\n", GOOD),
    "206 without a range": _send(head(206, len(GOOD)), GOOD),
    "206 from elsewhere": _send(head(206, 9, Content_Range="bytes 5-13/99"), b"123456789"),
    "resumed without a range": _partial(),
    "resumed with an absurd range": _partial(Content_Range="bytes of all kinds"),
    "resumed with a negative range": _partial(Content_Range="bytes -5--1/-9"),
    "resumed from elsewhere": _partial(Content_Range="bytes 7-1006/300000"),
    "resumed with another total": _partial(Content_Range="bytes {start}-100999/500"),
    "resumed with a total of 30 digits": _partial(Content_Range="bytes {start}-9/" + "9" * 30),
    "one byte for each connection": _one_byte_each,
    "redirected to itself": _redirect("/hostile.zip"),
    "redirected without end": _next_page,
    "redirected to a file": _redirect("file:///etc/passwd"),
    "redirected to FTP": _redirect("ftp://127.0.0.1:9/a.zip"),
    "redirected to nothing": _send(head(302, 0)),
    "redirected to nonsense": _redirect("http://[::bad/"),
    "redirected to a bad port": _redirect("http://127.0.0.1:99999999/a"),
    "redirected with a body without end": _endless_redirect_body,
    "headers without end": _for_ever(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n" * 500),
    "header line without end": _for_ever(b"HTTP/1.1 200 OK\r\nA: ", b"b" * 1000),
    "100 Continue without end": _for_ever(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 500),
    "body without end": _for_ever(head(200), bytes(100_000)),
    "chunks without end": _for_ever(
        head(200, Transfer_Encoding="chunked"), b"2710\r\n" + bytes(10_000) + b"\r\n"
    ),
    "trailers without end": _for_ever(
        head(200, Transfer_Encoding="chunked") + b"1\r\nx\r\n0\r\n", b"A: b\r\n" * 500
    ),
    "drips": _for_ever(head(200, 10**6), b"x", 0.05),
    "drips headers": _for_ever(b"HTTP/1.1 200 OK\r\nA: ", b"b", 0.05),
    "silent": _silent(),
    "silent after the headers": _silent(head(200, 5000) + b"x"),
}
