"""Time and peak memory of an export, beside onnxruntime-genai's builder on the same checkpoint.

Examples:
    python benchmarks/export.py --shape smollm2-135m
    python benchmarks/export.py --shape llama-1b --dtype fp16 --repeats 1
    python benchmarks/export.py --shape llama-8b --dtype bf16 --no-peer --repeats 1

Both write the same model in the same dtype, neither verifies it. Weights are counted from the checkpoint (a tied tensor
once), at the package's dtype, of a quantized package at the checkpoint's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from common import (
    ITEMSIZE,
    add_model_arguments,
    add_peers_argument,
    checkpoint_for,
    fail,
    folder_bytes,
    machine,
    make_parser,
    memory_fields,
    parameter_count,
    positive,
    print_table,
    safetensors_header,
    short_error,
    spread,
    summary,
    write_results,
)
from peers import genai_builder, llmx_export

EVERY = 0.02  # seconds between two looks at a process tree


class Watch(threading.Thread):
    """Follows a process and its children until it ends: peaks of what they hold together."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root = psutil.Process(pid)
        self._ended = threading.Event()
        self.together = 0  # resident bytes of the tree at one moment
        self.anonymous = 0  # those that no file backs
        self.highest = 0  # VmHWM of any one process: short peaks between two looks are in it

    def run(self) -> None:
        while not self._ended.wait(EVERY):
            together = anonymous = 0
            try:
                for process in [self._root, *self._root.children(recursive=True)]:
                    fields = memory_fields(process.pid, ("status",))  # cheap: no walk over the mappings
                    together += fields.get("VmRSS", 0)
                    anonymous += fields.get("RssAnon", 0)
                    self.highest = max(self.highest, fields.get("VmHWM", 0))
            except (psutil.Error, OSError):
                continue  # one of them ended meanwhile
            self.together, self.anonymous = max(self.together, together), max(self.anonymous, anonymous)

    def stop(self) -> None:
        self._ended.set()
        self.join()


def measure(name: str, command: list[str]) -> dict[str, float]:
    """Seconds, CPU seconds and peak memory of a command. Exits with its last line where it fails."""
    with tempfile.TemporaryFile("w+") as printed:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed, text=True)
        watch = Watch(process.pid)
        watch.start()
        _, status, usage = os.wait4(process.pid, 0)  # its own rusage, not the largest of all children so far
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        watch.stop()
        if process.returncode:
            printed.seek(0)
            fail(f"{name} failed: {short_error(printed.read())}")
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": max(usage.ru_maxrss * 1024, watch.highest, watch.together),
        "peak_anonymous_bytes": watch.anonymous,
    }


def source_bytes(checkpoint: Path) -> int:
    """Bytes of a checkpoint's tensors."""
    headers = [safetensors_header(file) for file in checkpoint.glob("*.safetensors")]
    return sum(info["data_offsets"][1] - info["data_offsets"][0] for header in headers for info in header.values())


def read_once(checkpoint: Path) -> None:
    """Bring the checkpoint into the page cache, so that no exporter reads the disk for the other."""
    for file in checkpoint.glob("*.safetensors"):
        with file.open("rb") as data:
            while data.read(1 << 24):
                pass


def run_all(args: argparse.Namespace, checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Every exporter in turn, `repeats` times, each into a new folder."""
    output = folder / checkpoint.name
    commands = {"llmx": llmx_export(checkpoint, output, args.dtype)}
    if not args.no_peer:
        commands["onnxruntime-genai"] = genai_builder(checkpoint, output, args.peers_dir, args.dtype)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    written: dict[str, int] = {}
    for number in range(args.repeats):
        for name, command in commands.items():
            read_once(checkpoint)
            run = measure(name, command)
            runs[name].append(run)
            written[name] = folder_bytes(output)
            shutil.rmtree(output)
            mb = run["peak_rss_bytes"] / 1e6
            print(f"round {number + 1}, {name}: {run['seconds']:.1f} s, peak {mb:,.0f} MB", file=sys.stderr)
    return {
        name: {
            **{key: summary([run[key] for run in rounds]) for key in rounds[0]},
            "package_bytes": written[name],
            "command": " ".join(_shown(commands[name], checkpoint, output)),
        }
        for name, rounds in runs.items()
    }


def _shown(command: list[str], checkpoint: Path, output: Path) -> list[str]:
    """The command without this machine's paths."""
    names = {str(checkpoint): "CHECKPOINT", str(output): "OUTPUT", str(output.parent / "genai-cache"): "CACHE"}
    return ["python", *(names.get(word, word) for word in command[1:])]


def report(name: str, dtype: str, results: dict[str, Any], weights: int) -> None:
    rows = []
    for exporter, result in results.items():
        seconds, peak = result["seconds"], result["peak_rss_bytes"]
        result["peak_rss_over_weights"] = round(peak["median"] / weights, 3)
        result["package_over_weights"] = round(result["package_bytes"] / weights, 4)
        result["seconds_over_llmx"] = round(seconds["median"] / results["llmx"]["seconds"]["median"], 3)
        rows.append(
            [
                exporter,
                spread(seconds),
                f"{result['seconds_over_llmx']:.2f}",
                spread(peak, 0, 1e6),
                f"{result['peak_rss_over_weights']:.2f}",
                f"{result['package_over_weights']:.4f}",
            ]
        )
    columns = ["exporter", "seconds", "÷ llmx's", "peak RSS, MB", "÷ weights", "package ÷ weights"]
    print_table(f"export of {name} to {dtype} ({weights / 1e6:,.0f} MB of weights)", columns, rows)


def main() -> None:
    parser = make_parser(__doc__)
    add_model_arguments(parser, (*ITEMSIZE, "int8", "int4"))
    add_peers_argument(parser)
    parser.add_argument("--repeats", type=positive, default=3, help="exports by each exporter [default: 3]")
    parser.add_argument("--no-peer", action="store_true", help="measure llmx alone")
    args = parser.parse_args()
    if args.dtype == "bf16" and not args.no_peer:
        fail("onnxruntime-genai's builder writes no bf16 for the CPU: add --no-peer, or choose fp32 or fp16.")
    started = machine()
    checkpoint = checkpoint_for(args)
    quantized = args.dtype not in ITEMSIZE
    weights = source_bytes(checkpoint) if quantized else parameter_count(checkpoint) * ITEMSIZE[args.dtype]
    args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="export-", dir=args.work.resolve()) as folder:
        results = run_all(args, checkpoint, Path(folder))
    report(checkpoint.name, args.dtype, results, weights)
    settings = {"model": checkpoint.name, "dtype": args.dtype, "weights_bytes": weights, "repeats": args.repeats}
    write_results(
        args.json, f"export-{checkpoint.name}-{args.dtype}", started, {"settings": settings, "exporters": results}
    )


if __name__ == "__main__":
    main()
