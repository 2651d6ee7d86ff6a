"""The harmony format of gpt-oss: messages with a channel each, of which a turn may hold several.

`<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>`; a call is a message
`to=functions.NAME`. Format: OpenAI's "Harmony response format" (openai/harmony, docs/format.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from llmx.runtime.chat_calls import MAX_HEAD, CallArguments, CallStart
from llmx.runtime.chat_output import ChatDelta, ChatMessage
from llmx.runtime.chat_parser import DeltaBuilder, new_call_id
from llmx.runtime.stopping import overlap

START, MESSAGE = "<|start|>", "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", START, "<|channel|>")
_RECIPIENT = re.compile(r"\bto=(?P<name>[^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(?P<name>\w+)")
_HEADERS = (START, "<|channel|>", "<|constrain|>", MESSAGE, "to=")


class HarmonyParser:
    """As ChatParser, for harmony. The channel "analysis" is reasoning, a message to a function a call, all other content.

    `prompt` is what the output continues: it ends inside a message's header, or inside a message. Without `tools` a
    message to a function is content. Messages of one kind are joined by a line break.
    """

    def __init__(self, tools: bool, prompt: str = "", make_id: Callable[[], str] = new_call_id) -> None:
        self.message = ChatMessage()
        self._tools = tools
        self._out = DeltaBuilder(make_id)
        self._buffer = ""
        self._kind: str | None = None  # of the message that is read: "content" | "reasoning" | "call"; None in a header
        self._said: set[str] = set()
        self._fresh = True  # nothing of the message has been shown
        header, begun, _ = (
            prompt[prompt.rfind(START) + len(START) :].partition(MESSAGE) if START in prompt else ("",) * 3
        )
        self._header = "" if begun else header  # the part of the header that the prompt holds
        if begun:
            kind, _ = self._meaning(header)
            self._kind = "content" if kind == "call" else kind

    def push(self, text: str) -> ChatDelta:
        """What `text` adds to the message."""
        self._buffer += text
        return self._advance(last=False)

    def finish(self, text: str = "") -> ChatDelta:
        """What `text`, the last of the output, adds, and what was held back."""
        self._buffer += text
        return self._advance(last=True)

    def _advance(self, last: bool) -> ChatDelta:
        while self._read_header(last) if self._kind is None else self._read_body(last):
            pass
        delta = self._out.take()
        self.message.add(delta)
        return delta

    def _read_header(self, last: bool) -> bool:
        """Whether a header, or text without one, was found. A header that the output ends in says nothing."""
        bare = self._buffer.lstrip()
        if not bare:
            return False
        if not bare.startswith(_HEADERS):
            if not last and any(h.startswith(bare) for h in _HEADERS):
                return False
            self._begin("content")
            return True
        at = self._buffer.find(MESSAGE, 0, MAX_HEAD)
        if at < 0:
            return self._no_header(last)
        header, self._buffer = self._header + self._buffer[:at], self._buffer[at + len(MESSAGE) :]
        kind, name = self._meaning(header)
        self._begin(kind)
        if kind == "call":
            self._out.event(CallStart(name))
        return True

    def _no_header(self, last: bool) -> bool:
        if len(self._buffer) >= MAX_HEAD or (last and "<|" not in self._buffer):
            self._begin("content")
            self._show(self._buffer[:MAX_HEAD])
            self._buffer = self._buffer[MAX_HEAD:]
            return True
        self._buffer = "" if last else self._buffer
        return False

    def _meaning(self, header: str) -> tuple[str, str]:
        """(kind, function) of a message with this header."""
        recipient, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
        if recipient is not None and self._tools:
            return "call", recipient["name"].removeprefix("functions.")
        return ("reasoning" if channel is not None and channel["name"] == "analysis" else "content"), ""

    def _begin(self, kind: str) -> None:
        self._kind, self._header, self._fresh = kind, "", True

    def _read_body(self, last: bool) -> bool:
        """Whether the message has ended."""
        found = min(((at, end) for end in _ENDS if (at := self._buffer.find(end)) >= 0), default=None)
        if found is not None:
            at, end = found
            self._show(self._buffer[:at])
            self._buffer = self._buffer[at if end in (START, "<|channel|>") else at + len(end) :]
            self._kind = None
            return True
        held = 0 if last else max(overlap(self._buffer, end) for end in _ENDS)
        self._show(self._buffer[: len(self._buffer) - held])
        self._buffer = self._buffer[len(self._buffer) - held :]
        return False

    def _show(self, text: str) -> None:
        if not text:
            return
        if self._kind == "call":
            self._out.event(CallArguments(text))
            return
        assert self._kind is not None
        before = "\n" if self._fresh and self._kind in self._said else ""
        self._said.add(self._kind)
        self._fresh = False
        (self._out.reasoning if self._kind == "reasoning" else self._out.content)(before + text)
