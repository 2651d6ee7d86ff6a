"""Packages whose state is carried from call to call: layouts `grow` and `replace`, one row at a time.

Such a graph takes the state as plain inputs and returns it as outputs. Rows differ in length, and a padded or repeated
token would corrupt a recurrence, so each row runs alone: the reference that a batch must equal anyway.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llmx.runtime.dtypes import numpy_dtype
from llmx.runtime.errors import LlmxError
from llmx.runtime.manifest import GraphInfo, Manifest, StateTensor
from llmx.runtime.ort_arrays import ort_value, run_error
from llmx.runtime.providers import import_onnxruntime
from llmx.runtime.state import StatePlan
from llmx.runtime.step_logits import HostLogits, HostPrefill, StepLogits


class CarriedBackend(HostPrefill):
    """A Backend over state that is passed from each call to the next.

    Invariant: a state value is never written once it exists, so slots may share it, and copying a slot costs nothing.
    """

    recompute_at: int | None = None
    prefill_chunk = 192
    last_hidden: np.ndarray | None = None
    verifies_batches = False
    stores_state = state_by_length = False  # a prefill graph takes no state, and a recurrence cannot be cut

    def __init__(self, manifest: Manifest, sessions: dict[str, Any], plan: StatePlan) -> None:
        self.manifest = manifest
        self.slots, self.max_length, self.kv_budget = plan.slots, plan.max_length, plan.budget
        self.vocab_size = manifest.model.vocab_size
        self.chunked = "prefill" not in sessions
        self._own = [tensor for tensor in manifest.state if tensor.layout != "cross"]
        self._crossed = [tensor for tensor in manifest.state if tensor.layout == "cross"]
        self.rewinds = all(tensor.layout == "grow" for tensor in self._own)
        self._sessions = sessions
        self._options = import_onnxruntime().RunOptions()
        self._state: list[list[Any]] = [self._empty() for _ in range(plan.slots)]
        self._hidden: np.ndarray | None = None
        self._cross: list[list[Any]] = [[] for _ in range(plan.slots)]
        self._lengths = [0] * plan.slots
        self._logits = np.empty((plan.slots, self.vocab_size), self._logits_dtype("decode"))

    def _logits_dtype(self, graph: str) -> np.dtype:
        return numpy_dtype(self.manifest.graphs[graph].outputs[0].dtype)

    def encode(self, slot: int, source: np.ndarray) -> None:
        """Read int64 [n] source tokens, or float32 [n_mels, frames] features: the slot's next prefill and all that follows attend to them."""
        ort = import_onnxruntime()
        [info] = self.manifest.graphs["encoder"].inputs
        array = np.ascontiguousarray(source[None], numpy_dtype(info.dtype))
        binding = self._sessions["encoder"].io_binding()
        binding.bind_ortvalue_input(info.name, ort_value(ort, array))
        for tensor in self._crossed:
            binding.bind_output(tensor.output, "cpu")
        try:
            self._sessions["encoder"].run_with_iobinding(binding, self._options)
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise run_error(error) from None
        self._cross[slot] = list(binding.get_outputs())

    def prefill(
        self, slot: int, token_ids: np.ndarray, start: int, positions: np.ndarray, prompt_length: int | None = None
    ) -> np.ndarray:
        count = len(token_ids)
        assert start >= 0 and start + count <= self.max_length and 0 <= slot < self.slots
        self._rewind(slot, start)
        if start == 0 and "prefill" in self._sessions and count >= self.manifest.model.min_prefill:
            logits = np.empty((1, len(positions), self.vocab_size), self._logits_dtype("prefill"))
            feeds = {"input_ids": token_ids, "position_ids": np.arange(count), "logits_positions": positions}
            self._state[slot] = self._run("prefill", {role: array[None] for role, array in feeds.items()}, {}, logits)
            self._lengths[slot] = count
            self.last_hidden = self._hidden[0] if self._hidden is not None else None
            return logits[0]
        asked = np.empty((len(positions), self.vocab_size), self._logits_dtype("decode"))
        hidden: list[np.ndarray] = []
        rows: dict[int, list[int]] = {}
        for row, position in enumerate(positions):
            rows.setdefault(int(position), []).append(row)
        for offset, token in enumerate(token_ids):
            logits = self._step(slot, int(token))
            asked[rows.get(offset, [])] = logits
            if self._hidden is not None:
                hidden.append(self._hidden[0, 0])
        self.last_hidden = np.array(hidden)[np.asarray(positions)] if hidden else None
        return asked

    def decode(
        self,
        token_ids: np.ndarray,
        lengths: np.ndarray,
        active: np.ndarray | None = None,
        temperatures: np.ndarray | None = None,
    ) -> StepLogits:
        for row in range(len(token_ids)):
            if active is None or active[row]:
                self._rewind(row, int(lengths[row]))
                self._logits[row] = self._step(row, int(token_ids[row]))
        return HostLogits(self._logits[: len(token_ids)])

    def verify(self, token_ids: np.ndarray, lengths: np.ndarray, counts: np.ndarray) -> np.ndarray:
        raise AssertionError("carried state runs row by row")

    def _step(self, slot: int, token: int) -> np.ndarray:
        """One token after the slot's state; logits [vocab]."""
        logits = np.empty((1, 1, self.vocab_size), self._logits_dtype("decode"))
        feeds = {"input_ids": np.array([[token]]), "position_ids": np.array([[self._lengths[slot]]])}
        past = {tensor.input: value for tensor, value in zip(self._own, self._state[slot], strict=True)}
        past |= {tensor.input: value for tensor, value in zip(self._crossed, self._cross[slot], strict=True)}
        self._state[slot] = self._run("decode", feeds, past, logits)
        self._lengths[slot] += 1
        return logits[0, 0]

    def _run(self, name: str, feeds: dict[str, np.ndarray], past: dict[str, Any], logits: np.ndarray) -> list[Any]:
        """Run graph `name` on the state `past` (by input), fill `logits`, and return the new state in `_own`'s order."""
        ort = import_onnxruntime()
        graph: GraphInfo = self.manifest.graphs[name]
        binding = self._sessions[name].io_binding()
        kept = []  # onnxruntime reads them during the run and does not own them
        for info in graph.inputs:
            if info.role in feeds:
                kept.append(np.ascontiguousarray(feeds[info.role], numpy_dtype(info.dtype)))
                binding.bind_ortvalue_input(info.name, ort.OrtValue.ortvalue_from_numpy(kept[-1]))
        for input_name, value in past.items():
            binding.bind_ortvalue_input(input_name, value)
        binding.bind_ortvalue_output(graph.outputs[0].name, ort_value(ort, logits))
        self._hidden = None
        for info in graph.outputs:
            if info.role == "last_hidden_state":
                self._hidden = np.empty((*logits.shape[:2], int(info.shape[2])), numpy_dtype(info.dtype))
                binding.bind_ortvalue_output(info.name, ort_value(ort, self._hidden))
        for tensor in self._own:
            binding.bind_output(tensor.output, "cpu")
        try:
            self._sessions[name].run_with_iobinding(binding, self._options)
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise run_error(error) from None
        return list(binding.get_outputs())[-len(self._own) :]

    def _empty(self) -> list[Any]:
        """The state before the first token: nothing where it grows, zeros where it is replaced."""
        ort = import_onnxruntime()
        zeros = (np.zeros([1, *_sizes(tensor)], numpy_dtype(tensor.dtype)) for tensor in self._own)
        return [ort_value(ort, array) for array in zeros]

    def _rewind(self, slot: int, length: int) -> None:
        """Make the slot hold its first `length` positions alone."""
        if length == 0:
            self._state[slot], self._lengths[slot] = self._empty(), 0
        elif length != self._lengths[slot]:
            self._state[slot] = self._beginning(slot, length)
            self._lengths[slot] = length

    def _beginning(self, slot: int, length: int) -> list[Any]:
        assert length <= self._lengths[slot] and self.rewinds, (
            f"slot {slot} holds {self._lengths[slot]} positions of a state that keeps no past, and {length} are wanted"
        )
        ort, values = import_onnxruntime(), []
        for tensor, value in zip(self._own, self._state[slot], strict=True):
            axis = tensor.shape.index("max_length")
            whole = value.numpy() if tensor.dtype != "bfloat16" else _bfloat16(value)
            values.append(ort_value(ort, np.ascontiguousarray(whole.take(range(length), axis))))
        return values

    def copy_slot(self, source: int, target: int, length: int, start: int = 0) -> None:
        same = length == self._lengths[source]
        self._state[target] = list(self._state[source]) if same else self._beginning(source, length)
        self._cross[target] = self._cross[source]
        self._lengths[target] = length

    def read_state(self, slot: int, start: int, end: int) -> list[np.ndarray]:
        raise AssertionError("carried state is not kept")

    def write_state(self, slot: int, start: int, state: list[np.ndarray]) -> None:
        raise AssertionError("carried state is not kept")

    def take_state(self, slot: int) -> list[Any]:
        """The slot's state and, of an encoder-decoder, what it attends to; shared: it is never written."""
        return [*self._state[slot], *self._cross[slot]]

    def give_state(self, slot: int, length: int, state: list[Any]) -> None:
        """Make the slot hold a state that `take_state` returned, of `length` tokens."""
        count = len(self._own)
        self._state[slot], self._cross[slot], self._lengths[slot] = state[:count], state[count:], length

    def wrap_state(self, arrays: list[np.ndarray]) -> list[Any]:
        """A state from its tensors' values, in the manifest's order."""
        ort = import_onnxruntime()
        return [ort_value(ort, np.ascontiguousarray(array)) for array in arrays]

    def free(self, slot: int) -> None:
        self._state[slot], self._cross[slot], self._lengths[slot] = self._empty(), [], 0

    def close(self) -> None:
        """Free sessions and state; the backend must not be used afterwards."""
        self._sessions.clear()
        self._state = []


def _sizes(tensor: StateTensor) -> list[int]:
    return [dim if isinstance(dim, int) else 0 for dim in tensor.shape[1:]]


def _bfloat16(value: Any) -> np.ndarray:
    raise LlmxError("A bfloat16 state cannot be rewound with this onnxruntime; export the model in fp32 or fp16.")
