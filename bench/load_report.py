"""A load test as numbers: throughput, percentiles of latencies, goodput. vLLM's names."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from llmx.bench.load import Load, Outcome
from llmx.bench.statistics import percentiles
from llmx.runtime.errors import RequestError

SHOWN = (50, 90, 95, 99)
#: What a goodput may bound, in milliseconds.
METRICS = ("ttft", "tpot", "e2el")


def parse_goodput(words: Sequence[str]) -> dict[str, float]:
    """`ttft:200 tpot:50` → milliseconds by metric. Raises RequestError."""
    bounds = {}
    for word in words:
        name, _, value = word.partition(":")
        try:
            bounds[name] = float(value)
        except ValueError:
            bounds[name] = -1.0
        if name not in METRICS or not 0 < bounds[name] < float("inf"):
            raise RequestError(f"--goodput takes METRIC:MILLISECONDS with {', '.join(METRICS)}, not {word!r}.")
    return bounds


def report(load: Load, outcomes: Sequence[Outcome], seconds: float, goodput: dict[str, float]) -> dict[str, Any]:
    """Statistics of the requests that were answered; those that failed are counted, with their reasons."""
    good = [o for o in outcomes if o.error is None]
    tokens_in, tokens_out = sum(o.prompt_len for o in good), sum(o.output_tokens for o in good)
    settings = {key: value for key, value in dataclasses.asdict(load).items() if key not in ("api_key", "extra_body")}
    settings["request_rate"] = load.request_rate if load.request_rate != float("inf") else "inf"
    facts: dict[str, Any] = {
        "settings": settings,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "errors": dict(Counter(o.error for o in outcomes if o.error is not None).most_common(5)),
        "duration_s": seconds,
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(good) / seconds,
        "output_throughput": tokens_out / seconds,
        "total_token_throughput": (tokens_in + tokens_out) / seconds,
        "most_at_once": most_at_once(outcomes),
    }
    values = {
        "ttft": [o.ttft for o in good],
        "tpot": [o.tpot for o in good if o.tpot is not None],
        "itl": [gap for o in good for gap in o.gaps],
        "e2el": [o.latency for o in good],
    }
    for name, seconds_each in values.items():
        facts[f"{name}_ms"] = percentiles([1e3 * value for value in seconds_each], SHOWN)
    if goodput:
        facts["goodput_bounds_ms"] = goodput
        facts["request_goodput"] = sum(_within(o, goodput) for o in good) / seconds
    return facts


def _within(outcome: Outcome, bounds: dict[str, float]) -> bool:
    values = {"ttft": outcome.ttft, "tpot": outcome.tpot or 0.0, "e2el": outcome.latency}
    return all(1e3 * values[name] <= bound for name, bound in bounds.items())


def most_at_once(outcomes: Sequence[Outcome]) -> int:
    """The most requests that were being answered at one moment."""
    edges = [(o.start, 1) for o in outcomes] + [(o.start + max(o.latency, o.ttft), -1) for o in outcomes]
    now = most = 0
    for _, step in sorted(edges):
        now += step
        most = max(most, now)
    return most
