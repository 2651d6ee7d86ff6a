"""`llmx bench serve`."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click
from llmx.cli.common import reason


class _Rates(click.ParamType):
    """Numbers above 0 by commas; `inf` sends everything at once."""

    name = "RATE[,RATE…]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        if isinstance(value, list):
            return value
        try:
            rates = [float(part) for part in str(value).split(",")]
        except ValueError:
            rates = [0.0]
        if not all(rate > 0 for rate in rates):
            self.fail(f"{value!r} is no list of rates above 0 such as 1,2,4 (or inf).", param, ctx)
        return list(dict.fromkeys(rates))


@click.command(name="serve")
@click.option("--base-url", default="http://127.0.0.1:8000", show_default=True, help="Of the server, without /v1.")
@click.option("--model", help="The model to ask for [default: the server's first].")
@click.option(
    "--backend", type=click.Choice(["openai", "openai-chat"]), default="openai", show_default=True,
    help="Completions of token ids, or chat completions of text.",
)  # fmt: skip
@click.option("--endpoint", help="The path [default: the backend's].")
@click.option("--api-key", envvar="OPENAI_API_KEY", help="Sent as a bearer token [OPENAI_API_KEY].")
@click.option("--num-prompts", type=click.IntRange(1), default=100, show_default=True, help="Requests to send.")
@click.option(
    "--request-rate", type=_Rates(), default="inf", show_default=True,
    help="Requests a second (Poisson arrivals); several by commas are run in turn.",
)  # fmt: skip
@click.option("--max-concurrency", type=click.IntRange(1), help="Most requests at once [default: no limit].")
@click.option("--random-input-len", "input_len", type=click.IntRange(1), default=128, show_default=True, help="Tokens.")
@click.option(
    "--random-output-len", "output_len", type=click.IntRange(1), default=64, show_default=True, help="Tokens."
)
@click.option(
    "--random-prefix-len", "prefix_len", type=click.IntRange(0), default=0, help="Tokens that all prompts share."
)
@click.option(
    "--random-range-ratio", "range_ratio", type=click.FloatRange(0, 1, max_open=True), default=0.0,
    help="How much lengths vary, as a part of them.",
)  # fmt: skip
@click.option("--ignore-eos", is_flag=True, help="Ask for outputs of full length (vLLM's and llmx's field).")
@click.option("--temperature", type=float, default=0.0, show_default=True)
@click.option("--extra-body", default="{}", metavar="JSON", help="Fields to add to every request.")
@click.option("--tokenizer", metavar="DIR_OR_FILE", help="A tokenizer.json, for prompts as text of the right length.")
@click.option("--vocab-size", type=click.IntRange(2), default=1000, show_default=True, help="Random ids lie below it.")
@click.option("--goodput", multiple=True, metavar="METRIC:MS", help="Count requests within ttft:MS, tpot:MS, e2el:MS.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of prompts and arrivals.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--result-file", type=click.Path(dir_okay=False, path_type=Path), help="Also write the JSON there.")
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.png",
    help="Draw latencies: over the rate, or, of one rate, how they are distributed.",
)  # fmt: skip
def command(
    request_rate: list[float], goodput: tuple[str, ...], extra_body: str, as_json: bool, result_file: Path | None,
    plot: Path | None, **options: Any,
) -> None:  # fmt: skip
    """Put an OpenAI-compatible server under load, and report throughput, TTFT, TPOT, ITL and end-to-end latency.

    \b
    Examples:
      llmx bench serve --base-url http://127.0.0.1:8000 --num-prompts 200 --max-concurrency 32 --ignore-eos
      llmx bench serve --request-rate 1,2,4,8 --num-prompts 100 --plot rates.png --goodput ttft:500 --goodput tpot:80
      llmx bench serve --backend openai-chat --tokenizer artifacts/demo --random-input-len 64 --json
    """
    from llmx.bench.load import Load
    from llmx.bench.load_report import parse_goodput

    bounds = parse_goodput([word for words in goodput for word in words.split()])
    if plot is not None:
        from llmx.bench.plot import check_target

        check_target(plot)
    if result_file is not None and not result_file.absolute().parent.is_dir():
        raise click.UsageError(f"The folder {result_file.absolute().parent} for the results does not exist.")
    load = Load(extra_body=_object(extra_body), **options)
    runs = [_run(dataclasses.replace(load, request_rate=rate), bounds) for rate in request_rate]
    reports = [run for run, _ in runs]
    facts = reports[0] if len(reports) == 1 else {"runs": reports}
    try:
        if result_file is not None:
            result_file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        if plot is not None:
            from llmx.bench.load_plot import distributions, rates

            if len(runs) > 1:
                rates(reports, plot)
            else:
                distributions(runs[0][1], plot)
    except OSError as error:
        raise click.ClickException(f"{error.filename or plot} cannot be written: {reason(error)}.") from None
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        for each in reports:
            _print(each)


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise click.UsageError('--extra-body takes a JSON object such as {"top_k": 5}.')
    return value


def _run(load: Any, bounds: dict[str, float]) -> tuple[dict[str, Any], list[Any]]:
    """(report, outcomes) of one load, with a progress bar on a terminal."""
    from llmx.bench.load import run
    from llmx.bench.load_report import report
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, quiet=not sys.stderr.isatty())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"rate {load.request_rate:g}", total=load.num_prompts)
        outcomes, seconds = asyncio.run(run(load, lambda count: progress.advance(task, count)))
    return report(load, outcomes, seconds, bounds), outcomes


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    rate, most = facts["settings"]["request_rate"], facts["settings"]["max_concurrency"]
    table = Table(title=f"rate {rate}, at most {most or 'any number'} at once", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for label, key, unit in (
        ("completed", "completed", ""), ("failed", "failed", ""), ("duration", "duration_s", " s"),
        ("input tokens", "total_input_tokens", ""), ("output tokens", "total_output_tokens", ""),
        ("requests", "request_throughput", " /s"), ("output tokens", "output_throughput", " /s"),
        ("all tokens", "total_token_throughput", " /s"), ("most at once", "most_at_once", ""),
        ("goodput", "request_goodput", " requests/s"),
    ):  # fmt: skip
        if key in facts:
            value = facts[key]
            table.add_row(label, f"{value:,.2f}{unit}" if isinstance(value, float) else f"{value:,}{unit}")
    console = Console(highlight=False)
    console.print(table)
    table = Table("ms")
    names = ("mean", "p50", "p90", "p95", "p99")
    for name in names:
        table.add_column(name, justify="right")
    for key, label in (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL"), ("e2el", "E2EL")):
        stats = facts[f"{key}_ms"]
        table.add_row(label, *(f"{stats[name]:,.1f}" if stats else "" for name in names))
    console.print(table)
    for error, count in facts["errors"].items():
        click.echo(f"{count} failed: {error}")
