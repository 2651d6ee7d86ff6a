"""Packages on the hub: the manifest first, then its files and nothing else. The hub is a small server of our own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from llmx.runtime.errors import PackageError, RequestError
from llmx.runtime.hub import resolve_package

COMMIT = "c" * 40


def manifest(demo: Path, **changes: Any) -> bytes:
    return json.dumps({**json.loads((demo / "llmx.json").read_text()), **changes}).encode()


@pytest.fixture
def package(demo: Path) -> dict[str, bytes]:
    """The demo's package as a repository, with more beside it."""
    files = {path.name: path.read_bytes() for path in demo.iterdir()}
    return {**files, "model.safetensors": b"x" * 100, "README.md": b"x"}


# -- the client replaced ----------------------------------------------------------------------------------------------


class FakeHub:
    """Stands for huggingface_hub's two functions and counts what they are asked for."""

    def __init__(self, folder: Path, files: dict[str, bytes]) -> None:
        self.folder, self.files = folder / COMMIT, files
        self.asked: list[tuple[str, str | None]] = []

    def fetch(self, name: str) -> str:
        self.folder.mkdir(exist_ok=True)
        (self.folder / name).write_bytes(self.files[name])
        return str(self.folder / name)

    def hf_hub_download(self, repo: str, filename: str, revision: str | None = None) -> str:
        from huggingface_hub.errors import EntryNotFoundError

        self.asked.append((filename, revision))
        if filename not in self.files:
            raise EntryNotFoundError("404")
        return self.fetch(filename)

    def snapshot_download(self, repo: str, revision: str | None = None, allow_patterns: list[str] | None = None) -> str:
        for name in self.files:
            if allow_patterns is None or any(fnmatch(name, pattern) for pattern in allow_patterns):
                self.asked.append((name, revision))
                self.fetch(name)
        return str(self.folder)


