"""Whether a package on a GPU says what PyTorch says: greedy tokens of a ragged batch, CUDA graphs on and off.

Example:
    python benchmarks/gpu_check.py --checkpoint artifacts/checkpoints/demo --package fp16=DIR --package bf16=DIR

The reference is transformers on the same GPU in the same dtype, each row alone and recomputed from its whole text for each
token. Where a row's token differs, the two best logits of PyTorch are given: rounding decides between equals. Rows are
also compared with themselves: a step's logits with those of a prompt that ends there, and requests that share a batch with
the same alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, make_parser, print_table, write_results

STEPS = 40
BATCHED = 40
LENGTHS = (3, 17, 40, 80, 5, 29)


def reference(checkpoint: Path, dtype: str, prompts: list[np.ndarray]) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy tokens of each prompt, and by how much each led the second best."""
    import torch
    from transformers import AutoModelForCausalLM

    kind = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=kind, attn_implementation="eager").cuda().eval()
    tokens: list[list[int]] = []
    leads: list[list[float]] = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor(prompt[None]).cuda()
            tokens.append([])
            leads.append([])
            for _ in range(STEPS):
                logits = model(ids).logits[0, -1].float()
                best = logits.topk(2).values
                leads[-1].append(float(best[0] - best[1]))
                tokens[-1].append(int(logits.argmax()))
                ids = torch.cat([ids, logits.argmax()[None, None]], 1)
    return tokens, leads


def open_backend(package: Path, slots: int, graphs: bool, ahead: bool) -> Any:
    from llmx.runtime.device_sessions import open_on_device
    from llmx.runtime.manifest import load_manifest
    from llmx.runtime.providers import Device

    backend: Any = open_on_device(package, load_manifest(package), Device("cuda", 0), 256, slots, ahead)
    if not graphs:
        backend._memory.capture = lambda run: run  # what is captured from now on runs as it is
    return backend


def generate(backend: Any, prompts: list[np.ndarray]) -> list[list[int]]:
    firsts = [backend.prefill_last(slot, ids, 0).greedy(0) for slot, ids in enumerate(prompts)]
    tokens, lengths = np.array(firsts), np.array([len(ids) for ids in prompts])
    rows = [[int(token)] for token in tokens]
    for _ in range(STEPS - 1):
        made = backend.decode(tokens, lengths, None, np.zeros(len(prompts), np.float32))
        tokens, lengths = np.array([made.greedy(row) for row in range(len(prompts))]), lengths + 1
        for row, token in zip(rows, tokens, strict=True):
            row.append(int(token))
    return rows


def candidates_agree(backend: Any, prompts: list[np.ndarray]) -> float:
    """The largest difference of a row's candidates from the row itself: ids, logits and log-sum."""
    lengths = np.array([len(ids) for ids in prompts])
    for slot, ids in enumerate(prompts):
        backend.prefill(slot, ids, 0, np.zeros(0, np.int64))
    asks = np.linspace(0.3, 2.0, len(prompts)).astype(np.float32)
    made = backend.decode(np.ones(len(prompts), np.int64), lengths, None, asks)
    worst = 0.0
    for row, ask in enumerate(asks):
        top, logits = made.top(row), made.row(row).astype(np.float32)
        order = np.argsort(-logits, kind="stable")[: len(top.ids)]
        same = logits[top.ids] == top.logits  # which of equals come last is the device's choice
        scaled = (logits.astype(np.float64) - logits.max()) / ask
        off = 0.0 if same.all() and np.array_equal(top.logits, logits[order]) else 1.0
        worst = max(worst, off, abs(top.log_sum - float(np.log(np.exp(scaled).sum()))))
    return worst


def steps_equal_prompts(backend: Any, ids: np.ndarray, steps: int) -> float:
    """The largest difference of a step's logits from those of a prompt that ends there, over the largest logit."""
    whole = backend.prefill(1, ids, 0, np.arange(len(ids))).astype(np.float32)
    start = len(ids) - steps
    backend.prefill(0, ids[:start], 0, np.zeros(0, np.int64))
    worst = 0.0
    for at in range(start, len(ids)):
        got = backend.decode(ids[at : at + 1], np.array([at])).row(0).astype(np.float32)
        worst = max(worst, float(np.abs(got - whole[at]).max() / np.abs(whole[at]).max()))
    return worst


