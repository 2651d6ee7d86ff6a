"""What the engine and the server cost by themselves: a backend whose steps take no time, or sleep.

Examples:
    python benchmarks/engine_cost.py                    # needs artifacts/demo (`make demo`), for its tokenizer
    python benchmarks/engine_cost.py --rows 128 --parts engine

"Engine": microseconds of `Engine.step` for each token, its receivers called as the server's are. "HTTP": CPU time of the
server's process, and of `llmx bench serve`'s, for each token that is streamed while a step sleeps for as long as it takes
elsewhere; and how many tokens a second they stream where it does not sleep.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import fail, machine, make_parser, positive, print_table, spread, summary, write_results
from llmx.runtime.candidates import NUM_TOP
from llmx.runtime.step_logits import DeviceLogits, StepLogits, TopRows

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top-k 40": {"temperature": 0.8, "top_k": 40, "seed": 1},
    "top-p 0.9": {"temperature": 0.8, "top_p": 0.9, "seed": 1},
    "plain sampling": {"temperature": 0.8, "seed": 1},
}


class InstantBackend:
    """A device's backend that computes nothing: random tokens, prepared beforehand, after `pace` seconds of sleep."""

    recompute_at: int | None = None
    kv_budget = None
    chunked = rewinds = stores_state = True
    state_by_length = verifies_batches = False
    prefill_chunk = 2048
    last_hidden: np.ndarray | None = None

    def __init__(
        self, slots: int, max_length: int, vocab: int, pace: float = 0.0, avoid: frozenset[int] = frozenset()
    ) -> None:
        self.slots, self.max_length, self.vocab_size, self.pace = slots, max_length, vocab, pace
        rng = np.random.default_rng(0)
        usable = np.setdiff1d(np.arange(vocab), list(avoid))
        count = min(NUM_TOP, len(usable))
        self._steps = []
        for _ in range(61):
            ids = np.array([rng.choice(usable, count, replace=False) for _ in range(slots)])
            logits = -np.sort(-rng.standard_normal((slots, count)).astype(np.float16) * np.float16(3), axis=1)
            logits = logits.astype(np.float32)
            best = (logits - logits[:, :1]) / np.float32(0.8)
            log_sums = np.log(np.exp(best).sum(1) * 1.001).astype(np.float32)
            self._steps.append((ids, logits, log_sums))
        self._turn = 0

    def _next(self, rows: int, temperatures: np.ndarray | None) -> StepLogits:
        self._turn = (self._turn + 1) % len(self._steps)
        ids, logits, log_sums = (array[:rows] for array in self._steps[self._turn])
        tops = None
        if temperatures is not None and (temperatures > 0).any():
            tops = partial(TopRows, ids, logits, log_sums, temperatures)
        return DeviceLogits(lambda first, count: np.zeros((count, self.vocab_size)), ids[:, 0], logits[:, 0], tops)

    def decode(self, token_ids: Any, lengths: Any, active: Any = None, temperatures: Any = None) -> StepLogits:
        if self.pace:
            time.sleep(self.pace)
        return self._next(len(token_ids), temperatures)

    def prefill(self, slot: int, token_ids: Any, start: int, positions: Any, prompt_length: Any = None) -> np.ndarray:
        return np.zeros((len(positions), self.vocab_size), np.float32)

    def prefill_last(
        self, slot: int, token_ids: Any, start: int, prompt_length: Any = None, temperature: float = -1.0
    ) -> StepLogits:
        return self._next(1, np.full(1, temperature, np.float32))

    def copy_slot(self, source: int, target: int, length: int, start: int = 0) -> None:
        pass

    def close(self) -> None:
        pass


