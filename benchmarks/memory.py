"""Memory of a process that has run both graphs of a package: are the weights in it once?

Examples:
    python benchmarks/memory.py --shape smollm2-135m
    python benchmarks/memory.py --shape llama-1b --dtype fp32

Private memory is Private_Dirty of /proc/self/smaps_rollup: pages that this process alone holds and that the system
cannot drop. Mapped weights are clean pages of a file, shared by every process that maps it. The bound is
0.5 × weights + state + 150 MiB. The first open packs the weights and writes the mapped cache; the second maps it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import (
    add_model_arguments,
    add_peers_argument,
    checkpoint_for,
    fail,
    machine,
    make_parser,
    memory_fields,
    positive,
    print_table,
    short_error,
    write_results,
)
from peers import model_for, parse_peer

MIB = 1 << 20


def child(package: str, cache: str, prompt: int, tokens: int) -> None:
    """Open the package, run both graphs, print what /proc says then."""
    from llmx.runtime import LLM, SamplingParams

    before = memory_fields()["Private_Dirty"]
    start = time.perf_counter()
    llm = LLM(package, "cpu", max_length=prompt + tokens, slots=1, cache_dir=Path(cache))
    opened = time.perf_counter() - start
    ids = [[1 + i % 1000 for i in range(prompt)]]
    llm.generate(ids, SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True))
    fields = memory_fields()
    facts = {name: fields[name] for name in ("Private_Dirty", "Private_Clean", "Pss", "Rss", "VmHWM")}
    state = llm.manifest.state_bytes_per_token() * llm.max_length
    weights = llm.manifest.files["weights.data"].size
    print(json.dumps({"before": before, "open_s": opened, "weights": weights, "state": state, **facts}))


def measure(package: Path, cache: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", str(package), cache]
    command += ["--prompt", str(args.prompt), "--tokens", str(args.tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        fail(f"running {package.name} failed: {short_error(done.stderr or done.stdout)}")
    run: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    run["bound"] = run["weights"] // 2 + run["state"] + 150 * MIB
    run["within"] = run["Private_Dirty"] <= run["bound"]
    return run


def main() -> None:
    parser = make_parser(__doc__)
    add_model_arguments(parser)
    add_peers_argument(parser)
    parser.add_argument("--prompt", type=positive, default=960, help="tokens of the prompt [default: 960]")
    parser.add_argument("--tokens", type=positive, default=64, help="decode steps [default: 64]")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child, args.prompt, args.tokens)
        return
    started = machine()
    package = model_for(parse_peer("llmx", args.dtype), checkpoint_for(args), args.work, args.peers_dir)
    cache = tempfile.mkdtemp(prefix="cache-", dir=args.work.resolve())
    try:
        runs = {name: measure(package, cache, args) for name in ("first open", "cached open")}
    finally:
        shutil.rmtree(cache)
    rows = []
    for name, run in runs.items():
        sizes = [f"{run[key] / MIB:,.0f}" for key in ("weights", "state", "Private_Dirty", "Pss", "bound")]
        rows.append([name, f"{run['open_s']:.2f}", *sizes, "yes" if run["within"] else "NO"])
    columns = ["", "open, s", "weights, MiB", "state", "private", "Pss", "bound", "within"]
    print_table(f"memory of {package.name} after running both graphs", columns, rows)
    settings = {"model": package.name, "prompt": args.prompt, "tokens": args.tokens}
    write_results(args.json, f"memory-{package.name}", started, {"settings": settings, "runs": runs})
    sys.exit(0 if runs["cached open"]["within"] else 1)


if __name__ == "__main__":
    main()
