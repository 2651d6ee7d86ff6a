"""What choosing a token costs: llmx's sampler beside transformers' processors on the same logits, one row.

Example:
    python benchmarks/sampling.py --vocab 128256 --history 2048

Each setting chooses `--tokens` tokens in turn, the history growing by each; transformers' processors (PyTorch, CPU, all
threads it may use) run in `generate`'s order on the same rows and draw with torch.multinomial. Microseconds a token.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, make_parser, positive, print_table, summary, write_results

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_k": {"temperature": 0.8, "top_k": 50},
    "top_p": {"temperature": 0.8, "top_p": 0.9},
    "min_p": {"temperature": 0.8, "min_p": 0.05},
    "top_k, top_p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "typical_p": {"temperature": 0.8, "typical_p": 0.9},
    "eta_cutoff": {"temperature": 0.8, "eta_cutoff": 0.0003},
    "greedy, repetition_penalty": {"temperature": 0.0, "repetition_penalty": 1.1},
    "greedy, no_repeat_ngram_size": {"temperature": 0.0, "no_repeat_ngram_size": 3},
    "all of a chat": {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
}


def rows_of(vocab: int, count: int) -> list[np.ndarray]:
    """Logits as peaked as a trained model's: a few likely tokens above a normal rest."""
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal(vocab).astype(np.float32) * 2 for _ in range(count)]
    for row in rows:
        row[rng.integers(0, vocab, 40)] += rng.gamma(3.0, 2.0, 40).astype(np.float32)
    return rows


def ours(options: dict[str, Any], prompt: list[int], rows: list[np.ndarray]) -> Callable[[], None]:
    from llmx.runtime import SamplingParams
    from llmx.runtime.history import History
    from llmx.runtime.sampling import choose, make_generator

    params = SamplingParams(**options).resolved({})

    def run() -> None:
        history, generator = History(prompt), make_generator(0)
        choose(rows[0], params, generator, history)  # the prompt is counted once, before the first token
        for row in rows:
            history.append(choose(row, params, generator, history).token)

    return run


def theirs(options: dict[str, Any], prompt: list[int], rows: list[np.ndarray]) -> Callable[[], None]:
    import torch
    from transformers.generation import logits_process as hf

    made = {
        "repetition_penalty": hf.RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": hf.NoRepeatNGramLogitsProcessor,
        "temperature": hf.TemperatureLogitsWarper,
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
        "typical_p": hf.TypicalLogitsWarper,
        "eta_cutoff": hf.EtaLogitsWarper,
    }
    greedy = options["temperature"] == 0.0
    chain = [
        make(options[name]) for name, make in made.items() if name in options and not (greedy and name == "temperature")
    ]
    tensors = [torch.from_numpy(row)[None] for row in rows]

    def run() -> None:
        torch.manual_seed(0)
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for scores in tensors:
                for step in chain:
                    scores = step(ids, scores)
                if greedy:
                    token = scores.argmax(-1, keepdim=True)
                else:
                    token = torch.multinomial(torch.softmax(scores, -1), 1)
                ids = torch.cat((ids, token), -1)

    return run


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--vocab", type=positive, default=128256, help="tokens of the vocabulary [default: 128256]")
    parser.add_argument("--history", type=positive, default=2048, help="tokens of the prompt [default: 2048]")
    parser.add_argument("--tokens", type=positive, default=50, help="tokens chosen in a run [default: 50]")
    parser.add_argument("--repeats", type=positive, default=5, help="runs of each [default: 5]")
    parser.add_argument("--json", type=Path, help="where to write the results [default: benchmarks/results/…]")
    args = parser.parse_args()
    started = machine()
    rows = rows_of(args.vocab, args.tokens)
    prompt = np.random.default_rng(1).integers(0, args.vocab, args.history).tolist()
    results: dict[str, Any] = {}
    table = []
    for name, options in SETTINGS.items():
        runs = {"llmx": ours(options, prompt, rows), "transformers": theirs(options, prompt, rows)}
        times: dict[str, list[float]] = {who: [] for who in runs}
        for _ in range(args.repeats + 1):  # the first warms up
            for who, run in runs.items():
                start = time.perf_counter()
                run()
                times[who].append((time.perf_counter() - start) / args.tokens)
        found = {who: summary(values[1:]) for who, values in times.items()}
        ratio = statistics.median(times["transformers"][1:]) / statistics.median(times["llmx"][1:])
        results[name] = {**found, "ratio": ratio}
        table.append([name, *(f"{found[who]['median'] * 1e6:,.0f}" for who in found), f"{ratio:.1f}"])
    columns = ["setting", "llmx, µs", "transformers, µs", "times as fast"]
    title = f"Choosing a token: {args.vocab:,} logits, {args.history:,} tokens before"
    print_table(title, columns, table)
    tables = [{"title": "one row, medians", "columns": columns, "rows": table}]
    shown = {"title": title, "section": "CPU", "tables": tables, "settings": {"tokens": args.tokens}}
    write_results(args.json, f"sampling-{args.vocab}", started, {**shown, "results": results})
    sys.exit(0)


if __name__ == "__main__":
    main()
