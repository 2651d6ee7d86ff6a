"""The command line: what it prints, what it refuses and how."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from llmx.cli import main


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], input=stdin)


def refused(result: Result, message: str, code: int) -> None:
    """One sentence naming the problem, no traceback."""
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert message in last


def test_run_prints_text_and_timings(demo: Path) -> None:
    result = run("run", "--onnx", demo, "--prompt", "ROMEO:", "--temperature", 0, "-n", 12)
    assert result.exit_code == 0, result.output
    assert len(result.stdout.strip()) > 3
    assert "tokens/s" in result.stderr and "first token after" in result.stderr
    assert "1,024 positions" in result.stderr


def test_run_json_and_the_same_text_from_file_and_stdin(demo: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("ROMEO:")
    common = ("run", "--onnx", demo, "--temperature", 0, "-n", 12, "--json")
    outputs = [run(*common, "--prompt", "ROMEO:"), run(*common, "--prompt-file", file), run(*common, stdin="ROMEO:")]
    facts = [json.loads(o.stdout) for o in outputs]
    assert facts[0]["text"] == facts[1]["text"] == facts[2]["text"]
    assert facts[0]["usage"] == {"prompt_tokens": 2, "completion_tokens": 12}
    assert facts[0]["finish_reason"] == "length"


def test_seed_repeats_and_stop_ends(demo: Path) -> None:
    common = ("run", "--onnx", demo, "--prompt", "ROMEO:", "-n", 40, "--json", "--seed", 5)
    first, second = (json.loads(run(*common).stdout)["text"] for _ in range(2))
    assert first == second
    word = first.split()[2]
    stopped = json.loads(run(*common, "--stop", word).stdout)
    assert stopped["text"] == first[: first.index(word)]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", word)


def test_chat_command(demo: Path) -> None:
    result = run("chat", "--onnx", demo, "--seed", 3, "-n", 20, stdin="What news?\n/reset\n\nAnd now?\n/exit\n")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.strip()) > 3


def test_inspect(demo: Path) -> None:
    shown = run("inspect", demo)
    assert "GroupQueryAttention" in shown.stdout and "in_place" in shown.stdout
    facts = json.loads(run("inspect", demo, "--json", "--integrity").stdout)
    assert facts["graphs"]["decode"]["GroupQueryAttention"] == 5
    assert facts["state"]["bytes_per_token"] == 5 * 2 * 2 * 32 * 4
    assert facts["verification"]["status"] == "passed"


def test_operator_counts_equal_onnx(demo: Path) -> None:
    import onnx
    from llmx.cli.inspect import operators

    graph = onnx.load(demo / "prefill.onnx", load_external_data=False).graph
    counts = operators(demo / "prefill.onnx")
    assert counts == {op: sum(n.op_type == op for n in graph.node) for op in {n.op_type for n in graph.node}}


def test_doctor() -> None:
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["can_run"] and facts["can_export"] and "CPUExecutionProvider" in facts["providers"]
    assert "onnxruntime" in run("doctor").stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    assert "_LLMX_COMPLETE" in run("completion", shell).stdout


@pytest.mark.parametrize("command", ["export", "run", "chat", "inspect", "doctor", "completion"])
def test_help_has_examples(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout or command == "doctor"


def test_export_command(demo_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run("export", "--model", demo_checkpoint, "--output", output, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["verification"]["status"] == "passed"
    refused(run("export", "--model", demo_checkpoint, "--output", output), "already exists", 1)
    assert run("export", "--model", demo_checkpoint, "--output", output, "--force", "--no-verify").exit_code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", "x", "--prompt-file", "y"], "not both"),
        (["--prompt-file", "/nowhere/x"], "cannot be read"),
        (["--prompt", "x", "--temperature", "-1"], "temperature must be"),
        (["--prompt", "x", "--top-p", "2"], "top_p must be"),
        (["--prompt", "x", "--top-k", "-5"], "top_k must be"),
        (["--prompt", "x", "-n", "0"], "max_tokens must be"),
        (["--prompt", "x", "--seed", "-1"], "seed must be"),
        (["--prompt", "x", "--device", "tpu"], 'device must be "auto"'),
        (["--prompt", "x", "--max-length", "5000"], "max_length must lie between 2 and"),
        (["--prompt", "word " * 2000], "context holds 1024"),
    ],
)
def test_run_refuses(demo: Path, options: list[str], message: str) -> None:
    refused(run("run", "--onnx", demo, *options), message, 2)


def test_provider_not_installed(demo: Path) -> None:
    refused(run("run", "--onnx", demo, "--prompt", "x", "--device", "cuda"), 'pip install "llmx[gpu]"', 1)


def test_no_such_package(tmp_path: Path, demo_checkpoint: Path) -> None:
    refused(run("run", "--onnx", tmp_path / "none", "--prompt", "x"), "There is no model package", 1)
    refused(run("run", "--onnx", tmp_path, "--prompt", "x"), "not a model package", 1)
    refused(run("run", "--onnx", demo_checkpoint, "--prompt", "x"), "export it first", 1)
    refused(run("run", "--onnx", "some-org/some-model", "--prompt", "x"), "hub could not be reached", 1)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / "llmx.json").read_text())
    change(manifest)
    (folder / "llmx.json").write_text(json.dumps(manifest))


@pytest.fixture
def damaged(demo: Path, tmp_path: Path) -> Path:
    shutil.copytree(demo, tmp_path / "copy")
    return tmp_path / "copy"


def test_missing_and_truncated_files(damaged: Path) -> None:
    weights = damaged / "weights.data"
    with weights.open("r+b") as file:
        file.truncate(1000)
    refused(run("run", "--onnx", damaged, "--prompt", "x"), "it was cut short or altered", 1)
    weights.unlink()
    refused(run("run", "--onnx", damaged, "--prompt", "x"), "lacks weights.data", 1)


def test_altered_files(damaged: Path) -> None:
    weights = damaged / "weights.data"
    data = bytearray(weights.read_bytes())
    data[5000] ^= 255
    weights.write_bytes(data)
    refused(run("inspect", damaged, "--integrity"), "was altered", 1)
    (damaged / "tokenizer.json").write_text("x" * (damaged / "tokenizer.json").stat().st_size)
    refused(run("run", "--onnx", damaged, "--prompt", "x"), "tokenizer.json was altered", 1)


def vouch(package: Path, name: str) -> None:
    """Write the file's present hash into the manifest, as if the exporter had written it so."""
    manifest = json.loads((package / "llmx.json").read_text())
    manifest["files"][name]["sha256"] = hashlib.sha256((package / name).read_bytes()).hexdigest()
    (package / "llmx.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(("name", "message"), [("decode.onnx", "cannot open"), ("tokenizer.json", "is damaged")])
def test_damaged_files(damaged: Path, name: str, message: str) -> None:
    file = damaged / name
    file.write_bytes(b"x" * file.stat().st_size)
    refused(run("run", "--onnx", damaged, "--prompt", "x"), f"{name} was altered", 1)
    vouch(damaged, name)
    refused(run("run", "--onnx", damaged, "--prompt", "x"), message, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version="2.0"), "format version 2.0"),
        (lambda m: m.pop("model"), "lacks"),
        (lambda m: m.update(state="x"), "should be"),
        (lambda m: m.update(format="other"), "not an llmx manifest"),
        (lambda m: m.update(family="encoder"), "graphs.encoder is missing"),
        (lambda m: m.update(family="encoder-decoder"), "graphs.encoder is missing"),
        (lambda m: m.update(family="diffusion"), "does not run"),
        (lambda m: m.update(min_onnxruntime="99.0"), "needs onnxruntime 99.0"),
    ],
)
def test_damaged_manifest(damaged: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    edit_manifest(damaged, change)
    refused(run("run", "--onnx", damaged, "--prompt", "x"), message, 1)


def test_a_newer_minor_version_is_read(damaged: Path) -> None:
    edit_manifest(damaged, lambda m: m.update(format_version="1.7", something_new=1))
    assert run("run", "--onnx", damaged, "--prompt", "x", "-n", 2).exit_code == 0


def test_manifest_that_is_no_json(damaged: Path) -> None:
    (damaged / "llmx.json").write_text("{")
    refused(run("run", "--onnx", damaged, "--prompt", "x"), "not valid JSON", 1)


def test_chat_without_a_template(damaged: Path) -> None:
    edit_manifest(damaged, lambda m: m["tokenizer"].update(chat_template=None))
    refused(run("chat", "--onnx", damaged, stdin="hi\n"), "no chat template", 2)


# -- processes of their own -------------------------------------------------------------------------------------------

_BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}:
            raise ImportError('blocked: ' + name)
