"""The prefill graph as CUDA graphs: prompts up to a thousand tokens, and guesses to be judged.

A prompt's kernels take less time than launching them one by one, so the graph is captured for some numbers of tokens.
A prompt is padded on its right to the next of them: attention is causal, so no token sees what comes after it, and only
the prompt's own positions are kept. First chunks run over a slot of their own, from which a slot gets its positions:
one graph serves all slots. Chunks that follow others run in place, one graph for each slot and width, the latest kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llmx.runtime.device_memory import Buffer, DeviceMemory
from llmx.runtime.device_state import DeviceState
from llmx.runtime.dtypes import itemsize, numpy_dtype
from llmx.runtime.manifest import Manifest
from llmx.runtime.ort_arrays import run_error
from llmx.runtime.providers import import_onnxruntime

#: Tokens of a first chunk that graphs are captured for. Longer ones keep the device busy while they are launched.
PROMPT_SIZES = (16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
#: Tokens of a later chunk: a token and guesses of what follows.
JUDGED_SIZES = (3, 5, 9, 17)
_KEPT_JUDGED = 32
_SCRATCH_BYTES = 16 << 20  # at most, of the slot that first chunks run over


class Chunk:
    """The prefill graph over fixed memory for `count` tokens and `asked` positions.

    One launch brings the inputs to the device, runs the graph and takes the most likely tokens back. It runs as it is the
    first time, which also makes onnxruntime allocate, and is captured the second time.
    """

    def __init__(
        self,
        session: Any,
        manifest: Manifest,
        memory: DeviceMemory,
        bind_state: Callable[[Any], None],
        count: int,
        asked: int,
        total: int,
        logits: Buffer,
    ) -> None:
        """`total`: what total_sequence_length says, which kernels are chosen by; row lengths are on the device.
        `logits`: where those of the asked positions go.
        """
        graph = manifest.graphs["prefill"]
        self._session, self._memory = session, memory
        self._count, self._asked = count, asked
        outputs = {info.role: info for info in graph.outputs}
        score = numpy_dtype(outputs["logits"].dtype)
        parts: dict[str, tuple[tuple[int, ...], np.dtype]] = {
            "input_ids": ((1, count), np.dtype(np.int64)),
            "position_ids": ((1, count), np.dtype(np.int64)),
            "rope_lengths": ((1, count), np.dtype(np.int64)),
            "logits_positions": ((1, asked), np.dtype(np.int64)),
            "seqlens_k": ((1,), np.dtype(np.int32)),
            "next_input_ids": ((1, asked), np.dtype(np.int64)),
            "greedy_logits": ((1, asked, 1), score),
        }
        spans, end, split = {}, 0, 0
        for role, (shape, dtype) in parts.items():
            split = end if role == "next_input_ids" else split
            spans[role] = end
            end = -(-(end + int(np.prod(shape)) * dtype.itemsize) // 16) * 16
        self._device, self._host = memory.allocate(end), memory.host_array((end,), np.dtype(np.uint8))
        self._split = split
        self._views = {
            role: self._host[spans[role] : spans[role] + int(np.prod(shape)) * dtype.itemsize].view(dtype)
            for role, (shape, dtype) in parts.items()
        }
        self._total = np.array(total, np.int32)  # read by a run, which does not own it
        self._binding = session.io_binding()
        bind_state(self._binding)
        for info in graph.inputs:
            if info.role == "total_sequence_length":
                self._binding.bind_cpu_input(info.name, self._total)
            elif info.role in parts:
                at = self._device.address + spans[info.role]
                memory.bind_input(self._binding, info.name, at, parts[info.role][0], info.dtype)
        for role in ("next_input_ids", "greedy_logits"):
            at = self._device.address + spans[role]
            memory.bind_output(self._binding, outputs[role].name, at, parts[role][0], outputs[role].dtype)
        shape = (1, asked, manifest.model.vocab_size)
        memory.bind_output(self._binding, outputs["logits"].name, logits.address, shape, outputs["logits"].dtype)
        self._options = import_onnxruntime().RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._options.add_run_config_entry("gpu_graph_id", "-1")  # captured here, not by onnxruntime
        self._captured: Any = None
        self._runs = 0

    def queue(self, token_ids: np.ndarray, start: int, asked: np.ndarray, length: int) -> None:
        """Queue int64 [n <= count] tokens at positions from `start` on, of a prompt of `length`; `asked` [k <= asked]
        columns. No earlier call may be under way.
        """
        at = np.arange(start, start + self._count)
        self._views["input_ids"][...] = 0
        self._views["input_ids"][: len(token_ids)] = token_ids
        self._views["position_ids"][...] = at
        self._views["rope_lengths"][...] = np.maximum(length, at + 1)
        self._views["logits_positions"][...] = asked[-1]
        self._views["logits_positions"][: len(asked)] = asked
        self._views["seqlens_k"][...] = start + self._count - 1
        self._runs += 1
        if self._runs == 2:
            self._captured = self._memory.capture(self._run)
        if self._captured is None:
            self._run()
        else:
            self._memory.launch(self._captured)

    def _run(self) -> None:
        self._memory.upload(self._device.address, self._host[: self._split])
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise run_error(error) from None
        self._memory.download(self._host[self._split :], self._device.address + self._split)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Most likely tokens int64 [asked] and their logits, once the queue has run dry."""
        return self._views["next_input_ids"].copy(), self._views["greedy_logits"].copy()

    def close(self) -> None:
        if self._captured is not None:
            self._memory.forget(self._captured)
        self._memory.free(self._device)
        self._memory.unpin(self._host)


