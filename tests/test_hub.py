"Methods in a repository of a local server that speaks as the Hugging Face hub does."

import base64
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
from conftest import ROOT, refused
from warm_process import WarmPython

import vlmadapt as va
from vlmadapt.data.repositories import repository_file
from vlmadapt.methods.cards import repository_page


class Hub:
    "Repositories in memory: creation, commits of small files, and their files by revision."

    def __init__(self):
        self.files = {}  # repository -> commit -> name -> bytes
        self.token = None  # that an upload needs
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                hub.send_file(self)

            do_HEAD = do_GET

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                hub.post(self, body)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler, status, body=b"", **headers):
        handler.send_response(status)
        headers.setdefault("Content-Length", str(len(body)))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)

    def as_json(self, handler, content):
        self.answer(handler, 200, json.dumps(content).encode(), Content_Type="application/json")

    def send_file(self, handler):
        owner, name, *rest = handler.path.strip("/").split("/")
        if rest[:1] != ["resolve"]:
            return self.answer(handler, 404)
        _, revision, *rest = rest
        commits = self.files.get(f"{owner}/{name}")
        if commits is None:
            return self.answer(handler, 404, X_Error_Code="RepoNotFound")
        commit = list(commits)[-1] if revision == "main" else revision
        if commit not in commits:
            return self.answer(handler, 404, X_Error_Code="RevisionNotFound")
        data = commits[commit].get("/".join(rest))
        if data is None:
            return self.answer(handler, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        digest = hashlib.sha256(data).hexdigest()
        return self.answer(handler, 200, data, ETag=f'"{digest}"', X_Repo_Commit=commit)

    def post(self, handler, body):
        given = handler.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.token and given != self.token:
            return self.answer(handler, 401, b'{"error": "Invalid credentials"}')
        parts = handler.path.strip("/").split("/")
        if handler.path == "/api/repos/create":
            found = json.loads(body)
            repository = f"{found.get('organization')}/{found['name']}"
            self.files.setdefault(repository, {})
            return self.as_json(handler, {"url": f"{self.url}/{repository}"})
        if parts[1:2] == ["validate-yaml"]:
            return self.as_json(handler, {"errors": [], "warnings": []})
        if "preupload" in parts:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.as_json(handler, {"files": files})
        commits = self.files["/".join(parts[2:4])]
        tree = dict(list(commits.values())[-1]) if commits else {}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                tree[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commit = hashlib.sha1(body).hexdigest()
        commits[commit] = tree
        address = f"{self.url}/{'/'.join(parts[2:4])}/commit/{commit}"
        return self.as_json(handler, {"commitOid": commit, "commitUrl": address})


@pytest.fixture(scope="module")
def server():
    hub = Hub()
    yield hub
    hub.server.shutdown()


@pytest.fixture
def hub(server):
    server.files, server.token = {}, None
    return server


@pytest.fixture(scope="module")
def run(server, tmp_path_factory):
    "Run code in a process whose hub is the local one, with a cache of its own."
    variables = {name: "" for name in os.environ if name.startswith("HF_")}
    variables |= dict(HF_ENDPOINT=server.url, HF_HOME=str(tmp_path_factory.mktemp("hf")))
    python = WarmPython(**variables | {"HF_HUB_OFFLINE": "0"})

    def run(code, *arguments, offline=False):
        if not offline:
            return python.run(code, *arguments)
        environment = os.environ | variables | dict(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    yield run
    python.close()


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    problem = va.few_shot("mini-digits", backbone="mini", shots=2, views=1)
    path = tmp_path_factory.mktemp("hub") / "m.safetensors"
    va.adapt(problem, "TaskRes", trials=2, fixed={"epochs": 2}).save(path)
    return path, va.load_method(path).scores(problem.features.test[:5])


PUSH = """
import vlmadapt as va

method = va.load_method({path!r})
print(method.push_to_hub("me/pets", accuracy=93.2, token={token!r}))
"""
LOAD = """
import torch
import vlmadapt as va

method = va.load_method({address!r})
problem = va.few_shot("mini-digits", backbone="mini", shots=2, views=1)
total = method.scores(problem.features.test[:5]).sum().item()
print(type(method).__name__, method.card["notes"], total)
"""
COMMAND = "import runpy; runpy.run_module('vlmadapt', run_name='__main__')"


def test_a_method_goes_up_and_comes_down(hub, run, stored):
    path, scores = stored
    done = run(PUSH.format(path=str(path), token=None))
    assert (done.returncode, done.stdout) == (0, "hf://me/pets\n"), done.stderr
    ((first, tree),) = hub.files["me/pets"].items()
    assert set(tree) == {"method.safetensors", "README.md"}
    page = tree["README.md"].decode()
    assert page.startswith("---\nlibrary_name: vlmadapt\npipeline_tag: image-classification\n")
    for text in ('va.load_method("hf://me/pets")', "`TaskRes`", '"accuracy": 93.2', "mini-digits"):
        assert text in page
    done = run(LOAD.format(address="hf://me/pets"))
    expected = f"TaskRes {{'accuracy': 93.2}} {scores.sum().item()}\n"
    assert done.stdout == expected, done.stderr
    # again without the server's help, at a revision, and by the command
    assert run(LOAD.format(address="hf://me/pets"), offline=True).stdout == expected
    run(PUSH.format(path=str(path), token=None).replace("93.2", "12.5"))
    assert "12.5" in run(LOAD.format(address="hf://me/pets")).stdout
    assert run(LOAD.format(address=f"hf://me/pets@{first}")).stdout == expected
    done = run(COMMAND, "evaluate", "hf://me/pets", "mini-digits")
    assert done.returncode == 0 and "accuracy" in done.stdout, done.stderr


FAIL = """
from vlmadapt.data.repositories import fetch_from_hub, upload_to_hub

for address in {addresses!r}:
    try:
        fetch_from_hub(address, "method.safetensors")
    except ValueError as error:
        print(error)
for token in {tokens!r}:
    try:
        print(upload_to_hub("me/new", {{"x.txt": b"x"}}, "A file", token=token))
    except ValueError as error:
        print(error)
"""


def test_what_fails_is_one_line(hub, run):
    hub.files["me/empty"] = {"0" * 40: {"README.md": b"nothing"}}
    hub.token = "secret"
    addresses = ["hf://me/none", "hf://me/empty", "hf://me/empty@v9"]
    done = run(FAIL.format(addresses=addresses, tokens=["wrong", "secret"]))
    none, empty, revision, denied, address = done.stdout.splitlines()
    assert f"hf://me/none: no such repository on {hub.url}, or a private one; `hf auth" in none
    assert "hf://me/empty: the repository holds no method.safetensors" in empty
    assert "the repository has no revision 'v9'" in revision
    assert "me/new: cannot be uploaded to" in denied and "HF_TOKEN gives access" in denied
    assert address == "hf://me/new"
    assert list(hub.files["me/new"].values()) == [{"x.txt": b"x"}]
    told = run(FAIL.format(addresses=["hf://me/none"], tokens=[]), offline=True).stdout
    assert "not in the local cache, and HF_HUB_OFFLINE is set" in told


def test_addresses():
    file = repository_file("hf://me/my.pets@refs-1/folder/x.safetensors", "")
    assert (file.repository, file.revision) == ("me/my.pets", "refs-1")
    assert file.name == "folder/x.safetensors"
    for wrong in ("hf://pets", "hf://", "hf://me/pets@", "hf://me/../x/y z@"):
        refused(lambda wrong=wrong: repository_file(wrong, ""), "expected hf://OWNER/NAME")
    method = va.create_method("ZeroShot", va.few_shot("mini-digits", shots=1, views=1))
    refused(lambda: method.push_to_hub("pets"), "expected hf://OWNER/NAME")


def test_the_page_holds_nothing_but_text():
    "Names of classes cannot break out of their block, whatever they contain."
    names = ["```", "# title", "</script><script>alert(1)</script>", "---"]
    card = dict(method="TaskRes", classnames=names, hyper_parameters={"alpha": 0.5}, trained=[])
    card |= dict(backbone="mini", problem=dict(dataset="a`b\n# c", shots=4))
    page = repository_page(card, "me/pets")
    fences = [line for line in page.splitlines() if line.startswith("```")]
    assert fences == ["```python", "```", "```json", "```", "```json", "```"]
    titles = [line for line in page.splitlines() if line.startswith("#")]
    assert titles == ["# pets", "## Classes", "## Hyper-parameters"]
    long = card | dict(classnames=[f"class {k}" for k in range(1000)])
    assert "and 800 more." in repository_page(long, "me/pets")
