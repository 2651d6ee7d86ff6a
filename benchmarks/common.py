"""What every benchmark shares: machine facts, statistics, tables, results files."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
WORK = ROOT / "artifacts" / "bench"  # ignored by git


def machine() -> dict[str, Any]:
    """Date, CPU, load and versions: without them a number says nothing."""
    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    versions = {}
    for name in ("llmx", "onnxruntime", "transformers", "torch", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": date, "cpu": model, "cpus": os.cpu_count(), "load_average": list(os.getloadavg()), "python": platform.python_version(),
        "versions": versions, "commit": commit.stdout.strip(),
    }  # fmt: skip


def summary(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def write_results(args: argparse.Namespace, name: str, results: dict[str, Any]) -> None:
    """Write JSON to --json, or to benchmarks/results/<name>.json."""
    path = args.json or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
    print(f"results: {path}")


def checkpoint_for(args: argparse.Namespace) -> Path:
    """The checkpoint of --checkpoint, or one of --shape's, made once."""
    if args.checkpoint:
        return Path(args.checkpoint)
    from checkpoints import write_checkpoint

    folder = WORK / args.shape
    if not (folder / "config.json").is_file():
        write_checkpoint(args.shape, folder)
    return folder


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", default="smollm2-135m", help="a shape of checkpoints.py")
    parser.add_argument("--checkpoint", help="a checkpoint folder instead of --shape")
    parser.add_argument("--json", type=Path, help="where to write the results")


def status_kib(pid: int | str, field: str) -> int:
    """A field of /proc/PID/status or smaps_rollup, in bytes."""
    for file in ("smaps_rollup", "status"):
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return 0
