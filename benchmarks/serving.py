"""`llmx serve` under load, by `llmx bench serve`: 32 clients beside one, beside `transformers serve`, over rates of arrivals.

Examples:
    python benchmarks/serving.py closed                 # 32 closed-loop clients beside one, three workloads
    python benchmarks/serving.py peer                   # … beside transformers serve with continuous batching
    python benchmarks/serving.py rates                  # open loop: latency against the rate of arrivals
    python benchmarks/serving.py agreement --guidellm …/bin/guidellm     # does guidellm measure the same?

Server and load generator share the machine's CPUs. Runs of one client and of many interleave.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import (
    add_model_arguments,
    add_peers_argument,
    checkpoint_for,
    fail,
    machine,
    make_parser,
    positive,
    print_table,
    rounded,
    short_error,
    write_results,
)
from llmx.bench.load import Load, run
from llmx.bench.load_report import report
from peers import model_for, parse_peer

#: Prompt tokens, output tokens, the least ratio of many clients' throughput to one's.
WORKLOADS = ((128, 64, 1.6), (512, 128, 1.6), (32, 256, 3.0))
#: Prompt and output tokens beside transformers serve, and the ratio wanted there.
PEER_WORKLOADS, PEER = ((128, 64), (32, 256)), 2.0
PRINTABLE = 95  # the checkpoints' first ids are printable characters, so that a text has as many tokens as characters


@contextlib.contextmanager
def serving(command: list[str], port: int, path: str, cpus: set[int] | None = None) -> Iterator[str]:
    """The URL of a server that `command` starts (on `cpus` alone), from when it answers `path` until the block ends."""
    with tempfile.TemporaryFile("w+") as printed:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed, text=True, env=environment,
            preexec_fn=(lambda: os.sched_setaffinity(0, cpus)) if cpus else None,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 300
            while not _answers(f"http://127.0.0.1:{port}{path}"):
                if process.poll() is not None or time.monotonic() > deadline:
                    printed.seek(0)
                    fail(f"{command[0]} does not serve: {short_error(printed.read())}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def llmx_server(args: argparse.Namespace, checkpoint: Path, cpus: set[int] | None = None) -> Iterator[str]:
    package = model_for(parse_peer("llmx", args.dtype), checkpoint, args.work, args.peers_dir)
    port = free_port()
    command = [sys.executable, "-m", "llmx.cli", "serve", "--onnx", f"model={package}", "--port", str(port)]
    command += ["--slots", str(args.clients), "--max-queue", "1024", "--max-length", "1024", "--log-level", "error"]
    threads = args.threads if cpus is None else len(cpus)
    with serving([*command, "--threads", str(threads)], port, "/ready", cpus) as url:
        yield url


@contextlib.contextmanager
def transformers_server(args: argparse.Namespace, checkpoint: Path, dtype: str) -> Iterator[str]:
    port = free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(checkpoint), "--device", "cpu"]
    command += ["--continuous-batching", "--dtype", dtype, "--port", str(port), "--host", "127.0.0.1"]
    command += [
        "--cb-max-batch-tokens",
        "256",
        "--cb-num-blocks",
        "512",
    ]  # its defaults are for GPUs and far slower here
    with serving(command, port, "/health") as url:
        yield url


def measure(load: Load) -> dict[str, Any]:
    outcomes, seconds = asyncio.run(run(load))
    facts = report(load, outcomes, seconds, {})
    if facts["failed"]:
        fail(f"{facts['failed']} requests failed: {facts['errors']}")
    settings = facts["settings"]
    what = f"{settings['input_len']} + {settings['output_len']}, {settings['max_concurrency'] or 'any'} at once"
    rate, ttft, tpot = facts["output_throughput"], facts["ttft_ms"]["p50"], facts["tpot_ms"]["p50"]
    print(
        f"{what}, rate {settings['request_rate']}: {rate:.1f} tokens/s, TTFT {ttft:.0f}, TPOT {tpot:.1f} ms",
        file=sys.stderr,
    )
    del settings["base_url"]
    return facts


def cells(facts: dict[str, Any]) -> list[str]:
    """Throughput and latencies of one run, for a table."""
    pairs = (("ttft_ms", "p50"), ("ttft_ms", "p99"), ("tpot_ms", "p50"), ("itl_ms", "p99"), ("e2el_ms", "p50"))
    return [f"{facts['output_throughput']:,.1f}", *(f"{facts[key][name]:,.0f}" for key, name in pairs)]


LATENCIES = ["output tokens/s", "TTFT p50, ms", "p99", "TPOT p50, ms", "ITL p99, ms", "E2EL p50, ms"]


def closed(args: argparse.Namespace, checkpoint: Path) -> dict[str, Any]:
    """Many clients beside one, in turn, each workload."""
    runs: dict[str, Any] = {}
    rows, behind = [], []
    with llmx_server(args, checkpoint) as url:
        for prompt, output, least in WORKLOADS:
            base = Load(url, model="model", input_len=prompt, output_len=output, ignore_eos=True, vocab_size=PRINTABLE)
            found: dict[int, list[dict[str, Any]]] = {1: [], args.clients: []}
            for number in range(args.repeats):
                for clients, each in found.items():
                    count = args.single if clients == 1 else args.clients * args.rounds
                    load = replace(base, num_prompts=count, max_concurrency=clients, seed=number)
                    each.append(measure(load))
            middle = {
                c: sorted(each, key=lambda f: f["output_throughput"])[len(each) // 2] for c, each in found.items()
            }
            ratios = [m["output_throughput"] / o["output_throughput"] for o, m in zip(*found.values(), strict=True)]
            ratio = rounded(statistics.median(ratios))
            runs[f"{prompt}+{output}"] = {"ratio": ratio, "ratios": [rounded(r) for r in ratios], "runs": found}
            for clients, facts in middle.items():
                shown = "" if clients == 1 else f"{ratio:.2f} (≥ {least})"
                rows.append([f"{prompt} + {output}", str(clients), *cells(facts), shown])
            if ratio < least:
                behind.append(
                    f"{args.clients} clients of {prompt} + {output} tokens have {ratio:.2f} times one's throughput; {least} was wanted."
                )
    columns = ["prompt + output", "clients", *LATENCIES, "÷ one client"]
    table = {
        "title": f"{checkpoint.name}, {args.dtype}: closed loop, {args.threads} threads",
        "columns": columns,
        "rows": rows,
    }
    return {"title": "Many clients beside one", "tables": [table], "losses": behind, "runs": runs}


def peer(args: argparse.Namespace, checkpoint: Path) -> dict[str, Any]:
    """The same texts to llmx and to transformers serve, one server after the other."""
    servers: dict[str, Callable[[], AbstractContextManager[str]]] = {
        f"llmx serve, {args.dtype}": lambda: llmx_server(args, checkpoint),
        "transformers serve, bfloat16": lambda: transformers_server(args, checkpoint, "bfloat16"),
        "transformers serve, float32": lambda: transformers_server(args, checkpoint, "float32"),
    }
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for _ in range(args.repeats):
        for name, serve in servers.items():
            with serve() as url:
                for prompt, output in PEER_WORKLOADS:
                    load = Load(url, input_len=prompt, output_len=output, num_prompts=args.clients)
                    load = replace(load, max_concurrency=args.clients, tokenizer=str(checkpoint), vocab_size=PRINTABLE)
                    load = replace(load, model=None if name.startswith("llmx") else str(checkpoint), timeout=1200.0)
                    runs.setdefault(f"{prompt} + {output}", {}).setdefault(name, []).append(measure(load))
    rows, behind = [], []
    for workload, found in runs.items():
        middle = {n: sorted(each, key=lambda f: f["output_throughput"])[len(each) // 2] for n, each in found.items()}
        ours = next(iter(middle.values()))["output_throughput"]
        for name, facts in middle.items():
            ratio = rounded(ours / facts["output_throughput"])
            rows.append([workload, name, *cells(facts), "" if name.startswith("llmx") else f"{ratio:.2f} (≥ {PEER})"])
            if not name.startswith("llmx") and ratio < PEER:
                behind.append(f"{workload} tokens: {ratio:.2f} times the throughput of {name}; {PEER} was wanted.")
        for facts in (f for each in found.values() for f in each):
            facts["settings"]["model"] = facts["settings"]["tokenizer"] = checkpoint.name
    title = f"{checkpoint.name}: {args.clients} closed-loop clients"
    table = {"title": title, "columns": ["prompt + output", "", *LATENCIES, "llmx ÷ it"], "rows": rows}
    return {"title": "Beside transformers serve", "tables": [table], "losses": behind, "runs": runs}


def rates(args: argparse.Namespace, checkpoint: Path) -> dict[str, Any]:
    """Arrivals at parts of what closed-loop clients reach; latency against the rate."""
    with llmx_server(args, checkpoint) as url:
        base = Load(url, model="model", input_len=128, output_len=64, ignore_eos=True, vocab_size=PRINTABLE)
        full = measure(replace(base, num_prompts=2 * args.clients, max_concurrency=args.clients))
        capacity = full["request_throughput"]
        parts = (0.25, 0.5, 0.75, 0.9, 1.0, 1.25)
        found = [
            measure(replace(base, num_prompts=args.requests, request_rate=round(part * capacity, 3))) for part in parts
        ]
    rows = [[f"{p:.0%}", f"{f['settings']['request_rate']:.2f}", *cells(f)] for p, f in zip(parts, found, strict=True)]
    title = f"{checkpoint.name}, {args.dtype}: Poisson arrivals, prompt 128, output 64, {args.clients} slots"
    columns = ["of closed-loop capacity", "requests/s", *LATENCIES]
    x = [f["settings"]["request_rate"] for f in found]
    plots = [
        {
            "file": f"serving-rates-{key}.png", "title": f"{title.split(':')[0]}: {label} against the rate",
            "x": "requests a second", "y": f"{label}, ms",
            "series": [{"name": name, "x": x, "y": [rounded(f[f"{key}_ms"][name]) for f in found]} for name in ("p50", "p90", "p99")],
        }
        for key, label in (("ttft", "time to first token"), ("tpot", "time per output token"))
    ]  # fmt: skip
    table = {"title": title, "columns": columns, "rows": rows}
    return {"title": "Latency against the rate", "tables": [table], "plots": plots, "runs": [full, *found]}


def agreement(args: argparse.Namespace, checkpoint: Path) -> dict[str, Any]:
    """guidellm and llmx bench serve against one server, in turn: the same clients, lengths and number of requests.

    The server has one half of the CPUs and the generators the other: guidellm's processes would slow down a server that
    they share CPUs with, by more than ours do, and both would be right about a different server.
    """
    if args.guidellm is None:
        fail("Name guidellm's command: --guidellm DIR/bin/guidellm (python -m venv DIR; DIR/bin/pip install guidellm).")
    clients, count = 8, 8 * args.rounds
    ours, theirs = [], []
    every = sorted(os.sched_getaffinity(0))
    half = max(1, len(every) // 2)
    os.sched_setaffinity(0, every[half:] or every)
    with llmx_server(args, checkpoint, set(every[:half])) as url:
        base = Load(url, model="model", input_len=128, output_len=64, ignore_eos=True, tokenizer=str(checkpoint))
        load = replace(base, num_prompts=count, max_concurrency=clients, vocab_size=PRINTABLE)
        for number in range(args.repeats):
            ours.append(measure(replace(load, seed=number)))
            theirs.append(guidellm(args.guidellm, url, checkpoint, clients, count))
    rows = []
    for key, label in (
        ("prompt", "prompt tokens"),
        ("output", "output tokens"),
        ("output_throughput", "output tokens/s"),
        ("ttft", "TTFT p50, ms"),
        ("itl", "ITL, mean, ms"),
        ("e2el", "E2EL p50, ms"),
    ):
        a, b = statistics.median(_of(f, key) for f in ours), statistics.median(f[key] for f in theirs)
        rows.append([label, f"{a:,.1f}", f"{b:,.1f}", f"{a / b:.3f}"])
    title = f"{checkpoint.name}, {args.dtype}: {clients} clients, 128 + 64 tokens, {count} requests"
    table = {"title": title, "columns": ["", "llmx bench serve", "guidellm", "ratio"], "rows": rows}
    for facts in ours:
        facts["settings"]["tokenizer"] = checkpoint.name
    return {"title": "Beside guidellm", "tables": [table], "runs": {"llmx bench serve": ours, "guidellm": theirs}}


def _of(facts: dict[str, Any], key: str) -> float:
    if key in ("prompt", "output"):
        return float(facts[f"total_{'input' if key == 'prompt' else key}_tokens"] / facts["completed"])
    names = {"ttft": ("ttft_ms", "p50"), "itl": ("itl_ms", "mean"), "e2el": ("e2el_ms", "p50")}
    return float(facts[key] if key not in names else facts[names[key][0]][names[key][1]])


def guidellm(command: str, url: str, checkpoint: Path, clients: int, count: int) -> dict[str, float]:
    """What guidellm measures, in the same units."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        arguments = [
            command, "run", "--disable-console",
            "--backend", f"kind=openai_http,target={url},model=model,request_format=/v1/completions",
            "--profile", f"kind=concurrent,streams={clients}", "--constraint", f"kind=max_requests,count={count}",
            "--tokenizer", f"kind=huggingface_auto,model={checkpoint}",
            "--data", "kind=synthetic_text,prompt_tokens=128,output_tokens=64", "--output", f"kind=json,path={file}",
        ]  # fmt: skip
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if done.returncode or not file.is_file():
            fail(f"guidellm failed: {short_error(done.stderr or done.stdout)}")
        metrics = json.loads(file.read_text())["benchmarks"][0]["metrics"]

    def value(name: str, what: str) -> float:
        stats = metrics[name]["successful"]
        return float(stats["percentiles"]["p50"] if what == "p50" else stats[what])

    return {
        "output_throughput": value("output_tokens_per_second", "mean"),
        "ttft": value("time_to_first_token_ms", "p50"),
        "itl": value("inter_token_latency_ms", "mean"),
        "e2el": 1e3 * value("request_latency", "p50"),
        "prompt": value("prompt_token_count", "mean"),
        "output": value("output_token_count", "mean"),
    }


