"""`llmx chat`."""

from __future__ import annotations

import sys
from typing import Any

import click
from llmx.cli.common import load, model_options, reason, sampling_options, sampling_params

_HELP = (
    "Commands: /reset forgets the conversation, /exit (or Ctrl-D) leaves. "
    "Ctrl-C stops an answer; at the prompt it leaves."
)


@click.command(name="chat")
@model_options
@click.option("--system", help="A system message to begin with.")
@sampling_options
def command(system: str | None, **options: Any) -> None:
    """Talk with a model in the terminal. /reset forgets the conversation, /exit leaves. Ctrl-C stops an answer and
    keeps what was said so far; at the prompt, and while the model loads, it leaves with exit code 130.

    \b
    Examples:
      llmx chat --onnx artifacts/demo
      llmx chat --onnx artifacts/demo --system "A street in Rome." --temperature 0.7
    """
    from llmx.runtime.errors import RequestError

    params = sampling_params(options)
    with load(options) as llm:
        opening = [{"role": "system", "content": system}] if system else []
        llm.chat_prompt([*opening, {"role": "user", "content": "?"}])  # a package without a template is refused here
        messages = list(opening)
        click.echo(_HELP, err=True)
        while (text := _ask()) is not None:
            if text == "/exit":
                break
            if text == "/reset":
                messages = list(opening)
                continue
            if not text:
                continue
            messages.append({"role": "user", "content": text})
            try:
                messages.append({"role": "assistant", "content": _answer(llm, messages, params)})
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


def _answer(llm: Any, messages: list[dict[str, str]], params: Any) -> str:
    """Stream the answer; Ctrl-C ends it and keeps what was said."""
    text, pieces = "", None
    try:
        pieces = llm.chat(messages, params, stream=True)
        for piece in pieces:
            text += piece.text
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        if pieces is not None:
            pieces.close()
        click.echo(" [stopped]", err=True)
    sys.stdout.write("\n")
    return text.strip()
