"""The kernels of a step, a prompt and a pass that judges guesses on a GPU, by the time they take (CUPTI, by torch.profiler).

Examples:
    python benchmarks/gpu_kernels.py --package artifacts/llama-1b --package artifacts/llama-8b
    ncu --clock-control none -k regex:nvjet -c 8 --metrics dram__throughput.avg.pct_of_peak_sustained_elapsed \\
        python benchmarks/gpu_kernels.py --package artifacts/llama-1b --plain 3

Captured graphs are launched as the runtime launches them. With `--plain` steps run uncaptured, for a profiler outside.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, make_parser, positive, print_table, write_results
from gpu_engines import fill_weights

CONTEXT = 512


def profiled(run: Callable[[], None], memory: Any) -> dict[str, Any]:
    """Calls and microseconds by kernel, the largest first; the time that they are busy, and from the first to the last."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    run()
    memory.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        memory.synchronize()
    kernels: dict[str, list[float]] = {}
    spans = []
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            entry = kernels.setdefault(short(event.name), [0, 0.0])
            entry[0] += 1
            entry[1] += event.device_time
            spans.append((event.time_range.start, event.time_range.end))
    ordered = sorted(kernels.items(), key=lambda item: -item[1][1])
    return {
        "count": int(sum(calls for calls, _ in kernels.values())), "busy_us": sum(us for _, us in kernels.values()),
        "span_us": max(end for _, end in spans) - min(start for start, _ in spans),
        "kernels": [[name, int(calls), us] for name, (calls, us) in ordered],
    }  # fmt: skip


def short(name: str) -> str:
    name = re.sub(r"\(.*", "", name.replace("(anonymous namespace)::", "")).removeprefix("void ")
    return name.replace("onnxruntime::", "")[:90]


def cases(backend: Any, rows: list[int]) -> dict[str, Callable[[], None]]:
    """What is profiled, each run once already, so that it is captured."""
    memory = backend._memory
    ids = np.random.default_rng(0).integers(1, 1000, CONTEXT)
    for slot in range(max(rows)):
        backend.prefill_last(slot, ids, 0)
    made: dict[str, Callable[[], None]] = {}
    for count in rows:
        tokens, lengths = np.ones(count, np.int64), np.full(count, CONTEXT)
        backend.decode(tokens, lengths, None, np.full(count, 0.8, np.float32))
        backend.decode(tokens, lengths, None, np.full(count, 0.8, np.float32))
        step, candidates = backend._step(count), backend._candidates_step(count)
        name = f"{count} row{'s' if count > 1 else ''}"
        made[f"a step of {name} at context {CONTEXT}"] = lambda step=step: memory.launch(step._launch)
        made[f"candidates of {name}"] = lambda candidates=candidates: memory.launch(candidates._launch)
    for _ in range(2):
        backend.prefill_last(0, ids, 0)
        backend.prefill_each(0, ids[:5], CONTEXT - 8, 0.0)
    made[f"a prompt of {CONTEXT}"] = lambda: backend.prefill_last(0, ids, 0)
    made["a pass over 5 tokens after 504"] = lambda: backend.prefill_each(0, ids[:5], CONTEXT - 8, 0.0)
    return made


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--package", type=Path, action="append", required=True, help="llmx's package, several times")
    parser.add_argument("--rows", default="1", help="rows of a step, by commas [default: 1]")
    parser.add_argument("--top", type=positive, default=14, help="kernels in the tables [default: 14]")
    parser.add_argument("--plain", type=positive, help="run so many steps of one row uncaptured, and nothing else")
    parser.add_argument("--json", type=Path, help="where to write the results [default: benchmarks/results/…]")
    args: argparse.Namespace = parser.parse_args()
    import onnxruntime
    import torch
    from llmx.runtime import LLM

    started = {**machine(), "gpu": torch.cuda.get_device_name()}
    started["versions"] |= {"onnxruntime": onnxruntime.__version__}  # the GPU's, whatever else is installed
    rows = [int(count) for count in args.rows.split(",")]
    tables = []
    for package in args.package:
        fill_weights(package, None)
        with LLM(package, "cuda", max_length=CONTEXT + 64, slots=max(rows)) as llm:
            backend: Any = llm.backend
            if args.plain:
                backend._memory.capture = lambda run: run
                for number in range(args.plain):
                    backend.decode(np.ones(1, np.int64), np.full(1, CONTEXT + number)).greedy(0)
                return
            for what, run in cases(backend, rows).items():
                found = profiled(run, backend._memory)
                title = f"{package.name}: {what}: {found['count']} kernels, {found['busy_us']:,.0f} µs busy of {found['span_us']:,.0f}"
                lines = [[name, str(calls), f"{us:.1f}"] for name, calls, us in found["kernels"][: args.top]]
                tables.append({"title": title, "columns": ["kernel", "calls", "µs"], "rows": lines})
                print_table(title, ["kernel", "calls", "µs"], lines[:6])
    write_results(args.json, "cuda-kernels", started, {"title": "Kernels", "section": "CUDA", "tables": tables})


if __name__ == "__main__":
    main()
