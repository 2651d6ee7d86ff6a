"""Plots of load tests: latency against the rate of arrivals, or how the latencies of one load are distributed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from llmx.bench.load import Outcome
from llmx.bench.plot import finish, need_matplotlib, save

_METRICS = (("ttft", "time to first token, ms"), ("tpot", "time per output token, ms"), ("e2el", "whole request, ms"))
_STYLES = (("p50", "#2a6fbb"), ("p90", "#d1742f"), ("p99", "#b83a4b"))


def rates(reports: list[dict[str, Any]], file: Path) -> None:
    """TTFT, TPOT and E2EL percentiles and the throughput, over the request rate."""
    plt = need_matplotlib()
    figure, axes = plt.subplots(2, 2, figsize=(9.6, 6.8))
    shown = sorted(reports, key=lambda r: float(r["settings"]["request_rate"]))
    x: list[Any] = [r["settings"]["request_rate"] for r in shown]
    if "inf" in x:
        x = [str(rate) for rate in x]
    for axis, (key, label) in zip(axes.flat, _METRICS, strict=False):
        for name, colour in _STYLES:
            y = [r[f"{key}_ms"].get(name, np.nan) for r in shown]
            axis.plot(x, y, marker="o", markersize=4, color=colour, label=name)
        axis.set_ylabel(label)
    last = axes.flat[3]
    last.plot(x, [r["output_throughput"] for r in shown], marker="o", markersize=4, color="#3c9a5f")
    last.set_ylabel("output tokens a second")
    for axis in axes.flat:
        axis.set_xlabel("requests a second, asked")
        finish(axis)
    axes.flat[0].legend(fontsize=8, frameon=False)
    save(plt, figure, _title(shown[0]["settings"]), file)


def distributions(outcomes: list[Outcome], file: Path) -> None:
    """The part of requests (gaps: of chunks) within a time, for each kind of latency."""
    plt = need_matplotlib()
    good = [o for o in outcomes if o.error is None]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8))
    panels = (
        ("time to first token, ms", [o.ttft for o in good]),
        ("gap between chunks, ms", [gap for o in good for gap in o.gaps]),
        ("whole request, ms", [o.latency for o in good]),
    )
    for axis, (label, values) in zip(axes, panels, strict=True):
        if values:
            ordered = np.sort(np.array(values)) * 1e3
            axis.step(ordered, np.arange(1, len(ordered) + 1) / len(ordered), where="post", color="#2a6fbb")
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        finish(axis)
        axis.set_ylim(0, 1.02)
    axes[0].set_ylabel("part within")
    save(plt, figure, f"{len(good):,} requests", file)


def _title(settings: dict[str, Any]) -> str:
    return f"{settings['num_prompts']:,} requests of {settings['input_len']:,} + {settings['output_len']:,} tokens"
