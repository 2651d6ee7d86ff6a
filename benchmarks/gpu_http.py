"""`gpu_load.py`'s load over HTTP: `llmx serve`, and closed-loop clients of `llmx bench serve` in processes of their own."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from common import fail, short_error

Requests = list[tuple[float, list[float]]]  # when each was sent, and when each token came


@contextmanager
def http_server(
    package: Path, device: str, slots: int, length: int, engine_process: bool | None = None
) -> Iterator[str]:
    """`llmx serve` of `package`; its address."""
    from prefix_cache import free_port

    port = free_port()
    options = ["--onnx", f"model={package}", "--device", device, "--slots", str(slots), "--max-length", str(length)]
    if engine_process is not None:
        options.append("--engine-process" if engine_process else "--no-engine-process")
    command = [sys.executable, "-m", "llmx.cli", "serve", *options, "--port", str(port), "--log-level", "warning"]
    process = subprocess.Popen(command)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            if process.poll() is not None:
                fail("llmx serve ended; what it says is above.")
            try:
                with direct.open(url + "/ready", timeout=5):
                    break
            except OSError:
                time.sleep(0.25)
        yield url
    finally:
        process.terminate()
        process.wait()


def http_load(
    url: str, clients: int, processes: int, rounds: int, prompt: int, output: int, temperature: float
) -> dict[str, Any]:
    """As `gpu_load.load`, the clients spread over processes."""
    from gpu_load import statistics_of

    shares = [len(part) for part in np.array_split(np.arange(clients), min(processes, clients))]
    wanted = {"url": url, "rounds": rounds, "prompt": prompt, "output": output, "temperature": temperature}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, json.dumps({**wanted, "clients": share, "seed": seed})],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed, share in enumerate(shares)
    ]
    found: list[Requests] = []
    for process in running:
        told, error = process.communicate()
        if process.returncode:
            fail(f"A process of clients failed: {short_error(error)}")
        found += json.loads(told)
    return statistics_of(found)


async def _client(client: Any, rng: np.random.Generator, wanted: dict[str, Any]) -> Requests:
    """One closed-loop client: its first request's length is drawn, so that not all prompts come at once ever after."""
    from llmx.bench.load import Prompt

    requests: Requests = []
    for number in range(wanted["rounds"] + 1):
        tokens = wanted["output"] if number else int(rng.integers(1, wanted["output"] + 1))
        outcome = await client.send(Prompt(rng.integers(1, 1000, wanted["prompt"]).tolist(), wanted["prompt"], tokens))
        if outcome.error is not None:
            sys.exit(outcome.error)
        events = outcome.start + outcome.ttft + np.concatenate(([0.0], np.cumsum(outcome.gaps)))
        # a token that ends within a character has no event of its own: it comes with the next
        places = np.minimum(np.arange(tokens) * len(events) // tokens, len(events) - 1)
        requests.append((outcome.start, events[places].tolist()))
    return requests


async def _clients(wanted: dict[str, Any]) -> list[Requests]:
    from llmx.bench.load import Client, Load

    sampled = {"top_k": 40, "seed": 1} if wanted["temperature"] else {}
    load = Load(wanted["url"], "model", temperature=wanted["temperature"], ignore_eos=True, extra_body=sampled)
    async with Client(load) as client:
        rngs = [np.random.default_rng([wanted["seed"], number]) for number in range(wanted["clients"])]
        return await asyncio.gather(*(_client(client, rng, wanted) for rng in rngs))


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_clients(json.loads(sys.argv[1])))))
