"""Options and helpers that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_ONNX = click.option(
    "--onnx", required=True, metavar="DIR_OR_HUB_ID", help="A package folder, or the hub id of a published package."
)
_DEVICE = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
_MAX_LENGTH = click.option(
    "--max-length",
    type=int,
    help="Positions of the context to allocate [default: what half the free memory allows, at most 4096].",
)
_THREADS = click.option(
    "--threads", type=click.IntRange(1), help="CPU threads [default: the CPUs this process may use]."
)
_SPIN = click.option(
    "--spin/--no-spin", default=True, help="Busy-wait within a step; without, slower and kinder to other processes."
)
_REVISION = click.option("--revision", help="Revision of a hub id.")
_BATCH_SIZE = click.option(
    "--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Texts run at once."
)


def _all(function: Callable[..., Any], *options: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with `options`, shown in this order."""
    for option in reversed(options):
        function = option(function)
    return function


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--onnx and how to load it."""
    return _all(function, _ONNX, _DEVICE, _MAX_LENGTH, _THREADS, _SPIN, _REVISION)


def encoder_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--onnx and how to load and run an encoder."""
    return _all(function, _ONNX, _DEVICE, _THREADS, _SPIN, _REVISION, _BATCH_SIZE)


def speculation_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--draft, --prompt-lookup and --num-speculative-tokens."""
    return _all(
        function,
        click.option(
            "--draft", metavar="DIR_OR_HUB_ID", help="A small package of the same vocabulary that guesses ahead."
        ),
        click.option(
            "--prompt-lookup", is_flag=True, help="Guess what followed the last words where they were before."
        ),
        click.option(
            "--num-speculative-tokens", type=int, help="Guesses a pass [default: as many as pay, none where none do]."
        ),
    )


def _speculation(options: dict[str, Any]) -> Any:
    """The Speculation of `speculation_options`, or None."""
    from llmx.runtime import Speculation

    if options.get("draft") and options.get("prompt_lookup"):
        raise click.UsageError("Give --draft or --prompt-lookup, not both.")
    count = options.get("num_speculative_tokens")
    if options.get("prompt_lookup"):
        return Speculation(prompt_lookup=True, num_tokens=count)
    if options.get("draft"):
        return Speculation(draft=options["draft"], num_tokens=count)
    if count is not None:
        raise click.UsageError("--num-speculative-tokens goes with --draft or --prompt-lookup.")
    return None


def load(options: dict[str, Any], slots: int = 1, generate: bool = True) -> Any:
    """The LLM of `model_options` or `encoder_options`, with a spinner on a terminal. A beam search gets the slots that it
    needs, several outputs run together. Raises FamilyError where it is to generate and cannot.
    """
    from llmx.runtime import LLM
    from llmx.runtime.hub import resolve_package
    from llmx.runtime.manifest import load_manifest
    from llmx.runtime.tracing import span

    with status(f"Loading {options['onnx']}"), span("load"):
        folder = resolve_package(options["onnx"], options["revision"])
        if "num_beams" in options and not options["temperature"]:
            slots = max(slots, options["num_beams"] or int(load_manifest(folder).generation.get("num_beams", 1)))
        slots = max(slots, min(8, max(options.get("n") or 1, options.get("best_of") or 1)))
        llm = LLM(
            folder,
            options["device"],
            max_length=options.get("max_length"),
            threads=options["threads"],
            spin=options["spin"],
            slots=slots,
            speculative=_speculation(options),
        )
    if generate:
        llm.need_generation()
    return llm


def status(text: str) -> Any:
    """A spinner on standard error while a block runs; nothing where that is not a terminal."""
    from rich.console import Console
    from rich.markup import escape

    return Console(stderr=True, quiet=not sys.stderr.isatty()).status(escape(text))


def read_file(file: Path | None, what: str) -> str:
    """The text of `file`, or of standard input where it is None."""
    try:
        return file.read_text(encoding="utf-8") if file is not None else sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        name = f"The {what} file {file}" if file is not None else "Standard input"
        raise click.UsageError(f"{name} cannot be read as text: {reason(error)}.") from None


def reason(error: OSError | UnicodeDecodeError) -> str:
    """Why a file cannot be read or written, in a few words."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start:,} is not UTF-8"
    return error.strerror or str(error)


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt from --prompt, --prompt-file or standard input; exactly one of them."""
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("Give --prompt or --prompt-file, not both.")
    if prompt is not None:
        return prompt
    if prompt_file is None and sys.stdin.isatty():
        raise click.UsageError("Give a prompt: --prompt TEXT, --prompt-file FILE, or text on standard input.")
    return read_file(prompt_file, "prompt")


def text_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--text and --text-file."""
    return _all(
        function,
        click.option("--text", multiple=True, help="A text (may be given several times)."),
        click.option(
            "--text-file",
            type=click.Path(dir_okay=False, path_type=Path),
            help="A file with one text a line [default: standard input].",
        ),
    )


def read_texts(text: tuple[str, ...], text_file: Path | None) -> list[str]:
    """Texts from --text, or the non-empty lines of --text-file or standard input."""
    if text and text_file is not None:
        raise click.UsageError("Give --text or --text-file, not both.")
    texts = list(text)
    if not text:
        if text_file is None and sys.stdin.isatty():
            raise click.UsageError("Give a text: --text TEXT, --text-file FILE, or lines on standard input.")
        texts = [line for line in read_file(text_file, "text").split("\n") if line.strip()]
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
    from rich.text import Text

    table = Table(*columns)
    for row in rows:
        table.add_row(*map(Text, row))  # as they are: "[MASK]" is no markup
    Console().print(table)


def quality_sentence(quality: dict[str, Any]) -> str:
    """What quantization costs, from the manifest."""
    return (
        f"Beside the source on {quality['positions']:,} tokens ({quality['text']}): KL {quality['mean_kl']:.2g} nats, best "
        f"tokens equal {quality['argmax_agreement']:.1%}, perplexity {quality['perplexity']:.3f} "
        f"(source {quality['source_perplexity']:.3f})."
    )
