"""The engine under load on a GPU: closed-loop clients beside the captured graphs launched back to back.

Example:
    python benchmarks/gpu_load.py --package artifacts/llama-1b --clients 128
    python benchmarks/gpu_load.py --package artifacts/llama-1b --clients 128 --http
    python benchmarks/gpu_load.py --package artifacts/demo --clients 8 --http --device cpu   # a trial without a GPU

Each client is a thread that sends its next prompt when its last one has ended; `AsyncLLM`'s thread runs the engine and
hands pieces over as it does to the server. Nothing goes over HTTP, but with `--http`: then the clients are those of `llmx
bench serve` in processes of their own (`gpu_http.py`), and `llmx serve` streams to them. "Raw" is what the same work takes in launches alone: a
step of as many rows as clients for each output token, and the prompts' graphs, one after another.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, make_parser, positive, print_table, rounded, write_results
from gpu_engines import _launches, fill_weights


class Client(threading.Thread):
    """Sends `count` prompts of random tokens, one at a time, and notes when each token came."""

    def __init__(self, llm: Any, seed: int, count: int, prompt: int, output: int, temperature: float) -> None:
        super().__init__(daemon=True)
        self._llm, self._count, self._prompt, self._output = llm, count, prompt, output
        self._rng, self._temperature = np.random.default_rng(seed), temperature
        self.requests: list[tuple[float, list[float]]] = []  # when it was sent, and when each token came

    def run(self) -> None:
        from llmx.runtime import SamplingParams

        for number in range(self._count):
            # the first ones end at different times, so that not all prompts come at once ever after
            tokens = self._output if number else int(self._rng.integers(1, self._output + 1))
            sampled = {"top_k": 40, "seed": 1} if self._temperature else {}
            params = SamplingParams(max_tokens=tokens, temperature=self._temperature, ignore_eos=True, **sampled)
            times: list[float] = []
            ended = threading.Event()

            def emit(piece: Any, times: list[float] = times, ended: threading.Event = ended) -> None:
                times += [time.perf_counter()] * len(piece.token_ids)
                if piece.finish_reason is not None:
                    ended.set()

            prompt = self._rng.integers(1, 1000, self._prompt).tolist()
            sent = time.perf_counter()
            self._llm.submit([(prompt, params, emit)])
            ended.wait()
            self.requests.append((sent, times))


def load(llm: Any, clients: int, rounds: int, prompt: int, output: int, temperature: float) -> dict[str, Any]:
    """Throughput and latencies while all clients are there: from the last first request's end to the first last one's."""
    threads = [Client(llm, seed, rounds + 1, prompt, output, temperature) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statistics_of([thread.requests for thread in threads])


def statistics_of(clients: list[list[tuple[float, list[float]]]]) -> dict[str, Any]:
    """Of each client's requests: when each was sent, and when each of its tokens came."""
    start = max(requests[0][1][-1] for requests in clients)
    end = min(requests[-1][1][-1] for requests in clients)
    tokens = sum(start < at <= end for requests in clients for _, times in requests for at in times)
    counted = [(sent, times) for requests in clients for sent, times in requests if sent >= start and times[0] <= end]
    first = [1e3 * (times[0] - sent) for sent, times in counted]
    gaps = [1e3 * gap for _, times in counted for gap in np.diff(times)]
    return {
        "seconds": end - start, "tokens_per_s": tokens / (end - start), "requests": len(counted),
        "ttft_ms": percentiles(first), "itl_ms": percentiles(gaps),
    }  # fmt: skip


def percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{p}": float(np.percentile(values or [np.nan], p)) for p in (50, 90, 99)}


