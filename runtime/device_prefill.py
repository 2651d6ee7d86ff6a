"""Running prompts on a device: inputs of any length in one copy, logits where they are wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llmx.runtime.device_memory import Buffer, DeviceMemory
from llmx.runtime.dtypes import itemsize, numpy_dtype
from llmx.runtime.manifest import Manifest, TensorInfo
from llmx.runtime.ort_arrays import run_error
from llmx.runtime.providers import import_onnxruntime

_GREEDY = ("next_input_ids", "greedy_logits")


class Prefill:
    """The prefill graph, bound for one slot at a time. `logits` holds those of the last position that `last` ran."""

    def __init__(
        self, session: Any, manifest: Manifest, memory: DeviceMemory, bind_state: Callable[[Any, int, int], None]
    ) -> None:
        """`bind_state(binding, first, rows)` binds past and present."""
        self._session, self._graph, self._memory = session, manifest.graphs["prefill"], memory
        self._vocab = manifest.model.vocab_size
        self._bind_state = bind_state
        self._bindings: dict[tuple[int, bool], Any] = {}  # by slot, and whether the last position alone is asked
        self._options = import_onnxruntime().RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._by_role = {info.role: info for info in self._graph.outputs if info.role != "state"}
        self.dtype = self._by_role["logits"].dtype
        self.logits = memory.allocate(self._vocab * itemsize(self.dtype))
        self._best = memory.allocate(16)  # int64 token, and its logit
        self._best_host = memory.host_array((16,), np.dtype(np.uint8))
        self._staging: tuple[Buffer, np.ndarray] | None = None
        self._total = np.zeros((), np.int32)  # read by a run, which does not own it

    def positions(self, slot: int, token_ids: np.ndarray, start: int, asked: np.ndarray, length: int) -> dict[str, Any]:
        """Run tokens and return, by role, what the graph says at the `asked` columns: logits [k, vocab], and the hidden
        states [k, hidden] where the package has them.
        """
        binding = self._binding(slot, False)
        self._feed(binding, token_ids, start, asked, length)
        wanted = {role: info for role, info in self._by_role.items() if role not in _GREEDY}
        sizes = {role: len(asked) * int(info.shape[2]) * itemsize(info.dtype) for role, info in wanted.items()}
        buffers = {role: self._memory.allocate(size) for role, size in sizes.items()}
        try:
            for role, info in wanted.items():
                shape = (1, len(asked), int(info.shape[2]))
                self._memory.bind_output(binding, info.name, buffers[role].address, shape, info.dtype)
            self._run(binding)
            return {role: self._fetch(info, buffers[role], len(asked)) for role, info in wanted.items()}
        finally:
            for buffer in buffers.values():
                self._memory.free(buffer)

    def last(self, slot: int, token_ids: np.ndarray, start: int, length: int) -> tuple[int, float]:
        """Run tokens; the most likely one after the last, and its logit. All logits stay in `logits`."""
        binding = self._binding(slot, True)
        self._feed(binding, token_ids, start, np.array([len(token_ids) - 1]), length)
        self._run(binding)
        self._memory.download(self._best_host, self._best.address)
        self._memory.synchronize()
        logit = self._best_host[8 : 8 + itemsize(self.dtype)].view(numpy_dtype(self.dtype))
        return int(self._best_host[:8].view(np.int64)[0]), float(logit[0])

    def _run(self, binding: Any) -> None:
        try:
            self._session.run_with_iobinding(binding, self._options)
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise run_error(error) from None

    def _feed(self, binding: Any, token_ids: np.ndarray, start: int, asked: np.ndarray, length: int) -> None:
        """Bring the inputs to the device in one copy, and bind them."""
        count, at = len(token_ids), np.arange(start, start + len(token_ids))
        values = {
            "input_ids": np.asarray(token_ids, np.int64),
            "position_ids": at,
            "rope_lengths": np.maximum(length, at + 1),
            "logits_positions": np.asarray(asked, np.int64),
            "seqlens_k": np.array([start + count - 1], np.int32),
            "query_seqlens": np.array([count], np.int32),
        }
        spans, end = {}, 0
        for role, array in values.items():
            spans[role] = end
            end = -(-(end + array.nbytes) // 16) * 16
        self._memory.synchronize()  # the staging memory may still be read
        if self._staging is None or self._staging[0].nbytes < end:
            size = 1 << max(14, (2 * end).bit_length())
            self._staging = (self._memory.allocate(size), self._memory.host_array((size,), np.dtype(np.uint8)))
        buffer, host = self._staging
        for role, array in values.items():
            host[spans[role] : spans[role] + array.nbytes] = array.view(np.uint8)
        self._memory.upload(buffer.address, host[:end])
        for info in self._graph.inputs:
            if info.role == "total_sequence_length":
                self._total[...] = start + count
                binding.bind_cpu_input(info.name, self._total)
            elif info.role in values:
                array = values[info.role]
                shape = array.shape if len(info.shape) == 1 else (1, *array.shape)
                self._memory.bind_input(binding, info.name, buffer.address + spans[info.role], shape, info.dtype)

    def _binding(self, slot: int, last: bool) -> Any:
        """A slot's binding; what does not change from call to call is bound once (each takes some microseconds)."""
        binding = self._bindings.get((slot, last))
        if binding is None:
            binding = self._bindings[slot, last] = self._session.io_binding()
            self._bind_state(binding, slot, 1)
            places = {"logits": self.logits.address, "next_input_ids": self._best.address}
            places["greedy_logits"] = self._best.address + 8
            for role, address in places.items() if last else ():
                info = self._by_role[role]
                shape = tuple(1 if isinstance(dim, str) else dim for dim in info.shape)
                self._memory.bind_output(binding, info.name, address, shape, info.dtype)
        return binding

    def _fetch(self, info: TensorInfo, buffer: Buffer, asked: int) -> np.ndarray:
        """[asked, n] of what a run leaves in `buffer`."""
        array = np.empty((asked, int(info.shape[2])), numpy_dtype(info.dtype))
        if array.nbytes:
            self._memory.download(array.view(np.uint8), buffer.address)
        self._memory.synchronize()
        return array