def engine_cost(package: Path, rows: int, options: dict[str, Any], steps: int) -> float:
    """Microseconds a token of the engine's decode steps, `rows` requests at once."""
    from llmx.runtime import SamplingParams
    from llmx.runtime.engine import Engine
    from llmx.runtime.manifest import load_manifest
    from llmx.runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(package, load_manifest(package).tokenizer)
    backend = InstantBackend(rows, steps + 64, tokenizer.vocab_size, avoid=tokenizer.special_ids)
    engine = Engine(backend, tokenizer, 2048)  # type: ignore[arg-type]
    params = SamplingParams(max_tokens=steps + 8, ignore_eos=True, **options).resolved({})
    pieces: list[Any] = []
    for _ in range(rows):
        engine.add(None, list(range(5, 21)), params, pieces.append)
    while len(pieces) < 3 * rows:
        engine.step()
    pieces.clear()
    start = time.perf_counter()
    for _ in range(steps):
        engine.step()
    return 1e6 * (time.perf_counter() - start) / len(pieces)


# -- over HTTP --------------------------------------------------------------------------------------------------------


def load_instant(pace: float, folder: Path, device: str, **options: Any) -> Any:
    """An LLM over an instant backend; also in the engine's process, which finds it by this module's name."""
    from llmx.runtime import llm

    def open_backend(folder: Path, manifest: Any, max_length: int, slots: int, **_: Any) -> InstantBackend:
        special = frozenset(manifest.tokenizer.eos_token_ids)
        return InstantBackend(slots, max_length or 4096, manifest.model.vocab_size, pace, special)

    llm.open_backend = open_backend  # type: ignore[assignment]
    return llm.LLM(folder, device, **options)


def serve(package: Path, rows: int, pace: float, port: int, in_process: bool) -> None:
    """The server over an instant backend, in this process."""
    import engine_cost
    from llmx.serve import ServeConfig, load_models, models
    from llmx.serve.server import bind
    from llmx.serve.server import serve as run

    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    models.load_llm = partial(engine_cost.load_instant, pace)  # type: ignore[assignment]
    config = ServeConfig(
        onnx=[f"model={package}"],
        port=port,
        slots=rows,
        max_length=1024,
        log_level="warning",
        engine_process=in_process,
    )
    with bind(config) as sock:
        run(load_models(config), config, sock)


def generate_load(port: int, rows: int, tokens: int, rounds: int) -> None:
    """`llmx bench serve`'s load, in this process; prints what it found and its CPU time."""
    from llmx.bench.load import Load, run
    from llmx.bench.load_report import report

    load = Load(f"http://127.0.0.1:{port}", "model", num_prompts=rows * rounds, max_concurrency=rows, input_len=16,
                output_len=tokens, ignore_eos=True, vocab_size=200)  # fmt: skip
    start = time.process_time()
    outcomes, seconds = asyncio.run(run(load))
    cpu = time.process_time() - start
    facts = report(load, outcomes, seconds, {})
    kept = {key: facts[key] for key in ("output_throughput", "total_output_tokens", "failed", "itl_ms", "ttft_ms")}
    print(json.dumps({**kept, "cpu_s": cpu, "seconds": seconds}))


@contextmanager
def server(package: Path, rows: int, pace: float, in_process: bool) -> Iterator[tuple[psutil.Process, int]]:
    from prefix_cache import free_port

    port = free_port()
    options = ["--package", str(package), "--rows", str(rows), "--pace", str(pace), "--port", str(port)]
    options += ["--engine-process"] if in_process else []
    process = subprocess.Popen([sys.executable, __file__, "--serve", *options])
    try:
        for _ in range(600):
            if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in psutil.net_connections("tcp")):
                break
            if process.poll() is not None:
                fail("The server did not start.")
            time.sleep(0.1)
        yield psutil.Process(process.pid), port
    finally:
        process.terminate()
        process.wait()