def raw(backend: Any, clients: int, prompt: int, output: int) -> dict[str, float]:
    """Seconds of a step of all rows at the middle of an output, of a prompt, and tokens a second of both together."""
    ids = np.random.default_rng(0).integers(1, 1000, prompt)
    for slot in range(clients):
        backend.prefill_last(slot, ids, 0)
    tokens, lengths = np.ones(clients, np.int64), np.full(clients, prompt)
    backend.decode(tokens, lengths, None, np.zeros(clients, np.float32))
    step = _launches(backend, clients, prompt + output // 2, min(64, output // 2))
    times = []
    for _ in range(12):
        start = time.perf_counter()
        backend.prefill_last(0, ids, 0).greedy(0)
        times.append(time.perf_counter() - start)
    first = statistics.median(times)
    # of each request: one prompt, whose first token it brings, and output - 1 places in steps
    return {
        "step_ms": 1e3 * step, "prompt_ms": 1e3 * first, "steps_alone_tokens_per_s": clients / step,
        "tokens_per_s": output / (first + (output - 1) * step / clients),
    }  # fmt: skip


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--package", type=Path, required=True, help="llmx's package for CUDA")
    parser.add_argument("--clients", type=positive, default=128)
    parser.add_argument("--loads", default="128:256,512:128,32:512", help="prompt:output tokens, by commas")
    parser.add_argument("--http", action="store_true", help="through `llmx serve`, clients in other processes")
    parser.add_argument("--engine-process", action=argparse.BooleanOptionalAction, default=None,
                        help="with --http, as `llmx serve` takes it [default: the server's]")  # fmt: skip
    parser.add_argument("--processes", type=positive, default=8, help="of the clients, with --http [default: 8]")
    parser.add_argument("--device", default="cuda", help="with --http; on a CPU nothing is compared [default: cuda]")
    parser.add_argument("--rounds", type=positive, default=3, help="requests of each client that count [default: 3]")
    parser.add_argument("--json", type=Path, help="where to write the results [default: benchmarks/results/…]")
    args: argparse.Namespace = parser.parse_args()
    loads = [tuple(map(int, pair.split(":"))) for pair in args.loads.split(",")]
    length = max(prompt + output for prompt, output in loads) + 16
    started = on_gpu(args.package) if args.device != "cpu" else machine()
    results, rows = [], []
    for prompt, output, temperature, found, bare in measured(args, loads, length):
        share, steps = (
            found["tokens_per_s"] / bare[key] if bare else None for key in ("tokens_per_s", "steps_alone_tokens_per_s")
        )
        results.append({"prompt": prompt, "output": output, "temperature": temperature, **found, "raw": bare,
                        "of_raw": share, "of_steps_alone": steps})  # fmt: skip
        rows.append([
            f"{prompt} → {output}, {'greedy' if temperature == 0 else 'top-k 40'}", f"{found['tokens_per_s']:,.0f}",
            *((f"{bare['tokens_per_s']:,.0f}", f"{share:.0%}", f"{steps:.0%}") if bare else ("", "", "")),
            *(f"{found[key][p]:.1f}" for key in ("ttft_ms", "itl_ms") for p in ("p50", "p99")),
        ])  # fmt: skip
        print(rows[-1], flush=True)
    columns = ["prompt → output", "tokens/s", "raw", "of raw", "of steps alone", "TTFT p50, ms", "p99", "ITL p50, ms", "p99"]  # fmt: skip
    how = f"over HTTP, from {args.processes} processes" if args.http else "in the process (no HTTP)"
    if args.http and args.engine_process is not None:
        how += f", the engine in {'a process of its own' if args.engine_process else 'a thread of the server'}"
    title = f"llmx's engine on a GPU, {args.clients} closed-loop clients {how}"
    print_table(title, columns, rows)
    heading = "Load on a GPU over HTTP" if args.http else "Load on a GPU"
    page = {"title": heading, "section": "CUDA", "tables": [{"title": title, "columns": columns, "rows": rows}]}
    settings = {"clients": args.clients, "rounds": args.rounds, "package": args.package.name}
    if args.http:
        settings |= {"processes": args.processes, "engine_process": args.engine_process}
    write_results(
        args.json,
        f"cuda-{'http' if args.http else 'load'}-{args.package.name}",
        started,
        {**page, "settings": settings, "results": rounded_all(results)},
    )


def on_gpu(package: Path) -> dict[str, Any]:
    """Random weights where they are missing; `machine()` of a GPU's."""
    import onnxruntime
    import torch

    fill_weights(package, None)
    started = {**machine(), "gpu": torch.cuda.get_device_name()}
    started["versions"] |= {"onnxruntime": onnxruntime.__version__}  # the GPU's, whatever else is installed
    return started


def measured(args: argparse.Namespace, loads: list[Any], length: int) -> Iterator[tuple[int, int, float, Any, Any]]:
    """(prompt, output, temperature, what `load` found, what `raw` found) of each load, greedy and sampled."""
    from llmx.runtime import AsyncLLM

    kinds = [(prompt, output, temperature) for prompt, output in loads for temperature in (0.0, 0.8)]
    bare: dict[Any, Any] = {}
    if args.device != "cpu":
        llm = AsyncLLM(args.package, args.device, max_length=length, slots=args.clients)
        for prompt, output, temperature in kinds:
            load(llm, args.clients, 2, prompt, 24, temperature)
            bare[prompt, output] = raw(llm.llm.backend, args.clients, prompt, output)
            if not args.http:
                found = load(llm, args.clients, args.rounds, prompt, output, temperature)
                yield prompt, output, temperature, found, bare[prompt, output]
        llm._close()
    if args.http:
        from gpu_http import http_load, http_server

        with http_server(args.package, args.device, args.clients, length, args.engine_process) as url:
            for prompt, output, temperature in kinds:
                http_load(url, args.clients, args.processes, 2, prompt, 24, temperature)
                found = http_load(url, args.clients, args.processes, args.rounds, prompt, output, temperature)
                yield prompt, output, temperature, found, bare.get((prompt, output))


def rounded_all(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded_all(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded_all(v) for v in value]
    return rounded(value) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
