"""Time and peak memory of an export, beside onnxruntime-genai's builder on the same checkpoint.

python benchmarks/export.py --shape smollm2-135m
python benchmarks/export.py --shape llama-1b --dtype fp16 --no-peer
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
from common import WORK, add_model_arguments, checkpoint_for, print_table, summary, write_results
from peers import DEFAULT, genai_builder


def measure(command: list[str]) -> tuple[float, int]:
    """(seconds, peak resident bytes of the process and its children)."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        try:
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            peak = max(peak, sum(p.memory_info().rss for p in tree))
        except psutil.Error:
            pass
        time.sleep(0.01)
    if process.returncode:
        assert process.stderr is not None
        sys.exit(f"{' '.join(command)} failed: {process.stderr.read()[-500:]}")
    return time.perf_counter() - start, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--dtype", choices=["fp32", "fp16"], default="fp32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-peer", action="store_true", help="measure llmx alone")
    parser.add_argument("--peers-dir", type=Path, default=DEFAULT)
    args = parser.parse_args()
    checkpoint = checkpoint_for(args)
    ours, theirs = WORK / "export-llmx", WORK / "export-genai"
    commands = {
        "llmx": [
            sys.executable,
            "-m",
            "llmx.cli",
            "export",
            "--model",
            str(checkpoint),
            "--output",
            str(ours),
            "--dtype",
            args.dtype,
            "--no-verify",
            "--force",
        ]
    }
    if not args.no_peer:
        commands["onnxruntime-genai"] = genai_builder(checkpoint, theirs, args.peers_dir, args.dtype)
    times: dict[str, list[float]] = {name: [] for name in commands}
    peaks: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(args.repeats):
        for name, command in commands.items():
            shutil.rmtree(theirs, ignore_errors=True)
            seconds, peak = measure(command)
            times[name].append(seconds)
            peaks[name].append(float(peak))
    weights = (ours / "weights.data").stat().st_size
    package = sum(p.stat().st_size for p in ours.iterdir())
    results = {n: {"seconds": summary(times[n]), "peak_bytes": summary(peaks[n])} for n in commands}
    rows = [
        [
            n,
            f"{r['seconds']['median']:.1f} s",
            f"{r['peak_bytes']['median'] / 1e6:,.0f} MB",
            f"{r['peak_bytes']['median'] / weights:.2f}",
        ]
        for n, r in results.items()
    ]
    print_table(
        f"export of {checkpoint.name} to {args.dtype}", ["exporter", "time", "peak RSS", "peak / weights"], rows
    )
    print(f"package {package:,} bytes, weights.data {weights:,}: {package / weights:.4f}")
    facts = {"shape": checkpoint.name, "dtype": args.dtype, "weights_bytes": weights, "package_bytes": package}
    write_results(args, f"export-{checkpoint.name}-{args.dtype}", {**facts, "exporters": results})
    shutil.rmtree(ours, ignore_errors=True)
    shutil.rmtree(theirs, ignore_errors=True)


if __name__ == "__main__":
    main()
