"""Prefill and decode speed beside the peers: interleaved runs, medians, ratios.

Examples:
    python benchmarks/decode.py --shape smollm2-135m
    python benchmarks/decode.py --shape llama-1b --repeats 3 --peers llama.cpp-f32
    python benchmarks/decode.py --shape llama-1b --dtype int4
    python benchmarks/decode.py --checkpoint ./my-llama --peers llama.cpp-q8_0,llama.cpp-q4_0,onnxruntime-genai-int4

Prefill: the prompt's tokens over the time to the first token. Decode: steps over their time, from the prompt's end on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from common import (
    add_model_arguments,
    add_peers_argument,
    add_run_arguments,
    checkpoint_for,
    common_prefix,
    fail,
    folder_bytes,
    machine,
    make_parser,
    parameter_count,
    positive,
    print_table,
    rounded,
    spread,
    summary,
    write_results,
)
from peers import DEFAULT, Peer, Worker, chosen_peers, model_for

NOISE = 0.05  # CPUs that others may use during a run before the reader is told


def measured(worker: Worker, prompt: list[int], steps: int) -> dict[str, Any]:
    """One run, and how many CPUs' worth of time went elsewhere meanwhile."""
    process = psutil.Process(worker.pid)
    start, busy, own = time.perf_counter(), _busy(), sum(process.cpu_times()[:2])
    answer = worker.request(do="run", prompt=prompt, steps=steps)
    wall = time.perf_counter() - start
    elsewhere = (_busy() - busy) - (sum(process.cpu_times()[:2]) - own)
    return {**answer, "other_cpus": max(0.0, elsewhere / wall)}


def _busy() -> float:
    """Seconds that all CPUs together were not idle; stolen ones too, as they are not ours."""
    times = psutil.cpu_times()
    return float(sum(times[:8])) - times.idle - getattr(times, "iowait", 0.0)


def run_all(args: argparse.Namespace, workers: list[Worker], vocab: int) -> dict[str, list[dict[str, Any]]]:
    """Round robin, each round with a prompt of its own and another engine first; warm-up rounds are not kept."""
    rng = random.Random(args.seed)
    runs: dict[str, list[dict[str, Any]]] = {worker.peer.name: [] for worker in workers}
    for round_number in range(args.warmup + args.repeats):
        prompt = [rng.randrange(1, vocab) for _ in range(args.prompt)]
        first = round_number % len(workers)
        for worker in workers[first:] + workers[:first]:
            answer = measured(worker, prompt, args.tokens)
            print(
                f"round {round_number + 1}, {worker.peer.name}: prefill {args.prompt / answer['prefill_s']:.1f}, "
                f"decode {args.tokens / answer['decode_s']:.1f} tokens/s, {answer['other_cpus']:.2f} CPUs busy elsewhere"
                + (" (warm-up)" if round_number < args.warmup else ""),
                file=sys.stderr,
            )
            if round_number >= args.warmup:
                runs[worker.peer.name].append(answer)
    return runs


def evaluate(args: argparse.Namespace, runs: dict[str, list[dict[str, Any]]], subject: str) -> dict[str, Any]:
    """Statistics of each engine, and llmx's ratio to it: of the medians, and its range over the rounds."""
    speeds = {
        name: {
            "prefill_tokens_per_s": [args.prompt / run["prefill_s"] for run in rounds],
            "decode_tokens_per_s": [args.tokens / run["decode_s"] for run in rounds],
        }
        for name, rounds in runs.items()
    }
    results: dict[str, Any] = {}
    for name, rounds in runs.items():
        result: dict[str, Any] = {"setting": rounds[-1]["setting"]}
        for key, values in speeds[name].items():
            ours = speeds[subject][key]
            ratios = [a / b for a, b in zip(ours, values, strict=True)]
            result[key] = {
                **summary(values),
                "llmx_ratio": rounded(statistics.median(ours) / statistics.median(values)),
                "llmx_ratio_range": [rounded(min(ratios)), rounded(max(ratios))],
            }
        pairs = zip(rounds, runs[subject], strict=True)
        result["tokens_equal_to_llmx"] = [common_prefix(run["tokens"], ours["tokens"]) for run, ours in pairs]
        result["other_cpus"] = rounded(statistics.median(run["other_cpus"] for run in rounds))
        results[name] = result
    return results


def report(args: argparse.Namespace, checkpoint: Path, results: dict[str, Any], subject: str) -> None:
    rows = []
    for name, result in results.items():
        cells = [name]
        for key in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            stats = result[key]
            low, high = stats["llmx_ratio_range"]
            ratio = "" if name == subject else f"{stats['llmx_ratio']:.2f} ({low:.2f}–{high:.2f})"
            cells += [spread(stats), ratio]
        equal = "" if name == subject else f"{min(result['tokens_equal_to_llmx'])} of {args.tokens + 1}"
        rows.append([*cells, equal])
    title = (
        f"{checkpoint.name}: prompt {args.prompt}, {args.tokens} steps, {args.threads} threads, {args.repeats} rounds; "
        "tokens/s, median (range)"
    )
    print_table(title, ["engine", "prefill", "llmx ÷ it", "decode", "llmx ÷ it", "equal tokens"], rows)
    noise = max(result["other_cpus"] for result in results.values())
    if noise > NOISE:
        print(f"Other processes used {noise:.2f} CPUs during these runs: measure again on a quiet machine.")


def main() -> None:
    parser = make_parser(__doc__)
    add_model_arguments(parser)
    add_peers_argument(parser)
    add_run_arguments(parser, prompt=512, repeats=5)
    parser.add_argument("--tokens", type=positive, default=128, help="decode steps [default: 128]")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them [default: 1]")
    parser.add_argument("--rebuild", action="store_true", help="make every engine's model anew")
    args = parser.parse_args()
    started = machine()
    checkpoint = checkpoint_for(args)
    peers = chosen_peers(args, DEFAULT)
    subject = peers[0].name
    models = {p.name: model_for(p, checkpoint, args.work, args.peers_dir, args.rebuild) for p in peers}
    config = json.loads((checkpoint / "config.json").read_text())
    context = -(-(args.prompt + args.tokens + 1) // 256) * 256
    if context > config.get("max_position_embeddings", context):
        fail(f"{checkpoint.name} has {config['max_position_embeddings']} positions; shorten --prompt or --tokens.")
    with contextlib.ExitStack() as stack:

        def start(peer: Peer) -> Worker:
            worker = Worker(peer, models[peer.name], args.threads, context, args.work, args.peers_dir)
            return stack.enter_context(contextlib.closing(worker))

        workers = [start(peer) for peer in peers]
        runs = run_all(args, workers, config["vocab_size"])
    results = evaluate(args, runs, subject)
    for worker in workers:
        name = worker.peer.name
        facts = {"weights": worker.peer.kind, "model_bytes": folder_bytes(models[name]), "versions": worker.versions}
        results[name] = {**facts, **results[name]}
    report(args, checkpoint, results, subject)
    wanted = ("prompt", "tokens", "threads", "repeats", "warmup", "seed", "dtype")
    settings = {"model": checkpoint.name, "parameters": parameter_count(checkpoint), "context": context}
    settings |= {key: getattr(args, key) for key in wanted}
    write_results(
        args.json, f"decode-{checkpoint.name}-{args.dtype}", started, {"settings": settings, "engines": results}
    )


if __name__ == "__main__":
    main()
