"""One token for each row that decodes, or several where guesses stand."""

from __future__ import annotations

import time

import numpy as np
from llmx.runtime.backend import Backend, recompute
from llmx.runtime.beam_requests import advance as advance_beams
from llmx.runtime.candidate_rows import choose_rows
from llmx.runtime.masks_ahead import MasksAhead
from llmx.runtime.scheduler import Scheduler, Sequence
from llmx.runtime.speculator import Speculator
from llmx.runtime.step_output import asked_now
from llmx.runtime.step_prefill import PrefillStage
from llmx.runtime.tracing import span


class DecodeStage:
    """Runs a plan's rows through the backend, and gives the logits to the output stage."""

    def __init__(
        self,
        backend: Backend,
        scheduler: Scheduler,
        speculator: Speculator | None,
        masks: MasksAhead,
        prefill: PrefillStage,
    ) -> None:
        self.backend, self.scheduler, self.speculator, self.masks = backend, scheduler, speculator, masks
        self._prefill, self.output = prefill, prefill.output

    def run(self, sequences: list[Sequence]) -> None:
        """Take a step with each of the sequences, which hold slots."""
        behind = [sequence for sequence in sequences if self._prefill.catch_up(sequence)]
        sequences = [s for s in sequences if s.slot is not None and s not in behind]
        if not sequences:
            return
        start = time.perf_counter()
        self._decode_rows(sequences)
        if self.speculator is not None and not behind:
            self.speculator.note_step(len(sequences), time.perf_counter() - start)

    def _decode_rows(self, sequences: list[Sequence]) -> None:
        """One token for each of the sequences, or several where guesses stand."""
        rows = self.scheduler.pool.num_rows
        tokens, lengths, active = np.zeros(rows, np.int64), np.zeros(rows, np.int64), np.zeros(rows, bool)
        temperatures = np.zeros(rows, np.float32)
        for idle in self.scheduler.pool.held():
            # a row in prefill keeps its length: what it writes there is overwritten
            lengths[idle.slot] = min(idle.num_cached, self.backend.max_length - 1)
        if self.speculator is not None:
            rest = self.speculator.run(sequences, lengths, self.output.take)
            if rest is not sequences:
                sequences = [s for s in rest if s.slot is not None]
                if not sequences:
                    return
                for sequence in self.scheduler.pool.held():
                    lengths[sequence.slot] = min(sequence.num_cached, self.backend.max_length - 1)
        for sequence in sequences:
            if sequence.num_cached == self.backend.recompute_at:
                assert sequence.slot is not None
                cached = np.array(sequence.tokens[: sequence.num_cached], np.int64)
                recompute(self.backend, sequence.slot, cached, self.scheduler.prefill_chunk)
                sequence.recomputed = True
            tokens[sequence.slot] = sequence.tokens[-1]
            lengths[sequence.slot] = sequence.num_cached
            active[sequence.slot] = True
            temperatures[sequence.slot] = asked_now(sequence)
        with span("decode"), self.masks.during([s.history for s in sequences]):
            logits = self.backend.decode(tokens, lengths, active, temperatures)
        with span("sample"):
            choices = choose_rows(
                logits,
                [
                    (s.slot, s.params, s.generator, float(temperatures[s.slot]))
                    for s in sequences
                    if s.slot is not None and s.request.beams is None
                ],
            )
        for sequence in sequences:
            slot = sequence.slot
            if slot is not None:  # else a sibling's failure has just ended its request
                sequence.num_cached += 1
                if sequence.request.beams is None:
                    self.output.advance(sequence, logits, slot, choices.get(slot))
        for request in {s.request.id: s.request for s in sequences if s.request.beams is not None}.values():
            advance_beams(self.output, request, [logits.row(beam.slot) for beam in request.beams.beams])