def http_cost(
    package: Path, rows: int, pace: float, in_process: bool, tokens: int, rounds: int, repeats: int
) -> dict[str, Any]:
    """CPU microseconds a streamed token, of the server's process, the engine's own and the load generator's; tokens a second."""
    found: dict[str, list[float]] = {"server_us": [], "engine_us": [], "client_us": [], "tokens_per_s": []}
    with server(package, rows, pace, in_process) as (process, port):
        engines = process.children()
        for repeat in range(repeats + 1):
            before = [used(process), sum(map(used, engines))]
            options = ["--port", str(port), "--rows", str(rows), "--tokens", str(tokens), "--rounds", str(rounds)]
            done = subprocess.run(
                [sys.executable, __file__, "--load", *options], capture_output=True, text=True, check=False
            )
            if done.returncode:
                fail(f"The load generator failed: {done.stderr[-400:]}")
            facts = json.loads(done.stdout)
            if repeat == 0 or facts["failed"]:
                continue
            count = facts["total_output_tokens"]
            found["server_us"].append(1e6 * (used(process) - before[0]) / count)
            found["engine_us"].append(1e6 * (sum(map(used, engines)) - before[1]) / count)
            found["client_us"].append(1e6 * facts["cpu_s"] / count)
            found["tokens_per_s"].append(facts["output_throughput"])
    return {key: summary(values) for key, values in found.items()}


def used(process: psutil.Process) -> float:
    """Seconds of CPU so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--package", type=Path, default=Path("artifacts/demo"), help="whose tokenizer [default: artifacts/demo]"
    )
    parser.add_argument("--rows", default="1,32,128", help="requests at once, by commas [default: 1,32,128]")
    parser.add_argument("--parts", default="engine,http", help="by commas [default: engine,http]")
    parser.add_argument("--steps", type=positive, default=200, help="of the engine that count [default: 200]")
    parser.add_argument("--tokens", type=positive, default=128, help="of each answer over HTTP [default: 128]")
    parser.add_argument("--rounds", type=positive, default=3, help="answers for each client [default: 3]")
    parser.add_argument("--repeats", type=positive, default=5, help="[default: 5]")
    parser.add_argument(
        "--pace", type=float, default=0.025, help="seconds that a step sleeps over HTTP [default: 0.025]"
    )
    parser.add_argument("--engine-process", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="where to write the results [default: benchmarks/results/…]")
    args = parser.parse_args()
    rows = [int(count) for count in args.rows.split(",")]
    if args.serve:
        return serve(args.package, rows[0], args.pace, args.port, args.engine_process)
    if args.load:
        return generate_load(args.port, rows[0], args.tokens, args.rounds)
    if not args.package.is_dir():
        fail(f"{args.package} is no package; run `make demo`, or name one with --package.")
    started = machine()
    results: dict[str, Any] = {"engine_us": {}, "http": {}}
    tables = []
    if "engine" in args.parts:
        for name, options in KINDS.items():
            results["engine_us"][name] = {
                count: summary([engine_cost(args.package, count, options, args.steps) for _ in range(args.repeats)])
                for count in rows
            }
        shown = [[name, *(spread(each[count]) for count in rows)] for name, each in results["engine_us"].items()]
        columns = ["µs a token", *(f"{count} rows" for count in rows)]
        tables.append({"title": "The engine over a backend that takes no time", "columns": columns, "rows": shown})
    if "http" in args.parts:
        shown = []
        for count in [count for count in rows if count > 1]:
            for pace, in_process in ((pace, own) for pace in (args.pace, 0.0) for own in (False, True)):
                facts = http_cost(args.package, count, pace, in_process, args.tokens, args.rounds, args.repeats)
                name = f"{count} streams, {1e3 * pace:g} ms a step" + (", engine's own process" if in_process else "")
                results["http"][name] = facts
                cells = [spread(facts[key], 0) for key in ("server_us", "client_us", "tokens_per_s")]
                shown.append([name, cells[0], spread(facts["engine_us"], 1) if in_process else "", *cells[1:]])
        columns = [
            "", "server, µs of CPU a token", "engine's process, µs", "`llmx bench serve`, µs", "tokens/s"
        ]  # fmt: skip
        tables.append(
            {"title": "Streams over HTTP, server and clients on the same CPUs", "columns": columns, "rows": shown}
        )
    for table in tables:
        print_table(table["title"], table["columns"], table["rows"])
    page = {"title": "What the engine and the server cost", "section": "Serving", "tables": tables}
    write_results(args.json, "engine-cost", started, {**page, **results})


if __name__ == "__main__":
    main()
