"""From messages to token ids, with what users wrote kept apart from the template's control tokens.

transformers tokenises the rendered template as one text, so `<|im_end|>` in a user's message becomes the control token
and may forge a turn. Here special tokens inside messages and tools are tokenised as the characters they are. Messages
that hold none (all but quotations and attacks) get exactly the ids that transformers gives.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmx.runtime.conversation import ChatRequest
from llmx.runtime.tokenizer import Tokenizer
from llmx.serve.errors import bad_request
from llmx.serve.models import Model
from llmx.serve.protocol import Message, Tool

#: What a request may not set as a template's variable: the API's own fields, and what the server chooses.
RESERVED = frozenset(
    [
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "tool_calls",
        "reasoning",
    ]
)


def plain_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """As templates read them: text parts joined to one text. Raises ApiError."""
    return [_plain(message, index) for index, message in enumerate(messages)]


def _plain(message: Message, index: int) -> dict[str, Any]:
    plain: dict[str, Any] = {k: v for k, v in (message.model_extra or {}).items() if v is not None}
    plain["role"] = message.role
    content = message.content
    if isinstance(content, list):
        for at, part in enumerate(content):
            if part.type not in ("text", "input_text", "output_text", "refusal") or (
                part.text is None and part.refusal is None
            ):
                raise bad_request(
                    f"messages[{index}].content[{at}] is of type {part.type[:40]!r}; this model reads text parts only.",
                    f"messages[{index}].content[{at}].type",
                    "unsupported_content",
                )
        content = "\n".join(part.text if part.text is not None else part.refusal or "" for part in content)
    plain["content"] = content if content is not None else message.refusal
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            plain[name] = getattr(message, name)
    if message.tool_calls:
        plain["tool_calls"] = [call.model_dump(exclude_none=True) for call in message.tool_calls]
    return plain


def chat_request(
    model: Model, messages: list[Message], tools: list[Tool] | None, variables: dict[str, Any] | None, **options: Any
) -> ChatRequest:
    """A conversation, ready to run. `variables` are the template's. Raises ApiError, and RequestError where the template
    refuses the messages.
    """
    reserved = RESERVED & set(variables or {})
    if reserved:
        raise bad_request(f"chat_template_kwargs must not hold {sorted(reserved)[0]}.", "chat_template_kwargs")
    guard = Guard(model.llm.tokenizer)
    plain_tools = [tool.model_dump(exclude_none=True) for tool in tools] if tools else None
    chosen = {**model.chat_options, **options, **(variables or {})}
    request = model.llm.chat_request(guard.hide(plain_messages(messages)), tools=guard.hide(plain_tools), **chosen)
    return replace(request, token_ids=guard.encode(request.prompt)) if guard.hides else request


class Guard:
    """Hides special tokens in what users wrote behind markers, and encodes a text with such markers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        spellings = sorted((self._tokenizer.token(i) for i in self._tokenizer.special_ids), key=len, reverse=True)
        self._special = re.compile("|".join(re.escape(s) for s in spellings if s) or r"(?!)")
        self._mark = f"\ue000{secrets.token_hex(8)}:"  # nobody can write it beforehand
        self._hidden: list[str] = []

    def hide(self, value: Any) -> Any:
        """`value` with every special token in its texts replaced; roles and keys are the API's own."""
        if isinstance(value, str):
            return self._special.sub(self._replace, value)
        if isinstance(value, Mapping):
            return {k: v if k in ("role", "type") else self.hide(v) for k, v in value.items()}
        if isinstance(value, list):
            return [self.hide(item) for item in value]
        return value

    def _replace(self, match: re.Match[str]) -> str:
        self._hidden.append(match[0])
        return f"{self._mark}{len(self._hidden) - 1}\ue001"

    @property
    def hides(self) -> bool:
        """Whether anything was hidden."""
        return bool(self._hidden)

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered template; hidden special tokens as plain characters."""
        ids: list[int] = []
        for index, piece in enumerate(re.split(re.escape(self._mark) + r"(\d+)\ue001", text)):
            if index % 2:
                ids += self._tokenizer.encode_plain(self._hidden[int(piece)])
            elif piece:
                ids += self._tokenizer.encode(piece, add_special_tokens=False)
        return ids
