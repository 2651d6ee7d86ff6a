"""Signals, and standard streams that fail: exit codes, one line, nothing left behind."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from llmx.cli import main, signals
from llmx.cli.common import print_table, read_texts

LLMX = [sys.executable, "-m", "llmx.cli"]


def deliver() -> None:
    """A child of a background job ignores SIGINT unless told otherwise."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def execute(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, text=True, timeout=120, check=False, preexec_fn=deliver, **{"stderr": subprocess.PIPE, **options}
    )


def shell(line: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return execute(["bash", "-c", line], stdout=subprocess.PIPE, **options)


# -- Ctrl-C and SIGTERM -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["click", "llmx.cli.main", "llmx.runtime.errors", "numpy", "llmx.cli.run"])
def test_ctrl_c_while_importing(module: str) -> None:
    program = f"""
import os, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
sys.argv = ["llmx", "run", "--onnx", "nowhere", "--prompt", "x"]
from llmx.cli import main
main()
"""
    done = execute([sys.executable, "-c", program])
    assert done.returncode == 130, done.stderr
    assert done.stderr.split() == ["Interrupted."]


def test_ctrl_c_inside_generated_code(tmp_path: Path) -> None:
    """`python -m` dies of SIGINT, however the interrupt was answered, once it has left an exec() of text."""
    (tmp_path / "program.py").write_text("""
import llmx.cli, llmx.cli.doctor as doctor, sys
def examine():
    exec("raise KeyboardInterrupt")
doctor.examine = examine
sys.argv = ["llmx", "doctor"]
llmx.cli.main()
""")
    done = execute([sys.executable, "-m", "program"], cwd=tmp_path)
    assert done.returncode == 130, done.stderr


def until(found: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "code", "word"), [("TERM", 143, "Terminated."), ("INT", 130, "Interrupted.")])
def test_a_signal_ends_an_export_without_a_trace(
    demo_checkpoint: Path, tmp_path: Path, number: str, code: int, word: str
) -> None:
    command = [*LLMX, "export", "--model", str(demo_checkpoint), "--output", str(tmp_path / "new" / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=deliver)
    until(lambda: list(tmp_path.glob("new/.out.partial-*/weights.data")))
    process.send_signal(getattr(signal, f"SIG{number}"))
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert err.splitlines()[-1] == word and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_handlers_are_restored_and_others_are_kept() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(signals.Terminated) as caught, signals.termination_interrupts():
        signal.raise_signal(signal.SIGTERM)
    assert signals.exit_code(caught.value) == 143
    assert signal.getsignal(signal.SIGTERM) is before
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        with signals.termination_interrupts():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_other_threads_set_no_handler() -> None:
    seen: list[Any] = []

    def work() -> None:
        with signals.termination_interrupts():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


def read_until(terminal: int, text: str, seconds: float = 60) -> str:
    got, deadline = b"", time.monotonic() + seconds
    while text.encode() not in got:
        assert select.select([terminal], [], [], deadline - time.monotonic())[0], got
        got += os.read(terminal, 1)
    return got.decode(errors="replace")


def test_ctrl_c_in_a_chat(demo: Path) -> None:
    """During an answer it stops the answer; at the prompt it leaves with 130. The help says so."""
    terminal, inner = pty.openpty()
    command = [*LLMX, "chat", "--onnx", str(demo), "--ignore-eos", "-n", "900"]
    process = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, preexec_fn=deliver)
    os.close(inner)
    try:
        help_text = " ".join(read_until(terminal, "> ").split())
        assert "Ctrl-C stops an answer; at the prompt it leaves." in help_text
        os.write(terminal, b"What news?\n")
        read_until(terminal, "\n")
        read_until(terminal, " ")
        process.send_signal(signal.SIGINT)
        assert "[stopped]" in read_until(terminal, "> ")
        time.sleep(0.5)  # until it reads: Python misses a signal between the prompt and the read
        process.send_signal(signal.SIGINT)
        assert read_until(terminal, "Interrupted.").split() == ["Interrupted."]
        assert process.wait(timeout=30) == 130
    finally:
        process.kill()
        os.close(terminal)


# -- streams that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", ["run --onnx {} --prompt x -n 3 --quiet", "run --onnx {} --prompt x --json", "--help"]
)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
def test_output_on_a_full_disk(demo: Path, command: str) -> None:
    done = shell(f"{' '.join(LLMX)} {command.format(demo)} > /dev/full")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "Error: Standard output cannot be written: No space left on device."
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize("command", ["run --onnx {} --prompt x -n 300 --ignore-eos --quiet", "--help", "doctor"])
def test_a_reader_that_goes_away(demo: Path, command: str) -> None:
    done = shell(f"{' '.join(LLMX)} {command.format(demo)} | true; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    ("redirection", "code"), [(">&-", 0), ("2>&-", 0), ("2>/dev/full", 0), (">&- 2>&-", 0), ("<&-", 0)]
)
def test_streams_that_the_caller_closed(demo: Path, redirection: str, code: int) -> None:
    done = shell(f"{' '.join(LLMX)} run --onnx {demo} --prompt x -n 3 {redirection}")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_no_prompt_and_no_standard_input(demo: Path) -> None:
    done = shell(f"{' '.join(LLMX)} run --onnx {demo} <&-")
    assert done.returncode == 2 and "The prompt is empty" in done.stderr


