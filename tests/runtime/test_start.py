"""What a new process waits for: imports on demand, and what is loaded side by side."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import llmx.runtime
import pytest
from llmx.runtime import LLM, PackageError, SamplingParams
from llmx.runtime import llm as llm_module
from llmx.runtime.ahead import Ahead
from llmx.runtime.backend import Backend, open_backend
from llmx.runtime.tokenizer import Tokenizer
from llmx.runtime.tracing import Trace


def test_every_public_name_is_found_in_a_module() -> None:
    assert sorted(llmx.runtime._HOME) == sorted(llmx.runtime.__all__)
    for name in llmx.runtime.__all__:
        assert getattr(llmx.runtime, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'LLLM'"):
        llmx.runtime.LLLM  # noqa: B018
    assert set(llmx.runtime.__all__) <= set(dir(llmx.runtime))


def test_generating_text_imports_nothing_that_it_does_not_need(demo: Path) -> None:
    code = (
        "import sys\nfrom llmx.runtime import LLM, SamplingParams\n"
        f"LLM({str(demo)!r}, 'cpu', max_length=64).generate([[5, 6, 7]], SamplingParams(max_tokens=3))\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "llmx.runtime.engine" in loaded
    for name in ("asyncio", "concurrent.futures", "logging", "wave", "jinja2"):
        assert name not in loaded
    for name in ("aio", "audio", "chat_formats", "conversation", "device_backend", "encoder", "session", "speculator"):
        assert f"llmx.runtime.{name}" not in loaded


def test_ahead_runs_beside_its_caller() -> None:
    begun, let_go = threading.Event(), threading.Event()

    def call() -> int:
        begun.set()
        assert let_go.wait(10)
        return 7

    ahead = Ahead(call)
    assert begun.wait(10)
    let_go.set()
    assert ahead.result() == 7
    assert ahead.result() == 7


def test_ahead_raises_where_its_result_is_asked_for() -> None:
    ahead = Ahead(lambda: 1 // 0)
    ahead.join()
    with pytest.raises(ZeroDivisionError):
        ahead.result()
    with pytest.raises(ZeroDivisionError):
        Ahead(lambda: 1 // 0, inline=True)
    assert Ahead(threading.current_thread, inline=True).result() is threading.current_thread()


def test_a_tokenizer_that_fails_frees_the_backend(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Backend] = []
    closed: list[Backend] = []

    def noted(*args: object, **more: object) -> Backend:
        backend = open_backend(*args, **more)  # type: ignore[arg-type]
        opened.append(backend)
        close = backend.close
        backend.close = lambda: (closed.append(backend), close())[1]  # type: ignore[method-assign, func-returns-value]
        return backend

    def fail(*_: object) -> Tokenizer:
        raise PackageError("no tokenizer")

    monkeypatch.setattr(llm_module, "open_backend", noted)
    monkeypatch.setattr(Tokenizer, "load", fail)
    with pytest.raises(PackageError, match="no tokenizer"):
        LLM(demo, "cpu", max_length=64)
    assert opened
    assert closed == opened


def test_graphs_that_fail_leave_no_thread(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Backend:
        raise PackageError("no graphs")

    monkeypatch.setattr(llm_module, "open_backend", fail)
    with pytest.raises(PackageError, match="no graphs"):
        LLM(demo, "cpu", max_length=64)
    assert not [thread for thread in threading.enumerate() if thread.name == "llmx-ahead"]


def test_a_trace_sees_one_thing_after_the_other(demo: Path) -> None:
    with Trace() as trace:
        LLM(demo, "cpu", max_length=64).generate([[5, 6]], SamplingParams(max_tokens=2))
    [tokenizer], [graphs] = trace.named("load tokenizer"), trace.named("load graphs")
    assert tokenizer.end <= graphs.start
    assert tokenizer.thread == graphs.thread == threading.get_ident()
