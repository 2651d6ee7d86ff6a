"""A small model that guesses what the large one will say."""

from __future__ import annotations

import math

import numpy as np
from llmx.runtime.backend import Backend
from llmx.runtime.errors import LlmxError
from llmx.runtime.sampling import distribution, draw
from llmx.runtime.scheduler import Sequence
from llmx.runtime.speculation import Guess
from llmx.runtime.step_output import asked_now


class DraftModel:
    """Guesses by a model of the same vocabulary, with the request's own parameters and random stream.

    Owns the draft's slots, one for each sequence that is guessed for. Invariant: the first positions of a slot hold the
    state of its `_held` tokens. A guess that did not stand is found by comparing them with the sequence's tokens, so
    nobody has to tell.
    """

    def __init__(self, backend: Backend, vocab_size: int, chunk: int) -> None:
        """`vocab_size`: of the model that is guessed for, whose vocabulary may be padded otherwise."""
        self._backend, self._chunk = backend, chunk
        self.steady = True
        self._vocab = vocab_size
        self._owners: list[Sequence | None] = [None] * backend.slots
        self._held: list[list[int]] = [[] for _ in range(backend.slots)]
        self._sure = [0] * backend.slots  # of `_held`, tokens that the owner is known to have too: its tokens only grow

    def propose(self, wanted: list[tuple[Sequence, int]]) -> list[list[Guess]]:
        self._free_ended()
        self.steady = True
        guesses: list[list[Guess]] = [[] for _ in wanted]
        rows: dict[int, np.ndarray] = {}
        late: list[int] = []
        for index, (sequence, most) in enumerate(wanted):
            if most > 0 and len(sequence.tokens) + most <= self._backend.max_length:
                slot = self._slot(sequence)
                row = self._catch_up(slot, sequence.tokens)
                if row is None:
                    late.append(index)
                else:
                    rows[index] = row
        if late:
            rows |= self._decode({index: wanted[index][0].tokens[-1] for index in late}, wanted)
        lengths = {index: len(wanted[index][0].tokens) for index in rows}
        try:
            while rows:
                rows = self._guess(rows, wanted, guesses)
        finally:
            for index, length in lengths.items():
                wanted[index][0].history.truncate(length)
        return guesses

    def _guess(
        self, rows: dict[int, np.ndarray], wanted: list[tuple[Sequence, int]], guesses: list[list[Guess]]
    ) -> dict[int, np.ndarray]:
        """One more guess from each row; the rows of those that want another."""
        following: dict[int, int] = {}
        for index, row in rows.items():
            sequence, most = wanted[index]
            try:
                guess = _draw(self._fitted(row), sequence)
            except LlmxError:  # the draft's trouble is not the request's: it goes without a guess
                continue
            guesses[index].append(guess)
            sequence.history.append(guess.token)
            if len(guesses[index]) < most:
                following[index] = guess.token
        return self._decode(following, wanted) if following else {}

    def _fitted(self, row: np.ndarray) -> np.ndarray:
        """Logits [vocab] of the model's vocabulary: rows that are mere padding are cut, or added as impossible."""
        missing = self._vocab - len(row)
        return row[: self._vocab] if missing <= 0 else np.pad(row, (0, missing), constant_values=-np.inf)

    def _decode(self, tokens: dict[int, int], wanted: list[tuple[Sequence, int]]) -> dict[int, np.ndarray]:
        """One step of the draft: index in `wanted` -> token, to index -> logits [vocab]."""
        slots = {index: self._owners.index(wanted[index][0]) for index in tokens}
        count = max(slots.values()) + 1
        ids, active = np.zeros(count, np.int64), np.zeros(count, bool)
        longest = self._backend.max_length - 1
        lengths = np.array([min(len(held), longest) for held in self._held[:count]], np.int64)
        for index, slot in slots.items():
            ids[slot], active[slot] = tokens[index], True
        logits = self._backend.decode(ids, lengths, active).rows()
        for index, slot in slots.items():
            self._held[slot].append(tokens[index])
        return {index: logits[slot] for index, slot in slots.items()}

    def _slot(self, sequence: Sequence) -> int:
        """The sequence's slot; a new one begins with what another holds of its tokens."""
        if sequence in self._owners:
            return self._owners.index(sequence)
        slot = self._owners.index(None)
        self._owners[slot], self._sure[slot] = sequence, 0
        shared = [common(held, sequence.tokens) for held in self._held]
        best = int(np.argmax(shared))
        if shared[best] > shared[slot]:
            self._backend.copy_slot(best, slot, shared[best], shared[slot])
            self._held[slot] = self._held[best][: shared[best]]
        return slot

    def _catch_up(self, slot: int, tokens: list[int]) -> np.ndarray | None:
        """Compute what `slot` lacks of `tokens`; logits [vocab] after them, or None where only the last is missing, which
        a step shared with others can do.
        """
        held, sure = self._held[slot], self._sure[slot]
        start = min(sure + common(held[sure:], tokens[sure:]), len(tokens) - 1)
        del held[start:]
        self._sure[slot] = start
        if start == len(tokens) - 1:
            return None
        self.steady = self.steady and start >= len(tokens) - 2  # as after guesses that all stood
        logits = np.zeros(0)
        for begin in range(start, len(tokens), self._chunk):
            piece = np.array(tokens[begin : begin + self._chunk], np.int64)
            last = begin + len(piece) == len(tokens)
            asked = np.array([len(piece) - 1] if last else [], np.int64)
            logits = self._backend.prefill(slot, piece, begin, asked)
            held += piece.tolist()
        row: np.ndarray = logits[0].copy()
        return row

    def _free_ended(self) -> None:
        for slot, owner in enumerate(self._owners):
            if owner is not None and (owner.finish_reason is not None or owner.slot is None):
                self._owners[slot] = None

    def check_integrity(self) -> None:
        """Raises AssertionError where a sequence has two slots, or one holds more than it can."""
        owners = [id(owner) for owner in self._owners if owner is not None]
        assert len(set(owners)) == len(owners), "one sequence in two slots"
        assert all(len(held) <= self._backend.max_length for held in self._held)

    def close(self) -> None:
        self._backend.close()


def _draw(row: np.ndarray, sequence: Sequence) -> Guess:
    """A guess from the draft's logits [vocab]. Raises LlmxError."""
    params, history = sequence.params, sequence.history
    if asked_now(sequence) == 0.0:
        token = int(row.argmax())
        if math.isfinite(row[token]):
            return Guess(token)
    c = distribution(row, params, history)
    return Guess(int(c.ids[0]) if params.temperature == 0.0 else draw(c, sequence.generator), c)


def common(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix; fast where one is nearly the other's."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:  # a[:low] is common, a[: high + 1] is not
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
