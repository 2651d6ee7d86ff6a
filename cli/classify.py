"""`llmx classify`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from llmx.cli.common import encoder_options, load, print_table, read_texts, text_options


@click.command(name="classify")
@encoder_options
@text_options
@click.option("--pair", multiple=True, help="The second text of each --text, for models that compare two.")
@click.option("--top-k", type=click.IntRange(1), default=5, show_default=True, help="Labels to show for each text.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    text: tuple[str, ...], text_file: Path | None, pair: tuple[str, ...], top_k: int, as_json: bool, **options: Any
) -> None:
    """Label texts with a sequence classifier, or their tokens with a token classifier.

    \b
    Examples:
      llmx classify --onnx artifacts/sentiment --text "What a play!"
      llmx classify --onnx artifacts/nli --text "It rains." --pair "The street is wet." --json
    """
    texts: list[Any] = read_texts(text, text_file)
    if pair:
        if len(pair) != len(texts):
            raise click.UsageError(f"There are {len(texts)} texts and {len(pair)} --pair; give one for each.")
        texts = list(zip(texts, pair, strict=True))
    with load(options, generate=False) as llm:
        if llm.encoder is not None and llm.encoder.info.task == "token-classify":
            rows = [
                [asdict(t) for t in tokens] for tokens in llm.classify_tokens(texts, batch_size=options["batch_size"])
            ]
        else:
            rows = [
                [asdict(v) for v in labels[:top_k]] for labels in llm.classify(texts, batch_size=options["batch_size"])
            ]
    if as_json:
        data = [{"text": t, "labels": r} for t, r in zip(texts, rows, strict=True)]
        click.echo(json.dumps({"data": data}, ensure_ascii=False))
        return
    lines = [
        [" / ".join(t) if isinstance(t, tuple) else t, row.get("token", ""), row["label"], f"{row['score']:.4f}"]
        for t, found in zip(texts, rows, strict=True)
        for row in found
    ]
    with_tokens = any(line[1] for line in lines)
    columns = ["text", "token", "label", "score"] if with_tokens else ["text", "label", "score"]
    print_table(columns, lines if with_tokens else [[line[0], *line[2:]] for line in lines])
