"""A GPU beside its peers: first token, decoding of one sequence and of batches, memory, host time.

Examples:
    python benchmarks/gpu_decode.py --package artifacts/llama-1b --genai genai/fp16 --json cuda-llama-1b-fp16.json
    python benchmarks/gpu_decode.py --package artifacts/llama-1b --config artifacts/llama-1b-hf --tokens 64

Runs on the machine with the GPU, in one environment that has onnxruntime-gpu (and onnxruntime-genai-cuda, transformers).
Each engine is a process of its own; rounds are interleaved. A package or genai model whose weights file is missing gets
one of random values, of the size that it should have: graphs travel, weights need not.

The bandwidth floor of a step is the weights that it reads (the embedding's rows apart) over the measured speed of a copy.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import fail, machine, make_parser, positive, print_table, rounded, spread, summary, write_results
from gpu_engines import ENGINES


class Child:
    """One engine in a process of its own: a JSON line a request."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self.name = name
        command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(options)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            fail(f"{self.name} ended with status {self._process.wait()}.")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def request(self, **what: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def child(options: dict[str, Any]) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not mix with the answers
    engine = ENGINES[options["engine"]](options)

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    answer({"versions": engine.versions})
    for line in sys.stdin:
        request = json.loads(line)
        answer(getattr(engine, request.pop("do"))(**request))


def interleaved(args: argparse.Namespace, children: list[Child]) -> dict[str, Any]:
    """Medians of first-token and step times of each engine, and llmx's ratio to it."""
    runs: dict[str, list[dict[str, Any]]] = {c.name: [] for c in children}
    for number in range(args.warmup + args.repeats):
        for c in children[number % len(children) :] + children[: number % len(children)]:
            answer = c.request(do="run", prompt=args.prompt, steps=args.tokens, seed=number)
            if number >= args.warmup:
                runs[c.name].append(answer)
    results = {}
    for c in children:
        first = summary([1e3 * run["first_token_s"] for run in runs[c.name]])
        step = summary([1e3 * run["decode_s"] / args.tokens for run in runs[c.name]])
        results[c.name] = {"first_token_ms": first, "step_ms": step, **c.facts}
    ours = results["llmx"]
    for result in results.values():
        for key in ("first_token_ms", "step_ms"):
            result[key]["llmx_ratio"] = rounded(result[key]["median"] / ours[key]["median"])
    return results


def tables(args: argparse.Namespace, engines: dict[str, Any], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """As benchmarks/page.py shows them; ratios are the peer's time over llmx's."""
    rows = []
    for name, engine in engines.items():
        own = name == "llmx"
        cells = [f"**{name}**" if own else name]
        for key in ("first_token_ms", "step_ms"):
            digits = 2 if key == "first_token_ms" else 3
            cells += [spread(engine[key], digits), "" if own else f"{engine[key]['llmx_ratio']:.2f}"]
        rows.append([*cells, f"{1e3 / engine['step_ms']['median']:,.0f}"])
    columns = ["", "first token, ms", "its ÷ llmx's", "step, ms", "its ÷ llmx's", "tokens/s"]
    made = [{"title": f"one sequence: prompt {args.prompt}, {args.tokens} tokens", "columns": columns, "rows": rows}]
    batches = [
        [str(rows), f"{b['step_ms']:.3f}", f"{b['tokens_per_s']:,.0f}", f"{b['host_us']:.0f}", f"{b['sampled_ms']:.3f}"]
        for rows, b in facts["batches"].items()
    ]
    columns = ["rows", "greedy step, ms", "tokens/s", "host, µs", "sampled step, ms"]
    made.append({"title": f"llmx, rows at context {args.context}", "columns": columns, "rows": batches})
    floor = facts["floor_ms"]
    values = [
        ["weights, GB", f"{facts['weights'] / 1e9:.2f}"],
        ["state, GB", f"{facts['state'] / 1e9:.2f}"],
        ["device memory beyond both, GB", f"{facts['beyond'] / 1e9:.2f}"],
        ["open, s", f"{facts['open_s']:.2f}"],
        [f"bandwidth floor of a step, ms (copy: {facts['copy_bytes_per_s'] / 1e12:.2f} TB/s)", f"{floor:.3f}"],
        ["floor ÷ step, one sequence", f"{floor / engines['llmx']['step_ms']['median']:.1%}"],
    ]
    made.append({"title": "llmx", "columns": ["", ""], "rows": values})
    return made


def losses(name: str, engines: dict[str, Any]) -> list[str]:
    found = []
    for peer, engine in engines.items():
        for key, what in (("first_token_ms", "has its first token"), ("step_ms", "makes a step")):
            ratio = engine[key]["llmx_ratio"]
            if ratio < 0.995:
                found.append(f"{name}: {peer} {what} in {ratio:.2f} of llmx's time.")
    return found


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--package", type=Path, help="llmx's package for CUDA")
    parser.add_argument("--genai", type=Path, help="the same model of onnxruntime-genai's builder, for CUDA")
    parser.add_argument("--config", type=Path, help="a folder with config.json: transformers with random weights, too")
    parser.add_argument("--prompt", type=positive, default=512, help="tokens of the prompt [default: 512]")
    parser.add_argument("--tokens", type=positive, default=128, help="decode steps [default: 128]")
    parser.add_argument("--batches", default="1,8,32,128", help="rows, by commas [default: 1,8,32,128]")
    parser.add_argument("--context", type=positive, default=512, help="positions of each row [default: 512]")
    parser.add_argument("--repeats", type=positive, default=7, help="rounds that count [default: 7]")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them [default: 2]")
    parser.add_argument("--title", help="of the result [default: the package's name and dtype]")
    parser.add_argument("--json", type=Path, help="where to write the results [default: benchmarks/results/…]")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(json.loads(args.child))
        return
    if args.package is None:
        fail("Give the package: --package DIR.")
    started = machine()
    with contextlib.closing(Child("the preparation", {"engine": "prepare"})) as preparing:
        genai = str(args.genai) if args.genai else None
        prepared = preparing.request(do="prepare", package=str(args.package), genai=genai)
    started["gpu"], manifest, copy = prepared["gpu"], prepared["manifest"], prepared["copy_bytes_per_s"]
    started["versions"].pop("onnxruntime", None)  # of the environment's CPU wheel, if any: engines say what they ran
    name = args.title or f"{manifest['name']}, {manifest['dtype']}"
    wanted: dict[str, dict[str, Any]] = {"llmx": {"engine": "llmx", "model": str(args.package)}}
    if args.genai:
        for graph in (False, True):
            peer = "onnxruntime-genai-cuda" + (", CUDA graph" if graph else "")
            wanted[peer] = {"engine": "genai", "model": str(args.genai), "graph": graph}
    if args.config:
        wanted["transformers, static cache"] = {"engine": "transformers", "model": str(args.config)}
    with contextlib.ExitStack() as stack:
        children = []
        for peer, options in wanted.items():
            limits = {"length": args.prompt + args.tokens + 64, "dtype": manifest["dtype"]}
            children.append(stack.enter_context(contextlib.closing(Child(peer, {**options, **limits}))))
        engines = interleaved(args, children)
    batches = [int(rows) for rows in args.batches.split(",")]
    options = {"engine": "llmx", "model": str(args.package), "slots": max(batches), "length": args.context + 256}
    with contextlib.closing(Child("llmx", options)) as batched:
        facts = batched.request(do="batches", rows=batches, context=args.context)
    facts |= {"copy_bytes_per_s": copy, "floor_ms": 1e3 * facts["read"] / copy}
    settings = {key: getattr(args, key) for key in ("prompt", "tokens", "context", "repeats", "warmup")}
    settings |= {"model": manifest["name"], "dtype": manifest["dtype"], "device": "cuda"}
    result = {"title": name, "section": "CUDA", "settings": settings, "engines": engines, "llmx": facts}
    result |= {"tables": tables(args, engines, facts), "losses": losses(name, engines)}
    for table in result["tables"]:
        print_table(table["title"], table["columns"], table["rows"])
    write_results(args.json, f"cuda-{manifest['name']}-{manifest['dtype']}", started, result)


if __name__ == "__main__":
    main()
