"""Options and helpers that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from llmx.runtime.params import SamplingParams


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--onnx and how to load it."""
    for option in reversed(
        [
            click.option(
                "--onnx",
                required=True,
                metavar="DIR_OR_HUB_ID",
                help="A package folder, or the hub id of a published package.",
            ),
            click.option("--device", default="auto", show_default=True, help="auto or cpu (cuda is refused so far)."),
            click.option(
                "--max-length",
                type=int,
                help="Positions of the context to allocate [default: what half the free memory allows, at most 4096].",
            ),
            click.option(
                "--threads", type=click.IntRange(1), help="CPU threads [default: the CPUs this process may use]."
            ),
            click.option("--revision", help="Revision of a hub id."),
        ]
    ):
        function = option(function)
    return function


def sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Sampling parameters; None leaves the package's default."""
    for option in reversed(
        [
            click.option(
                "-n", "--max-tokens", type=int, help="Most tokens to generate [default: the package's, else 256]."
            ),
            click.option("--temperature", type=float, help="0 is greedy [default: the package's]."),
            click.option("--top-k", type=int, help="Sample from the K most likely tokens."),
            click.option(
                "--top-p", type=float, help="Sample from the most likely tokens that make up this probability."
            ),
            click.option("--min-p", type=float, help="Drop tokens less likely than this part of the likeliest."),
            click.option("--seed", type=int, help="Make the draws repeatable."),
            click.option("--stop", multiple=True, help="End at this text (may be given several times)."),
            click.option("--ignore-eos", is_flag=True, help="Go on past the model's end tokens."),
        ]
    ):
        function = option(function)
    return function


def sampling_params(options: dict[str, Any], **more: Any) -> SamplingParams:
    """The SamplingParams of `sampling_options`."""
    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "ignore_eos")
    return SamplingParams(stop=list(options["stop"]), **{name: options[name] for name in names}, **more)


def load(options: dict[str, Any], slots: int = 1, generate: bool = True) -> Any:
    """The LLM of `model_options`, with a spinner on a terminal. Raises FamilyError where it is to generate and cannot."""
    from llmx.runtime import LLM

    with status(f"Loading {options['onnx']}"):
        llm = LLM(
            options["onnx"],
            options["device"],
            revision=options["revision"],
            max_length=options["max_length"],
            threads=options["threads"],
            slots=slots,
        )
    if generate:
        llm.need_generation()
    return llm


def status(text: str) -> Any:
    """A spinner on standard error while a block runs; nothing where that is not a terminal."""
    from rich.console import Console

    return Console(stderr=True, quiet=not sys.stderr.isatty()).status(text)


def human_bytes(size: float) -> str:
    """Decimal units, three digits: 1.23 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt from --prompt, --prompt-file or standard input; exactly one of them."""
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("Give --prompt or --prompt-file, not both.")
    if prompt_file is not None:
        try:
            return prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise click.UsageError(f"The prompt file {prompt_file} cannot be read as text: {error}.") from None
    if prompt is None:
        if sys.stdin.isatty():
            raise click.UsageError("Give a prompt: --prompt TEXT, --prompt-file FILE, or text on standard input.")
        prompt = sys.stdin.read()
    return prompt


def encoder_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--onnx and how to load and run an encoder."""
    for option in reversed(
        [
            click.option("--onnx", required=True, metavar="DIR_OR_HUB_ID", help="A package folder, or a hub id."),
            click.option("--device", default="auto", show_default=True, help="auto or cpu (cuda is refused so far)."),
            click.option("--threads", type=click.IntRange(1), help="CPU threads [default: what the process may use]."),
            click.option("--revision", help="Revision of a hub id."),
            click.option(
                "--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Texts run at once."
            ),
        ]
    ):
        function = option(function)
    return function


def text_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--text and --text-file."""
    file = click.Path(dir_okay=False, path_type=Path)
    function = click.option("--text-file", type=file, help="A file with one text a line [default: standard input].")(
        function
    )
    return click.option("--text", multiple=True, help="A text (may be given several times).")(function)


def load_encoder(options: dict[str, Any]) -> Any:
    """The LLM of `encoder_options`; its calls say which command fits another family."""
    return load({**options, "max_length": None}, generate=False)


def read_texts(text: tuple[str, ...], text_file: Path | None) -> list[str]:
    """Texts from --text, or the non-empty lines of --text-file or standard input."""
    if text and text_file is not None:
        raise click.UsageError("Give --text or --text-file, not both.")
    texts = list(text)
    if not text:
        if text_file is None and sys.stdin.isatty():
            raise click.UsageError("Give a text: --text TEXT, --text-file FILE, or lines on standard input.")
        try:
            source = text_file.read_text(encoding="utf-8") if text_file is not None else sys.stdin.read()
        except (OSError, UnicodeDecodeError) as error:
            raise click.UsageError(f"The text file {text_file} cannot be read as text: {error}.") from None
        texts = [line for line in source.splitlines() if line.strip()]
    if not texts or not all(t.strip() for t in texts):
        raise click.UsageError("A text is empty; give at least one character.")
    return texts


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    """A table on a terminal, tab-separated lines elsewhere."""
    if not sys.stdout.isatty():
        for row in rows:
            click.echo("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
