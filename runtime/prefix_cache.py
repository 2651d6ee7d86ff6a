"""State of prompt prefixes, kept so that a prompt that begins as an earlier one did is not computed again.

A block is a whole prefill chunk: the state of `block` prompt tokens, copied out of the slot that computed it and keyed by
a hash of all tokens up to its end (as vLLM's automatic prefix caching, arXiv:2309.06180, names blocks). A hit copies it
into another slot. A chunk begins and ends at the same positions whether or not those before it came from here, so what
is restored, and what is computed after it, are bit for bit what a cold prefill computes. For the same reason state that
decode steps made is kept for the sequence that made it alone, while it waits to go on (`park`).
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from llmx.runtime.backend import Backend
    from llmx.runtime.scheduler import Request, Sequence


@dataclass(frozen=True)
class _Block:
    state: Any  # what `Backend.read_state` returned; never written
    num_bytes: int


class PrefixCache:
    """Owns at most `max_bytes` of blocks, the least recently used out first, and of preempted sequences' outputs.

    Invariant: a block is the state that a cold prefill of its tokens computes, whichever request asked for it.
    """

    def __init__(self, backend: Backend, block: int, max_bytes: int) -> None:
        self._backend, self._block, self.max_bytes = backend, block, max_bytes
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()  # least recently used first
        self._parked: dict[Sequence, tuple[int, _Block]] = {}  # from the output's first position to the one given
        self._key = secrets.token_bytes(16)  # nobody outside can make two prefixes collide
        self.num_bytes = 0
        self.num_queries = self.num_hits = 0  # prompt tokens looked up, and found

    def __len__(self) -> int:
        return len(self._blocks)

    def restore(self, sequence: Sequence) -> int:
        """Fill the sequence's slot with the blocks that follow what it holds; returns the tokens that this saved.

        The last token is always left to compute: its logits are wanted. Nothing is restored for a prompt whose
        log-probabilities are asked for, nor for an encoder-decoder.
        """
        request, start = sequence.request, sequence.num_cached
        if not self._serves(request) or start % self._block:
            return 0
        assert sequence.slot is not None
        keys = self._keys(request)
        while (index := sequence.num_cached // self._block) < len(keys) and keys[index] in self._blocks:
            self._backend.write_state(sequence.slot, sequence.num_cached, self._blocks[keys[index]].state)
            sequence.num_cached += self._block
        saved = sequence.num_cached - start
        self.num_hits += saved
        return saved

    def keep(self, sequence: Sequence, start: int, end: int) -> None:
        """Copy what the sequence's slot holds at `start` … `end - 1`, if that is a whole block of its prompt."""
        request = sequence.request
        if not self._serves(request) or start % self._block or end - start != self._block:
            return
        keys = self._keys(request)
        index = start // self._block
        if index < len(keys) and keys[index] not in self._blocks:
            assert sequence.slot is not None
            self._put(keys[index], self._backend.read_state(sequence.slot, start, end), set(keys))

    def ended(self, sequence: Sequence) -> None:
        """The prompt is computed: its blocks are the most recently used, the first of them last to go."""
        request = sequence.request
        if not self._serves(request):
            return
        self.num_queries += request.num_prompt
        for key in reversed(self._keys(request)):
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def park(self, sequence: Sequence, slot: int) -> None:
        """Keep what `slot` holds of the sequence's output, if there is room. Blocks give way to it."""
        start, end = sequence.num_prompt, sequence.num_cached
        if end <= start:
            return
        one = sum(array.nbytes for array in self._backend.read_state(slot, start, start + 1))
        size = one * (end - start)
        others = sum(block.num_bytes for _, block in self._parked.values())
        if others + size > self.max_bytes:  # no block needs to go for it
            return
        self._make_room(size, set())
        try:
            state = self._backend.read_state(slot, start, end)
        except MemoryError:
            return
        self._parked[sequence] = (end, _Block(state, size))
        self.num_bytes += size

    def unpark(self, sequence: Sequence) -> None:
        """Put the state of the sequence's output behind that of its prompt, if it was kept."""
        if sequence in self._parked:
            end, block = self._parked.pop(sequence)
            assert sequence.slot is not None and sequence.num_cached == sequence.num_prompt
            self._backend.write_state(sequence.slot, sequence.num_prompt, block.state)
            sequence.num_cached = end
            self.num_bytes -= block.num_bytes

    def forget_ended(self) -> None:
        """Let go of what was kept for sequences that have ended."""
        for sequence in [s for s in self._parked if s.finish_reason is not None]:
            self.num_bytes -= self._parked.pop(sequence)[1].num_bytes

    def clear(self) -> None:
        self._blocks.clear()
        self._parked.clear()
        self.num_bytes = 0

    def check_integrity(self) -> None:
        """Raises AssertionError unless the sizes add up and keep to the limit."""
        parked = sum(block.num_bytes for _, block in self._parked.values())
        assert self.num_bytes == sum(block.num_bytes for block in self._blocks.values()) + parked
        assert all(s.finish_reason is None and s.num_cached <= s.num_prompt for s in self._parked), "kept for nobody"
        assert self.num_bytes <= self.max_bytes, f"{self.num_bytes} bytes of prefixes, {self.max_bytes} allowed"

    def _put(self, key: bytes, state: list[np.ndarray], chain: set[bytes]) -> None:
        """Keep a block; of its own prompt's blocks none is given up for it, as they are of no use without each other."""
        size = sum(array.nbytes for array in state)
        if self._make_room(size, chain):
            self._blocks[key] = _Block(state, size)
            self.num_bytes += size

    def _make_room(self, size: int, chain: set[bytes]) -> bool:
        """Give up blocks, the least recently used first but none of `chain`, until `size` bytes fit; whether they do."""
        while self.num_bytes + size > self.max_bytes:
            oldest = next(iter(self._blocks), None)
            if oldest is None or oldest in chain:
                return False
            self.num_bytes -= self._blocks.pop(oldest).num_bytes
        return True

    @staticmethod
    def _serves(request: Request) -> bool:
        # a session's past was made by decode steps
        return request.source is None and request.session is None and request.params.prompt_logprobs is None

    def _keys(self, request: Request) -> list[bytes]:
        """A key for each whole block before the prompt's last token: a hash of the tokens from the beginning on.

        Where rotary factors follow the prompt's length (`rope_lengths`), so does the state, and the key has it too.
        """
        if request.block_keys is None:
            tokens = np.array(request.prompt_ids, np.int64)
            chain = request.num_prompt.to_bytes(8, "little") if self._backend.state_by_length else b""
            request.block_keys = []
            for start in range(0, len(tokens) - self._block, self._block):
                data = chain + tokens[start : start + self._block].tobytes()
                chain = hashlib.blake2b(data, digest_size=16, key=self._key).digest()
                request.block_keys.append(chain)
        return request.block_keys
