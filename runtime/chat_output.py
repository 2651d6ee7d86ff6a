"""What an answer in a chat is made of, whole and piece by piece: OpenAI's fields as plain dataclasses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmx.runtime.chat_json import loads


@dataclass(frozen=True)
class ToolCallDelta:
    """A piece of tool call `index`. The first piece of each carries `id` and `name`, later ones more of `arguments`."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As OpenAI streams it."""
        function: dict[str, Any] = {"arguments": self.arguments}
        if self.name is None:
            return {"index": self.index, "function": function}
        return {"index": self.index, "id": self.id, "type": "function", "function": {"name": self.name, **function}}


@dataclass(frozen=True)
class ChatDelta:
    """What a piece of output adds to the message; falsy where it adds nothing."""

    content: str = ""
    reasoning_content: str = ""
    tool_calls: Sequence[ToolCallDelta] = ()

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning_content or self.tool_calls)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not empty, as OpenAI streams them."""
        delta: dict[str, Any] = {}
        if self.reasoning_content:
            delta["reasoning_content"] = self.reasoning_content
        if self.content:
            delta["content"] = self.content
        if self.tool_calls:
            delta["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        return delta


@dataclass
class ToolCall:
    """A call that the model asks for. `arguments` is JSON text as the model wrote it; `error` says what is wrong with it."""

    id: str
    name: str
    arguments: str = ""

    @property
    def error(self) -> str | None:
        """None, or one sentence where `arguments` is no JSON object (the output was cut, or the model erred)."""
        try:
            value = loads(self.arguments)
        except ValueError as error:
            return f"The arguments of the call of {self.name!r} are not valid JSON: {error}."
        return None if isinstance(value, dict) else f"The arguments of the call of {self.name!r} are not a JSON object."

    def to_dict(self) -> dict[str, Any]:
        """In OpenAI's form."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass
class ChatMessage:
    """An assistant's turn. `content` and `reasoning_content` are "" where there is none."""

    content: str = ""
    reasoning_content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    def add(self, delta: ChatDelta) -> None:
        """Append a delta; deltas arrive in order."""
        self.content += delta.content
        self.reasoning_content += delta.reasoning_content
        for piece in delta.tool_calls:
            if piece.name is not None:
                self.tool_calls.append(ToolCall(piece.id or "", piece.name))
            self.tool_calls[piece.index].arguments += piece.arguments

    def to_dict(self) -> dict[str, Any]:
        """As OpenAI returns it, and as a chat template takes it in the next turn: `content` is None beside calls alone."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content or (None if self.tool_calls else "")}
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        return message
