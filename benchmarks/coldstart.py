"""Time from starting a process to its first token, beside the peers: imports, loading, one prompt.

Examples:
    python benchmarks/coldstart.py --shape smollm2-135m --dtype int4
    python benchmarks/coldstart.py --shape llama-1b --dtype int4 --peers llama.cpp-q4_0

Each engine starts in a process of its own, again and again, in turn. The first round fills the page cache and llmx's
cache of prepacked weights, and does not count. `ready`: the process has loaded its model.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from contextlib import closing
from typing import Any

from common import (
    add_model_arguments,
    add_peers_argument,
    add_run_arguments,
    checkpoint_for,
    machine,
    make_parser,
    print_table,
    rounded,
    spread,
    summary,
    write_results,
)
from peers import Peer, Worker, chosen_peers, model_for

#: Engines whose start is compared where none are named.
DEFAULT = {
    "fp32": "llama.cpp-f32,onnxruntime-genai,openvino-genai",
    "int8": "llama.cpp-q8_0,openvino-genai",
    "int4": "llama.cpp-q4_0,onnxruntime-genai,openvino-genai",
}


def measure(peer: Peer, args: Any, models: dict[str, Any], prompt: list[int]) -> dict[str, Any]:
    """Start the engine, ask for one token, end it."""
    start = time.perf_counter()
    worker = Worker(peer, models[peer.name], args.threads, 256, args.work, args.peers_dir, one_setting=True)
    with closing(worker):
        ready = time.perf_counter() - start
        answer = worker.request(do="run", prompt=prompt, steps=0)
        first = time.perf_counter() - start
    return {"ready_s": ready, "first_token_s": first, "tokens": answer["tokens"], "versions": worker.versions}


def run_all(args: Any, peers: list[Peer], models: dict[str, Any], vocab: int) -> dict[str, list[dict[str, Any]]]:
    rng = random.Random(args.seed)
    prompt = [rng.randrange(1, vocab) for _ in range(args.prompt)]
    runs: dict[str, list[dict[str, Any]]] = {peer.name: [] for peer in peers}
    for number in range(args.repeats + 1):
        for peer in peers[number % len(peers) :] + peers[: number % len(peers)]:
            run = measure(peer, args, models, prompt)
            ready, first = run["ready_s"], run["first_token_s"]
            note = "" if number else " (does not count)"
            print(f"round {number}, {peer.name}: ready {ready:.2f} s, first token {first:.2f} s{note}", file=sys.stderr)
            if number:
                runs[peer.name].append(run)
    return runs


def main() -> None:
    parser = make_parser(__doc__)
    add_model_arguments(parser)
    add_peers_argument(parser)
    add_run_arguments(parser, prompt=32, repeats=7)
    args = parser.parse_args()
    started, checkpoint = machine(), checkpoint_for(args)
    peers = chosen_peers(args, DEFAULT)
    models = {peer.name: model_for(peer, checkpoint, args.work, args.peers_dir) for peer in peers}
    vocab = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    runs = run_all(args, peers, models, vocab)
    engines: dict[str, Any] = {}
    for peer in peers:
        rounds = runs[peer.name]
        engines[peer.name] = {"weights": peer.kind, "versions": rounds[0]["versions"]}
        for key in ("ready_s", "first_token_s"):
            values, ours = [run[key] for run in rounds], [run[key] for run in runs["llmx"]]
            ratio = statistics.median(ours) / statistics.median(values)
            engines[peer.name][key] = {**summary(values), "llmx_ratio": rounded(ratio)}
    rows = [
        [n, spread(e["ready_s"], 2), spread(e["first_token_s"], 2), f"{e['first_token_s']['llmx_ratio']:.2f}"]
        for n, e in engines.items()
    ]
    columns = ["engine", "model loaded, s", "first token, s", "llmx's time ÷ its"]
    print_table(f"{checkpoint.name}, {args.dtype}: from the start of a process", columns, rows)
    settings = {"model": checkpoint.name, "dtype": args.dtype, "prompt": args.prompt, "threads": args.threads}
    settings |= {"repeats": args.repeats, "seed": args.seed}
    name = f"coldstart-{checkpoint.name}-{args.dtype}"
    write_results(args.json, name, started, {"settings": settings, "engines": engines})


if __name__ == "__main__":
    main()
