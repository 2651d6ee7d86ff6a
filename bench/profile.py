"""Where the time of a run goes: phases, operators, and both on one time line as a Chrome trace."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmx.bench.steps import enclosing
from llmx.runtime.tracing import Trace

_KERNEL = "_kernel_time"


@dataclass(frozen=True)
class Phase:
    """`seconds` in all, of which `in_run` inside onnxruntime's run calls. Indented phases are part of the one above."""

    name: str
    calls: int
    seconds: float
    in_run: float = 0.0
    part: bool = False


@dataclass(frozen=True)
class Operator:
    """What a graph's operators of one type took; `share` of all its operators' time."""

    graph: str
    operator: str
    calls: int
    seconds: float
    share: float


@dataclass(frozen=True)
class Profile:
    """A finished run of `seconds`."""

    seconds: float
    phases: list[Phase]
    operators: list[Operator]
    events: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Everything but the events."""
        return {
            "seconds": self.seconds,
            "phases": [asdict(phase) for phase in self.phases],
            "operators": [asdict(operator) for operator in self.operators],
        }


def read(trace: Trace, start: float, end: float) -> Profile:
    """The profile of `trace`, which has ended; `start` and `end` on the clock of `time.perf_counter`."""
    kernels: list[tuple[str, dict[str, Any]]] = []
    for graph, began, file in trace.end_profiles():
        nodes = (e for e in json.loads(file.read_text()) if e.get("cat") == "Node" and e["name"].endswith(_KERNEL))
        kernels += [(graph, {**node, "ts": node["ts"] + (began - start) * 1e6}) for node in nodes]
        file.unlink()
    return Profile(end - start, _phases(trace, end - start), _operators(kernels), _events(trace, kernels, start))


def _phases(trace: Trace, wall: float) -> list[Phase]:
    runs = [span for span in trace.spans if span.name.startswith("run ")]

    def phase(name: str, part: bool = False) -> Phase:
        spans = sorted(trace.named(name), key=lambda span: span.start)
        within = zip(runs, enclosing(runs, spans), strict=True)
        in_run = sum(run.seconds for run, at in within if at is not None)
        return Phase(name, len(spans), sum(span.seconds for span in spans), in_run, part)

    load, tokenise, step = phase("load"), phase("tokenise"), phase("step")
    inner = [phase(name, True) for name in ("encode", "prefill", "decode", "sample", "detokenise")]
    schedule = Phase("schedule and the rest", step.calls, step.seconds - sum(p.seconds for p in inner), part=True)
    outside = wall - load.seconds - tokenise.seconds - step.seconds
    found = [
        load, phase("load tokenizer", True), phase("load graphs", True), tokenise, step, *inner, schedule,
        Phase("the rest (imports, printing)", 1, outside),
    ]  # fmt: skip
    return [p for p in found if p.calls]


def _operators(kernels: list[tuple[str, dict[str, Any]]]) -> list[Operator]:
    calls: dict[tuple[str, str], list[float]] = {}
    total: dict[str, float] = {}
    for graph, event in kernels:
        seconds = event["dur"] / 1e6
        calls.setdefault((graph, event["args"].get("op_name", "?")), []).append(seconds)
        total[graph] = total.get(graph, 0.0) + seconds
    found = [
        Operator(graph, name, len(each), sum(each), sum(each) / total[graph] if total[graph] else 0.0)
        for (graph, name), each in calls.items()
    ]
    return sorted(found, key=lambda o: (-total[o.graph], o.graph, -o.seconds))


def _events(trace: Trace, kernels: list[tuple[str, dict[str, Any]]], start: float) -> list[dict[str, Any]]:
    """Trace Event Format: complete events of process 1; the runtime's threads, then a row for each graph's operators."""
    threads = {thread: number for number, thread in enumerate(dict.fromkeys(s.thread for s in trace.spans), 1)}
    graphs = {graph: len(threads) + number for number, graph in enumerate(dict.fromkeys(g for g, _ in kernels), 1)}
    rows = {number: f"llmx, thread {number}" for number in threads.values()}
    rows |= {number: f"operators of {graph}" for graph, number in graphs.items()}
    events: list[dict[str, Any]] = [_named("process_name", 0, "llmx")]
    events += [_named("thread_name", number, name) for number, name in rows.items()]
    for span in sorted(trace.spans, key=lambda s: s.start):
        event = {"name": span.name, "cat": "llmx", "ph": "X", "pid": 1, "tid": threads[span.thread]}
        events.append({**event, "ts": (span.start - start) * 1e6, "dur": span.seconds * 1e6})
    for graph, kernel in kernels:
        args = {"node": kernel["name"].removesuffix(_KERNEL), "provider": kernel["args"].get("provider")}
        args |= {key: kernel["args"].get(key) for key in ("input_type_shape", "output_type_shape")}
        event = {"name": kernel["args"].get("op_name", "?"), "cat": "operator", "ph": "X", "pid": 1, "args": args}
        events.append({**event, "tid": graphs[graph], "ts": kernel["ts"], "dur": kernel["dur"]})
    return events


def _named(kind: str, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": 1, "tid": thread, "args": {"name": name}}


def write_chrome_trace(profile: Profile, path: Path) -> None:
    """Write the time line for chrome://tracing or Perfetto. `path` appears when it is whole. Raises OSError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            facts = {"traceEvents": profile.events, "displayTimeUnit": "ms", "otherData": profile.to_json()}
            json.dump(facts, file)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
