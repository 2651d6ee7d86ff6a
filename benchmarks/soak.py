"""A server under mixed traffic for long: nothing leaks, nothing is mixed up, health stays green.

Examples:
    python benchmarks/soak.py --package artifacts/demo --minutes 30

Workers send completions and chats, whole and streamed, leave in the middle, send malformed bodies, and run curl readers
that are stopped (SIGSTOP) for a while, and killed or let go on. Every completed greedy output is compared with the one
that the prompt gets alone. Each second /health must answer 200; every five seconds the server's memory is noted. At the
end no slot and no place is taken. The prefix cache is filled with other prompts before the traffic begins: it would grow up to
its bound for as long as new prompts come (a changed byte of a body makes one). Slopes are least-squares lines through the
server's private memory, in MiB an hour: from the second minute on, and of the second half.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from common import fail, machine, make_parser, memory_fields, positive, versions, write_results
from overload import ready
from prefix_cache import free_port

MIB = 1 << 20
Case = tuple[str, dict[str, Any], str]  # path, body, the text that a correct server answers


def make_cases(package: str, count: int, generator: random.Random) -> list[Case]:
    """Greedy requests with their outputs, each run alone."""
    from llmx.runtime import LLM, SamplingParams

    words = [
        "ROMEO",
        "JULIET",
        "my",
        "lord",
        "the",
        "king",
        "is",
        "dead",
        "come",
        "hither",
        "what",
        "news",
        "from",
        "Rome",
        "and",
        "then",
        "I",
        "will",
        "speak",
        "of",
        "love",
    ]
    cases: list[Case] = []
    with LLM(package, slots=1) as llm:
        system = " ".join(generator.choices(words, k=250))
        for _ in range(count):
            text = " ".join(generator.choices(words, k=generator.randint(1, 60)))
            tokens = generator.choice([1, 8, 30, 60, 150])
            params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
            fields = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
            if generator.random() < 0.5:
                messages = [{"role": "user", "content": text}]
                if generator.random() < 0.5:
                    messages.insert(0, {"role": "system", "content": system})
                output: Any = llm.chat(messages, params)
                cases.append(("/v1/chat/completions", {"messages": messages, **fields}, output.outputs[0].text))
            else:
                prompt = (system + " " if generator.random() < 0.3 else "") + text
                [output] = llm.generate(prompt, params)
                cases.append(("/v1/completions", {"prompt": prompt, **fields}, output.outputs[0].text))
    return cases


class Soak:
    def __init__(self, url: str, cases: list[Case], seed: int) -> None:
        self.url, self.cases, self.random = url, cases, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.client = httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=200))
        self.over = False

    async def worker(self) -> None:
        kinds = [self.whole] * 4 + [self.streamed] * 4 + [self.leaves] * 3 + [self.malformed] * 2 + [self.stopped]
        while not self.over:
            kind = self.random.choice(kinds)
            try:
                await kind()
                self.counts[kind.__name__] += 1
            except (httpx.HTTPError, OSError) as error:
                self.wrong.append(f"{kind.__name__}: {type(error).__name__} {error}")
                await asyncio.sleep(0.2)

    def _check(self, what: str, text: str, expected: str) -> None:
        if text == expected:
            self.counts["outputs equal to their reference"] += 1
        else:
            self.wrong.append(f"{what}: {text[:80]!r} instead of {expected[:80]!r}")

    async def whole(self) -> None:
        path, body, expected = self.random.choice(self.cases)
        answer = await self.client.post(path, json=body)
        if answer.status_code == 429:
            self.counts["429"] += 1
            await asyncio.sleep(0.05)
        elif answer.status_code != 200:
            self.wrong.append(f"{path}: {answer.status_code} {answer.text[:200]}")
        else:
            choice = answer.json()["choices"][0]
            self._check(path, choice["text"] if "text" in choice else choice["message"]["content"], expected)

    async def streamed(self, leave_after: int | None = None) -> None:
        path, body, expected = self.random.choice(self.cases)
        text, ended = "", False
        async with self.client.stream("POST", path, json={**body, "stream": True}) as answer:
            if answer.status_code == 429:
                self.counts["429"] += 1
                return
            pieces = 0
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
                    pieces += 1
                    if leave_after is not None and pieces > leave_after:
                        return
                ended = ended or line == "data: [DONE]"
        if not ended:
            self.wrong.append(f"{path}: a stream without [DONE]")
        self._check(path + " streamed", text, expected)

    async def leaves(self) -> None:
        """Leave in the middle of a stream, or while waiting for the whole answer."""
        if self.random.random() < 0.5:
            await self.streamed(leave_after=self.random.randint(0, 10))
            return
        path, body, _ = self.random.choice(self.cases)
        task = asyncio.ensure_future(self.client.post(path, json={**body, "n": self.random.choice([1, 2])}))
        await asyncio.sleep(self.random.random() * 0.2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def malformed(self) -> None:
        path, body, _ = self.random.choice(self.cases)
        raw = bytearray(json.dumps(body).encode())
        kind = self.random.randrange(5)
        if kind == 0:
            for _ in range(self.random.randint(1, 20)):
                raw[self.random.randrange(len(raw))] = self.random.randrange(256)
        elif kind == 1:
            raw = raw[: self.random.randrange(len(raw))]
        elif kind == 2:
            raw = bytearray(
                json.dumps({**body, self.random.choice(["max_tokens", "top_p", "stop", "n"]): {"a": []}}).encode()
            )
        elif kind == 3:
            raw = bytearray(b"[" * self.random.randint(10, 100_000))
        else:
            raw = bytearray(self.random.randbytes(self.random.randint(0, 5000)))
        answer = await self.client.post(path, content=bytes(raw), headers={"content-type": "application/json"})
        if answer.status_code >= 500:
            self.wrong.append(f"{answer.status_code} for {bytes(raw[:100])!r}: {answer.text[:200]}")

    async def stopped(self) -> None:
        """A reader that is stopped for a while: let go on (its output is whole) or killed."""
        path, body, expected = self.random.choice(self.cases)
        data = json.dumps({**body, "stream": True})
        curl = await asyncio.create_subprocess_exec(
            "curl", "-sSN", self.url + path, "-H", "content-type: application/json", "-d", data,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        await asyncio.sleep(self.random.random() * 0.3)
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            curl.send_signal(signal.SIGSTOP)
            await asyncio.sleep(self.random.random() * 5)
            curl.send_signal(signal.SIGKILL if self.random.random() < 0.4 else signal.SIGCONT)
        output, _ = await curl.communicate()
        if b"[DONE]" in output:
            chunks = [
                json.loads(line[6:])["choices"][0]
                for line in output.decode().splitlines()
                if line.startswith("data: {")
            ]
            self._check(path + " stopped", "".join(c["text"] if "text" in c else c["delta"].get("content") or "" for c in chunks), expected)  # fmt: skip


async def fill(url: str, generator: random.Random, most: int = 1000) -> tuple[int, float]:
    """Send new prompts until the prefix cache no longer grows; how many, and the bytes that it holds."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        kept = -1.0
        for count in range(most):
            before, kept = kept, gauges((await client.get("/metrics")).text)["prefix_cache_bytes"]
            if kept == before:
                return count, kept
            prompt = [generator.randrange(5, 500) for _ in range(300)]
            answer = await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1})
            answer.raise_for_status()
    fail(f"The prefix cache still grows after {most} prompts ({kept / 1e6:.1f} MB); lower --prefix-cache.")


