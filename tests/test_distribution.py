"""What users get: the wheel in an environment without PyTorch, the example service, the documented snippets."""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def sh(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    result: subprocess.CompletedProcess[str] = done
    return result


@pytest.fixture(scope="module")
def lean_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new venv with the built wheel and its `cpu` extra alone."""
    work = tmp_path_factory.mktemp("wheel")
    sh(sys.executable, "-m", "build", "--wheel", "--outdir", work, ROOT)
    [wheel] = work.glob("llmx-*.whl")
    sh(sys.executable, "-m", "venv", work / "venv")
    python = work / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    sh(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", f"{wheel}[cpu]")
    return python


def test_the_wheel_runs_a_package_without_torch(lean_environment: Path, demo: Path, tmp_path: Path) -> None:
    installed = sh(lean_environment, "-m", "pip", "list", "--format=json").stdout
    names = {entry["name"].lower() for entry in json.loads(installed)}
    assert not names & {"torch", "transformers", "onnx", "onnxscript", "onnx-ir"}
    llmx = lean_environment.with_name("llmx")
    done = sh(llmx, "run", "--onnx", demo, "--prompt", "ROMEO:", "-n", 8, "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 8
    sh(llmx, "inspect", demo, cwd=tmp_path)
    sh(llmx, "doctor", cwd=tmp_path)
    export = subprocess.run([llmx, "export", "--model", "x"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert export.returncode == 1
    assert 'pip install "llmx[export]"' in export.stderr and "Traceback" not in export.stderr


def test_the_wheel_holds_the_page(lean_environment: Path) -> None:
    import zipfile

    [wheel] = lean_environment.parents[2].glob("llmx-*.whl")
    source = ROOT / "serve" / "static"
    files = {path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*") if path.is_file()}
    with zipfile.ZipFile(wheel) as archive:
        prefix = "llmx/serve/static/"
        names = [name for name in archive.namelist() if name.startswith(prefix)]
        assert {name.removeprefix(prefix): archive.read(name) for name in names} == files
    assert "index.html" in files


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def post(url: str, body: dict[str, object]) -> tuple[int, dict[str, object]]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_the_example_service(demo: Path, tmp_path: Path) -> None:
    """The example for real: uvicorn in a process where PyTorch cannot be imported, many clients at once."""
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not in production')")
    port = free_port()
    environment = {**os.environ, "LLMX_PACKAGE": str(demo), "PYTHONPATH": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "--app-dir",
        str(ROOT / "examples"),
        "embed_in_service:app",
        "--port",
        str(port),
    ]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    base = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                post(base + "/complete", {"prompt": "x", "max_tokens": 1})
                break
            except OSError:
                assert time.monotonic() < deadline and server.poll() is None
                time.sleep(0.1)
        body = {"prompt": "ROMEO:", "max_tokens": 20, "temperature": 0.0}
        answers: list[tuple[int, dict[str, object]]] = []
        threads = [threading.Thread(target=lambda: answers.append(post(base + "/complete", body))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(answers) == 8 and len({json.dumps(a) for a in answers}) == 1
        assert answers[0][0] == 200 and answers[0][1]["text"]
        status, refusal = post(base + "/complete", {"prompt": "x", "temperature": -1})
        assert status == 400 and "temperature must be" in str(refusal["detail"])
        with urllib.request.urlopen(base + "/stream?prompt=ROMEO:&max_tokens=12", timeout=30) as answer:
            assert answer.read().decode()
    finally:
        server.terminate()
        server.wait(20)


@pytest.mark.parametrize("page", ["README.md", "docs/chat.md", "docs/decoding.md", "docs/sampling.md"])
def test_the_readme_is_true(page: str, demo: Path) -> None:
    """Its Python snippets run on the demo package; its llmx commands name options that exist."""
    from click.testing import CliRunner
    from llmx.cli import main

    text = (ROOT / page).read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.S)
    assert snippets
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet.replace("artifacts/demo", str(demo)), page, "exec"), names)
    for line in re.findall(r"^llmx (.+)$", text, re.M):
        command = list(itertools.takewhile(lambda word: not word.startswith("-"), line.split("#")[0].split()))
        shown = CliRunner().invoke(main, [*command, "--help"]).output
        for option in re.findall(r"(?<!\S)--[a-z-]+", line):
            assert option in shown, f"{page}: llmx {line}"


def test_nothing_in_the_runtime_imports_torch() -> None:
    pattern = re.compile(r"^\s*(?:import|from)\s+(torch|transformers|onnxscript|onnx_ir|onnx|peft)\b", re.M)
    for folder in ("runtime", "serve", "bench", "cli"):
        for file in (ROOT / folder).rglob("*.py"):
            assert not pattern.search(file.read_text()), file
