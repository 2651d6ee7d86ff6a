"""Stop strings in a stream: found across token boundaries, never emitted in part."""

from __future__ import annotations

from collections.abc import Sequence


class StopChecker:
    """Feeds text through; holds back only the longest suffix that a stop string could still complete.

    The match that is complete first wins: what a reader who checks after every character would see, however the text
    is cut into pieces. Of matches that are complete at the same character, the one that starts first wins.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """`stops` are non-empty; with `include` the matched one is part of the output."""
        self.stops = list(stops)
        self.include = include
        #: The stop string that ended the output, or None so far.
        self.matched: str | None = None
        self._held = ""

    def push(self, text: str, armed: bool = True) -> str:
        """Text that may be shown now. After a match: what precedes it (and the match with `include`), then nothing.

        Text pushed with `armed` False (before `min_tokens`) passes through, and is part of no match.
        """
        if self.matched is not None:
            return ""
        if not self.stops:
            return text
        text = self._held + text
        self._held = ""
        if not armed:
            return text
        # The first occurrence of each is the one that is complete first. Nothing held back holds a whole stop string.
        hits = [(at + len(stop), at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if hits:
            end, start, self.matched = min(hits)
            return text[: end if self.include else start]
        shown = len(text) - max(overlap(text, stop) for stop in self.stops)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """The end of the output: what was held back."""
        text, self._held = self._held, ""
        return text


def overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    at = text.find(stop[0], max(len(text) - len(stop) + 1, 0))
    while at >= 0:
        if stop.startswith(text[at:]):
            return len(text) - at
        at = text.find(stop[0], at + 1)
    return 0
