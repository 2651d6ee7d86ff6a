"""The model's output in a chat, taken apart while it streams: reasoning, text, tool calls.

A parser is given the output's text in pieces of any size and says what each adds to the message. The deltas of a stream
add up to what the whole text gives at once, however it is cut: a decision waits until no later character can change it,
and what is reported is never taken back.

White space between the text and what is no text (reasoning, calls) belongs to neither and is dropped; all other text is
passed on as it is. A call that turns out to be none is plain text, its markers included. One whose arguments break off
or are no JSON stays a call, its arguments as the model wrote them (`ToolCall.error`), and what follows is plain text.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmx.runtime.chat_calls import CallStart, Event, Reader
from llmx.runtime.chat_output import ChatDelta, ChatMessage, ToolCallDelta
from llmx.runtime.stopping import overlap

_ALPHABET = string.ascii_letters + string.digits


def new_call_id(length: int = 24, prefix: str = "call_") -> str:
    """A random id of a tool call."""
    return prefix + "".join(secrets.choice(_ALPHABET) for _ in range(length))


@dataclass(frozen=True)
class Opener:
    """`marker` opens what `reader` makes a reader for; no reader: the marker says nothing and is dropped.

    `first`: only where no text of the message precedes it directly. `kept`: the marker is part of what the reader reads.
    """

    marker: str
    reader: Callable[[], Reader] | None
    first: bool = False
    kept: bool = False


@dataclass(frozen=True)
class Reasoning:
    """Reasoning stands between `begin` and `end`, where no text of the message precedes it directly."""

    begin: str
    end: str


class DeltaBuilder:
    """Collects what one piece of output adds, calls numbered across the whole message."""

    def __init__(self, make_id: Callable[[], str]) -> None:
        self._make_id = make_id
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolCallDelta] = []
        self._num_calls = 0

    def content(self, text: str) -> None:
        self._content.append(text)

    def reasoning(self, text: str) -> None:
        self._reasoning.append(text)

    def event(self, event: Event) -> None:
        """A call's beginning, or more of the arguments of the one begun last."""
        if isinstance(event, CallStart):
            self._calls.append(ToolCallDelta(self._num_calls, event.id or self._make_id(), event.name))
            self._num_calls += 1
            return
        index = self._num_calls - 1
        if self._calls and self._calls[-1].index == index:
            last = self._calls.pop()
            self._calls.append(ToolCallDelta(index, last.id, last.name, last.arguments + event.text))
        else:
            self._calls.append(ToolCallDelta(index, arguments=event.text))

    def take(self) -> ChatDelta:
        """The delta since the last call."""
        delta = ChatDelta("".join(self._content), "".join(self._reasoning), tuple(self._calls))
        self._content, self._reasoning, self._calls = [], [], []
        return delta


