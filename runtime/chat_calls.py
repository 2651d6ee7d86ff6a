"""Readers of tool calls: text after a call's opening marker in, call events out.

A reader is fed the text that follows its marker and says how much of it is its own. What it decides depends on the
characters alone, never on how the text is cut into pieces, so a stream and the whole text give the same calls.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llmx.runtime.chat_json import SPACE, Member, ObjectScanner, ValueScanner, loads

#: Longest text between a call's marker and its arguments; what is longer is no call.
MAX_HEAD = 256


@dataclass(frozen=True)
class CallStart:
    name: str
    id: str | None = None


@dataclass(frozen=True)
class CallArguments:
    text: str


Event = CallStart | CallArguments


class Reader(Protocol):
    """`state`: "undecided" (may still turn out to be no call), "open" (a call has been reported), "done" or "failed".

    `events` are taken, and emptied, by the caller. `pending` is text that was read and is in no event (yet): plain text
    after all once the reader is done or has failed. A reader that fails has reported nothing.
    """

    @property
    def state(self) -> str: ...

    @property
    def events(self) -> list[Event]: ...

    @property
    def pending(self) -> str: ...

    def read(self, text: str, last: bool) -> int:
        """Consume from the front of `text`; returns how many characters. What is left over is given again, with more
        after it, while the reader is undecided or open. `last`: nothing follows.
        """
        ...


class Tools:
    """The functions that a request offers: name -> JSON schema of the parameters. Takes OpenAI's form or the bare one."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        functions = [tool.get("function", tool) for tool in tools]
        self.parameters: dict[str, Mapping[str, Any]] = {
            f["name"]: f.get("parameters") or {} for f in functions if isinstance(f, Mapping) and f.get("name")
        }

    def value(self, function: str, key: str, text: str) -> Any:
        """`text` as the type that the schema of the parameter asks for; the text itself where it asks for none."""
        properties = self.parameters.get(function, {}).get("properties")
        types = _types(properties.get(key)) if isinstance(properties, Mapping) else set()
        if not types or ("string" in types and not (text.strip() == "null" and "null" in types)):
            return text
        bare = text.strip()
        if "boolean" in types and bare.lower() in ("true", "false"):
            return bare.lower() == "true"
        if "null" in types and bare in ("null", "None"):
            return None
        try:
            return loads(bare)
        except ValueError:
            return text


def _types(schema: Any) -> set[str]:
    if not isinstance(schema, Mapping):
        return set()
    declared = schema.get("type")
    found = {declared} if isinstance(declared, str) else {t for t in declared or () if isinstance(t, str)}
    for union in ("anyOf", "oneOf"):
        for choice in schema.get(union) or ():
            found |= _types(choice)
    return found


@dataclass
class JsonCalls:
    """`{"name": …, "arguments": {…}}`, one, several with `separator` between them, or a list of them; then `end`.

    Arguments are passed on as they are written. `known`: names that count, where the format has no marker of its own.
    """

    end: str | None = None
    names: tuple[str, ...] = ("name",)
    arguments: tuple[str, ...] = ("arguments", "parameters")
    separator: str | None = None
    known: frozenset[str] | None = None
    state: str = "undecided"
    events: list[Event] = field(default_factory=list)
    pending: str = ""
    _scanner: ObjectScanner | None = None
    _call: _JsonCall | None = None
    _list: bool = False
    _expect: str = "value"  # "value" | "object" | "next" (after an object) | "end" (after the list) | "closed"

    def read(self, text: str, last: bool) -> int:
        at = 0
        while at < len(text) and self.state in ("undecided", "open"):
            if self._expect == "object":
                taken: int | None = self._object(text[at])
            elif text[at] in SPACE:
                taken = 1
            else:
                taken = self._between(text[at:], last)
            if taken is None:
                break
            self.pending += text[at : at + taken]
            at += taken
            if self._expect == "closed" or (self._call is not None and self._call.started):
                self.pending = ""
            if self._scanner is None:
                self._call = None
        if last and self.state in ("undecided", "open"):
            self._stop()
        if self.state == "done" and self.pending.isspace():
            self.pending = ""
        return at

    def _object(self, char: str) -> int:
        assert self._scanner is not None and self._call is not None
        self._scanner.feed(char)
        if self._scanner.broken:
            self._stop()
            return 0
        if self._call.update(self._scanner.members, self.events, self._scanner.complete):
            self.state = "open"
        if self._scanner.complete:
            self._scanner, self._expect = None, "next"
            if not self._call.started:
                self._stop()
        return 1

    def _between(self, text: str, last: bool) -> int | None:
        """Outside of objects, at a character that is no space; None: more text is needed."""
        char = text[0]
        if self._expect == "value" and char == "{":
            self._scanner, self._expect = ObjectScanner(), "object"
            self._call = _JsonCall(self.names, self.arguments, self.known)
            return 0
        if self._expect == "value" and char == "[" and not self._list and self.state == "undecided":
            self._list = True
            return 1
        if self._expect == "next" and self._list and char in ",]":
            self._expect = "value" if char == "," else "end"
            if char == "]" and self.end is None:
                self._done()
            return 1
        if self._expect == "next" and self.separator is not None and char == self.separator:
            self._expect = "value"
            return 1
        if self.end is not None and self._expect in ("next", "end") and not (self._list and self._expect == "next"):
            if text.startswith(self.end):
                self._done()
                return len(self.end)
            if not last and self.end.startswith(text):
                return None
        self._stop()
        return 0

    def _done(self) -> None:
        self.state, self._expect = "done", "closed"

    def _stop(self) -> None:
        self.state = "done" if self.state == "open" else "failed"