PARTS = {"closed": closed, "peer": peer, "rates": rates, "agreement": agreement}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("part", choices=list(PARTS))
    add_model_arguments(parser)
    parser.set_defaults(dtype="int4")
    add_peers_argument(parser)
    parser.add_argument("--clients", type=positive, default=32, help="at once [default: 32]")
    parser.add_argument("--single", type=positive, default=4, help="requests of the one client [default: 4]")
    parser.add_argument("--rounds", type=positive, default=2, help="requests of each of many [default: 2]")
    parser.add_argument("--requests", type=positive, default=60, help="of each rate [default: 60]")
    parser.add_argument("--repeats", type=positive, default=3, help="runs of each [default: 3]")
    parser.add_argument("--threads", type=positive, default=2, help="of llmx serve [default: 2]")
    parser.add_argument("--guidellm", help="guidellm's command")
    args = parser.parse_args()
    started, checkpoint = machine(), checkpoint_for(args)
    results = PARTS[args.part](args, checkpoint)
    for table in results["tables"]:
        print_table(table["title"], table["columns"], table["rows"])
    settings = {"model": checkpoint.name, "dtype": args.dtype, "threads": args.threads, "clients": args.clients}
    name = f"serving-{args.part}-{checkpoint.name}-{args.dtype}"
    write_results(args.json, name, started, {"section": "Serving", "settings": settings, **results})


if __name__ == "__main__":
    main()
