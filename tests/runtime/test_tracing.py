"""Spans: what they cover, and that they are nested as the runtime's work is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from llmx.runtime import LLM, SamplingParams
from llmx.runtime.tracing import Span, Trace, active, span


def inside(inner: Span, outers: list[Span]) -> bool:
    return any(o.start <= inner.start and inner.end <= o.end and o.thread == inner.thread for o in outers)


def test_spans_of_a_generation(demo: Path, tmp_path: Path) -> None:
    with Trace(tmp_path) as trace, LLM(demo, slots=2, prefill_chunk=16) as llm:
        [a, b] = llm.generate(["ROMEO: and then", list(range(1, 41))], SamplingParams(max_tokens=6, temperature=0.0))
        profiles = trace.end_profiles()
    steps = trace.named("step")
    chunks = -(-len(a.prompt_token_ids) // 16) + 3
    assert len(trace.named("prefill")) == len(trace.named("run prefill")) == chunks
    assert len(trace.named("decode")) == len(trace.named("run decode")) >= 5
    # a batch's rows are sampled, and turned into text, together
    assert len(trace.named("sample")) >= len(trace.named("decode")) + 2
    assert len(trace.named("detokenise")) >= len(trace.named("decode")) + 2
    assert len(trace.named("tokenise")) == 1  # the other prompt was tokens
    assert len(trace.named("load tokenizer")) == len(trace.named("load graphs")) == 1
    for name in ("prefill", "decode", "sample", "detokenise"):
        assert all(inside(s, steps) for s in trace.named(name))
    for name in ("prefill", "decode"):
        assert all(inside(s, trace.named(name)) for s in trace.named(f"run {name}"))
    assert 0 < trace.seconds("run decode") < trace.seconds("decode") < trace.seconds("step")
    assert b.outputs[0].finish_reason == "length"
    for graph, start, file in profiles:
        kernels = [e for e in json.loads(file.read_text()) if e.get("cat") == "Node"]
        first, last = (start + f(e["ts"] for e in kernels) / 1e6 for f in (min, max))
        runs = trace.named(f"run {graph}")
        assert runs[0].start - 1e-3 < first and last < runs[-1].end + 1e-3  # one clock


def test_nothing_is_recorded_without_a_trace() -> None:
    with span("x"):
        assert active() is None
    with Trace() as trace:
        with span("x"), pytest.raises(ValueError, match="kept"), span("y"):
            raise ValueError("kept")
        assert active() is trace
    with span("x"):
        pass
    assert [s.name for s in trace.spans] == ["y", "x"] and active() is None
