"""Chat templates, rendered in jinja2's sandbox as transformers renders them.

Follows `apply_chat_template` and `render_jinja_template` of transformers 5.23. A template comes with a package and is
not trusted: it runs in an immutable sandbox and sees plain JSON values alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime
from functools import cache
from typing import Any

import numpy as np
from llmx.runtime.errors import RequestError

Message = Mapping[str, Any]


class Arguments(dict[str, Any]):
    """A tool call's arguments, given as JSON text: a mapping for templates that expect one (`| tojson`, `| items`), and
    the text itself for those that print or concatenate it.
    """

    def __init__(self, values: Mapping[str, Any], text: str) -> None:
        super().__init__(_plain(values))
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: str) -> str:
        return self._text + other

    def __radd__(self, other: str) -> str:
        return other + self._text


#: Names under which a message's reasoning is passed; templates read the first (gpt-oss: the second).
_REASONING = ("reasoning_content", "thinking", "reasoning")
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplate:
    """A compiled chat template. `special_tokens` ("bos_token" -> "<s>", …) are its variables.

    Raises RequestError where there is no template, or it is not valid Jinja.
    """

    def __init__(self, source: str | None, special_tokens: Mapping[str, str] | None = None) -> None:
        import jinja2

        if not source:
            raise RequestError("The package has no chat template; use a plain prompt.")
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise RequestError(f"The package's chat template cannot be read: {_one_line(error)}.") from None
        self._source = source
        self._special = dict(special_tokens or {})

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool | str = False,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation; encode it with `add_special_tokens=False`.

        Args:
            messages: mappings with a role and a content (text or parts); keys whose value is None count as absent.
            add_generation_prompt: end with the header of the assistant's turn. None: yes, unless continuing.
            tools: JSON schemas of functions.
            documents: mappings with title and text.
            continue_final_message: leave the last message open, for the model to go on with it; a string names the
                field that is continued ("content" where True).
            variables: further variables of the template; they win over special tokens.

        Raises RequestError: bad messages, tools or documents, or the template refuses them.
        """
        check_messages(messages)
        _check_mappings("tools", tools)
        _check_mappings("documents", documents)
        if continue_final_message and add_generation_prompt:
            raise RequestError("continue_final_message and add_generation_prompt exclude each other; set one of them.")
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        chat = [_reasoning_under_all_names(_plain({k: v for k, v in m.items() if v is not None})) for m in messages]
        ending = self._open_last(chat, continue_final_message) if continue_final_message else None
        try:
            text: str = self._template.render(
                **{**self._special, **_plain(variables)},
                messages=chat,
                tools=None if tools is None else _plain(list(tools)),
                documents=None if documents is None else _plain(list(documents)),
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # whatever a package's template may come to
            raise RequestError(_refusal(error)) from None
        return text if ending is None else _cut_at_tag(text, ending)

    def _open_last(self, chat: list[dict[str, Any]], field: bool | str) -> str:
        """Mark where the last message's text ends; returns that text. The template must not add anything after it."""
        last, name = chat[-1], field if isinstance(field, str) else "content"
        text = last.get(name)
        if text is None:
            raise RequestError(f"continue_final_message needs a last message with {name!r}.")
        names = [n for n in _REASONING if last.get(n) == text] if name in _REASONING else [name]
        if not any(n in self._source for n in names):
            raise RequestError(f"continue_final_message cannot continue {name!r}: the chat template does not use it.")
        if isinstance(text, str):
            last.update(dict.fromkeys(names, text + _CONTINUE_TAG))
            return text
        part = next((part for part in reversed(text) if isinstance(part, dict) and "text" in part), None)
        if part is None:
            raise RequestError("continue_final_message needs a last message with text.")
        text = str(part["text"])
        part["text"] = text + _CONTINUE_TAG
        return text


def _cut_at_tag(rendered: str, ending: str) -> str:
    """`rendered` up to the tag that follows the text `ending` of the last message."""
    tag = _CONTINUE_TAG.strip()
    if ending.strip() not in rendered or tag not in rendered:
        raise RequestError("continue_final_message does not fit this chat template: it changes the last message.")
    at = rendered.rindex(tag)
    # A template that trims the message took the tag's space; then it would have taken the text's own spaces as well.
    return rendered[:at] if rendered.startswith(_CONTINUE_TAG, at) else rendered[:at].rstrip()


def check_messages(messages: Any) -> None:
    """Raises RequestError unless `messages` is a non-empty list of mappings with a role and something to say."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise RequestError('messages must be a non-empty list like [{"role": "user", "content": "hi"}].')
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(role, str) or not role:
            raise RequestError(f'messages[{index}] must be an object with a "role" and a "content".')
        content = message.get("content")
        # An assistant's turn may be tool calls or reasoning alone.
        if content is None and (role in ("user", "system") or all(message[k] is None for k in message if k != "role")):
            raise RequestError(f'messages[{index}] has the role "{role}" and no "content"; give it a text.')
        if content is not None and (isinstance(content, bytes) or not isinstance(content, (str, Mapping, Sequence))):
            raise RequestError(f"messages[{index}].content must be text or a list of parts.")


def _check_mappings(name: str, values: Any) -> None:
    if values is None:
        return
    if isinstance(values, (str, Mapping)) or not isinstance(values, Sequence):
        raise RequestError(f"{name} must be a list of objects.")
    if not all(isinstance(value, Mapping) for value in values):
        raise RequestError(f"{name} must be a list of objects{' (JSON schemas)' if name == 'tools' else ''}.")


def _reasoning_under_all_names(message: dict[str, Any]) -> dict[str, Any]:
    """transformers' `_alias_reasoning_fields`: templates differ in the name that they read."""
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """`value` rebuilt of JSON's types, so that a template can reach no method of a caller's object.

    Also a copy: what the renderer changes is never the caller's. Other objects become a placeholder like "<ndarray>".
    """
    if value is None or type(value) in (str, int, float, bool, Arguments):
        return value
    if isinstance(value, str):  # a subclass (an enum, numpy's str_) may bring methods
        return str.__str__(value)
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, (int, float)):
        return int.__int__(value) if isinstance(value, int) else float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
        return [_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    dump = getattr(value, "model_dump", None)  # pydantic's models
    return _plain(dump()) if callable(dump) else f"<{type(value).__name__}>"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"


def _refusal(error: Exception) -> str:
    """What a template came to, told to who sent the messages."""
    from jinja2.exceptions import SecurityError, TemplateError

    if type(error) in (TemplateError, SecurityError):  # raise_exception, and the sandbox
        return f"The chat template refuses these messages: {_one_line(error)}"
    reason = "it may not know tools, parts or one of the roles"
    return f"The chat template fails on these messages ({reason}): {_one_line(error)}"


@cache
def _environment() -> Any:
    """As transformers' `_compile_jinja_template`: trimmed blocks, loop controls, its functions and its restrictions.

    jinja2 is imported here, not above: `import llmx.runtime` is fast without it.
    """
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["dict"] = _DictFunction()
    environment.globals["namespace"] = _namespace()
    return environment


def _generation_tag() -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension

    class GenerationTag(Extension):
        """`{% generation %}…{% endgeneration %}` marks the assistant's tokens for training; here it only groups.

        A call block as in transformers, so that assignments inside of it stay inside.
        """

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Callable[[], str]) -> str:
            return caller()

    return GenerationTag


def _namespace() -> Any:
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    def check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"templates cannot store {name!r} on a namespace; rename the attribute")

    class PlainNamespace(Namespace):
        """`namespace()` without underscored attributes, which could reach CPython's internals."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # `self` unnamed: a template may write namespace(self=…)
            attributes = dict(*args[1:], **kwargs)
            for name in attributes:
                check(name)
            Namespace.__init__(args[0], attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            super().__setitem__(name, value)

    return PlainNamespace


class _DictFunction:
    """`dict` for templates, without the class's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without jinja2's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