class _JsonCall:
    """One call of JsonCalls: reports its name as soon as it is known, and its arguments as they come."""

    def __init__(self, names: tuple[str, ...], arguments: tuple[str, ...], known: frozenset[str] | None) -> None:
        self._names, self._arguments, self._known = names, arguments, known
        self.started = False
        self._sent = 0

    def update(self, members: list[Member], events: list[Event], complete: bool) -> bool:
        """Whether the call has been reported, after what `members` hold now."""
        if not self.started:
            name = self._name(members)
            if name is None:
                return False
            given = next((m for m in members if m.key in ("id", "tool_call_id") and m.complete), None)
            call_id = given.parsed() if given is not None and given.value.startswith('"') else None
            events.append(CallStart(name, call_id or None))
            self.started = True
        member = next((m for m in members if m.key in self._arguments), None)
        if member is not None and member.value.startswith("{"):
            if len(member.value) > self._sent:
                events.append(CallArguments(member.value[self._sent :]))
                self._sent = len(member.value)
        elif not self._sent and (complete or (member is not None and member.complete)):
            text = _as_arguments(member)
            events.append(CallArguments(text))
            self._sent = max(len(text), 1)
        return True

    def _name(self, members: list[Member]) -> str | None:
        member = next((m for m in members if m.key in self._names and m.complete), None)
        try:
            name = member.parsed() if member is not None else None
        except ValueError:
            return None
        valid = isinstance(name, str) and name and (self._known is None or name in self._known)
        return name if valid else None


def _as_arguments(member: Member | None) -> str:
    """Arguments that are no object in place: none, null, or an object inside of a string."""
    if member is None or member.value == "null":
        return "{}"
    try:
        value = member.parsed()
    except ValueError:
        return member.value
    return value if isinstance(value, str) else member.value


@dataclass
class NamedCalls:
    """A name, then a JSON object: `head` (a pattern with the groups `name` and, optionally, `id`) must match the text
    before the object's brace; `filler` is what may stand between the object and `end`.
    """

    head: re.Pattern[str]
    end: str | None = None
    filler: str = SPACE
    state: str = "undecided"
    events: list[Event] = field(default_factory=list)
    pending: str = ""
    _value: ValueScanner | None = None

    def read(self, text: str, last: bool) -> int:
        at = 0
        if self._value is None:
            at = self._head(text, last)
            if self.state != "open":
                return 0
        assert self._value is not None
        written = []
        while at < len(text) and not self._value.complete:
            added = self._value.feed(text[at])
            if added is None:
                break
            written.append(added)
            at += 1
        if written:
            self.events.append(CallArguments("".join(written)))
        if self._value.complete:
            return self._after(text, at, last)
        if last or at < len(text):
            self.state = "done"
        return at

    def _head(self, text: str, last: bool) -> int:
        brace = text.find("{", 0, MAX_HEAD)
        stop = text.find(self.end, 0, MAX_HEAD) if self.end is not None else -1
        if stop >= 0 and (brace < 0 or stop < brace):
            self.state = "failed"
            return 0
        found = self.head.fullmatch(text, 0, brace) if brace >= 0 else None
        if found is not None:
            self.events.append(CallStart(found["name"], found.groupdict().get("id")))
            self._value, self.state = ValueScanner(), "open"
            return brace
        if brace >= 0 or len(text) >= MAX_HEAD or last:
            self.state = "failed"
        return 0

    def _after(self, text: str, at: int, last: bool) -> int:
        """After the object: what may stand before `end`, and `end`. Without it the rest is plain text."""
        if self.end is None:
            self.state = "done"
            return at
        begin = at
        while at < len(text) and text[at] in self.filler:
            at += 1
        if text.startswith(self.end, at):
            self.state = "done"
            return at + len(self.end)
        if last or not self.end.startswith(text[at:]):
            self.state = "done"
        return at if last and at == len(text) else begin  # nothing is consumed before it is certain


@dataclass
class FirstOf:
    """Chooses the reader by the first character that is no space: `json` before a bracket, `named` otherwise."""

    json: Reader
    named: Reader
    _chosen: Reader | None = None

    @property
    def state(self) -> str:
        return "undecided" if self._chosen is None else self._chosen.state

    @property
    def events(self) -> list[Event]:
        return self.named.events if self._chosen is None else self._chosen.events

    @property
    def pending(self) -> str:
        return "" if self._chosen is None else self._chosen.pending

    def read(self, text: str, last: bool) -> int:
        if self._chosen is None:
            bare = text.lstrip(SPACE)
            if not bare and not last:
                return 0
            self._chosen = self.json if bare[:1] in ("[", "{") else self.named
        return self._chosen.read(text, last)
