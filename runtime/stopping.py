"""Stop strings in a stream: found across token boundaries, never emitted in part."""

from __future__ import annotations

from collections.abc import Sequence


class StopChecker:
    """Feeds text through; holds back only the longest suffix that a stop string could still complete.

    Of several matches the one that ends first wins, then the one that starts first: what a reader who checks after
    every character would see.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self.stops = list(stops)
        self.include = include
        self.matched: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        """Text that may be shown now. After a match: what precedes it (and the match with `include`), then nothing."""
        if self.matched is not None:
            return ""
        if not self.stops:
            return text
        text = self._held + text
        hits = [(at + len(stop), at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if hits:
            end, start, self.matched = min(hits)
            self._held = ""
            return text[: end if self.include else start]
        held = max(_overlap(text, stop) for stop in self.stops)
        self._held = text[len(text) - held :] if held else ""
        return text[: len(text) - held]

    def finish(self) -> str:
        """The end of the output: what was held back."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
