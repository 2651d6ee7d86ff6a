"""Chat templates, rendered in jinja2's sandbox as transformers renders them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from llmx.runtime.errors import RequestError

Message = Mapping[str, Any]


class ChatTemplate:
    """A compiled chat template. `special_tokens` ("bos_token" -> "<s>", …) are its variables."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        import jinja2

        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise RequestError(f"The package's chat template cannot be read: {error}.") from None
        self._special = dict(special_tokens or {})

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation; encode it without adding special tokens.

        Raises RequestError: messages are not role/content mappings, or the template refuses them.
        """
        import jinja2

        check_messages(messages)
        try:
            return self._template.render(
                **{**self._special, **variables},
                messages=list(messages),
                tools=list(tools) if tools else None,
                documents=list(documents) if documents else None,
                add_generation_prompt=add_generation_prompt,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise RequestError(f"The chat template refuses these messages: {error}") from None


def check_messages(messages: Any) -> None:
    """Raises RequestError unless `messages` is a non-empty list of mappings with a role."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise RequestError('messages must be a non-empty list like [{"role": "user", "content": "hi"}].')
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f'messages[{index}] must be an object with a "role" and a "content".')


def _environment() -> Any:
    """As transformers' `_compile_jinja_template`: trimmed blocks, loop controls, raise_exception, strftime_now, tojson."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """`{% generation %}…{% endgeneration %}` marks the assistant's tokens for training; here it is transparent."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

        def parse(self, parser: Any) -> Any:
            scope = nodes.Scope(lineno=next(parser.stream).lineno)
            scope.body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return scope

    def raise_exception(message: str) -> None:
        from jinja2.exceptions import TemplateError

        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
