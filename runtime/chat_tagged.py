"""Readers of tool calls that are not written as JSON: tagged parameters, Python calls, Gemma's own notation."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass, field
from typing import Any

from llmx.runtime.chat_calls import MAX_HEAD, CallArguments, CallStart, Event, Tools
from llmx.runtime.chat_json import SPACE, loads


@dataclass
class TaggedCalls:
    """A name, then parameters in tags, each reported as it is complete.

    `head` (group `name`) is matched against what follows the marker; `parameter` (groups `key` and `value`, optionally
    `string`, "false" for JSON) against each parameter, which starts with `opening` and ends with `closing`. `inner` is a
    tag without meaning.
    Values take the type that the tool's schema gives them.
    """

    head: re.Pattern[str]
    opening: str
    closing: str
    parameter: re.Pattern[str]
    end: str
    tools: Tools
    inner: str | None = None
    state: str = "undecided"
    events: list[Event] = field(default_factory=list)
    pending: str = ""
    _name: str = ""
    _count: int = 0
    _searched: int = 0  # characters of the parameter at hand that do not hold `closing`

    def read(self, text: str, last: bool) -> int:
        at = 0
        if self.state == "undecided":
            found = self.head.match(text, 0, MAX_HEAD)
            if found is None:
                if last or len(text) >= MAX_HEAD:
                    self.state = "failed"
                return 0
            self._name, self.state, at = found["name"], "open", found.end()
            self.events.append(CallStart(self._name))
        while (step := self._step(text, at, last)) > at:
            at = step
            if self.state == "done":
                return at
        if last:
            self._close()
        return at

    def _step(self, text: str, at: int, last: bool) -> int:
        """Past the next parameter or tag from `at`; `at` itself where more text is needed, or none is to come."""
        bare = at
        while bare < len(text) and text[bare] in SPACE:
            bare += 1
        rest = text[bare : bare + 64]
        if text.startswith(self.end, bare):
            self._close()
            return bare + len(self.end)
        if self.inner is not None and text.startswith(self.inner, bare):
            return bare + len(self.inner)
        if text.startswith(self.opening, bare):
            return self._parameter(text, at, bare)
        starts = [self.opening, self.end, *([self.inner] if self.inner is not None else [])]
        if not any(start.startswith(rest) for start in starts):
            self._close()  # neither a parameter nor the end: what follows is plain text
        return at

    def _parameter(self, text: str, at: int, bare: int) -> int:
        """Past the parameter that begins at `bare`; `at` where its end is not there. Each character is searched once."""
        if text.find(self.closing, bare + max(0, self._searched - len(self.closing))) < 0:
            self._searched = len(text) - bare
            return at
        found = self.parameter.match(text, bare)
        if found is None:
            return at
        self._searched = 0
        self._report(found)
        return found.end()

    def _report(self, found: re.Match[str]) -> None:
        key, text, kind = found["key"], found["value"], found.groupdict().get("string")
        value: Any = text
        if kind == "false":
            try:
                value = loads(text)
            except ValueError:
                value = text
        elif kind is None:
            value = self.tools.value(self._name, key, text)
        before = ", " if self._count else "{"
        self._count += 1
        self.events.append(
            CallArguments(f"{before}{json.dumps(key, ensure_ascii=False)}: {json.dumps(value, ensure_ascii=False)}")
        )

    def _close(self) -> None:
        self.events.append(CallArguments("}" if self._count else "{}"))
        self.state = "done"


class _Brackets:
    """Finds the bracket that closes the first one of a growing text, reading each character once."""

    def __init__(self) -> None:
        self._at = self._depth = 0
        self._quote, self._escaped = "", False

    def closing(self, text: str) -> int:
        """The position after the closing bracket; -1: not there yet. `text` begins as it did at the last call."""
        for at in range(self._at, len(text)):
            char = text[at]
            if self._quote:
                if self._escaped or char == "\\":
                    self._escaped = not self._escaped
                elif char == self._quote:
                    self._quote = ""
            elif char in "\"'":
                self._quote = char
            elif char in "([{":
                self._depth += 1
            elif char in ")]}":
                self._depth -= 1
                if self._depth <= 0:
                    return at + 1
        self._at = len(text)
        return -1


@dataclass
class BufferedCalls:
    """Base of readers that see their whole text first. Without an `end` they read up to the closing bracket."""

    tools: Tools
    end: str | None = None
    state: str = "undecided"
    events: list[Event] = field(default_factory=list)
    pending: str = ""
    _brackets: _Brackets = field(default_factory=_Brackets)

    def read(self, text: str, last: bool) -> int:
        at = text.find(self.end) if self.end is not None else self._brackets.closing(text)
        if at < 0 and not last:
            return 0
        calls = self.parse(text[:at]) if at >= 0 else None
        if not calls:
            self.state = "failed"
            return 0
        for name, arguments in calls:
            self.events += [CallStart(name), CallArguments(json.dumps(arguments, ensure_ascii=False))]
        self.state = "done"
        return at + len(self.end or "")

    def parse(self, text: str) -> list[tuple[str, dict[str, Any]]] | None:
        """(name, arguments) of each call, or None where the text is something else."""
        raise NotImplementedError


class PythonCalls(BufferedCalls):
    """`[f(a=1), g(b="x")]`: calls of the request's own tools with literal arguments (Llama 3.2, Llama 4, Gemma 3)."""

    def parse(self, text: str) -> list[tuple[str, dict[str, Any]]] | None:
        try:
            body = ast.parse(text.strip(), mode="eval").body
            nodes = body.elts if isinstance(body, ast.List) else [body]
            return [self._call(node) for node in nodes]
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            return None

    def _call(self, node: ast.expr) -> tuple[str, dict[str, Any]]:
        if not isinstance(node, ast.Call) or node.args:
            raise ValueError
        name = ast.unparse(node.func).removesuffix(".call")  # Llama 3.1's built-in tools: brave_search.call(query="…")
        if name not in self.tools.parameters:
            raise ValueError
        arguments = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise ValueError
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
            json.dumps(arguments[keyword.arg], allow_nan=False)  # a set or bytes is no JSON (TypeError below)
        return name, arguments


_GEMMA_CALL = re.compile(r"\s*call:(?P<name>[\w.:-]+)\s*(?P<body>\{.*\})\s*", re.DOTALL)
_GEMMA_TOKEN = re.compile(
    r'<\|"\|>(?P<text>.*?)<\|"\|>|(?P<string>"(?:[^"\\]|\\.)*")|(?P<key>[\w.-]+)(?=\s*:)', re.DOTALL
)


class GemmaCalls(BufferedCalls):
    """`call:name{key:<|"|>text<|"|>,other:3}`: keys without quotes, texts between `<|"|>` (Gemma 4)."""

    def parse(self, text: str) -> list[tuple[str, dict[str, Any]]] | None:
        found = _GEMMA_CALL.fullmatch(text)
        if found is None:
            return None

        def quoted(token: re.Match[str]) -> str:
            plain = token["text"] if token["text"] is not None else token["key"]
            return token["string"] if plain is None else json.dumps(plain)

        try:
            value = loads(_GEMMA_TOKEN.sub(quoted, found["body"]))
        except ValueError:
            return None
        return [(found["name"], value)]
