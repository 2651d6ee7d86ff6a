"""Options of conversations that several commands share, and how an answer is shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from llmx.cli.common import reason

_FILE = click.Path(dir_okay=False, path_type=Path)


def template_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """What the chat template is given besides the messages."""
    for option in reversed(
        [
            click.option("--system", help="A system message to begin with."),
            click.option(
                "--chat-template", metavar="NAME_OR_FILE", help="One of the package's chat templates, or a Jinja file."
            ),
            click.option("--documents", type=_FILE, help="A JSON file: a list of objects with title and text."),
            click.option(
                "--template-option",
                multiple=True,
                metavar="NAME=VALUE",
                help="A variable of the chat template, such as enable_thinking=false (JSON, else text).",
            ),
        ]
    ):
        function = option(function)
    return function


def template_arguments(options: dict[str, Any], tools: Path | None = None) -> dict[str, Any]:
    """What LLM.chat takes of `template_options`. Raises UsageError for files and values that cannot be read."""
    arguments = dict(_variable(text) for text in options["template_option"])
    chosen = options["chat_template"]
    if chosen is not None:
        path = Path(chosen)
        arguments["chat_template"] = _text(path) if path.is_file() else chosen
    if options["documents"] is not None:
        arguments["documents"] = _json_list(options["documents"], "--documents")
    if tools is not None:
        arguments["tools"] = _json_list(tools, "--tools")
    return arguments


def opening(options: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages that a conversation begins with."""
    return [{"role": "system", "content": options["system"]}] if options["system"] else []


def _variable(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise click.UsageError(f"--template-option takes NAME=VALUE, such as enable_thinking=false, and got {text!r}.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{path} cannot be read as text: {reason(error)}.") from None


def _json_list(path: Path, option: str) -> list[Any]:
    try:
        value = json.loads(_text(path))
    except ValueError as error:
        raise click.UsageError(f"The file of {option} ({path}) is not JSON: {error}.") from None
    if not isinstance(value, list):
        raise click.UsageError(f"The file of {option} ({path}) must hold a JSON list of objects.")
    return value


def show(pieces: Iterable[Any]) -> Any:
    """Stream an answer: its text to standard output, its reasoning to standard error, then a line of JSON for each tool
    call. Returns the last piece's metrics.
    """
    calls: dict[int, tuple[str, str]] = {}
    metrics, thought = None, False
    for piece in pieces:
        delta = piece.delta
        if delta.reasoning_content:
            thought = True
            click.echo(click.style(delta.reasoning_content, dim=True), err=True, nl=False)
        if thought and (delta.content or delta.tool_calls or piece.finish_reason):
            click.echo("\n", err=True)
            thought = False
        sys.stdout.write(delta.content)
        sys.stdout.flush()
        for call in delta.tool_calls:
            name, arguments = calls.get(call.index, (call.name, ""))
            calls[call.index] = (name, arguments + call.arguments)
        metrics = piece.metrics or metrics
    for name, arguments in calls.values():
        sys.stdout.write("\n" + json.dumps({"tool_call": {"name": name, "arguments": arguments}}, ensure_ascii=False))
    sys.stdout.write("\n")
    sys.stdout.flush()
    return metrics
