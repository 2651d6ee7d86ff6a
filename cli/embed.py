"""`llmx embed`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click
from llmx.cli.common import encoder_options, load, read_texts, reason, text_options


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
    if output is not None and as_json:
        raise click.UsageError("Give --output or --json, not both.")
    if output is not None and not output.parent.is_dir():
        raise click.UsageError(f"{output} cannot be written: {output.parent} is not a folder.")
    texts = read_texts(text, text_file)
    with load(options, generate=False) as llm:
        vectors = llm.embed(texts, dimensions=dimensions, prompt_name=prompt_name, batch_size=options["batch_size"])
    if output is not None:
        _save(output, vectors)
        click.echo(f"{output}: {vectors.shape[0]} vectors of {vectors.shape[1]} numbers.", err=True)
    elif as_json:
        rows = [{"text": t, "embedding": v.tolist()} for t, v in zip(texts, vectors, strict=True)]
        click.echo(json.dumps({"dimension": int(vectors.shape[1]), "data": rows}, ensure_ascii=False))
    else:
        for vector in vectors:
            click.echo(json.dumps([round(float(x), 6) for x in vector]))


def _save(output: Path, vectors: Any) -> None:
    """Write a NumPy file whole or not at all; what is no regular file (/dev/stdout, a pipe) is written as it comes."""
    import numpy as np

    path = output.resolve()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial") if path.is_file() or not path.exists() else path
    try:
        with partial.open("wb") as file:
            np.save(file, vectors)
        if partial != path:
            partial.replace(path)
    except OSError as error:
        raise click.ClickException(f"{output} cannot be written: {reason(error)}.") from None
    finally:
        if partial != path:
            partial.unlink(missing_ok=True)