class ChatParser:
    """Reads one output. `push` takes its next text and `finish` its end; `message` is what has been said so far.

    Args:
        openers: what opens a tool call (none where the request has no tools).
        reasoning: the tags around reasoning, or None.
        reasons: whether the output begins inside reasoning, because the prompt ends with the opening tag.
        make_id: ids for calls that bring none.
    """

    def __init__(
        self,
        openers: Sequence[Opener] = (),
        reasoning: Reasoning | None = None,
        reasons: bool = False,
        make_id: Callable[[], str] = new_call_id,
    ) -> None:
        self.message = ChatMessage()
        self._openers, self._tags = list(openers), reasoning
        self._out = DeltaBuilder(make_id)
        self._buffer = ""
        self._space = ""  # white space that is dropped if no text follows
        self._first = True  # nothing but white space since the beginning, or since reasoning or a call ended
        self._after = False  # no text was shown since reasoning or a call ended
        self._reasoning = reasons and reasoning is not None
        self._opener: Opener | None = None
        self._reader: Reader | None = None

    def push(self, text: str) -> ChatDelta:
        """What `text` adds to the message."""
        self._buffer += text
        return self._advance(last=False)

    def finish(self, text: str = "") -> ChatDelta:
        """What `text`, the last of the output, adds, and what was held back."""
        self._buffer += text
        return self._advance(last=True)

    def _advance(self, last: bool) -> ChatDelta:
        while self._step(last):
            pass
        delta = self._out.take()
        self.message.add(delta)
        return delta

    def _step(self, last: bool) -> bool:
        """Whether the state changed, so that there may be more to do."""
        if self._reasoning:
            return self._read_reasoning(last)
        if self._reader is not None:
            return self._read_call(last)
        return self._read_text(last)

    # -- reasoning ----------------------------------------------------------------------------------------------------

    def _read_reasoning(self, last: bool) -> bool:
        assert self._tags is not None
        at = self._buffer.find(self._tags.end)
        if at >= 0:
            self._reason(self._buffer[:at])
            self._buffer = self._buffer[at + len(self._tags.end) :]
            self._reasoning = False
            self._close()
            return True
        held = 0 if last else overlap(self._buffer, self._tags.end)
        self._reason(self._buffer[: len(self._buffer) - held])
        self._buffer = self._buffer[len(self._buffer) - held :]
        return False

    def _reason(self, text: str) -> None:
        """Reasoning without the white space around it."""
        text = text.lstrip() if self._first else self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            self._out.reasoning(shown)
            self._first = False

    # -- calls --------------------------------------------------------------------------------------------------------

    def _read_call(self, last: bool) -> bool:
        reader, opener = self._reader, self._opener
        assert reader is not None and opener is not None
        used = reader.read(self._buffer, last)
        self._buffer = self._buffer[used:]
        for event in reader.events:
            self._out.event(event)
        reader.events.clear()
        if reader.state not in ("done", "failed"):
            return False
        self._buffer = reader.pending + self._buffer
        self._reader = None
        if reader.state == "failed":
            self._first = False
            if not opener.kept:
                self._say(opener.marker)
        else:
            self._close()
        return True

    def _close(self) -> None:
        """What was no text has ended."""
        self._space, self._first, self._after = "", True, True

    # -- text ---------------------------------------------------------------------------------------------------------

    def _read_text(self, last: bool) -> bool:
        if self._first and self._skip_to_text(last):
            return True
        if self._first and not last and self._could_open():
            return False
        found = [
            (at, -len(o.marker), o) for o in self._openers if not o.first and (at := self._buffer.find(o.marker)) >= 0
        ]
        if found:
            at, _, opener = min(found, key=lambda hit: hit[:2])
            self._say(self._buffer[:at])
            self._open(opener, at)
            return True
        held = 0 if last else max((overlap(self._buffer, o.marker) for o in self._openers if not o.first), default=0)
        text, self._buffer = self._buffer[: len(self._buffer) - held], self._buffer[len(self._buffer) - held :]
        self._say(text)
        if last and not self._after:
            self._out.content(self._space)
            self._space = ""
        return False

    def _skip_to_text(self, last: bool) -> bool:
        """At a place without text: open what may stand only there. White space goes to `_space`."""
        bare = self._buffer.lstrip()
        self._space += self._buffer[: len(self._buffer) - len(bare)]
        self._buffer = bare
        if self._tags is not None and bare.startswith(self._tags.begin):
            self._buffer = bare[len(self._tags.begin) :]
            self._reasoning, self._space = True, ""
            return True
        for opener in self._openers:
            if opener.first and bare.startswith(opener.marker):
                self._open(opener, 0)
                return True
        return False

    def _could_open(self) -> bool:
        """Whether the buffer is the beginning of something that opens only where no text precedes it."""
        markers = [o.marker for o in self._openers if o.first]
        markers += [self._tags.begin] if self._tags is not None else []
        return any(marker.startswith(self._buffer) for marker in markers)

    def _open(self, opener: Opener, at: int) -> None:
        self._buffer = self._buffer[at if opener.kept else at + len(opener.marker) :]
        if opener.reader is None:
            self._close()
        else:
            self._opener, self._reader = opener, opener.reader()

    def _say(self, text: str) -> None:
        """Text of the message; the white space at its end waits for more."""
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            self._out.content(shown.lstrip() if self._after else shown)
            self._first = self._after = False
