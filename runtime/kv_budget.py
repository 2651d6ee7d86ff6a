"""How much state all slots may hold together, where that is less than a whole context for each of them.

Who runs then is decided by what there is room for: the youngest continuation gives its slot back when those that are older
need its blocks (`Scheduler.plan`), as vLLM's does (arXiv:2309.06180, section 4.5).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmx.runtime.dtypes import itemsize
from llmx.runtime.errors import OutOfMemoryError, RequestError
from llmx.runtime.manifest import Manifest
from llmx.runtime.units import human_bytes

if TYPE_CHECKING:
    from llmx.runtime.scheduler import Sequence

PAGE = mmap.PAGESIZE
NAME = "kv_cache_memory_bytes"  # vLLM's


@dataclass(frozen=True)
class KVBudget:
    """A bound in blocks, which the scheduler keeps.

    A block is `block` positions of one slot and `block_bytes` over all layers: where the state lies in pages, the fewest
    positions that fill whole ones, so that what is counted is what is resident. Every slot takes one, whoever holds it:
    a step writes at an idle row's next position. `max_length`: a sequence's most positions, for which there is room.
    """

    blocks: int
    block: int
    block_bytes: int
    max_length: int

    def of(self, positions: int) -> int:
        """Blocks of a slot of which so many positions may be in use."""
        return max(1, -(-min(positions, self.max_length) // self.block))

    @property
    def positions(self) -> int:
        return self.blocks * self.block


class KVRoom:
    """Counts the blocks that slots take: of a held one those for its holder's tokens and `ahead` more positions (guesses that
    a pass may write, and the next position, where a row writes that idles in a step), of a free one one.
    """

    def __init__(self, budget: KVBudget, slots: int, ahead: int = 1) -> None:
        self.budget, self._slots, self._ahead = budget, slots, ahead

    def of(self, sequence: Sequence) -> int:
        return self.budget.of(len(sequence.history.tokens) + self._ahead)

    def left(self, held: Iterable[Sequence]) -> int:
        """Blocks that nobody takes; below 0 where the holders have outgrown the budget."""
        return self.budget.blocks - self._slots - sum(self.of(sequence) - 1 for sequence in held)

    def admits(self, held: list[Sequence], more: list[Sequence]) -> bool:
        """Whether `more` may join: there is a block to grow by for each that runs, so that none is preempted at once."""
        return self.left([*held, *more]) >= len(held)

    def ever_holds(self, sequences: int, positions: int) -> bool:
        """Whether so many sequences of so many positions fit at the same time."""
        return self.budget.of(positions + self._ahead) * sequences + self._slots - sequences <= self.budget.blocks


def page_block(manifest: Manifest) -> int:
    """The fewest positions that fill whole pages in every tensor of an in-place state."""
    block = 1
    for tensor in manifest.state:
        row = int(tensor.shape[-1]) * itemsize(tensor.dtype)
        block = math.lcm(block, PAGE // math.gcd(PAGE, row))
    return block


def plan_budget(
    manifest: Manifest, bound: int, slots: int, free: int, longest: int, max_length: int | None
) -> tuple[int, KVBudget | None]:
    """(positions of a sequence, the bound in blocks) for `bound` bytes of state that all slots share; no bound where it
    cannot be reached.

    `free`: bytes that may be used; `longest`: the default for `max_length`, where the bound allows it. A state that grows
    (layout `grow`) is made anew beside the old one, a slot at a time: the bound has room for that. Raises RequestError
    where it does not hold one whole sequence, OutOfMemoryError where it is more than what is free.
    """
    if bound > free:
        raise OutOfMemoryError(
            f"{NAME} is {human_bytes(bound)} and {human_bytes(max(0, free))} are free; give less, or free some memory."
        )
    per_token, in_place = manifest.state_bytes_per_token(), all(t.layout == "in_place" for t in manifest.state)
    fixed = manifest.state_bytes_per_slot() * slots
    block = page_block(manifest) if in_place else 1
    copies = 1 if in_place else 2
    if not per_token:
        if fixed > bound:
            raise _too_small(bound, slots, 1, fixed)
        return max_length or longest, None
    blocks = max(0, bound - fixed) // (per_token * block)
    most = (blocks - (slots - 1)) // copies * block  # each other slot takes a block
    if max_length is None:
        max_length = min(longest, most)
    if max_length > most or max_length < 2:
        wanted = max(2, max_length)
        raise _too_small(bound, slots, wanted, fixed + (-(-wanted // block) * copies + slots - 1) * block * per_token)
    whole = -(-max_length // block)
    left = blocks - (copies - 1) * whole
    budget = KVBudget(left, block, block * per_token, max_length)
    return max_length, None if whole * slots <= left else budget


def whole_slots(manifest: Manifest, bound: int, slots: int, longest: int, max_length: int | None) -> int:
    """Positions of a slot where all are allocated whole (on a device) and take no more than `bound` bytes together.

    Raises RequestError where that is less than `max_length`.
    """
    per_token, fixed = manifest.state_bytes_per_token(), manifest.state_bytes_per_slot() * slots
    most = max(0, bound - fixed) // max(1, per_token * slots)
    length = min(longest, most) if max_length is None else max_length
    if length > most or length < 2:
        raise RequestError(
            f"{NAME} is {bound:,} and {slots} slots, which a device allocates whole, take "
            f"{fixed + per_token * slots * max(2, length):,} at {max(2, length):,} positions; raise it, or lower max_length "
            "or slots."
        )
    return length


def _too_small(bound: int, slots: int, length: int, needed: int) -> RequestError:
    return RequestError(
        f"{NAME} is {bound:,} and must hold a sequence of max_length {length:,} beside {slots} slots, which takes "
        f"{needed:,}; raise it, or lower max_length or slots."
    )
