"""A package whose weights, state and logits stay in a device's memory (CUDA; the CPU for tests)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llmx.runtime.device_chunks import Chunks
from llmx.runtime.device_memory import Buffer, DeviceMemory
from llmx.runtime.device_prefill import Prefill
from llmx.runtime.device_state import DeviceState
from llmx.runtime.device_steps import SPARE_POSITIONS, CandidatesStep, DecodeStep, buckets
from llmx.runtime.dtypes import itemsize, numpy_dtype
from llmx.runtime.kv_budget import KVBudget
from llmx.runtime.manifest import Manifest
from llmx.runtime.ort_arrays import run_error
from llmx.runtime.providers import import_onnxruntime
from llmx.runtime.state import StatePlan
from llmx.runtime.step_logits import DeviceLogits, HostLogits, StepLogits, TopRows

_DRIFT = 64  # positions that a row which is not meant may wander before it is called back


class DeviceBackend:
    """Graphs on a device with memory of its own: a greedy step is one launch and one small copy.

    Invariants: past and present of a state tensor are the same memory. A slot's first `_held[slot]` positions may be in
    use; rows that a call does not mean write past them alone.
    """

    chunked = rewinds = stores_state = True
    kv_budget: KVBudget | None = None  # buffers are allocated whole
    verifies_batches = False  # a call with past and several new tokens has batch 1 there
    prefill_chunk = 2048

    def __init__(
        self, manifest: Manifest, sessions: dict[str, Any], memory: DeviceMemory, plan: StatePlan, ahead: bool = True
    ) -> None:
        """`ahead`: start the next greedy step before the caller has seen this one's tokens."""
        self.manifest, self._sessions, self._memory = manifest, sessions, memory
        self.slots, self.max_length = plan.slots, plan.max_length
        self.vocab_size, self.recompute_at = manifest.model.vocab_size, manifest.model.recompute_at
        self.state_by_length = any(t.role == "rope_lengths" for g in manifest.graphs.values() for t in g.inputs)
        self.last_hidden: np.ndarray | None = None
        self._length = plan.max_length + SPARE_POSITIONS
        self._ahead = ahead
        self._logits_dtype = manifest.graphs["decode"].outputs[0].dtype
        self._state = DeviceState(manifest, memory, plan.slots, self._length)
        self._logits = memory.allocate(plan.slots * self._row_bytes)
        self._held = np.zeros(plan.slots, np.int64)
        self._buckets = buckets(plan.slots)
        self._steps: dict[int, DecodeStep] = {}
        self._candidates: dict[int, CandidatesStep] = {}
        self._flying: tuple[DecodeStep, int, np.ndarray] | None = None  # a step that runs ahead: what it returns
        self._changed = np.zeros(plan.slots, bool)  # slots whose state is another than that step's
        self._joined: dict[int, tuple[int, int]] = {}  # prompts ended since the last step: next token and its position
        self._prompts = Prefill(sessions["prefill"], manifest, memory, self._state.bind)
        self._chunks = Chunks(sessions["prefill"], manifest, memory, self._state, self.max_length, self._prompts.logits)
        self._prompt_candidates: CandidatesStep | None = None
        self._judged_candidates: dict[int, CandidatesStep] = {}  # by rows
        self._options = import_onnxruntime().RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._options.add_run_config_entry("gpu_graph_id", "-1")  # the backend captures its graphs itself

    @property
    def _row_bytes(self) -> int:
        return self.vocab_size * itemsize(self._logits_dtype)

    # -- prefill ------------------------------------------------------------------------------------------------------

    def prefill(
        self, slot: int, token_ids: np.ndarray, start: int, positions: np.ndarray, prompt_length: int | None = None
    ) -> np.ndarray:
        end = self._begin(slot, token_ids, start)
        made = self._prompts.positions(slot, token_ids, start, positions, prompt_length or end)
        self.last_hidden = made.get("last_hidden_state")
        logits: np.ndarray = made["logits"]
        return logits

    def prefill_last(
        self,
        slot: int,
        token_ids: np.ndarray,
        start: int,
        prompt_length: int | None = None,
        temperature: float = -1.0,
    ) -> StepLogits:
        end = self._begin(slot, token_ids, start)
        made = self._chunks.first(slot, token_ids, prompt_length or end) if start == 0 else None
        token, logit = made or self._prompts.last(slot, token_ids, start, prompt_length or end)
        top: CandidatesStep | None = None
        if temperature > 0 and "candidates" in self._sessions:
            top = self._prompt_candidates = self._prompt_candidates or self._candidates_of(1, self._prompts.logits)
            top.queue(np.full(1, temperature, np.float32), self._options)
            self._memory.synchronize()
        elif temperature == 0:
            self._joined[slot] = (token, end)
        best, score = np.array([token]), np.array([logit], np.float32)
        return DeviceLogits(self._read_prompt_rows, best, score, _tops(top, np.full(1, temperature, np.float32)))

    def prefill_each(self, slot: int, token_ids: np.ndarray, start: int, temperature: float = -1.0) -> StepLogits:
        self._begin(slot, token_ids, start)
        judged = self._chunks.judge(slot, token_ids, start)
        if judged is None:
            return HostLogits(self.prefill(slot, token_ids, start, np.arange(len(token_ids)), start + 1))
        count, top = len(token_ids), None
        logits = self._chunks.logits
        assert logits is not None
        asks = np.full(count, temperature, np.float32)
        if temperature > 0 and "candidates" in self._sessions:
            top = self._judged_candidates.get(count)
            if top is None:
                top = self._judged_candidates[count] = self._candidates_of(count, logits)
            top.queue(asks, self._options)
            self._memory.synchronize()
        return DeviceLogits(functools.partial(self._read_judged_rows, logits), *judged, _tops(top, asks))

    def _read_judged_rows(self, logits: Buffer, first: int, count: int) -> np.ndarray:
        return self._read_logits(logits.address + first * self._row_bytes, count)

    def _begin(self, slot: int, token_ids: np.ndarray, start: int) -> int:
        """Check a chunk's place and note it as held; returns its end."""
        end = start + len(token_ids)
        assert start >= 0 and end <= self.max_length and 0 <= slot < self.slots
        self._memory.activate()
        self._note_changed(slot, end)
        return end

    def _note_changed(self, slot: int, held: int) -> None:
        self._held[slot] = held
        self._changed[slot] = True
        self._joined.pop(slot, None)

    def _read_prompt_rows(self, first: int, count: int) -> np.ndarray:
        return self._read_logits(self._prompts.logits.address, count)

    # -- decode -------------------------------------------------------------------------------------------------------

    def decode(
        self,
        token_ids: np.ndarray,
        lengths: np.ndarray,
        active: np.ndarray | None = None,
        temperatures: np.ndarray | None = None,
    ) -> StepLogits:
        count = len(token_ids)
        self._memory.activate()
        step = self._step(next(size for size in self._buckets if size >= count))
        meant = np.zeros(step.rows, bool)
        meant[:count] = True if active is None else active
        self._held[:count][meant[:count]] = lengths[meant[:count]] + 1
        greedy = temperatures is not None and bool((temperatures[meant[:count]] == 0).all())
        _, mark, result = self._launched(step, token_ids, lengths, meant)
        tokens, places = step.tokens, step.lengths
        assert tokens is not None
        joined, self._joined = self._joined, {}
        ahead = greedy and self._ahead and int(places[meant].max(initial=0)) + 2 < self._length
        ready = not joined and self._is_free(places + 1, meant)
        if ahead and ready:
            self._launch_ahead(step)
        top: CandidatesStep | None = None
        if temperatures is not None and bool((temperatures > 0).any()) and "candidates" in self._sessions:
            top = self._candidates_step(step.rows)
            asks = np.zeros(step.rows, np.float32)
            asks[:count] = temperatures
            top.queue(asks, self._options)
            self._memory.synchronize()
        else:
            self._memory.wait(mark)
        best = step.block.view(result, "input_ids").copy()
        scores = step.block.view(result, "greedy_logits")[:count].copy()
        step.tokens, step.lengths = best, places + 1
        if ahead and not ready:
            self._join(step, joined, meant)
            self._launch_ahead(step)
        read = functools.partial(self._read_rows, step, tokens, places, meant)
        return DeviceLogits(read, best[:count], scores, _tops(top, temperatures))

    def _launched(self, step: DecodeStep, token_ids: np.ndarray, lengths: np.ndarray, meant: np.ndarray) -> Any:
        """The step that is asked for: the one that runs ahead, if it is that, or one launched now."""
        asked = step.tokens is not None and bool(
            (step.tokens[: len(token_ids)] == token_ids)[meant[: len(token_ids)]].all()
            and (step.lengths[: len(lengths)] == lengths)[meant[: len(lengths)]].all()
        )
        flying, self._flying = self._flying, None
        if flying is not None:
            if flying[0] is step and asked and not (self._changed[: step.rows] & meant).any():
                return flying  # rows that are not meant wrote before whatever has been put into their slots since
            flying[0].tokens = None  # its block is a step further than the caller
            asked = asked and flying[0] is not step
        if not (asked and self._is_free(step.lengths, meant)):
            tokens, places = np.zeros(step.rows, np.int64), self._floor(step.rows)
            tokens[: len(token_ids)] = token_ids
            places[: len(lengths)][meant[: len(lengths)]] = lengths[meant[: len(lengths)]]
            step.upload(tokens, places)
        return (step, *step.launch())

    def _launch_ahead(self, step: DecodeStep) -> None:
        self._flying = (step, *step.launch())
        self._changed[:] = False

    def _join(self, step: DecodeStep, joined: dict[int, tuple[int, int]], meant: np.ndarray) -> None:
        """Make the block hold what will be asked for next: the most likely tokens, and those of prompts that have ended."""
        assert step.tokens is not None
        places = np.where(meant, step.lengths, self._floor(step.rows))
        tokens = step.tokens.copy()
        for slot, (token, length) in joined.items():
            if slot < step.rows and not meant[slot]:
                tokens[slot], places[slot] = token, length
        step.upload(tokens, places)

    def _step(self, rows: int) -> DecodeStep:
        step = self._steps.get(rows)
        if step is None:
            step = DecodeStep(
                self._sessions["decode"],
                self.manifest,
                self._memory,
                self._state.bind,
                rows,
                self._logits,
                self._length,
            )
            step.upload(np.zeros(rows, np.int64), np.minimum(self._held[:rows], self.max_length))
            try:
                step.prepare(self._options)
            except Exception as error:  # onnxruntime's exceptions share no base but Exception
                raise run_error(error) from None
            step.tokens = None
            self._steps[rows] = step
        return step

    def _candidates_step(self, rows: int) -> CandidatesStep:
        if rows not in self._candidates:
            self._candidates[rows] = self._candidates_of(rows, self._logits)
        return self._candidates[rows]

    def _candidates_of(self, rows: int, logits: Buffer) -> CandidatesStep:
        return CandidatesStep(self._sessions["candidates"], self.manifest, self._memory, rows, logits)

    def _is_free(self, places: np.ndarray, meant: np.ndarray) -> bool:
        """Whether the rows that are not meant, at `places`, write past what their slots hold, and not far past it."""
        floor = self._floor(len(places))
        free = (places >= floor) & (places < np.minimum(floor + _DRIFT, self._length - 1))
        return bool(free[~meant].all())

    def _floor(self, rows: int) -> np.ndarray:
        """Where rows that are not meant may write: past what they hold."""
        return np.minimum(self._held[:rows], self.max_length)

    def _read_rows(
        self, step: DecodeStep, tokens: np.ndarray, lengths: np.ndarray, meant: np.ndarray, first: int, count: int
    ) -> np.ndarray:
        """Logits [count, vocab] of rows of the last step, which ran on `tokens` at `lengths`."""
        self._memory.activate()
        if self._flying is not None:  # it has overwritten the logits: they are computed once more
            self._flying = None
            step.upload(tokens, np.where(meant, lengths, self._floor(step.rows)))
            self._memory.wait(step.launch()[0])
            step.tokens = None
        return self._read_logits(self._logits.address + first * self._row_bytes, count)

    def _read_logits(self, address: int, count: int) -> np.ndarray:
        array = np.empty((count, self.vocab_size), numpy_dtype(self._logits_dtype))
        self._memory.activate()
        self._memory.download(array.view(np.uint8), address)
        self._memory.synchronize()
        return array

    # -- the rest -----------------------------------------------------------------------------------------------------

    def verify(self, token_ids: np.ndarray, lengths: np.ndarray, counts: np.ndarray) -> np.ndarray:
        raise AssertionError("guesses are judged slot by slot on a device")

    def encode(self, slot: int, source: np.ndarray) -> None:
        raise AssertionError("a decoder-only package has no encoder")

    def copy_slot(self, source: int, target: int, length: int, start: int = 0) -> None:
        self._memory.activate()
        self._note_changed(target, length)
        self._state.copy(target, self._state, source, start, length)

    def read_state(self, slot: int, start: int, end: int) -> list[np.ndarray]:
        self._memory.activate()
        return self._state.read(slot, start, end)

    def write_state(self, slot: int, start: int, state: list[np.ndarray]) -> None:
        self._memory.activate()
        self._note_changed(slot, start + state[0].shape[1] if state else int(self._held[slot]))
        self._state.write(slot, start, state)

    def free(self, slot: int) -> None:
        raise AssertionError("a device's buffers are whole")

    def close(self) -> None:
        """Free sessions, state and weights; the backend must not be used afterwards."""
        self._flying = None
        self._memory.activate()
        self._memory.synchronize()
        self._steps, self._candidates, self._judged_candidates, self._prompt_candidates = {}, {}, {}, None
        self._sessions.clear()
        self._memory.close()


def _tops(step: CandidatesStep | None, temperatures: np.ndarray | None) -> Callable[[], TopRows] | None:
    return None if step is None or temperatures is None else functools.partial(step.tops, temperatures)
