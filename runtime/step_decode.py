"""One token for each row that decodes, or several where guesses stand."""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
from llmx.runtime.backend import Backend, recompute
from llmx.runtime.beam_requests import advance as advance_beams
from llmx.runtime.candidate_rows import Rows
from llmx.runtime.candidates import WHOLE_ROW
from llmx.runtime.masks_ahead import MasksAhead
from llmx.runtime.scheduler import Scheduler, Sequence
from llmx.runtime.step_output import asked_now
from llmx.runtime.step_prefill import PrefillStage
from llmx.runtime.tracing import span

if TYPE_CHECKING:
    from llmx.runtime.speculator import Speculator


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
        self._batch = _Batch([])

    def run(self, sequences: list[Sequence]) -> None:
        """Take a step with each of the sequences, which hold slots."""
        behind = [s for s in sequences if s.num_cached + 1 < len(s.history.tokens)]
        known: list[Sequence] = []  # those whose next token is not to be chosen
        if behind:
            ran = [s for s in behind if (self._prefill.replay(s) if s.replaying else self._prefill.catch_up(s))]
            known = [s for s in behind if s not in ran and s.slot is not None]
            sequences = [s for s in sequences if s.slot is not None and s not in behind]
        if self.scheduler.room is not None and any(s.request.beams is not None for s in sequences):
            sequences = _whole(sequences)
        if not sequences and not known:
            return
        start = time.perf_counter()
        self._decode_rows(sequences, known)
        if self.speculator is not None and not behind:
            self.speculator.note_step(len(sequences), time.perf_counter() - start)

    def _decode_rows(self, sequences: list[Sequence], known: list[Sequence]) -> None:
        """One token for each of the sequences, or several where guesses stand. `known`: what was preempted takes the steps
        that it had taken before, and nothing is made of their logits.
        """
        rows = self.scheduler.pool.num_rows
        if self.speculator is not None:
            rest = self.speculator.run(sequences, lambda: self._lengths(rows, []), self.output.take, self.masks)
            if rest is not sequences:
                sequences = [s for s in rest if s.slot is not None]
                known = [s for s in known if s.slot is not None]  # else a sibling's failure has just ended its request
                if not sequences and not known:
                    return
        if self.backend.recompute_at is not None:
            for sequence in [*sequences, *known]:
                self._recompute(sequence)
        batch = self._batch = self._batch if self._batch.is_of(sequences) else _Batch(sequences)
        tokens, active = np.zeros(rows, np.int64), np.zeros(rows, bool)
        tokens[batch.slots] = [s.history.tokens[-1] for s in sequences]
        active[batch.slots] = True
        temperatures = np.zeros(rows, np.float32)
        temperatures[batch.slots] = batch.asks
        if known:
            for sequence in known:
                tokens[sequence.slot], active[sequence.slot] = sequence.tokens[sequence.num_cached], True
        lengths = self._lengths(rows, [*sequences, *known] if known else sequences)
        with span("decode"):
            if batch.histories:
                with self.masks.during(batch.histories):
                    logits = self.backend.decode(tokens, lengths, active, temperatures)
            else:
                logits = self.backend.decode(tokens, lengths, active, temperatures)
        for sequence in known:
            sequence.num_cached += 1
        if not sequences:
            return
        with span("sample"):
            chosen = batch.rows.choose(logits)
        self.output.advance_rows(sequences, logits, chosen)
        if batch.searches:
            for request in {s.request.id: s.request for s in sequences if s.request.beams is not None}.values():
                advance_beams(self.output, request, [logits.row(beam.slot) for beam in request.beams.beams])

    def forget(self) -> None:
        """Keep nothing of the last step's sequences."""
        self._batch = _Batch([])

    def _lengths(self, rows: int, sequences: list[Sequence]) -> np.ndarray:
        """int64 [rows]: positions that the slots hold, those of `sequences`, which decode, and all others."""
        lengths = np.zeros(rows, np.int64)
        held = self.scheduler.pool.held()
        if len(sequences) != len(held):
            # a row in prefill keeps its length: what it writes there is overwritten
            lengths[_slots(held)] = [min(s.num_cached, self.backend.max_length - 1) for s in held]
        lengths[_slots(sequences)] = [s.num_cached for s in sequences]
        return lengths

    def _recompute(self, sequence: Sequence) -> None:
        if sequence.num_cached == self.backend.recompute_at:
            assert sequence.slot is not None
            cached = np.array(sequence.tokens[: sequence.num_cached], np.int64)
            recompute(self.backend, sequence.slot, cached, self.scheduler.prefill_chunk)
            sequence.recomputed = True


def _slots(sequences: list[Sequence]) -> list[int]:
    return [s.slot for s in sequences if s.slot is not None]


def _whole(sequences: list[Sequence]) -> list[Sequence]:
    """Without the beams of a search of which not all can take this step: after a preemption one is back before the other."""
    present = Counter(s.request.id for s in sequences)
    return [s for s in sequences if s.request.beams is None or present[s.request.id] == len(s.request.beams.beams)]


class _Batch:
    """The rows of a step, and what stays the same while they do."""

    def __init__(self, sequences: list[Sequence]) -> None:
        self._sequences = sequences
        self.slots = _slots(sequences)
        self.asks = [asked_now(s) for s in sequences]
        self.histories = [s.history for s in sequences if s.history.has_grammar]
        self.searches = any(s.request.beams is not None for s in sequences)
        # a search gives its beams other histories; a short output asks for other things than a longer one
        self._changes = self.searches or any(s.num_output < s.whole_until < math.inf for s in sequences)
        # a beam's row is read whole, by its search
        self.rows = Rows(
            self.slots,
            [s.params for s in sequences],
            [s.generator for s in sequences],
            [WHOLE_ROW if s.request.beams is not None else ask for s, ask in zip(sequences, self.asks, strict=True)],
        )

    def is_of(self, sequences: list[Sequence]) -> bool:
        """Whether it can be used for a step of `sequences` as they are now."""
        return not self._changes and self._sequences == sequences and self.slots == _slots(sequences)
