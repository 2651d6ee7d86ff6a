"""Private memory of a process that has run both graphs of a package: are the weights in it once?

    python benchmarks/memory.py --shape smollm2-135m
    python benchmarks/memory.py --shape llama-1b

Private memory is Private_Dirty of /proc/self/smaps_rollup: pages that this process alone holds and that the system
cannot drop. Mapped weights are clean pages of a file, shared by every process that maps it. The bound is
0.5 x weights + state + 150 MiB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

from common import WORK, add_model_arguments, checkpoint_for, print_table, status_kib, write_results
from peers import DEFAULT, model_for


def child(package: str) -> None:
    """Open, run both graphs, report."""
    from llmx.runtime import LLM, SamplingParams

    before = status_kib("self", "Private_Dirty")
    start = time.perf_counter()
    llm = LLM(package, "cpu", max_length=1024, slots=1, cache_dir=WORK / "cache")
    opened = time.perf_counter() - start
    llm.generate([list(range(1, 513))], SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True))
    facts = {name: status_kib("self", name) for name in ("Private_Dirty", "Private_Clean", "Pss", "Rss")}
    state = llm.manifest.state_bytes_per_token() * llm.max_length
    weights = llm.manifest.files["weights.data"].size
    print(json.dumps({"before": before, "open_s": opened, "weights": weights, "state": state, **facts}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    package = model_for("llmx", checkpoint_for(args), WORK, DEFAULT)
    runs = {}
    for name in ("first open", "cached open"):
        done = subprocess.run(
            [sys.executable, __file__, "--child", str(package)], capture_output=True, text=True, check=True
        )
        runs[name] = json.loads(done.stdout.splitlines()[-1])
    rows = []
    for name, r in runs.items():
        r["bound"] = r["weights"] // 2 + r["state"] + (150 << 20)
        r["within"] = r["Private_Dirty"] <= r["bound"]
        mib = {k: f"{r[k] / 2**20:,.0f}" for k in ("weights", "state", "Private_Dirty", "Pss", "bound")}
        rows.append([name, f"{r['open_s']:.2f} s", *mib.values(), "yes" if r["within"] else "NO"])
    columns = ["", "open", "weights MiB", "state", "private", "Pss", "bound", "within"]
    print_table(f"memory of {package.name} after running both graphs", columns, rows)
    write_results(args, f"memory-{package.name}", {"runs": runs})
    sys.exit(0 if runs["cached open"]["within"] else 1)


if __name__ == "__main__":
    main()
