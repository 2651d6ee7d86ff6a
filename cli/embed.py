"""`llmx embed`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from llmx.cli.common import encoder_options, load, read_texts, text_options


@click.command(name="embed")
@encoder_options
@text_options
@click.option("--dimensions", type=int, help="Keep the first so many numbers of each vector (Matryoshka models).")
@click.option("--prompt-name", help="Put this one of the package's prompts before each text.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write a NumPy file (.npy) instead.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    text: tuple[str, ...],
    text_file: Path | None,
    dimensions: int | None,
    prompt_name: str | None,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Turn texts into vectors: one JSON list a line, in the texts' order.

    \b
    Examples:
      llmx embed --onnx artifacts/minilm --text "a sentence" --text "another"
      llmx embed --onnx artifacts/minilm --text-file lines.txt --output vectors.npy
    """
    texts = read_texts(text, text_file)
    with load(options, generate=False) as llm:
        vectors = llm.embed(texts, dimensions=dimensions, prompt_name=prompt_name, batch_size=options["batch_size"])
    if output is not None:
        import numpy as np

        try:
            with output.open("wb") as file:
                np.save(file, vectors)
        except OSError as error:
            raise click.UsageError(f"{output} cannot be written: {error.strerror}.") from None
        click.echo(f"{output}: {vectors.shape[0]} vectors of {vectors.shape[1]} numbers.", err=True)
    elif as_json:
        rows = [{"text": t, "embedding": v.tolist()} for t, v in zip(texts, vectors, strict=True)]
        click.echo(json.dumps({"dimension": int(vectors.shape[1]), "data": rows}, ensure_ascii=False))
    else:
        for vector in vectors:
            click.echo(json.dumps([round(float(x), 6) for x in vector]))