def test_characters_that_the_terminal_lacks(demo: Path) -> None:
    line = f"{' '.join(LLMX)} run --onnx {demo} --prompt 'x→' -n 2 --json"
    done = shell(line, env={**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
    assert '"prompt": "x\\u2192"' in done.stdout


# -- other bad input --------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read(demo: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"ab\xff")
    common = ["run", "--onnx", str(demo), "--prompt-file"]
    result = CliRunner().invoke(main, [*common, str(file)])
    assert result.exit_code == 2 and "cannot be read as text: byte 2 is not UTF-8." in result.stderr
    result = CliRunner().invoke(main, [*common, str(tmp_path / "none")])
    assert result.exit_code == 2 and "cannot be read as text: No such file or directory." in result.stderr


def test_a_chat_of_bytes_that_are_no_text(demo: Path) -> None:
    line = f"printf '\\xff\\n' | {' '.join(LLMX)} chat --onnx {demo}"
    done = shell(line, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "Error: Standard input cannot be read as text: byte 0 is not UTF-8."


def test_brackets_are_no_markup(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_table(["token"], [["[MASK]"], ["[/x]"]])
    shown = capsys.readouterr().out
    assert "[MASK]" in shown and "[/x]" in shown
    from llmx.cli.doctor import _print

    facts: dict[str, Any] = {
        "python": "3", "platform": "x", "versions": {}, "providers": [], "cpus": 1, "free_memory": 1, "gpus": [],
        "cache": "/[/x]", "can_run": False, "can_export": False,
        "problems": [{"problem": "none", "fix": 'pip install "llmx[cpu]"'}],
    }  # fmt: skip
    _print(facts)
    shown = capsys.readouterr().out
    assert 'pip install "llmx[cpu]"' in shown and "/[/x]" in shown


def test_only_newlines_part_texts(tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    file.write_bytes("one\u2028line\r\ntwo\x0c\n\n".encode())
    assert read_texts((), file) == ["one\u2028line", "two\x0c"]


def test_vectors_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import click
    import numpy as np
    from llmx.cli.embed import _save

    path = tmp_path / "v.npy"
    _save(path, np.ones((2, 3)))
    before = path.read_bytes()

    def fail(file: Any, _: object) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(click.ClickException, match="v.npy cannot be written: No space left on device") as caught:
        _save(path, np.ones(9))
    assert caught.value.exit_code == 1
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    result = CliRunner().invoke(main, ["embed", "--onnx", "x", "--text", "x", "--output", str(path / "v.npy")])
    assert result.exit_code == 2 and "is not a folder" in result.stderr
    result = CliRunner().invoke(main, ["embed", "--onnx", "x", "--text", "x", "--output", str(path), "--json"])
    assert result.exit_code == 2 and "not both" in result.stderr


def test_unreadable_files_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/x/weights.data")

    monkeypatch.setattr("llmx.runtime.hub.resolve_package", fail)
    result = CliRunner().invoke(main, ["inspect", "x"])
    assert result.exit_code == 1
    assert result.stderr == "Error: /x/weights.data cannot be read or written: Permission denied.\n"


# -- libraries that do not load ---------------------------------------------------------------------------------------


def test_libraries_that_are_installed_and_do_not_load(demo: Path, demo_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text(
        'raise ImportError("libgomp.so.1: cannot open shared object file")'
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = execute([*LLMX, "run", "--onnx", str(demo), "--prompt", "x"], env=env)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "Error: onnxruntime is installed but cannot be loaded: libgomp.so.1: cannot open shared object file; "
        'pip install --force-reinstall "llmx[cpu]" (or "llmx[gpu]" for CUDA).'
    )
    done = execute([*LLMX, "doctor", "--json"], env=env, stdout=subprocess.PIPE)
    assert done.returncode == 1 and "is installed but cannot be loaded (libgomp" in done.stdout
    (tmp_path / "onnxruntime").rename(tmp_path / "torch")
    done = execute([*LLMX, "export", "--model", str(demo_checkpoint), "--output", str(tmp_path / "o")], env=env)
    assert done.returncode == 1
    assert "is installed but cannot be loaded: libgomp" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