def check(checkpoint: Path, dtype: str, package: Path) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, 1000, length) for length in LENGTHS]
    want, leads = reference(checkpoint, dtype, prompts)
    found = []
    for graphs, ahead in ((True, True), (True, False), (False, False)):
        backend = open_backend(package, len(prompts) + 1, graphs, ahead)
        rows = generate(backend, prompts)
        agreed = [
            next((i for i, (a, b) in enumerate(zip(r, w, strict=True)) if a != b), STEPS)
            for r, w in zip(rows, want, strict=True)
        ]
        facts: dict[str, Any] = {"dtype": dtype, "graphs": graphs, "ahead": ahead, "tokens_equal": agreed}
        facts["leads_where_not"] = [lead[n] for lead, n in zip(leads, agreed, strict=True) if n < STEPS]
        facts["candidates_off"] = candidates_agree(backend, prompts)
        facts["steps_off"] = steps_equal_prompts(backend, rng.integers(1, 1000, 120), 24)
        backend.close()
        found.append(facts)
    return found


def batched_and_alone(package: Path) -> dict[str, Any]:
    """Greedy outputs of requests that share a batch, joining and leaving, beside those that each gets alone.

    Where one differs: by how much the two best tokens differ there, over the largest logit of the row. Kernels are
    chosen by the number of rows, so equals may be decided otherwise; anything larger is a mistake.
    """
    from llmx.runtime import LLM, SamplingParams

    rng = np.random.default_rng(5)
    prompts = [rng.integers(1, 1000, int(length)).tolist() for length in rng.integers(1, 120, BATCHED)]
    params = [
        SamplingParams(max_tokens=int(count), temperature=0.0, ignore_eos=True)
        for count in rng.integers(20, 120, BATCHED)
    ]
    differences = []
    with LLM(package, "cuda", max_length=256, slots=7) as llm:
        alone = [llm.generate([ids], p)[0].outputs[0].token_ids for ids, p in zip(prompts, params, strict=True)]
        for _ in range(2):
            together = [out.outputs[0].token_ids for out in llm.generate(prompts, params)]
            for ids, one, other in zip(prompts, alone, together, strict=True):
                place = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
                if place is not None:
                    row = llm.backend.prefill_last(0, np.array([*ids, *one[:place]]), 0).row(0).astype(np.float32)
                    pair = row[[one[place], other[place]]]
                    differences.append(float(abs(pair[0] - pair[1]) / np.abs(row).max()))
    return {"requests": 2 * BATCHED, "equal": 2 * BATCHED - len(differences), "gaps_where_not": differences}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--package", action="append", required=True, help="DTYPE=DIR, several times")
    parser.add_argument("--json", type=Path, help="where to write the results [default: benchmarks/results/…]")
    args: argparse.Namespace = parser.parse_args()
    import onnxruntime
    import torch

    started = {**machine(), "gpu": torch.cuda.get_device_name()}
    started["versions"] |= {"onnxruntime": onnxruntime.__version__}  # the GPU's, whatever else is installed
    found: list[dict[str, Any]] = []
    batched: list[dict[str, Any]] = []
    for pair in args.package:
        dtype, _, folder = pair.partition("=")
        found += check(args.checkpoint, dtype, Path(folder))
        batched.append({"dtype": dtype, **batched_and_alone(Path(folder))})
    rows = [
        [
            f["dtype"],
            "yes" if f["graphs"] else "no",
            "yes" if f["ahead"] else "no",
            f"{sum(n == STEPS for n in f['tokens_equal'])} of {len(LENGTHS)}",
            ", ".join(f"{lead:.3g}" for lead in f["leads_where_not"]) or "—",
            f"{f['steps_off']:.1e}",
        ]
        for f in found
    ]
    columns = [
        "dtype",
        "CUDA graphs",
        "runs ahead",
        f"rows with all {STEPS} tokens equal",
        "PyTorch's lead where not",
        "step to prompt",
    ]
    table = {
        "title": f"{args.checkpoint.name}: a ragged batch of {len(LENGTHS)} rows",
        "columns": columns,
        "rows": rows,
    }
    print_table(table["title"], columns, rows)
    shared = {
        "title": "requests that share a batch of 7 rows, joining and leaving, beside each alone",
        "columns": ["dtype", "equal outputs", "gap of the two tokens where not, of the largest logit"],
        "rows": [
            [b["dtype"], f"{b['equal']} of {b['requests']}", ", ".join(f"{g:.1e}" for g in b["gaps_where_not"]) or "—"]
            for b in batched
        ],
    }
    print_table(shared["title"], shared["columns"], shared["rows"])
    result = {
        "title": "Greedy tokens beside PyTorch", "section": "CUDA", "tables": [table, shared], "checks": found,
        "batched": batched,
    }  # fmt: skip
    write_results(args.json, f"cuda-check-{args.checkpoint.name}", started, result)


if __name__ == "__main__":
    main()
