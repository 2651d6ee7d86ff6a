"""`llmx perplexity`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from llmx.cli.common import load, model_options, read_file, status


@click.command(name="perplexity")
@model_options
@click.option(
    "--text-file", type=click.Path(dir_okay=False, path_type=Path), help="A UTF-8 text [default: standard input]."
)
@click.option("--window", type=click.IntRange(2), help="Tokens of a window [default: the whole context].")
@click.option("--stride", type=click.IntRange(1), help="Tokens from one window to the next [default: half a window].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(text_file: Path | None, window: int | None, stride: int | None, as_json: bool, **options: Any) -> None:
    """Measure how well a model predicts a text: perplexity with a sliding window.

    \b
    Examples:
      llmx perplexity --onnx artifacts/demo --text-file artifacts/checkpoints/data/held_out.txt
      llmx perplexity --onnx artifacts/smollm2 --text-file book.txt --window 1024 --stride 512 --json
    """
    text = read_file(text_file, "text")
    with load(options) as llm, status("Reading"):
        found = llm.perplexity(text, stride=stride, max_length=window)
    if as_json:
        click.echo(json.dumps(asdict(found)))
    else:
        click.echo(
            f"Perplexity {found.perplexity:.4f} over {found.num_tokens:,} tokens "
            f"(windows of {found.max_length:,}, stride {found.stride:,})."
        )
