"""`llmx rerank`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from llmx.cli.common import encoder_options, load, print_table, read_texts, text_options


@click.command(name="rerank")
@encoder_options
@click.option("--query", required=True, help="What the documents should answer.")
@text_options
@click.option("--top-n", type=click.IntRange(1), help="Show only the best so many.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    query: str, text: tuple[str, ...], text_file: Path | None, top_n: int | None, as_json: bool, **options: Any
) -> None:
    """Order documents (--text, or the lines of --text-file) by how well they answer a query, best first.

    \b
    Examples:
      llmx rerank --onnx artifacts/cross-encoder --query "Who wrote Hamlet?" --text-file documents.txt --top-n 3
    """
    documents = read_texts(text, text_file)
    with load(options, generate=False) as llm:
        ranked = llm.rerank(query, documents, top_n=top_n, batch_size=options["batch_size"])
    if as_json:
        click.echo(json.dumps({"query": query, "results": [asdict(r) for r in ranked]}, ensure_ascii=False))
    else:
        print_table(["score", "index", "document"], [[f"{r.score:.4f}", str(r.index), r.document] for r in ranked])
