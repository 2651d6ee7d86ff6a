"""A public fake: a deterministic toy model that also checks how it is called. For tests of schedulers and services."""

from __future__ import annotations

import numpy as np
from llmx.runtime.kv_budget import KVBudget
from llmx.runtime.step_logits import HostLogits, HostPrefill, StepLogits


class FakeBackend(HostPrefill):
    """A Backend whose logits are a pure function of the slot's tokens so far.

    Each slot keeps the tokens written at its positions. Writing past a gap, or asking for a position that was never
    written, raises AssertionError: a scheduler that mixes up slots or positions does not go unnoticed. With `kv_positions`
    so does one that has all slots together hold more.
    """

    recompute_at: int | None = None
    state_by_length = False
    verifies_batches = True
    chunked = True
    prefill_chunk = 192
    last_hidden: np.ndarray | None = None

    def __init__(
        self,
        slots: int = 4,
        max_length: int = 64,
        vocab_size: int = 32,
        rewinds: bool = True,
        kv_positions: int | None = None,
        kv_block: int = 1,
    ) -> None:
        self.stores_state = rewinds
        self.rewinds = rewinds  # False: a recurrence, which knows no way back but to the beginning
        self.slots, self.max_length, self.vocab_size = slots, max_length, vocab_size
        self._written: list[list[int]] = [[] for _ in range(slots)]
        self.kv_budget = (
            None if kv_positions is None else KVBudget(kv_positions // kv_block, kv_block, 8 * kv_block, max_length)
        )
        self.num_prefills = self.num_decodes = self.num_verifies = 0
        self.closed = False

    def next_logits(self, tokens: list[int]) -> np.ndarray:
        """float32 [vocab]: what the model says after `tokens`."""
        seed = np.frombuffer(np.array(tokens, np.int64).tobytes(), np.uint32)
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed.tolist()))).standard_normal(
            self.vocab_size, np.float32
        )

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The continuation that any correct scheduler must produce."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.next_logits(tokens).argmax()))
        return tokens[len(prompt) :]

    def _write(self, slot: int, position: int, token: int) -> None:
        written = self._written[slot]
        assert 0 <= position < self.max_length, f"slot {slot}: position {position}"
        assert position <= len(written), f"slot {slot}: writes at {position}, {len(written)} are written"
        assert self.rewinds or position in (0, len(written)), f"slot {slot}: goes back to {position}"
        del written[position:]
        written.append(token)
        self._check_room()

    def _check_room(self) -> None:
        if self.kv_budget is not None:
            held = [self.kv_budget.of(len(written)) for written in self._written]
            assert sum(held) <= self.kv_budget.blocks, f"{held} blocks are held"

    def prefill(
        self, slot: int, token_ids: np.ndarray, start: int, positions: np.ndarray, prompt_length: int | None = None
    ) -> np.ndarray:
        self.num_prefills += 1
        for offset, token in enumerate(token_ids):
            self._write(slot, start + offset, int(token))
        rows = [self.next_logits(self._written[slot][: start + int(p) + 1]) for p in positions]
        return np.array(rows, np.float32).reshape(len(rows), self.vocab_size)

    def decode(
        self,
        token_ids: np.ndarray,
        lengths: np.ndarray,
        active: np.ndarray | None = None,
        temperatures: np.ndarray | None = None,
    ) -> StepLogits:
        self.num_decodes += 1
        rows = []
        for slot, (token, length) in enumerate(zip(token_ids, lengths, strict=True)):
            idle = active is not None and not active[slot]
            if idle and (not self.rewinds or length > len(self._written[slot])):  # not run, or never filled so far
                rows.append(np.full(self.vocab_size, np.nan, np.float32))
                continue
            self._write(slot, int(length), int(token))
            rows.append(self.next_logits(self._written[slot]))
        return HostLogits(np.array(rows))

    def verify(self, token_ids: np.ndarray, lengths: np.ndarray, counts: np.ndarray) -> np.ndarray:
        self.num_verifies += 1
        logits = np.full((*token_ids.shape, self.vocab_size), np.nan, np.float32)
        for slot, (tokens, length, count) in enumerate(zip(token_ids, lengths, counts, strict=True)):
            if length <= len(self._written[slot]):  # else an idle row that was never filled so far
                for offset, token in enumerate(tokens[:count]):
                    self._write(slot, int(length) + offset, int(token))
                    logits[slot, offset] = self.next_logits(self._written[slot])
        return logits

    def encode(self, slot: int, source: np.ndarray) -> None:
        raise AssertionError("the fake is decoder-only")

    def copy_slot(self, source: int, target: int, length: int, start: int = 0) -> None:
        assert start <= length <= len(self._written[source])
        assert self._written[target][:start] == self._written[source][:start], f"slot {target}: differs before {start}"
        assert self.rewinds or length == len(self._written[source])
        self._written[target] = self._written[source][:length]
        self._check_room()

    def read_state(self, slot: int, start: int, end: int) -> list[np.ndarray]:
        assert 0 <= start < end <= len(self._written[slot])
        return [np.array(self._written[slot][start:end], np.int64)]

    def write_state(self, slot: int, start: int, state: list[np.ndarray]) -> None:
        [tokens] = state
        for offset, token in enumerate(tokens):
            self._write(slot, start + offset, int(token))

    def take_state(self, slot: int) -> list[np.ndarray]:
        return [np.array(self._written[slot], np.int64)]

    def give_state(self, slot: int, length: int, state: list[np.ndarray]) -> None:
        assert length == len(state[0])
        self._written[slot] = state[0].tolist()
        self._check_room()

    def wrap_state(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        return arrays

    def free(self, slot: int) -> None:
        self._written[slot] = []

    def close(self) -> None:
        self.closed = True