def slope(samples: list[tuple[float, int, float]], begin: float) -> float:
    """MiB an hour of a least-squares line through the memory from `begin` (s) on."""
    late = [(t / 3600, memory / MIB) for t, memory, _ in samples if t > begin]
    return float(np.polyfit([t for t, _ in late], [m for _, m in late], 1)[0]) if len(late) > 2 else 0.0


async def watch(soak: Soak, pid: int, samples: list[tuple[float, int, float]], start: float) -> None:
    """Health each second, memory each five."""
    async with httpx.AsyncClient(base_url=soak.url, timeout=60) as client:
        beat = 0
        while not soak.over:
            try:
                answer = await client.get("/health")
                if answer.status_code != 200:
                    soak.wrong.append(f"/health: {answer.status_code}")
                soak.counts["health green"] += 1
            except httpx.HTTPError as error:
                soak.wrong.append(f"/health: {type(error).__name__}")
            if beat % 5 == 0:
                kept = gauges((await client.get("/metrics")).text)["prefix_cache_bytes"]
                samples.append((time.monotonic() - start, memory_fields(pid)["Private_Dirty"], kept))
            beat += 1
            await asyncio.sleep(1)


def gauges(text: str) -> dict[str, float]:
    names = ("vllm:", "llmx:")
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(names) and "_bucket" not in line)
    return {name.split("{")[0].partition(":")[2]: float(value) for name, value in lines}


