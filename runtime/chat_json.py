"""JSON read character by character: an object's members, as far as they have come."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

SPACE = " \t\r\n"


def loads(text: str) -> Any:
    """`json.loads` by the standard's letter, without NaN and Infinity. Raises ValueError, also for what nests too deeply."""
    try:
        return json.loads(text, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_ESCAPES = {chr(code): json.dumps(chr(code))[1:-1] for code in range(0x20)}
_SCALAR = frozenset("+-.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


@dataclass
class Member:
    """A member of an object: its key and the value's JSON text so far, control characters in strings escaped."""

    key: str
    value: str = ""
    complete: bool = False

    def parsed(self) -> Any:
        """The value. Raises ValueError where it is incomplete or no JSON."""
        return loads(self.value)


class ValueScanner:
    """Finds the end of one JSON value. Brackets and strings are followed; what stands between them is not checked."""

    def __init__(self) -> None:
        self._brackets: list[str] = []
        self._in_string = self._escaped = False
        self._kind = ""  # the first character: a bracket, a quote, or of a number or word
        self.complete = False

    def feed(self, char: str) -> str | None:
        """Text to add to the value; None: `char` is not part of it (`complete` says whether the value has ended).

        A raw control character inside a string, which models write and JSON forbids, comes back escaped.
        """
        if self._in_string:
            return self._feed_string(char)
        if not self._kind:
            return self._begin(char)
        if self._kind not in '{["':
            if char in _SCALAR:
                return char
            self.complete = True
            return None
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._brackets.append("}" if char == "{" else "]")
        elif char in "}]":
            if self._brackets[-1] != char:
                return None
            self._brackets.pop()
            self.complete = not self._brackets
        return char

    def _begin(self, char: str) -> str | None:
        if char in "{[":
            self._brackets.append("}" if char == "{" else "]")
        elif char == '"':
            self._in_string = True
        elif char not in _SCALAR:
            return None
        self._kind = char
        return char

    def _feed_string(self, char: str) -> str:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._in_string = False
            self.complete = not self._brackets
        return _ESCAPES.get(char, char)


class ObjectScanner:
    """Reads `{"key": value, …}` from its opening brace on. `members` grows, and so does the last one's value.

    `complete` after the closing brace, `broken` at the first character that no object can have there.
    """

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.complete = self.broken = False
        self._expect = "{"  # "{" | "first" (key or "}") | "key" | "in key" | ":" | "value" | "in value" | ","
        self._scanner = ValueScanner()
        self._key = ""

    def feed(self, char: str) -> None:
        """Take the next character. No call may follow once `complete` or `broken`."""
        if self._expect == "in key":
            self._key += self._scanner.feed(char) or ""
            if self._scanner.complete:
                self._expect = ":"
        elif self._expect == "in value":
            self._in_value(char)
        elif char not in SPACE:
            self._structure(char)

    def _structure(self, char: str) -> None:
        if self._expect == "{" and char == "{":
            self._expect = "first"
        elif self._expect in ("first", "key") and char == '"':
            self._scanner, self._key, self._expect = ValueScanner(), char, "in key"
            self._scanner.feed(char)
        elif self._expect == ":" and char == ":":
            try:
                self.members.append(Member(loads(self._key)))
            except ValueError:
                self.broken = True
            self._scanner, self._expect = ValueScanner(), "in value"
        elif self._expect == "," and char == ",":
            self._expect = "key"
        elif self._expect in ("first", ",") and char == "}":
            self.complete = True
        else:
            self.broken = True

    def _in_value(self, char: str) -> None:
        member = self.members[-1]
        if not member.value and char in SPACE:
            return
        added = self._scanner.feed(char)
        member.value += added or ""
        if self._scanner.complete:
            member.complete, self._expect = True, ","
            if added is None and char not in SPACE:
                self._structure(char)  # a number or word ends at the character after it
        elif added is None:
            self.broken = True
