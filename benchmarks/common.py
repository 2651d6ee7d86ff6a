"""What every benchmark shares: options, machine facts, statistics, tables, results files."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
WORK = ROOT / "artifacts" / "bench"  # ignored by git
PEERS = ROOT / ".peers"
ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2}
DTYPES = ("fp32", "fp16", "bf16", "int8", "int4")
_TOLD = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "OPENBLAS_CORETYPE", "GGML_N_THREADS")


def fail(sentence: str) -> NoReturn:
    sys.exit(sentence)


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_model_arguments(parser: argparse.ArgumentParser, dtypes: tuple[str, ...] = DTYPES) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--shape", default="smollm2-135m", help="a shape of checkpoints.py [default: smollm2-135m]")
    which.add_argument("--checkpoint", type=Path, help="a checkpoint folder instead of --shape")
    parser.add_argument("--dtype", choices=dtypes, default="fp32", help="weights of llmx's package [default: fp32]")
    parser.add_argument("--work", type=Path, default=WORK, help="where models are made [default: artifacts/bench]")
    parser.add_argument("--json", type=Path, help="where to write the results [default: benchmarks/results/…]")


def add_peers_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peers-dir", type=Path, default=PEERS, help="the peers' venvs [default: .peers]")


def add_run_arguments(parser: argparse.ArgumentParser, prompt: int, repeats: int) -> None:
    """Which engines run, on what, how often; the numbers are defaults."""
    parser.add_argument("--peers", help="engines, by commas [default: those that fit --dtype]")
    parser.add_argument("--prompt", type=positive, default=prompt, help=f"tokens of the prompt [default: {prompt}]")
    parser.add_argument("--threads", type=positive, default=2, help="of every engine [default: 2]")
    parser.add_argument("--repeats", type=positive, default=repeats, help=f"rounds that count [default: {repeats}]")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts [default: 0]")


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def checkpoint_for(args: argparse.Namespace) -> Path:
    """The checkpoint of --checkpoint, or one of --shape's in bf16, made once."""
    if args.checkpoint:
        folder = Path(args.checkpoint).resolve()
        if not (folder / "config.json").is_file():
            fail(f"{folder} is not a checkpoint: it has no config.json.")
        return folder
    from checkpoints import SHAPES, write_checkpoint

    if args.shape not in SHAPES:
        fail(f"{args.shape} is not a shape of checkpoints.py; choose one of {', '.join(SHAPES)}.")
    folder = args.work.resolve() / args.shape
    if not (folder / "config.json").is_file():
        print(f"making {folder}", file=sys.stderr)
        write_checkpoint(args.shape, folder)
    return folder


def safetensors_header(file: Path) -> dict[str, dict[str, Any]]:
    """Name to dtype, shape and offsets of each tensor in a safetensors file."""
    with file.open("rb") as data:
        (length,) = struct.unpack("<Q", data.read(8))
        header: dict[str, dict[str, Any]] = json.loads(data.read(length))
    header.pop("__metadata__", None)
    return header


def parameter_count(checkpoint: Path) -> int:
    """Values of all tensors of a checkpoint; tied ones are stored, and counted, once."""
    files = checkpoint.glob("*.safetensors")
    return sum(math.prod(info["shape"]) for file in files for info in safetensors_header(file).values())


def folder_bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def memory_fields(pid: int | str = "self", files: tuple[str, ...] = ("smaps_rollup", "status")) -> dict[str, int]:
    """Bytes: what /proc says of a process's memory, smaps_rollup and the status file's peaks together."""
    fields = {}
    for name in files:
        for line in Path(f"/proc/{pid}/{name}").read_text().splitlines():
            key, _, rest = line.partition(":")
            words = rest.split()
            if len(words) == 2 and words[1] == "kB":
                fields[key] = int(words[0]) * 1024
    return fields


def cpu_facts() -> dict[str, str]:
    """What /proc/cpuinfo says of the first CPU; nothing where there is no such file."""
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    return facts


def machine() -> dict[str, Any]:
    """Date, CPU, load and versions: without them a number says nothing."""
    facts = cpu_facts()
    flags = set(facts.get("flags", "").split())
    gpus = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False
    ).stdout.split("\n")[:-1] if shutil.which("nvidia-smi") else []  # fmt: skip
    git = ["git", "-C", str(ROOT)]
    commit, changed = _said([*git, "rev-parse", "--short", "HEAD"]), _said([*git, "status", "--porcelain", "-uno"])
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "cpu_family_model": f"{facts.get('cpu family', '?')}/{facts.get('model', '?')}",
        "cpu_features": sorted(flags & {"avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"}),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        **({"gpu": ", ".join(gpus)} if gpus else {}),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "versions": versions("llmx", "onnxruntime", "transformers", "torch", "numpy"),
        "environment": {name: os.environ[name] for name in _TOLD if name in os.environ},
        "commit": os.environ.get("LLMX_COMMIT") or commit + ("+changes" if changed else ""),
    }


def _said(command: list[str]) -> str:
    """What a command prints; nothing where it is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def summary(values: list[float]) -> dict[str, Any]:
    """Median, range and every value, in the order of the runs."""
    return {
        "median": rounded(statistics.median(values)),
        "min": rounded(min(values)),
        "max": rounded(max(values)),
        "values": [rounded(value) for value in values],
    }


def common_prefix(a: list[int], b: list[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def rounded(value: float) -> float:
    return float(f"{value:.5g}") if abs(value) < 1e5 else round(value)


def spread(stats: dict[str, Any], digits: int = 1, unit: float = 1.0) -> str:
    """`median (min–max)` for a table."""
    median, low, high = (f"{stats[key] / unit:,.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({low}–{high})"


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table) if console.is_terminal else Console(width=140).print(table)


def write_results(path: Path | None, name: str, started: dict[str, Any], results: dict[str, Any]) -> None:
    """Write JSON to `path`, or to benchmarks/results/<name>.json. `started`: `machine()` before the first run."""
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    finished = {"date": machine()["date"], "load_average": [round(load, 2) for load in os.getloadavg()]}
    path.write_text(json.dumps({"machine": started, "finished": finished, **results}, indent=1) + "\n")
    print(f"results: {path}")


def short_error(text: str) -> str:
    """The last line that says something, of what a failed command printed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:400] if lines else "it printed nothing"


def run_quietly(command: list[str], what: str) -> None:
    """Run a command; where it fails, exit with its last line."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        fail(f"{what} failed: {short_error(done.stderr or done.stdout)}")
