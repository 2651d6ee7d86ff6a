"""A server at its capacity, and at ten times that: what is accepted keeps its latency, the rest is refused at once.

Examples:
    python benchmarks/overload.py --dtype fp32
    python benchmarks/overload.py --dtype int4 --slots 8 --queue 64
    python benchmarks/overload.py --package artifacts/demo --seconds 5

First as many clients as the server has slots and places in the queue, each sending its next request when it has its
answer: the latency at capacity, and the requests a second that the server serves. Then requests arrive at ten times that
rate, whatever the answers (Poisson). Latencies are those that the client sees; it shares the machine with the server.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from common import (
    add_model_arguments,
    add_peers_argument,
    checkpoint_for,
    fail,
    machine,
    make_parser,
    positive,
    print_table,
    versions,
    write_results,
)
from peers import model_for, parse_peer
from prefix_cache import free_port

FACTOR = 10
REFUSED_WITHIN = 0.1


def percentile(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(part * (len(ordered) - 1)))] if ordered else 0.0


async def ready(url: str, server: asyncio.subprocess.Process) -> None:
    """Return once the server answers; exits where it has ended instead."""
    async with httpx.AsyncClient(base_url=url, timeout=5) as client:
        for _ in range(600):
            if server.returncode is not None:
                break
            try:
                await client.get("/ready")
                return
            except httpx.TransportError:
                await asyncio.sleep(0.2)
    fail("llmx serve did not start.")


class Load:
    def __init__(self, url: str, args: argparse.Namespace) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        self.client = httpx.AsyncClient(base_url=url, timeout=300, limits=limits)
        self.random, self.args = random.Random(0), args
        self.served: list[float] = []
        self.refused: list[float] = []
        self.other: list[str] = []

    async def one(self) -> None:
        prompt = [self.random.randrange(100, 1000) for _ in range(self.args.prompt)]
        body = {"prompt": prompt, "max_tokens": self.args.tokens, "temperature": 0, "ignore_eos": True}
        start = time.perf_counter()
        answer = await self.client.post("/v1/completions", json=body)
        seconds = time.perf_counter() - start
        if answer.status_code == 200:
            self.served.append(seconds)
        elif answer.status_code == 429 and int(answer.headers["retry-after"]) > 0:
            self.refused.append(seconds)
        else:
            self.other.append(f"{answer.status_code} {answer.text[:100]}")

    async def closed(self, clients: int, seconds: float) -> float:
        """Requests a second that `clients` get served, each sending the next when it has its answer."""
        end = time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < end:
                await self.one()

        start = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return len(self.served) / (time.perf_counter() - start)

    async def opened(self, rate: float, seconds: float) -> None:
        """Requests that arrive `rate` a second, whatever the answers."""
        end, tasks = time.monotonic() + seconds, []
        due = time.monotonic()
        while time.monotonic() < end:
            tasks.append(asyncio.ensure_future(self.one()))
            due += self.random.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        await asyncio.gather(*tasks)


def facts(load: Load) -> dict[str, Any]:
    return {
        "served": len(load.served),
        "refused": len(load.refused),
        "other": load.other[:5],
        "latency_s": {f"p{p}": round(percentile(load.served, p / 100), 3) for p in (50, 95, 99)},
        "refusal_s": {f"p{p}": round(percentile(load.refused, p / 100), 4) for p in (50, 95, 99)},
    }


async def measure(args: argparse.Namespace, package: str) -> dict[str, Any]:
    port = free_port()
    length = args.prompt + args.tokens + 8
    command = [
        sys.executable,
        "-m",
        "llmx.cli",
        "serve",
        "--onnx",
        package,
        "--port",
        str(port),
        "--log-level",
        "warning",
    ]
    options = [
        "--slots",
        str(args.slots),
        "--max-queue",
        str(args.queue),
        "--max-length",
        str(length),
        "--prefix-cache",
        "0",
    ]
    server = await asyncio.create_subprocess_exec(*command, *options, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    url = f"http://127.0.0.1:{port}"
    try:
        await ready(url, server)
        await Load(url, args).one()
        at, over = Load(url, args), Load(url, args)
        capacity = await at.closed(args.slots + args.queue, args.seconds)
        await over.opened(FACTOR * capacity, args.seconds)
    finally:
        if server.returncode is None:
            server.terminate()
        await server.wait()
    return {"capacity_per_s": round(capacity, 2), "at capacity": facts(at), f"{FACTOR} x capacity": facts(over)}


def main() -> None:
    parser = make_parser(__doc__)
    add_model_arguments(parser)
    add_peers_argument(parser)
    parser.add_argument("--package", type=Path, help="a package instead of one made of --shape")
    parser.add_argument("--slots", type=positive, default=4, help="[default: 4]")
    parser.add_argument("--queue", type=positive, default=4, help="places in the queue [default: 4]")
    parser.add_argument("--prompt", type=positive, default=64, help="tokens of a prompt [default: 64]")
    parser.add_argument("--tokens", type=positive, default=32, help="tokens of an answer [default: 32]")
    parser.add_argument("--seconds", type=positive, default=30, help="each of the two phases [default: 30]")
    args = parser.parse_args()
    if args.package is not None and not (args.package / "llmx.json").is_file():
        fail(f"{args.package} is no package; export one, or leave --package out.")
    started = machine()
    package = args.package or model_for(parse_peer("llmx", args.dtype), checkpoint_for(args), args.work, args.peers_dir)
    results = asyncio.run(measure(args, str(package)))
    rows, ratio = [], 0.0
    for name in ("at capacity", f"{FACTOR} x capacity"):
        found = results[name]
        latencies = [f"{found['latency_s'][p]:.2f}" for p in ("p50", "p95")]
        refusals = [f"{found['refusal_s'][p] * 1e3:.0f}" if found["refused"] else "" for p in ("p50", "p95")]
        rows.append([name, str(found["served"]), *latencies, str(found["refused"]), *refusals])
    at, over = (results[name] for name in ("at capacity", f"{FACTOR} x capacity"))
    ratio = over["latency_s"]["p95"] / at["latency_s"]["p95"]
    title = (
        f"{package.name}, {args.slots} slots, {args.queue} places, {results['capacity_per_s']} requests/s at capacity"
    )
    columns = ["", "served", "p50, s", "p95, s", "refused", "p50, ms", "p95, ms"]
    print_table(title, columns, rows)
    print(f"p95 of what is accepted, over that at capacity: {ratio:.2f}; anything else: {at['other'] + over['other']}")
    shown = {"title": "Overload", "section": "Serving", "tables": [{"title": title, "columns": columns, "rows": rows}]}
    settings = {k: getattr(args, k) for k in ("slots", "queue", "prompt", "tokens", "seconds")}
    more = {"settings": settings, "versions": versions("llmx", "onnxruntime", "httpx"), "p95_ratio": round(ratio, 3)}
    write_results(args.json, f"overload-{package.name}", started, {**shown, **more, **results})
    sys.exit(0 if over["refusal_s"]["p95"] <= REFUSED_WITHIN and not (at["other"] or over["other"]) else 1)


if __name__ == "__main__":
    main()
