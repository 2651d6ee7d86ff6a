"""What each engine's weights cost in quality: KL, best tokens and perplexity beside PyTorch in fp32, on real text.

Examples:
    python benchmarks/quality.py                     # the trained demo model, on the text it was not trained on
    python benchmarks/quality.py --peers llmx-int8,llmx-int4,llama.cpp-q4_0

Each position is the last of a window of its own, so every engine computes it the same way. Perplexity is that of the
tokens that follow.
"""

from __future__ import annotations

import random
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, add_peers_argument, machine, make_parser, positive, print_table, write_results
from common import WORK as DEFAULT_WORK
from peers import Worker, model_for, parse_peer

DEMO = ROOT / "artifacts" / "checkpoints" / "demo"
TEXT = ROOT / "artifacts" / "checkpoints" / "data" / "tinyshakespeare.txt"
REFERENCE = "transformers-fp32"
PEERS = (
    "llmx-fp32,llmx-int8,llmx-int8-same,llmx-int4,llmx-int4-same,llmx-int4-head4,llama.cpp-q8_0,llama.cpp-q4_0,onnxruntime-genai-int4,"
    "openvino-genai-int8,openvino-genai-int4"
)


def windows(args: Any) -> tuple[list[list[int]], list[int]]:
    """Random windows of the text's last tenth, and the token after each."""
    from tokenizers import Tokenizer

    text = args.text.read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    ids = tokenizer.encode(text[int(len(text) * 0.9) :], add_special_tokens=False).ids
    rng = random.Random(args.seed)
    starts = [rng.randrange(len(ids) - args.window) for _ in range(args.positions)]
    return [ids[s : s + args.window] for s in starts], [ids[s + args.window] for s in starts]


def log_probs(name: str, args: Any, prompts: list[list[int]]) -> tuple[np.ndarray, dict[str, str]]:
    """float64 [positions, vocab] of the engine `name`, and its versions."""
    peer = parse_peer(name)
    model = model_for(peer, args.checkpoint.resolve(), args.work, args.peers_dir)
    with closing(Worker(peer, model, args.threads, 256, args.work, args.peers_dir)) as worker:
        logits = np.array([worker.request(do="logits", prompt=p)["logits"] for p in prompts], np.float64)
    logits -= logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True)), worker.versions


def main() -> None:
    parser = make_parser(__doc__)
    add_peers_argument(parser)
    parser.add_argument("--checkpoint", type=Path, default=DEMO, help="a trained model [default: the demo]")
    parser.add_argument("--text", type=Path, default=TEXT, help="UTF-8; its last tenth is read [default: the demo's]")
    parser.add_argument("--peers", default=PEERS, help=f"engines, by commas [default: {PEERS}]")
    parser.add_argument("--positions", type=positive, default=400, help="windows [default: 400]")
    parser.add_argument("--window", type=positive, default=96, help="tokens of each [default: 96]")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="where models are made")
    parser.add_argument("--json", type=Path, help="where to write the results [default: benchmarks/results/…]")
    args = parser.parse_args()
    started = machine()
    prompts, following = windows(args)
    reference: Any = None
    engines: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys([REFERENCE, *(n for n in args.peers.split(",") if n)]):
        print(f"running {name}", file=sys.stderr)
        found, versions = log_probs(name, args, prompts)
        reference = found if reference is None else reference
        kl = (np.exp(reference) * (reference - found)).sum(1)
        engines[name] = {
            "mean_kl": float(kl.mean()),
            "max_kl": float(kl.max()),
            "top1": float((found.argmax(1) == reference.argmax(1)).mean()),
            "perplexity": float(np.exp(-found[np.arange(len(found)), following].mean())),
            "versions": versions,
        }
    rows = [
        [n, f"{e['mean_kl']:.2e}", f"{e['max_kl']:.2e}", f"{e['top1']:.1%}", f"{e['perplexity']:.3f}"]
        for n, e in engines.items()
    ]
    columns = ["engine", "mean KL to PyTorch fp32, nats", "largest", "same best token", "perplexity"]
    print_table(f"{args.checkpoint.name}, {args.positions} positions", columns, rows)
    settings = {"model": args.checkpoint.name, "positions": args.positions, "window": args.window, "seed": args.seed}
    write_results(args.json, f"quality-{args.checkpoint.name}", started, {"settings": settings, "engines": engines})


if __name__ == "__main__":
    main()
