"""The state of a sequence without a slot, on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from llmx.runtime.backend import Backend

_CHECKPOINTS = 8


@dataclass(frozen=True)
class Part:
    """State of the positions `start` … `end - 1`; never changed. Carried state is whole: it starts at 0."""

    start: int
    end: int
    arrays: list[Any]


class ParkedState(Protocol):
    """State of the first `length` tokens of a sequence. `made_for`: how long the sequence was when it was made."""

    parts: list[Part]
    made_for: int

    @property
    def length(self) -> int: ...

    def cut(self, position: int) -> None:
        """Keep no more than the state of the first `position` tokens."""
        ...

    def restore(self, backend: Backend, slot: int, most: int) -> int:
        """Write the state of at most `most` tokens to a slot; of how many it was."""
        ...

    def keep(self, backend: Backend, slot: int, length: int) -> None:
        """Take what `slot` holds of `length` tokens, the first of which are those last restored."""
        ...

    def copy(self) -> ParkedState: ...


class PositionState:
    """State that lies position by position: only what is new is copied out, and any position can be gone back to."""

    def __init__(self, parts: list[Part] | None = None, made_for: int = 0) -> None:
        self.parts, self.made_for = parts or [], made_for

    @property
    def length(self) -> int:
        return self.parts[-1].end if self.parts else 0

    def cut(self, position: int) -> None:
        kept = [part for part in self.parts if part.start < position]
        if kept and kept[-1].end > position:
            last = kept.pop()
            arrays = [array[:, : position - last.start] for array in last.arrays]
            kept.append(Part(last.start, position, arrays))
        self.parts = kept

    def restore(self, backend: Backend, slot: int, most: int) -> int:
        self.cut(most)
        for part in self.parts:
            backend.write_state(slot, part.start, part.arrays)
        return self.length

    def keep(self, backend: Backend, slot: int, length: int) -> None:
        start = self.length
        self.made_for = length
        if length > start:
            self.parts = [*self.parts, Part(start, length, backend.read_state(slot, start, length))]

    def copy(self) -> PositionState:
        return PositionState(list(self.parts), self.made_for)


class WholeState:
    """Carried state, shared with the slot that made it, as it is never written. One that cannot be cut (a recurrence)
    keeps the last few checkpoints, each the end of an answer.
    """

    def __init__(self, cuts: bool, parts: list[Part] | None = None, made_for: int = 0) -> None:
        self._cuts = cuts
        self.parts, self.made_for = parts or [], made_for
        self._most = 2**62  # what may be used of a state that can be cut

    @property
    def length(self) -> int:
        return min(self.parts[-1].end, self._most) if self.parts else 0

    def cut(self, position: int) -> None:
        if self._cuts:
            self._most = min(self._most, position)
        self.parts = [part for part in self.parts if self._cuts or part.end <= position] if position else []

    def restore(self, backend: Any, slot: int, most: int) -> int:
        self.cut(most)
        if self.parts:
            backend.give_state(slot, self.parts[-1].end, self.parts[-1].arrays)  # a prefill at `length` cuts it
        return self.length

    def keep(self, backend: Any, slot: int, length: int) -> None:
        self.made_for, self._most = length, 2**62
        part = Part(0, length, backend.take_state(slot))
        self.parts = [part] if self._cuts else [*self.parts, part][-_CHECKPOINTS:]

    def copy(self) -> WholeState:
        twin = WholeState(self._cuts, list(self.parts), self.made_for)
        twin._most = self._most
        return twin


def make_parked(backend: Backend, parts: list[Part] | None = None, made_for: int = 0) -> ParkedState:
    """The kind of parked state that a backend's slots have."""
    if backend.stores_state:
        return PositionState(parts, made_for)
    return WholeState(backend.rewinds, parts, made_for)


def on_host(value: Any) -> np.ndarray:
    """A part's array, whatever the backend keeps it in."""
    return value if isinstance(value, np.ndarray) else np.asarray(value.numpy())
