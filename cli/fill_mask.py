"""`llmx fill-mask`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from llmx.cli.common import encoder_options, load, print_table, read_texts, text_options


@click.command(name="fill-mask")
@encoder_options
@text_options
@click.option("--top-k", type=click.IntRange(1), default=5, show_default=True, help="Tokens to propose for each mask.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(text: tuple[str, ...], text_file: Path | None, top_k: int, as_json: bool, **options: Any) -> None:
    """Propose words for each mask token in a text.

    \b
    Examples:
      llmx fill-mask --onnx artifacts/bert --text "To be or not to [MASK]."
    """
    texts = read_texts(text, text_file)
    with load(options, generate=False) as llm:
        results = llm.fill_mask(texts, top_k=top_k, batch_size=options["batch_size"])
    if as_json:
        data = [{"text": t, "masks": [[asdict(f) for f in m] for m in r]} for t, r in zip(texts, results, strict=True)]
        click.echo(json.dumps({"data": data}, ensure_ascii=False))
    else:
        rows = [[f"{f.score:.4f}", f.token, f.text] for masks in results for found in masks for f in found]
        print_table(["score", "token", "text"], rows)
