"""What an engine says of itself when it is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmx.runtime.llm import LLM


@dataclass(frozen=True)
class EngineStats:
    """Counts at one moment; those of tokens, look-ups and guesses only grow."""

    num_running: int = 0  # continuations that hold a slot
    num_waiting: int = 0  # those that wait for one
    num_cached: int = 0  # positions in use
    num_positions: int = 1
    num_output_tokens: int = 0
    num_preempted: int = 0
    num_prefix_queries: int = 0  # prompt tokens looked up
    num_prefix_hits: int = 0
    prefix_bytes: int = 0
    speculation: tuple[int, ...] | None = None  # passes that judged guesses, guesses, those that stood


def engine_stats(llm: LLM) -> EngineStats:
    """From any thread."""
    engine, budget = llm.engine, llm.backend.kv_budget
    held, cache, speculator = engine.scheduler.pool.held(), engine.prefix_cache, engine.speculator
    return EngineStats(
        len(held),
        len(engine.scheduler.waiting),
        sum(s.num_cached for s in held),
        llm.backend.slots * llm.max_length if budget is None else budget.positions,
        engine.num_output_tokens,
        engine.scheduler.num_preempted,
        cache.num_queries if cache else 0,
        cache.num_hits if cache else 0,
        cache.num_bytes if cache else 0,
        None if speculator is None else tuple(speculator.counts),
    )
