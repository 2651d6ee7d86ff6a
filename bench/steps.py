"""What the engine's steps spend where, from the spans of a trace."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from llmx.runtime.tracing import Span, Trace


@dataclass(frozen=True)
class Step:
    """One round of the engine: its seconds, and those of the spans within it by name."""

    start: float
    seconds: float
    parts: dict[str, float]

    @property
    def run(self) -> float:
        """Seconds inside onnxruntime's run calls."""
        return sum(seconds for name, seconds in self.parts.items() if name.startswith("run "))

    @property
    def host(self) -> float:
        """Seconds outside of them: scheduling, feeding, sampling, detokenising, handing over."""
        return self.seconds - self.run

    @property
    def decodes(self) -> bool:
        """Whether it decoded and did nothing else."""
        return "decode" in self.parts and "prefill" not in self.parts and "encode" not in self.parts


def enclosing(inner: Sequence[Span], outer: Sequence[Span]) -> list[int | None]:
    """For each of `inner` the place in `outer` (in order, not overlapping) of the span that it lies in."""
    starts = [span.start for span in outer]
    places = (bisect_right(starts, span.start) - 1 for span in inner)
    return [at if at >= 0 and span.end <= outer[at].end else None for span, at in zip(inner, places, strict=True)]


def steps(trace: Trace) -> list[Step]:
    """The steps of a trace in order. Steps never overlap: one thread at a time makes them."""
    rounds = sorted(trace.named("step"), key=lambda span: span.start)
    others = [span for span in trace.spans if span.name != "step"]
    parts: list[dict[str, float]] = [{} for _ in rounds]
    for span, at in zip(others, enclosing(others, rounds), strict=True):
        if at is not None:
            parts[at][span.name] = parts[at].get(span.name, 0.0) + span.seconds
    return [Step(span.start, span.seconds, part) for span, part in zip(rounds, parts, strict=True)]