async def run(args: argparse.Namespace, url: str, pid: int, cases: list[Case]) -> dict[str, Any]:
    soak, samples, start = Soak(url, cases, args.seed), [], time.monotonic()
    tasks = [asyncio.ensure_future(soak.worker()) for _ in range(args.workers)]
    watcher = asyncio.ensure_future(watch(soak, pid, samples, start))
    while time.monotonic() - start < args.minutes * 60 and not (soak.wrong and args.stop):
        await asyncio.sleep(1)
    soak.over = True
    await asyncio.wait_for(asyncio.gather(*tasks, watcher), 180)
    left: dict[str, float] = {}
    for _ in range(100):
        left = gauges((await soak.client.get("/metrics")).text)
        if not left["num_requests_running"] and not left["num_requests_waiting"]:
            break
        await asyncio.sleep(0.1)
    await soak.client.aclose()
    length = time.monotonic() - start
    thirds = [slope([x for x in samples if x[0] <= (n + 1) * length / 3], n * length / 3) for n in range(3)]
    return {
        "minutes": round((time.monotonic() - start) / 60, 1),
        "counts": dict(soak.counts),
        "wrong": soak.wrong[:50],
        "num_wrong": len(soak.wrong),
        "left": {k: left[k] for k in ("num_requests_running", "num_requests_waiting")},
        "prefix_cache": {k: left[f"prefix_cache_{k}_total"] for k in ("queries", "hits")},
        "memory_mib": [(round(t), round(m / MIB, 1), round(kept / MIB, 1)) for t, m, kept in samples],
        "slope_since_full_mib_per_hour": round(slope(samples, min(60, length / 2)), 2),
        "slope_mib_per_hour": round(slope(samples, length / 2), 2),
        "slopes_of_thirds": [round(value, 2) for value in thirds],
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--package", default="artifacts/demo", help="a package that generates [default: artifacts/demo]"
    )
    parser.add_argument("--minutes", type=float, default=30, help="how long [default: 30]")
    parser.add_argument("--workers", type=positive, default=16, help="clients at the same time [default: 16]")
    parser.add_argument("--cases", type=positive, default=60, help="different requests [default: 60]")
    parser.add_argument(
        "--prefix-cache", type=float, default=4, help="its bound in MB, filled at the start [default: 4]"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="store_true", help="end at the first thing that is wrong")
    parser.add_argument("--json", type=Path, help="where to write the results [default: benchmarks/results/soak.json]")
    args = parser.parse_args()
    if not Path(args.package).is_dir():
        fail(f"{args.package} is no package; run `make demo`, or name one with --package.")
    started = machine()
    cases = make_cases(args.package, args.cases, random.Random(args.seed))
    results = asyncio.run(serve_and_run(args, cases))
    print(json.dumps({k: v for k, v in results.items() if k != "memory_mib"}, indent=1))
    memory = [x for x in results["memory_mib"] if x[0] >= 60] or results["memory_mib"]
    first, last = (f"{total:.1f} ({kept:.1f})" for _, total, kept in (memory[0], memory[-1]))
    checked = results["counts"].get("outputs equal to their reference", 0)
    row = [
        str(results["minutes"]),
        f"{checked:,}",
        str(results["num_wrong"]),
        f"{first} → {last}",
        str(results["slope_since_full_mib_per_hour"]),
        str(results["slope_mib_per_hour"]),
    ]
    columns = ["minutes", "outputs compared", "wrong", "private memory (of it prefixes) after a minute → at the end, MiB", "slope after a minute, MiB/h", "slope of the second half"]  # fmt: skip
    table = {
        "title": f"mixed traffic, {args.workers} clients, {Path(args.package).name}",
        "columns": columns,
        "rows": [row],
    }
    shown = {"title": "Soak", "section": "Serving", "tables": [table], "versions": versions("llmx", "onnxruntime")}
    write_results(args.json, "soak", started, {**shown, **results})
    sys.exit(1 if results["num_wrong"] or any(results["left"].values()) else 0)


async def serve_and_run(args: argparse.Namespace, cases: list[Case]) -> dict[str, Any]:
    port = free_port()
    command = [sys.executable, "-m", "llmx.cli", "serve", "--onnx", args.package, "--port", str(port), "--slots", "4"]
    options = [
        "--max-queue",
        "8",
        "--prefill-chunk",
        "64",
        "--prefix-cache",
        str(args.prefix_cache),
        "--log-level",
        "warning",
    ]
    server = await asyncio.create_subprocess_exec(*command, *options, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    url = f"http://127.0.0.1:{port}"
    try:
        await ready(url, server)
        filled = await fill(url, random.Random(args.seed))
        results = await run(args, url, server.pid, cases)
        results["filled"] = {"prompts": filled[0], "bytes": filled[1]}
        results["server_alive"] = server.returncode is None
        return results
    finally:
        if server.returncode is None:
            server.terminate()
        await server.wait()


if __name__ == "__main__":
    main()