@pytest.fixture
def fake(tmp_path: Path, package: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    hub = FakeHub(tmp_path, package)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.hf_hub_download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    monkeypatch.setattr("llmx.runtime.hub._where", dict)  # it answers
    return hub


def test_only_the_files_of_the_manifest_are_fetched(fake: FakeHub) -> None:
    folder = resolve_package("some-org/demo", "v1")
    wanted = set(json.loads(fake.files["llmx.json"])["files"]) | {"llmx.json"}
    assert {path.name for path in folder.iterdir()} == wanted
    assert fake.asked[0] == ("llmx.json", "v1")
    assert {revision for _, revision in fake.asked[1:]} == {COMMIT}  # of one commit, should the branch move meanwhile
    fake.asked.clear()
    assert resolve_package("some-org/demo", "v1") == folder
    assert fake.asked == [("llmx.json", "v1")]  # everything is there


def test_a_checkpoint_is_refused_before_its_weights(fake: FakeHub) -> None:
    del fake.files["llmx.json"]
    with pytest.raises(PackageError) as caught:
        resolve_package("some-org/demo")
    assert str(caught.value) == (
        "some-org/demo on the hub is not a model package (no llmx.json): export it first: "
        "llmx export --model some-org/demo"
    )
    assert fake.asked == [("llmx.json", None)]


def test_a_newer_package_is_refused_before_its_weights(fake: FakeHub, demo: Path) -> None:
    fake.files["llmx.json"] = manifest(demo, format_version="9.0")
    with pytest.raises(PackageError, match="some-org/demo/llmx.json has format version 9.0"):
        resolve_package("some-org/demo")
    fake.files["llmx.json"] = b"\xff"
    with pytest.raises(PackageError, match="llmx.json of some-org/demo cannot be read"):
        resolve_package("some-org/demo")
    assert {name for name, _ in fake.asked} == {"llmx.json"}


def test_a_repository_that_lacks_a_file(fake: FakeHub) -> None:
    del fake.files["weights.data"]
    with pytest.raises(PackageError, match="some-org/demo lacks weights.data, which its manifest lists"):
        resolve_package("some-org/demo")


def test_a_revision_of_a_local_folder(tmp_path: Path) -> None:
    assert resolve_package(tmp_path) == tmp_path
    with pytest.raises(RequestError, match="A revision goes with a hub id"):
        resolve_package(tmp_path, "main")


def test_what_is_no_hub_id_is_not_asked_for(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a name without an owner nor a path in a folder that is here."""
    (tmp_path / "artifacts").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "artifacts/demo", "./demo"):
        with pytest.raises(PackageError, match=f"There is no model package at {name}; create one"):
            resolve_package(name)
    assert fake.asked == []


# -- the real client, a server of our own -----------------------------------------------------------------------------


class Server:
    """The few answers of the hub that its client asks for."""

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        self.fetched: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def answer(self, code: int, body: bytes, **headers: str) -> None:
                self.send_response(code)
                for key, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(key.replace("_", "-"), value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_POST(self) -> None:
                self.answer(404, b"")

            def do_GET(self) -> None:
                path = unquote(self.path).partition("?")[0].strip("/")
                name = next((n for n in repositories if n in path), None)
                if name is None:
                    return self.answer(404, b"", X_Error_Code="RepoNotFound")
                files = repositories[name]
                if path.startswith("api/models/"):
                    return self.answer(200, self.listing(path, name, files), Content_Type="application/json")
                file = path.partition("/resolve/")[2].partition("/")[2]
                if file not in files:
                    return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
                if self.command == "GET":
                    outer.fetched.append(file)
                etag = hashlib.sha256(files[file]).hexdigest()
                self.answer(200, files[file], ETag=f'"{etag}"', X_Repo_Commit=COMMIT)

            @staticmethod
            def listing(path: str, name: str, files: dict[str, bytes]) -> bytes:
                if "/tree/" in path:
                    entries = [{"type": "file", "path": f, "size": len(d), "oid": "0" * 40} for f, d in files.items()]
                    return json.dumps(entries).encode()
                siblings = [{"rfilename": f} for f in files]
                return json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(package: dict[str, bytes]) -> Iterator[Server]:
    checkpoint = {"config.json": b"{}", "model.safetensors": b"x" * 1000}
    server = Server({"some-org/demo": package, "some-org/checkpoint": checkpoint})
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_with_the_real_client(server: Server, demo: Path, tmp_path: Path) -> None:
    proxies = {name: "" for name in os.environ if name.lower().endswith("_proxy")}
    endpoint = f"http://127.0.0.1:{server.http.server_port}"
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    own["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

    def inspect(name: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llmx.cli", "inspect", name, "--json"]
        env = {**os.environ, **proxies, **own, **more}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env)

    done = inspect("some-org/checkpoint")
    assert done.returncode == 1
    assert "some-org/checkpoint on the hub is not a model package (no llmx.json)" in done.stderr
    assert server.fetched == []
    assert "no such repository on the hub" in inspect("some-org/other").stderr
    done = inspect("some-org/demo")
    assert done.returncode == 0, done.stderr
    assert sorted(server.fetched) == sorted(path.name for path in demo.iterdir())
    folder = Path(json.loads(done.stdout)["path"])
    assert folder.name == COMMIT
    assert (folder / "weights.data").read_bytes() == (demo / "weights.data").read_bytes()
    server.fetched.clear()
    assert inspect("some-org/demo").returncode == 0
    assert inspect("some-org/demo", HF_HUB_OFFLINE="1").returncode == 0
    assert server.fetched == []
    (folder / "weights.data").unlink()
    done = inspect("some-org/demo", HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.endswith(
        "(An error happened while trying to locate the file on the Hub and we cannot find the "
        "requested files in the local cache).\n"
    )


def test_a_hub_that_does_not_answer(tmp_path: Path) -> None:
    """One sentence at once, where the client would try for half a minute."""
    own = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    proxies = {name: "" for name in os.environ if name.lower().endswith("_proxy")}
    command = [sys.executable, "-m", "llmx.cli", "run", "--onnx", "some-org/demo", "--prompt", "x"]
    env = {**os.environ, **proxies, **own}
    done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=False, env=env)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "There is no folder some-org/demo here, and the hub could not be reached for it" in done.stderr
