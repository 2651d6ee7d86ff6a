"""Prompts: a chunk at a time, what the prefix cache or a session holds left out."""

from __future__ import annotations

import time

import numpy as np
from llmx.runtime.backend import Backend
from llmx.runtime.beam_requests import advance as advance_beams
from llmx.runtime.masks_ahead import MasksAhead
from llmx.runtime.preemption import take_back
from llmx.runtime.prefix_cache import PrefixCache
from llmx.runtime.scheduler import PrefillPlan, Scheduler, Sequence
from llmx.runtime.step_logits import HostLogits, StepLogits
from llmx.runtime.step_output import OutputStage, asked_now
from llmx.runtime.tracing import span


class PrefillStage:
    """Runs the chunks of a plan; the last one of a prompt brings its first token."""

    def __init__(
        self,
        backend: Backend,
        scheduler: Scheduler,
        prefix_cache: PrefixCache | None,
        masks: MasksAhead,
        output: OutputStage,
    ) -> None:
        self.backend, self.scheduler, self.prefix_cache, self.output = backend, scheduler, prefix_cache, output
        self.masks = masks

    def run(self, plan: PrefillPlan) -> None:
        """Run one chunk; the sequence holds a slot."""
        sequence, cache = plan.sequence, self.prefix_cache
        last: StepLogits
        assert sequence.slot is not None
        metrics = sequence.request.metrics
        metrics.scheduled = metrics.scheduled or time.perf_counter()
        if sequence.request.session is not None and sequence.num_cached == 0:
            metrics.num_cached_tokens = sequence.num_cached = sequence.request.session.restore(self.backend, sequence)
            plan = self.scheduler.next_chunk(sequence)
        if cache is not None:
            saved = cache.restore(sequence)
            if not sequence.replay_to:  # what a request is told was spared at its beginning
                metrics.num_cached_tokens = max(metrics.num_cached_tokens, saved)
            plan = self.scheduler.next_chunk(sequence)
        tokens = np.array(sequence.tokens[plan.start : plan.end], np.int64)
        scored = sequence.params.prompt_logprobs is not None and sequence.request.prompt_logprobs is not None
        if plan.start == 0 and sequence.request.source is not None:
            with span("encode"):
                self.backend.encode(sequence.slot, sequence.request.source)
        # of all that will draw their first tokens from this row
        begun = (
            [s.history for s in sequence.request.sequences if not s.num_output] if sequence.history.has_grammar else []
        )
        with span("prefill"), self.masks.during(begun if plan.last else []):
            if plan.last and not scored:
                last = self.backend.prefill_last(
                    sequence.slot, tokens, plan.start, sequence.num_prompt, asked_now(sequence)
                )
            else:
                asked = np.arange(len(tokens) if scored else 0)
                logits = self.backend.prefill(sequence.slot, tokens, plan.start, asked, sequence.num_prompt)
                last = HostLogits(logits[-1:])
        sequence.num_cached = plan.end
        if cache is not None:
            cache.keep(sequence, plan.start, plan.end)
            if plan.last:
                cache.ended(sequence)
        if scored:
            self.output.note_prompt_logprobs(sequence, logits, plan.start)
        if not plan.last:
            return
        if sequence.num_output:  # it was preempted, and goes on from its own tokens
            take_back(sequence, cache)
            return
        if sequence.request.beams is not None:
            advance_beams(self.output, sequence.request, [last.row(0)])
            return
        if any(s is not sequence and s.finish_reason is None and s.prefilling for s in sequence.request.sequences):
            sequence.request.prompt_logits = last.row(0).copy()
        self.output.advance(sequence, last, 0)

    def catch_up(self, sequence: Sequence) -> bool:
        """Run in one chunk the tokens that a grammar has forced; whether there were any."""
        tokens = sequence.tokens
        if sequence.slot is None or sequence.num_cached == len(tokens) - 1:
            return False
        while sequence.num_cached < len(tokens):
            start, end = sequence.num_cached, min(len(tokens), sequence.num_cached + self.scheduler.prefill_chunk)
            last = [end - start - 1] if end == len(tokens) else []
            with self.masks.during([sequence.history] if last else []):
                logits = self._run_output(sequence, end, last)
            sequence.passes[start] = end
        self.output.advance(sequence, HostLogits(logits), 0)
        return True

    def replay(self, sequence: Sequence) -> bool:
        """Run again the pass that computed what follows in the sequence's output; whether it was one, and not a step."""
        end = sequence.passes.get(sequence.num_cached)
        if end is None:
            return False
        self._run_output(sequence, end, [])
        return True

    def _run_output(self, sequence: Sequence, end: int, asked: list[int]) -> np.ndarray:
        """One pass over the output's tokens up to `end`; logits [k, vocab] of its asked columns."""
        start, slot = sequence.num_cached, sequence.slot
        assert slot is not None
        tokens = np.array(sequence.tokens[start:end], np.int64)
        # each is at its own position what a decode step would make of it, not part of a longer prompt
        with span("prefill"):
            logits = self.backend.prefill(slot, tokens, start, np.array(asked, np.int64), start + 1)
        sequence.num_cached = end
        return logits
