"""One decode step of a fixed number of rows on a device: its inputs in one block, its launch, what comes back.

A block holds the step's small inputs side by side, the most likely tokens and their logits first:

    input_ids int64 [rows] | greedy_logits [rows] | position_ids int64 | rope_lengths int64 | seqlens_k int32

so that one copy brings the inputs in and one takes the result out. The graph's outputs `next_*` are bound to the inputs'
own memory: after a step the block holds the inputs of the next one, if the most likely tokens are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from llmx.runtime.device_memory import Buffer, DeviceMemory
from llmx.runtime.dtypes import itemsize, numpy_dtype
from llmx.runtime.manifest import GraphInfo, Manifest, TensorInfo
from llmx.runtime.step_logits import TopRows

#: Positions past max_length that every slot's buffer has: rows that are not meant, warm-up runs and steps that run ahead
#: write there at most.
SPARE_POSITIONS = 3

_CANDIDATE_ROWS = 8  # whose candidates are found at once

_PARTS = ("input_ids", "greedy_logits", "position_ids", "rope_lengths", "seqlens_k")


def buckets(slots: int) -> list[int]:
    """Row counts that steps are made for: few enough to keep, close enough to waste little."""
    sizes, size = [], 1
    while size < slots:
        sizes += [size, size * 3 // 2] if size >= 2 else [size]
        size *= 2
    return sorted({size for size in sizes if size < slots} | {slots})


@dataclass(frozen=True)
class Block:
    """Where the parts of a block lie: (offset, dtype) of each, `nbytes` in all, `head` of what a step returns."""

    rows: int
    parts: dict[str, tuple[int, np.dtype]]
    nbytes: int
    head: int

    @staticmethod
    def of(rows: int, logits: np.dtype) -> Block:
        parts, at, head = {}, 0, 0
        for name in _PARTS:
            dtype = {"greedy_logits": logits, "seqlens_k": np.dtype(np.int32)}.get(name, np.dtype(np.int64))
            parts[name] = (at, dtype)
            at = -(-(at + rows * dtype.itemsize) // 16) * 16
            head = at if name == "greedy_logits" else head
        return Block(rows, parts, at, head)

    def view(self, array: np.ndarray, name: str) -> np.ndarray:
        """A part [rows] of a host copy (uint8) of the block."""
        offset, dtype = self.parts[name]
        view: np.ndarray = array[offset : offset + self.rows * dtype.itemsize].view(dtype)
        return view


class DecodeStep:
    """The decode graph bound for `rows` rows: slots 0 … rows - 1.

    `tokens` and `lengths` [rows] are what the block on the device holds, as far as the host knows: the next step's inputs.
    """

    def __init__(
        self,
        session: Any,
        manifest: Manifest,
        memory: DeviceMemory,
        bind_state: Callable[[Any, int, int], None],
        rows: int,
        logits: Buffer,
        total: int,
    ) -> None:
        """`bind_state(binding, first, rows)` binds past and present; `total`: the state buffers' length."""
        graph: GraphInfo = manifest.graphs["decode"]
        self.rows, self._memory, self._session = rows, memory, session
        dtype = numpy_dtype(graph.outputs[0].dtype)
        self.block = Block.of(rows, dtype)
        self._device = memory.allocate(self.block.nbytes)
        self._host = memory.host_array((self.block.nbytes,), np.dtype(np.uint8))
        self._results = [memory.host_array((self.block.head,), np.dtype(np.uint8)) for _ in range(2)]
        self._turn = 0
        self.tokens: np.ndarray | None = None
        self.lengths = np.zeros(rows, np.int64)
        self._total = memory.host_array((), np.dtype(np.int32))
        self._total[...] = total
        self.binding = session.io_binding()
        self._bind(graph, logits, manifest.model.vocab_size)
        bind_state(self.binding, 0, rows)
        self._launch: Any = None

    def _bind(self, graph: GraphInfo, logits: Buffer, vocab: int) -> None:
        from llmx.runtime.providers import import_onnxruntime

        for info in graph.inputs:
            if info.role == "total_sequence_length":
                value = import_onnxruntime().OrtValue.ortvalue_from_numpy(self._total)
                self.binding.bind_ortvalue_input(info.name, value)
            elif info.role in self.block.parts:
                self._memory.bind_input(self.binding, info.name, *self._part(info))
        for info in graph.outputs:
            if info.role == "logits":
                shape = (self.rows, 1, vocab)
                self._memory.bind_output(self.binding, info.name, logits.address, shape, info.dtype)
            elif info.role.removeprefix("next_") in self.block.parts:
                self._memory.bind_output(self.binding, info.name, *self._part(info))

    def _part(self, info: TensorInfo) -> tuple[int, tuple[int, ...], str]:
        """Address, shape and dtype of the part that an input, or the output that feeds it, is bound to."""
        offset = self.block.parts[info.role.removeprefix("next_")][0]
        shape = tuple(self.rows if isinstance(dim, str) else dim for dim in info.shape)
        return self._device.address + offset, shape, info.dtype

    def upload(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Make the block hold int64 [rows] tokens at positions `lengths`."""
        self._memory.synchronize()  # an earlier copy may still read the host's block
        for name, values in (
            ("input_ids", tokens),
            ("position_ids", lengths),
            ("rope_lengths", lengths + 1),
            ("seqlens_k", lengths),
        ):
            self.block.view(self._host, name)[...] = values
        self._memory.upload(self._device.address, self._host)
        self.tokens, self.lengths = tokens.copy(), lengths.copy()

    def prepare(self, options: Any) -> None:
        """Run the graph until nothing new is allocated, and capture it. The block holds rubbish afterwards."""

        def run() -> None:
            self._session.run_with_iobinding(self.binding, options)

        for _ in range(2):
            run()
        self._launch = self._memory.capture(run)

    @property
    def prepared(self) -> bool:
        return self._launch is not None

    def launch(self) -> tuple[Any, np.ndarray]:
        """Queue a step on what the block holds. Returns what to wait for, and the host's copy of its result.

        Two results are kept: the one before the last launch stays valid until the next.
        """
        self._memory.launch(self._launch)
        self._turn ^= 1
        result = self._results[self._turn]
        self._memory.download(result, self._device.address)
        return self._memory.mark(self._turn), result


class CandidatesStep:
    """The candidates graph bound for `rows` rows of the logits buffer, a few at a time: it widens the logits to float32,
    several times over.
    """

    def __init__(self, session: Any, manifest: Manifest, memory: DeviceMemory, rows: int, logits: Buffer) -> None:
        graph = manifest.graphs["candidates"]
        self._memory, self._session = memory, session
        count = int(next(t.shape[1] for t in graph.outputs if t.role == "top_logits"))
        sizes = {"top_ids": 8 * count, "top_logits": 4 * count, "log_sum": 4}
        self._device = memory.allocate(rows * (sum(sizes.values()) + 4))
        self._host = memory.host_array((rows * sum(sizes.values()),), np.dtype(np.uint8))
        self._temperatures = memory.host_array((rows,), np.dtype(np.float32))
        offset, views, places = 0, {}, {}
        for info in sorted(graph.outputs, key=lambda t: list(sizes).index(t.role)):
            places[info.role] = (self._device.address + offset, sizes[info.role])
            shape: tuple[int, ...] = (rows,) if info.role == "log_sum" else (rows, count)
            end = offset + rows * sizes[info.role]
            views[info.role] = self._host[offset:end].view(numpy_dtype(info.dtype)).reshape(shape)
            offset = end
        self.ids, self.logits, self.log_sums = views["top_ids"], views["top_logits"], views["log_sum"]
        self._temperature_address = self._device.address + offset
        places["temperature"] = (self._temperature_address, 4)
        dtype = next(t.dtype for t in graph.inputs if t.role == "logits")
        places["logits"] = (logits.address, manifest.model.vocab_size * itemsize(dtype))
        self._bindings = []
        for first in range(0, rows, _CANDIDATE_ROWS):
            binding, some = session.io_binding(), min(_CANDIDATE_ROWS, rows - first)
            for info, bind in [(t, memory.bind_input) for t in graph.inputs] + [
                (t, memory.bind_output) for t in graph.outputs
            ]:
                address, width = places[info.role]
                bind(binding, info.name, address + first * width, (some, *map(int, info.shape[1:])), info.dtype)
            self._bindings.append(binding)
        self._launch: Any = None

    def queue(self, temperatures: np.ndarray, options: Any) -> None:
        """Queue the graph on the logits as they will be, and the copy of its result, to be read after `synchronize`."""

        def run() -> None:
            for binding in self._bindings:
                self._session.run_with_iobinding(binding, options)

        wanted = np.where(temperatures > 0, temperatures, np.float32(1.0))
        if self._launch is None or not np.array_equal(wanted, self._temperatures):
            self._memory.synchronize()
            self._temperatures[...] = wanted
            self._memory.upload(self._temperature_address, self._temperatures)
        if self._launch is None:
            for _ in range(2):
                run()
            self._launch = self._memory.capture(run)
        self._memory.launch(self._launch)
        self._memory.download(self._host, self._device.address)

    def tops(self, temperatures: np.ndarray) -> TopRows:
        """What the graph found, of as many rows as there are `temperatures`; valid until it is queued again."""
        count = len(temperatures)
        return TopRows(self.ids[:count], self.logits[:count], self.log_sums[:count], temperatures)
