"""Prefill and decode speed beside the peers: interleaved runs, medians, ratios.

python benchmarks/decode.py --shape smollm2-135m
python benchmarks/decode.py --shape llama-1b --repeats 3 --peers llama.cpp-f32
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import WORK, add_model_arguments, checkpoint_for, print_table, summary, write_results
from peers import DEFAULT, model_for, python_of


class Worker:
    """A peer's process. It answers one request at a time and sleeps between them."""

    def __init__(self, peer: str, model: Path, threads: int, peers: Path) -> None:
        engine = "llama.cpp" if peer.startswith("llama.cpp") else peer
        command = [
            python_of(engine, peers),
            str(Path(__file__).with_name("worker.py")),
            engine,
            str(model),
            str(threads),
        ]
        self.peer = peer
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self.peer} stopped; run `python benchmarks/worker.py` by hand to see why.")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompt": prompt, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--peers", default="llama.cpp-f32,onnxruntime-genai,transformers")
    parser.add_argument("--peers-dir", type=Path, default=DEFAULT)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    checkpoint = checkpoint_for(args)
    names = ["llmx", *(p for p in args.peers.split(",") if p)]
    models = {name: model_for(name, checkpoint, WORK, args.peers_dir) for name in names}
    workers = [Worker(name, models[name], args.threads, args.peers_dir) for name in names]
    vocab = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    rng = random.Random(0)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for repeat in range(args.repeats + 1):
        prompt = [rng.randrange(1, vocab) for _ in range(args.prompt)]
        for worker in workers:
            answer = worker.run(prompt, args.tokens)
            if repeat:  # the first round warms up
                runs[worker.peer].append(answer)
    for worker in workers:
        worker.close()
    report(args, checkpoint, names, runs)


def report(args: argparse.Namespace, checkpoint: Path, names: list[str], runs: dict[str, list[dict[str, Any]]]) -> None:
    results: dict[str, Any] = {}
    for name in names:
        prefill = summary([args.prompt / r["prefill_s"] for r in runs[name]])
        decode = summary([(args.tokens - 1) / r["decode_s"] for r in runs[name]])
        same = [
            sum(a == b for a, b in zip(r["tokens"], q["tokens"], strict=True))
            for r, q in zip(runs[name], runs["llmx"], strict=True)
        ]
        results[name] = {
            "prefill_tokens_per_s": prefill,
            "decode_tokens_per_s": decode,
            "first_16_tokens_equal_to_llmx": same,
        }
    ours = results["llmx"]
    rows = []
    for name, r in results.items():
        cells = [name]
        for key in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            ratio = ours[key]["median"] / r[key]["median"]
            r[key]["llmx_ratio"] = round(ratio, 3)
            cells += [f"{r[key]['median']:.1f} ({r[key]['min']:.1f}–{r[key]['max']:.1f})", f"{ratio:.2f}×"]
        rows.append(cells)
    title = f"{checkpoint.name}, fp32, prompt {args.prompt}, {args.tokens} tokens, {args.threads} threads: tokens/s, median (range)"
    print_table(title, ["engine", "prefill", "llmx/peer", "decode", "llmx/peer"], rows)
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("json", "peers_dir", "checkpoint")}
    write_results(args, f"decode-{checkpoint.name}", {"settings": settings, "engines": results})


if __name__ == "__main__":
    main()
