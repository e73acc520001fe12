"""The path that most users take, `--model OWNER/NAME`, against a small hub on this machine.

The hub answers what huggingface_hub asks the real one: a model's info and tree, and its files with
etag, commit and Range. Some of its models are slow, silent or break off."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import FAST, ROOT, script
from test_cli import save_model

COMMIT = "c" * 40
NOBODY = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # refuses
FETCH = """
import os, sys, tokenrl
try:
    print("files:", *sorted(os.listdir(tokenrl.fetch_model(sys.argv[1]))))
except tokenrl.UserError as error:
    print(type(error).__name__, error)
"""


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files, asked = {}, []
    names = {"org/tiny", "org/slow", "org/broken", "Qwen/Qwen2-1.5B"}
    cuts = {"org/tiny": 1, "org/broken": 99}  # how many downloads of the weights end in the middle

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.asked.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0].removeprefix("/api/models").strip("/").split("/")
        name, rest = "/".join(path[:2]), path[2:]
        if name == "org/silent":
            time.sleep(12)
            self.close_connection = True
        elif name not in self.names:
            self.reply(404, b"{}", X_Error_Code="RepoNotFound")
        elif rest[:1] == ["resolve"]:
            self.send_file(name, self.files["/".join(rest[2:])])
        elif rest[:1] == ["tree"]:
            rows = [
                {"type": "file", "path": f, "size": len(b), "oid": etag(b)}
                for f, b in self.files.items()
            ]
            self.reply(200, json.dumps(rows).encode())
        else:
            siblings = [{"rfilename": file} for file in self.files]
            self.reply(200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())

    do_HEAD = do_GET

    def send_file(self, name: str, body: bytes) -> None:
        headers = {"ETag": f'"{etag(body)}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        status, total = 200, len(body)
        if wanted := re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range", "")):
            status, body = 206, body[int(wanted[1]) :]
            headers["Content_Range"] = f"bytes {wanted[1]}-{total - 1}/{total}"
        large = total > 1_000_000 and self.command == "GET"
        if large and self.cuts.get(name):
            self.cuts[name] -= 1
            self.close_connection = True
            self.reply(status, body[: len(body) // 2], len(body), **headers)
        else:
            pauses = [2, 2, 2] if large and name == "org/slow" else []
            self.reply(status, body, pauses=pauses, **headers)

    def reply(
        self, status: int, body: bytes, length: int = 0, pauses: list = (), **headers
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        for pause in pauses:
            self.wfile.write(body[:1000])
            body = body[1000:]
            time.sleep(pause)
        if self.command == "GET":
            self.wfile.write(body)


def etag(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    """The address of a hub whose models are all one random Qwen2, among files that nobody needs."""
    folder = save_model(tmp_path_factory.mktemp("hub") / "model")
    Hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    for file in ("consolidated.safetensors", "pytorch_model.bin", "onnx/config.json", "README.md"):
        Hub.files[file] = b"not asked for"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def start(endpoint, tmp_path):
    """Start a command in a folder with a small task, on a machine whose hub is this one."""
    task = tmp_path / "d" / "own"
    task.mkdir(parents=True)
    for split in ("train", "test"):
        rows = [json.dumps({"question": f"{i}+1", "answer": i + 1}) + "\n" for i in range(9)]
        (task / f"{split}.jsonl").write_text("".join(rows))
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}

    def started(*arguments, **variables):
        variables = os.environ | own | {"PYTHONPATH": str(ROOT), "NO_PROXY": "*"} | variables
        if arguments[0] != "fetch":
            return script(*arguments, cwd=tmp_path, env=variables)
        return subprocess.Popen(
            [sys.executable, "-c", FETCH, *arguments[1:]],
            cwd=tmp_path,
            env=variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    return started


def said(process) -> str:
    """All that a process printed, on one line."""
    return " ".join(process.communicate(timeout=60)[0].split())


TRAIN = ["train", "own", "--data-dir", "d", *FAST, "--steps", "1"]


def test_download_train_merge_eval(start, tmp_path):
    training = start(*TRAIN, "--model", "org/tiny", "--name", "r")
    text = said(training)
    assert training.returncode == 0, text
    assert Hub.cuts["org/tiny"] == 0  # it did break
    assert "resum" not in text and "Retry" not in text
    adapter = json.loads((tmp_path / "runs/r/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "org/tiny"  # not a folder of this machine
    asked = len(Hub.asked)
    evaluating = start("eval", "own", "--data-dir", "d", "--limit", "2", "--adapter", "runs/r")
    merging = start("merge", "runs/r", "merged", **NOBODY)  # from the cache, without a hub
    for process in (evaluating, merging):
        text = said(process)
        assert process.returncode == 0, text
    assert not any("resolve" in path for path in Hub.asked[asked:])
    assert (tmp_path / "merged/model.safetensors").exists()


def test_the_default_model_and_a_wrong_name(start):
    default, wrong = start(*TRAIN), start(*TRAIN, "--model", "org/tinny")
    text = said(default)
    assert default.returncode == 0 and "Loading Qwen/Qwen2-1.5B" in text, text
    text = said(wrong)
    assert wrong.returncode == 1 and "check the spelling" in text and text.count("Error") == 1, text


def test_slow_silent_and_broken_hubs(start):
    began = time.monotonic()
    silent = start("fetch", "org/silent")
    slow, broken = (start("fetch", f"org/{name}") for name in ("slow", "broken"))
    refused, offline = (
        start("fetch", "org/tiny", **NOBODY),
        start("fetch", "org/x", HF_HUB_OFFLINE="1"),
    )
    text = said(silent)
    assert text.startswith("UserError") and "no answer" in text and text.count(";") == 1, text
    assert time.monotonic() - began < 10
    needed = (
        "config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json"
    )
    assert said(slow) == f"files: {needed}" and time.monotonic() - began > 6
    text = said(broken)
    assert text.startswith("UserError") and "closed" in text and text.count(";") == 1, text
    Hub.cuts["org/broken"] = 0
    assert said(start("fetch", "org/broken")) == f"files: {needed}"
    assert said(start("fetch", "org/broken", **NOBODY)) == f"files: {needed}"
    assert "refused" in said(refused)
    assert "offline mode" in said(offline)
    assert not any(
        "onnx" in path or "consolidated" in path or "README" in path for path in Hub.asked
    )