class Chunks:
    """Chunks by size, made when they first occur."""

    def __init__(
        self,
        session: Any,
        manifest: Manifest,
        memory: DeviceMemory,
        state: DeviceState,
        max_length: int,
        logits: Buffer,
    ) -> None:
        """`logits`: of one row, where `first` leaves them."""
        self._session, self._manifest, self._memory, self._state = session, manifest, memory, state
        room = min(max_length, _SCRATCH_BYTES // max(1, manifest.state_bytes_per_token()))
        self._sizes = [size for size in PROMPT_SIZES if size <= room]
        self._scratch: DeviceState | None = None
        self._firsts: dict[int, Chunk] = {}
        self._judged: dict[tuple[int, int], Chunk] = {}  # by slot and width, the latest used last
        self._first_logits = logits
        self.logits: Buffer | None = None  # of the positions that `judge` ran

    def first(self, slot: int, token_ids: np.ndarray, length: int) -> tuple[int, float] | None:
        """Run a prompt's first chunk; the most likely token after its last, and its logit; None where it is too long."""
        size = next((size for size in self._sizes if size >= len(token_ids)), None)
        if size is None:
            return None
        if self._scratch is None:
            self._scratch = DeviceState(self._manifest, self._memory, 1, self._sizes[-1])
        scratch = self._scratch
        chunk = self._firsts.get(size)
        if chunk is None:
            chunk = self._firsts[size] = Chunk(
                self._session, self._manifest, self._memory, lambda binding: scratch.bind(binding, 0, 1), size, 1, size,
                self._first_logits,
            )  # fmt: skip
        chunk.queue(token_ids, 0, np.array([len(token_ids) - 1]), length)
        self._state.copy(slot, scratch, 0, 0, len(token_ids))
        self._memory.synchronize()
        tokens, scores = chunk.result()
        return int(tokens[0]), float(scores[0])

    def judge(self, slot: int, token_ids: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Run tokens after the `start` > 0 positions that a slot holds; the most likely token after each, and their
        logits; None where that is not what graphs are captured for. The rows stay in `logits`.
        """
        size = next((size for size in JUDGED_SIZES if size >= len(token_ids)), None)
        if size is None or start < 1 or start + size > self._state.length:
            return None
        if self.logits is None:
            row = self._manifest.model.vocab_size * itemsize(self._manifest.graphs["prefill"].outputs[0].dtype)
            self.logits = self._memory.allocate(JUDGED_SIZES[-1] * row)
        chunk = self._judged.pop((slot, size), None)
        if chunk is None:
            if len(self._judged) >= _KEPT_JUDGED:
                self._judged.pop(next(iter(self._judged))).close()
            chunk = Chunk(
                self._session, self._manifest, self._memory, lambda binding: self._state.bind(binding, slot, 1), size,
                size, self._state.length, self.logits,
            )  # fmt: skip
        self._judged[slot, size] = chunk
        chunk.queue(token_ids, start, np.arange(len(token_ids)), start + 1)
        self._memory.synchronize()
        tokens, scores = chunk.result()
        return tokens[: len(token_ids)], scores[: len(token_ids)]
