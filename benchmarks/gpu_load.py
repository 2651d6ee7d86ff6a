"""The engine under load on a GPU: closed-loop clients beside the captured graphs launched back to back.

Example:
    python benchmarks/gpu_load.py --package artifacts/llama-1b --clients 128

Each client is a thread that sends its next prompt when its last one has ended; `AsyncLLM`'s thread runs the engine and
hands pieces over as it does to the server. Nothing goes over HTTP. "Raw" is what the same work takes in launches alone: a
step of as many rows as clients for each output token, and the prompts' graphs, one after another.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
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
    start = max(thread.requests[0][1][-1] for thread in threads)
    end = min(thread.requests[-1][1][-1] for thread in threads)
    tokens = sum(start < at <= end for t in threads for _, times in t.requests for at in times)
    counted = [(sent, times) for t in threads for sent, times in t.requests if sent >= start and times[0] <= end]
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
    parser.add_argument("--rounds", type=positive, default=3, help="requests of each client that count [default: 3]")
    parser.add_argument("--json", type=Path, help="where to write the results [default: benchmarks/results/…]")
    args: argparse.Namespace = parser.parse_args()
    import onnxruntime
    import torch
    from llmx.runtime import AsyncLLM

    fill_weights(args.package, None)
    started = {**machine(), "gpu": torch.cuda.get_device_name()}
    started["versions"] |= {"onnxruntime": onnxruntime.__version__}  # the GPU's, whatever else is installed
    loads = [tuple(map(int, pair.split(":"))) for pair in args.loads.split(",")]
    length = max(prompt + output for prompt, output in loads) + 16
    llm = AsyncLLM(args.package, "cuda", max_length=length, slots=args.clients)
    results, rows = [], []
    for prompt, output in loads:
        for temperature in (0.0, 0.8):
            load(llm, args.clients, 2, prompt, 24, temperature)
            bare = raw(llm.llm.backend, args.clients, prompt, output)
            found = load(llm, args.clients, args.rounds, prompt, output, temperature)
            share = found["tokens_per_s"] / bare["tokens_per_s"]
            steps = found["tokens_per_s"] / bare["steps_alone_tokens_per_s"]
            results.append({"prompt": prompt, "output": output, "temperature": temperature, **found, "raw": bare,
                            "of_raw": share, "of_steps_alone": steps})  # fmt: skip
            rows.append([
                f"{prompt} → {output}, {'greedy' if temperature == 0 else 'top-k 40'}", f"{found['tokens_per_s']:,.0f}",
                f"{bare['tokens_per_s']:,.0f}", f"{share:.0%}", f"{steps:.0%}",
                *(f"{found[key][p]:.1f}" for key in ("ttft_ms", "itl_ms") for p in ("p50", "p99")),
            ])  # fmt: skip
            print(rows[-1], flush=True)
    llm._close()
    columns = ["prompt → output", "tokens/s", "raw", "of raw", "of steps alone", "TTFT p50, ms", "p99", "ITL p50, ms", "p99"]  # fmt: skip
    title = f"llmx's engine on a GPU, {args.clients} closed-loop clients in the process (no HTTP)"
    print_table(title, columns, rows)
    page = {"title": "Load on a GPU", "section": "CUDA", "tables": [{"title": title, "columns": columns, "rows": rows}]}
    settings = {"clients": args.clients, "rounds": args.rounds, "package": args.package.name}
    write_results(
        args.json,
        f"cuda-load-{args.package.name}",
        started,
        {**page, "settings": settings, "results": rounded_all(results)},
    )


def rounded_all(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded_all(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded_all(v) for v in value]
    return rounded(value) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
