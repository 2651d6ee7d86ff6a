"""Where the time goes: named spans, recorded while a `Trace` is active. Otherwise a span costs a fraction of a microsecond.

    with Trace() as trace:
        llm = LLM("artifacts/demo")
        llm.generate(["ROMEO:"])
    trace.seconds("decode"), trace.seconds("run decode")

The runtime's spans: `load tokenizer`, `load graphs`; `tokenise`; `step` (one round of the engine), and within it `encode`, `prefill` and `decode` (the
backend's calls, within them `run GRAPH`, onnxruntime's own), `sample` and `detokenise`. Graph runs are seen in sessions that
were opened while the trace was active.
"""

from __future__ import annotations

import contextlib
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple


class Span(NamedTuple):
    """Something that took from `start` to `end`, seconds of `time.perf_counter`, on one thread."""

    name: str
    start: float
    end: float
    thread: int

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Trace:
    """Spans of the whole process while it is active (one at a time), from any thread.

    `operators`: a folder for onnxruntime's own profiles of the sessions opened meanwhile; `end_profiles` collects them.
    """

    def __init__(self, operators: Path | None = None) -> None:
        self.spans: list[Span] = []
        self.operators = operators
        self._sessions: list[tuple[str, Any]] = []

    def __enter__(self) -> Trace:
        global _active
        assert _active is None, "another trace is active"
        _active = self
        return self

    def __exit__(self, *_: object) -> None:
        global _active
        _active = None

    def span(self, name: str) -> AbstractContextManager[None]:
        """Records the block under `name`."""
        return _Recording(self.spans, name)

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]

    def seconds(self, *names: str) -> float:
        """Time in spans of these names together."""
        return sum(span.seconds for span in self.spans if span.name in names)

    def prepare(self, options: Any) -> None:
        """Have a session with these SessionOptions profile its operators, where that is wanted."""
        if self.operators is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(self.operators / "ort")

    def watch(self, graph: str, session: Any) -> Any:
        """`session` with its runs recorded as `run GRAPH`."""
        self._sessions.append((graph, session))
        return _WatchedSession(graph, session)

    def end_profiles(self) -> list[tuple[str, float, Path]]:
        """(graph, start in seconds of `time.perf_counter`, file) of every session's own profile, which ends here."""
        if self.operators is None:
            return []
        found = [(graph, _profile_start(s), Path(s.end_profiling())) for graph, s in self._sessions]
        self._sessions = []
        return found


class _Recording:
    """A span in the making; a generator-based context manager would cost three times as much."""

    __slots__ = ("_name", "_spans", "_start")

    def __init__(self, spans: list[Span], name: str) -> None:
        self._spans, self._name = spans, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._spans.append(Span(self._name, self._start, time.perf_counter(), threading.get_ident()))


class _WatchedSession:
    """An InferenceSession; everything but its runs is the session's own."""

    def __init__(self, graph: str, session: Any) -> None:
        self._name, self._session = f"run {graph}", session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, *args: Any, **more: Any) -> Any:
        with span(self._name):
            return self._session.run(*args, **more)

    def run_with_iobinding(self, *args: Any, **more: Any) -> None:
        with span(self._name):
            self._session.run_with_iobinding(*args, **more)


def _profile_start(session: Any) -> float:
    """When the session's profile began, in seconds of `time.perf_counter`.

    onnxruntime reads C++'s high_resolution_clock, which is the system's clock on Linux and a monotonic one elsewhere.
    """
    start: int = session.get_profiling_start_time_ns()
    clock = min((time.time_ns, time.monotonic_ns), key=lambda clock: abs(clock() - start))
    # the reading that was least interrupted, of several
    readings = [(time.perf_counter_ns(), clock(), time.perf_counter_ns()) for _ in range(9)]
    before, now, after = min(readings, key=lambda reading: reading[2] - reading[0])
    return ((before + after) / 2 - (now - start)) / 1e9


_active: Trace | None = None
_NOTHING = contextlib.nullcontext()


def span(name: str) -> AbstractContextManager[None]:
    """Records the block under `name` where a trace is active."""
    return _NOTHING if _active is None else _active.span(name)


def active() -> Trace | None:
    """The trace that records now."""
    return _active
