"""`llmx bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from llmx.cli.bench_serve import command as serve
from llmx.cli.common import reason, status


class _Numbers(click.ParamType):
    """Whole numbers by commas, each at least `lowest`; doubles go."""

    name = "N[,N…]"

    def __init__(self, lowest: int) -> None:
        self._lowest = lowest

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            numbers = [int(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is no list of whole numbers such as 128,512.", param, ctx)
        if min(numbers) < self._lowest:
            self.fail(f"each must be at least {self._lowest}.", param, ctx)
        return list(dict.fromkeys(numbers))


@click.group(name="bench", invoke_without_command=True)
@click.option("--onnx", metavar="DIR_OR_HUB_ID", help="A package folder, or the hub id of a published package.")
@click.option("--device", default="auto", show_default=True, help="As in `llmx run`.")
@click.option("--revision", help="Revision of a hub id.")
@click.option(
    "-p", "--n-prompt", "prompt", type=_Numbers(1), default="512", show_default=True, help="Tokens of the prompt."
)
@click.option(
    "-n", "--n-gen", "steps", type=click.IntRange(0), default=128, show_default=True,
    help="Tokens to generate after the first.",
)  # fmt: skip
@click.option(
    "-d", "--n-depth", "depth", type=_Numbers(0), default="0", show_default=True,
    help="Positions of the context that are filled before the prompt.",
)  # fmt: skip
@click.option(
    "--batch-size", "batch", type=_Numbers(1), default="1", show_default=True, help="Requests (texts) at once."
)
@click.option("-r", "--repetitions", type=click.IntRange(1), default=5, show_default=True, help="Runs that count.")
@click.option("--warmup", type=click.IntRange(0), default=1, show_default=True, help="Runs before them.")
@click.option("-t", "--threads", type=click.IntRange(1), help="CPU threads [default: the CPUs this process may use].")
@click.option("--prefill-chunk", type=click.IntRange(1), help="Prompt tokens run at once [default: as in `LLM`].")
@click.option("--cold-starts", type=click.IntRange(0), default=3, show_default=True, help="Fresh processes to time.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.png", help="Draw the sweep.")
@click.pass_context
def command(ctx: click.Context, onnx: str | None, as_json: bool, plot: Path | None, **options: Any) -> None:
    """Measure a package on this machine: time to first token, time per output token, tokens a second, memory, cold
    start, and how near decoding comes to the memory's bandwidth. Lists by commas are swept, every combination.

    \b
    Examples:
      llmx bench --onnx artifacts/demo
      llmx bench --onnx artifacts/smollm2 -p 128,512,2048 -n 64 --plot prompts.png
      llmx bench --onnx artifacts/smollm2 -p 32 -n 64 -d 0,1024,4096 --json
      llmx bench --onnx artifacts/smollm2 -p 128 --batch-size 1,4,16,32
      llmx bench --onnx artifacts/minilm -p 32,256 --batch-size 1,32
    """
    if ctx.invoked_subcommand is not None:
        return
    if onnx is None:
        raise click.UsageError("Give --onnx DIR_OR_HUB_ID.")
    if plot is not None:
        from llmx.bench.plot import check_target

        check_target(plot)
    from llmx.bench.report import Options, measure

    with status(f"Loading {onnx}") as spinner:
        report = measure(Options(onnx, **options), spinner.update)
    if plot is not None:
        from llmx.bench.plot import sweep

        try:
            sweep(report["points"], f"{report['package']['name']}, {_weights(report['package'])}", plot)
        except OSError as error:
            raise click.ClickException(f"{plot} cannot be written: {reason(error)}.") from None
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        _print(report)


def _weights(package: dict[str, Any]) -> str:
    """float32, or float32 with int4 weights."""
    bits = (package["quantization"] or {}).get("bits")
    return f"{package['dtype']}, int{bits} weights" if bits else str(package["dtype"])


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    package, points = report["package"], report["points"]
    title = f"{package['name']}, {_weights(package)}, {package['threads']} threads"
    table = Table(title=title, title_justify="left")
    rows = _encoder_rows(points) if package["family"] == "encoder" else _rows(points)
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row.values())
    console.print(table) if console.is_terminal else Console(width=150, highlight=False).print(table)
    for line in _lines(report):
        click.echo(line)


def _rows(points: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Columns of a generating package; a depth or batch that nobody asked for has none."""
    rows = []
    for p in points:
        row = {"prompt": f"{p['prompt']:,}"}
        if any(q["depth"] for q in points):
            row["depth"] = f"{p['depth']:,}"
        if any(q["batch"] > 1 for q in points):
            row["batch"] = f"{p['batch']:,}"
        row["TTFT, ms"] = _spread(p["ttft_s"], 1e3, 1)
        row["prefill, tok/s"] = _spread(p["prefill_tokens_per_s"], 1, 0)
        row["TPOT, ms"] = _spread(p["tpot_s"], 1e3, 2)
        itl = p["itl_s"]
        row["ITL p50 / p90 / p99, ms"] = " / ".join(f"{itl[k] * 1e3:.2f}" for k in ("p50", "p90", "p99")) if itl else ""
        row["decode, tok/s"] = _spread(p["decode_tokens_per_s"], 1, 1)
        row["bandwidth"] = f"{p['bandwidth_share']:.0%}" if p.get("bandwidth_share") else ""
        row["host"] = f"{p['host_share']['median']:.1%}" if p["host_share"] else ""
        rows.append(row)
    return rows


def _encoder_rows(points: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "tokens": f"{p['prompt']:,}",
            "batch": f"{p['batch']:,}",
            "a run, ms": _spread(p["seconds"], 1e3, 2),
            "texts/s": _spread(p["texts_per_s"], 1, 1),
            "tokens/s": _spread(p["tokens_per_s"], 1, 0),
        }
        for p in points
    ]


def _spread(stats: dict[str, Any], unit: float, digits: int) -> str:
    if not stats:
        return ""
    median, low, high = (f"{stats[key] * unit:,.{digits}f}" for key in ("median", "min", "max"))
    return median if low == high else f"{median} ({low}–{high})"


def _lines(report: dict[str, Any]) -> list[str]:
    """What is not of one point, in sentences."""
    from llmx.runtime.units import human_bytes

    cold, memory, lines = report["cold_start"], report["memory"], []
    if cold:
        load, ready, first = (cold[key]["median"] for key in ("load_s", "ready_s", "first_token_s"))
        what = "answer" if report["package"]["family"] == "encoder" else "first token"
        lines.append(
            f"Cold start: loads in {load:.2f} s; a new process is ready after {ready:.2f} s, {what} after {first:.2f} s."
        )
    lines.append(
        f"Memory: {human_bytes(memory['private_bytes'])} private, "
        f"{human_bytes(memory['resident_peak_bytes'])} resident at most (mapped weights included)."
    )
    if report["copy_bytes_per_s"]:
        lines.append(
            f"Bandwidth: bytes that a step reads (weights, state) over its time, as a part of {report['copy_bytes_per_s'] / 1e9:.1f} "
            "GB/s, what a copy reaches here. Host: a decode step's part outside onnxruntime's run call."
        )
    return lines


command.add_command(serve)
