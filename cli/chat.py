"""`llmx chat`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click
from llmx.cli.common import load, model_options, reason, speculation_options
from llmx.cli.conversation import opening, show, template_arguments, template_options
from llmx.cli.sampling import GroupedCommand, sampling_options, sampling_params

_HELP = (
    "Commands: /reset forgets the conversation, /exit (or Ctrl-D) leaves. "
    "Ctrl-C stops an answer; at the prompt it leaves."
)


@click.command(name="chat", cls=GroupedCommand)
@model_options
@template_options
@speculation_options
@click.option(
    "--on-full",
    type=click.Choice(["stop", "shift"]),
    default="stop",
    show_default=True,
    help="Where the context has no room for an answer: stop, or forget the oldest tokens.",
)
@click.option("--keep-first", type=int, default=0, help="Of the oldest tokens, keep so many (with --on-full shift).")
@sampling_options
def command(on_full: str, keep_first: int, **options: Any) -> None:
    """Talk with a model in the terminal. /reset forgets the conversation, /exit leaves. Ctrl-C stops an answer and
    keeps what was said so far; at the prompt, and while the model loads, it leaves with exit code 130.

    \b
    Examples:
      llmx chat --onnx artifacts/demo
      llmx chat --onnx artifacts/demo --system "A street in Rome." --temperature 0.7
    """
    from llmx.runtime.errors import RequestError

    params, arguments = sampling_params(options), template_arguments(options)
    with load(options) as llm:
        first = opening(options)
        llm.chat_prompt([*first, {"role": "user", "content": "?"}], **arguments)  # no template: refused here
        messages, session = list(first), llm.session(on_full, keep_first)
        click.echo(_HELP, err=True)
        while (text := _ask()) is not None:
            if text == "/exit":
                break
            if text == "/reset":
                messages, session = list(first), llm.session(on_full, keep_first)
                continue
            if not text:
                continue
            messages.append({"role": "user", "content": text})
            try:
                messages.append(_answer(session, messages, params, arguments))
            except RequestError as error:
                messages.pop()
                click.echo(f"Error: {error} (/reset starts anew)", err=True)


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise click.UsageError(f"Standard input cannot be read as text: {reason(error)}.") from None


def _answer(session: Any, messages: list[dict[str, Any]], params: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Stream the answer; Ctrl-C ends it and keeps what was said."""
    from llmx.runtime import ChatMessage

    message, pieces = ChatMessage(), None
    try:
        pieces = session.chat(messages, params, stream=True, **arguments)
        show(_noted(pieces, message))
    except KeyboardInterrupt:
        if pieces is not None:
            pieces.close()
        click.echo(" [stopped]", err=True)
        sys.stdout.write("\n")
    return {**message.to_dict(), "content": message.content.strip()}


def _noted(pieces: Any, message: Any) -> Iterator[Any]:
    for piece in pieces:
        message.add(piece.delta)
        yield piece
