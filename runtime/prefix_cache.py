"""State of prompt prefixes, kept so that a prompt that begins as an earlier one did is not computed again.

A block is a whole prefill chunk: the state of `block` prompt tokens, copied out of the slot that computed it and keyed by
a hash of all tokens up to its end (as vLLM's automatic prefix caching, arXiv:2309.06180, names blocks). A hit copies it
into another slot. A chunk begins and ends at the same positions whether or not those before it came from here, so what
is restored, and what is computed after it, are bit for bit what a cold prefill computes. For the same reason state that
decode steps made is never kept.
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
    """Owns at most `max_bytes` of blocks, the least recently used out first.

    Invariant: a block is the state that a cold prefill of its tokens computes, whichever request asked for it.
    """

    def __init__(self, backend: Backend, block: int, max_bytes: int) -> None:
        self._backend, self._block, self.max_bytes = backend, block, max_bytes
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()  # least recently used first
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

    def clear(self) -> None:
        self._blocks.clear()
        self.num_bytes = 0

    def check_integrity(self) -> None:
        """Raises AssertionError unless the sizes add up and keep to the limit."""
        assert self.num_bytes == sum(block.num_bytes for block in self._blocks.values())
        assert self.num_bytes <= self.max_bytes, f"{self.num_bytes} bytes of prefixes, {self.max_bytes} allowed"

    def _put(self, key: bytes, state: list[np.ndarray], chain: set[bytes]) -> None:
        """Keep a block; of its own prompt's blocks none is given up for it, as they are of no use without each other."""
        size = sum(array.nbytes for array in state)
        while self.num_bytes + size > self.max_bytes:
            oldest = next(iter(self._blocks), None)
            if oldest is None or oldest in chain:
                return
            self.num_bytes -= self._blocks.pop(oldest).num_bytes
        self._blocks[key] = _Block(state, size)
        self.num_bytes += size

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