sys.meta_path.insert(0, Blocker())
{code}
"""


def blocked(names: set[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process where importing `names` raises ImportError."""
    program = _BLOCKER.format(blocked=names, code=code)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)


def cli(*arguments: object) -> str:
    return f"sys.argv = {['llmx', *map(str, arguments)]!r}\nfrom llmx.cli import main\nmain()"


TORCH = {"torch", "transformers", "onnx", "onnxscript", "onnx_ir", "peft"}


def test_the_runtime_needs_no_torch(demo: Path) -> None:
    code = f"""
from llmx.runtime import LLM, AsyncLLM, SamplingParams
out = LLM({str(demo)!r}).generate("ROMEO:", SamplingParams(max_tokens=3))
assert len(out[0].outputs[0].token_ids) == 3
"""
    done = blocked(TORCH, code)
    assert done.returncode == 0, done.stderr
    assert blocked(TORCH, cli("run", "--onnx", demo, "--prompt", "x", "-n", 2)).returncode == 0


def test_help_is_quick_and_imports_neither_torch_nor_onnxruntime() -> None:
    assert blocked(TORCH | {"onnxruntime", "numpy"}, cli("--help")).returncode == 0
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "llmx.cli", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3


def find_spec_hides(names: set[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` where `names` are not installed, as importlib.util.find_spec sees it."""
    hide = f"""
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split('.')[0] in {names!r} else real(name, *a)
"""
    return blocked(names, hide + code)


def test_missing_libraries_are_named_with_their_fix(demo: Path, demo_checkpoint: Path, tmp_path: Path) -> None:
    done = blocked({"onnxruntime"}, cli("run", "--onnx", demo, "--prompt", "x"))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        'Error: onnxruntime is not installed: pip install "llmx[cpu]" (or "llmx[gpu]" for CUDA).'
    )
    done = find_spec_hides({"torch"}, cli("export", "--model", demo_checkpoint, "--output", tmp_path / "x"))
    assert done.returncode == 1
    assert 'pip install "llmx[export]"' in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_stops_cleanly(demo: Path) -> None:
    import signal

    command = [
        sys.executable,
        "-m",
        "llmx.cli",
        "run",
        "--onnx",
        str(demo),
        "--prompt",
        "ROMEO:",
        "--ignore-eos",
        "-n",
        "100000",
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    if process.returncode == 0:
        pytest.fail("the model had finished before the signal")
    assert process.returncode == 130, err
    assert "Traceback" not in err


@pytest.mark.parametrize(("flags", "spins"), [([], True), (["--no-spin"], False)])
def test_spinning_is_a_setting(flags: list[str], spins: bool, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmx.runtime import sessions

    seen, original = [], sessions.session_options

    def options(settings: sessions.SessionSettings) -> object:
        made = original(settings)
        seen.append(made.get_session_config_entry("session.intra_op.allow_spinning"))
        return made

    monkeypatch.setattr(sessions, "session_options", options)
    assert run("run", "--onnx", demo, "--prompt", "ROMEO:", "-n", 2, *flags).exit_code == 0
    assert set(seen) == {"1" if spins else "0"}
