"""What becomes of a continuation's state when its slot is taken from it, and how it comes back.

The prompt is computed again in the same chunks (or taken from the prefix cache). What steps had made of the output goes, where
there is room, into the memory of the prefix cache and back; otherwise the same steps are taken again, beside those of the
others, with the tokens that are known (`DecodeStage.run`). Chunks over the output would be quicker and are not taken: their
last bits differ from a step's. What else a continuation is made of (its random stream, its history, its text) stays with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmx.runtime.prefix_cache import PrefixCache
    from llmx.runtime.scheduler import Sequence


def give_up(sequence: Sequence, slot: int, cache: PrefixCache | None) -> None:
    """`sequence` has lost `slot`, which still holds its state."""
    sequence.request.metrics.num_preemptions += 1
    sequence.replay_to = max(sequence.replay_to, sequence.num_cached)
    if cache is not None and not sequence.recomputed:
        cache.park(sequence, slot)
    sequence.num_cached, sequence.recomputed = 0, False


def take_back(sequence: Sequence, cache: PrefixCache | None) -> None:
    """The state of the prompt is in the slot again: put what was kept of the output's behind it."""
    if cache is not None:
        cache.unpark(sequence)
