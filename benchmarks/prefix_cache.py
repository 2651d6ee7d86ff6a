"""Time to the first token of prompts that share a system prompt, with the prefix cache and without a hit.

Examples:
    python benchmarks/prefix_cache.py --shape smollm2-135m
    python benchmarks/prefix_cache.py --shape smollm2-135m --dtype int4

`llmx serve` runs in a process of its own; a client streams completions of token ids. Cold prompts begin with tokens that
no other prompt has, warm ones with a system prompt that an earlier request had; both end with a question of their own.
Cold and warm alternate. Every output is compared with that of a runtime without a prefix cache.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from typing import Any

import numpy as np
from common import (
    add_model_arguments,
    add_peers_argument,
    checkpoint_for,
    fail,
    machine,
    make_parser,
    positive,
    print_table,
    spread,
    summary,
    versions,
    write_results,
)
from peers import model_for, parse_peer

TARGET = 0.15


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stream(url: str, prompt: list[int], tokens: int) -> tuple[float, str, int]:
    """(seconds to the first token, text, cached tokens) of a greedy completion."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    start, first, text, cached = time.perf_counter(), 0.0, "", 0
    with urllib.request.urlopen(request, timeout=300) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if chunk["choices"]:
                first = first or time.perf_counter() - start
                text += chunk["choices"][0]["text"]
            if chunk.get("usage"):
                cached = chunk["usage"]["prompt_tokens_details"]["cached_tokens"]
    return first, text, cached


def start_server(package: str, length: int) -> tuple[subprocess.Popen[bytes], str]:
    port = free_port()
    command = [sys.executable, "-m", "llmx.cli", "serve", "--onnx", package, "--port", str(port), "--slots", "2"]
    server = subprocess.Popen(
        [*command, "--max-length", str(length), "--prefix-cache", "2000"], stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(url + "/health", timeout=5).close()
            return server, url + "/v1/completions"
        except OSError:
            if server.poll() is not None:
                break
            time.sleep(0.2)
    server.kill()
    fail(f"llmx serve --onnx {package} did not start.")


def main() -> None:
    parser = make_parser(__doc__)
    add_model_arguments(parser)
    add_peers_argument(parser)
    parser.add_argument("--system", type=positive, default=2000, help="tokens of the system prompt [default: 2000]")
    parser.add_argument("--question", type=positive, default=32, help="tokens after it [default: 32]")
    parser.add_argument("--tokens", type=positive, default=16, help="tokens generated [default: 16]")
    parser.add_argument("--rounds", type=positive, default=8, help="cold and warm requests [default: 8]")
    args = parser.parse_args()
    started = machine()
    package = model_for(parse_peer("llmx", args.dtype), checkpoint_for(args), args.work, args.peers_dir)
    generator = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        ids: list[int] = generator.integers(100, 1000, count).tolist()
        return ids

    length = args.system + args.question + args.tokens + 8
    system = tokens(args.system)
    server, url = start_server(str(package), length)
    times: dict[str, list[float]] = {"cold": [], "warm": []}
    outputs: list[tuple[list[int], str]] = []
    try:
        stream(url, tokens(64), 4)
        stream(url, system + tokens(args.question), 4)
        for _ in range(args.rounds):
            for kind, head in (("cold", tokens(args.system)), ("warm", system)):
                prompt = head + tokens(args.question)
                first, text, cached = stream(url, prompt, args.tokens)
                if bool(cached) != (kind == "warm"):
                    fail(f"a {kind} prompt had {cached} cached tokens.")
                times[kind].append(first)
                outputs.append((prompt, text))
    finally:
        server.terminate()
        server.wait(30)
    different = compare(str(package), length, outputs, args.tokens)
    stats = {kind: summary(values) for kind, values in times.items()}
    ratio = stats["warm"]["median"] / stats["cold"]["median"]
    rows = [[kind, spread(stats[kind], 0, 1e-3), str(cached if kind == "warm" else 0)] for kind in times]
    title = f"time to first token, {args.system}-token system prompt, {package.name}"
    columns = ["", "ms, median (range)", "cached tokens"]
    print_table(title, columns, rows)
    print(f"warm / cold: {ratio:.3f} (bar: {TARGET}); {len(outputs) - different} of {len(outputs)} outputs identical")
    settings = {"system": args.system, "question": args.question, "tokens": args.tokens, "rounds": args.rounds}
    results: dict[str, Any] = {
        "title": "Prefix cache",
        "section": "Serving",
        "tables": [{"title": title, "columns": columns, "rows": rows}],
        "settings": {"model": package.name, **settings},
        "versions": versions("llmx", "onnxruntime"),
        "ttft_s": stats,
        "ratio": ratio,
        "identical": len(outputs) - different,
        "outputs": len(outputs),
    }
    write_results(args.json, f"prefix-cache-{package.name}", started, results)
    sys.exit(0 if ratio <= TARGET and not different else 1)


def compare(package: str, length: int, outputs: list[tuple[list[int], str]], tokens: int) -> int:
    """How many outputs differ from those of a runtime that has no prefix cache."""
    from llmx.runtime import LLM, SamplingParams

    greedy = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    with LLM(package, max_length=length, slots=1) as llm:
        return sum(llm.generate([prompt], greedy)[0].outputs[0].text != text for prompt, text in outputs)


if __name__ == "__main__":
    main()
