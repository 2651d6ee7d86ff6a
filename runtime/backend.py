"""What runs a package's graphs: tokens and positions in, logits out. The scheduler knows nothing else of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from llmx.runtime.dtypes import numpy_dtype
from llmx.runtime.kv_budget import KVBudget
from llmx.runtime.manifest import GraphInfo, Manifest, StateTensor
from llmx.runtime.manifest_check import CARRIED, why_not_on_device
from llmx.runtime.mapped_cache import wanted
from llmx.runtime.ort_arrays import ort_value, run_error
from llmx.runtime.providers import Device, import_onnxruntime, resolve_device
from llmx.runtime.sessions import SessionSettings, open_sessions
from llmx.runtime.state import StatePool, plan_state
from llmx.runtime.step_logits import HostLogits, HostPrefill, StepLogits

_KEPT_PREFILL_STEPS = 16
#: Prompt tokens at once, fastest of 64 to 512: causal chunks skip work that one large chunk masks. With integer products, which
#: are fast with few rows, smaller ones are.
_CHUNK, _INTEGER_CHUNK = 192, 128
_FEW = 12  # tokens, up to which the graph "append" is faster than integer products


class Backend(Protocol):
    """A model with `slots` rows of state, each `max_length` positions long."""

    slots: int
    max_length: int
    vocab_size: int
    chunked: bool  # whether a prompt may come in several calls as cheaply as in one
    rewinds: bool  # whether a slot may go back to fewer positions than it holds
    prefill_chunk: int  # prompt tokens that are best run at once
    last_hidden: np.ndarray | None  # [k, hidden] of the last prefill's asked columns, where the package has them
    verifies_batches: bool  # whether `verify` works
    stores_state: bool  # whether `read_state` and `write_state` work
    state_by_length: bool  # whether a prompt token's state depends on how long the prompt is
    recompute_at: int | None  # state of so many positions is computed anew before a token is decoded (`recompute`)
    kv_budget: KVBudget | None  # what all slots may hold together; None: a whole context each

    def prefill(
        self, slot: int, token_ids: np.ndarray, start: int, positions: np.ndarray, prompt_length: int | None = None
    ) -> np.ndarray:
        """Run int64 [n] tokens at positions `start` … `start + n - 1` of `slot`.

        `prompt_length`: of the prompt that they are a chunk of, which some models' rotary factors depend on (default:
        the prompt ends with them).

        Returns logits [k, vocab] of the k asked columns (int64 [k], each in 0 … n-1); k may be 0. The array may be
        overwritten by the next call.
        """
        ...

    def prefill_last(
        self,
        slot: int,
        token_ids: np.ndarray,
        start: int,
        prompt_length: int | None = None,
        temperature: float = -1.0,
    ) -> StepLogits:
        """`prefill` of a prompt's last chunk: one row, the logits after its last token, valid until the next call.

        `temperature`: what the row will be asked for, as `decode`'s.
        """
        ...

    def prefill_each(self, slot: int, token_ids: np.ndarray, start: int, temperature: float = -1.0) -> StepLogits:
        """`prefill` of tokens that are judged one by one: the rows after each of them, valid until the next call, each as a
        step at its place would make it. `temperature`: what the rows will be asked for, as `decode`'s.
        """
        ...

    def decode(
        self,
        token_ids: np.ndarray,
        lengths: np.ndarray,
        active: np.ndarray | None = None,
        temperatures: np.ndarray | None = None,
    ) -> StepLogits:
        """One token for each of the slots 0 … n-1: int64 [n] tokens, and how many positions each slot holds before it.

        Returns the logits of n rows, valid until the next call. `active`, bool [n]: the rows that are meant (default:
        all). An idle row passes any token and its own length: a backend that runs it all the same writes at its next
        position alone, which its next owner overwrites, and its logits mean nothing. `temperatures`, float32 [n]: what a
        row will be asked for: its `greedy` token where 0, its `top` at a temperature above, else (-1, and by default)
        the whole row. Whatever it says, every row can be read whole.
        """
        ...

    def verify(self, token_ids: np.ndarray, lengths: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Several tokens for each of the slots 0 … n-1: int64 [n, width] tokens, padded on their right, how many positions
        each slot holds before them, and how many of its tokens count, int64 [n], 1 … width.

        Returns logits [n, width, vocab], valid until the next call; those of the padding mean nothing. Only where
        `verifies_batches`. An idle row passes one token and its own length, as to `decode`.
        """
        ...

    def encode(self, slot: int, source: np.ndarray) -> None:
        """Encoder-decoders: read int64 [n] source tokens, or features float32 [n_mels, frames]; the slot attends to them
        from its next prefill on.
        """
        ...

    def copy_slot(self, source: int, target: int, length: int, start: int = 0) -> None:
        """Make the first `length` positions of slot `target` those of `source`; the first `start` are the same already."""
        ...

    def read_state(self, slot: int, start: int, end: int) -> list[np.ndarray]:
        """A copy of what the slot holds at positions `start` … `end - 1`."""
        ...

    def write_state(self, slot: int, start: int, state: list[np.ndarray]) -> None:
        """Put what `read_state` returned at the positions from `start` on, before which the slot is filled."""
        ...

    def free(self, slot: int) -> None:
        """Give back the memory of a slot that nobody holds. Asked for where there is a `kv_budget` alone."""
        ...

    def close(self) -> None: ...


class OrtBackend(HostPrefill):
    """A package on onnxruntime with IO binding: addresses are bound once, a step writes a few integers.

    Invariant: past and present of a state tensor are bound to the same memory, so a run updates the state in place.
    """

    chunked = rewinds = stores_state = True
    last_hidden: np.ndarray | None = None

    def __init__(self, manifest: Manifest, sessions: dict[str, Any], state: StatePool, device: Device) -> None:
        self.manifest = manifest
        self.slots, self.max_length, self.kv_budget = state.plan.slots, state.plan.max_length, state.plan.budget
        self.vocab_size = manifest.model.vocab_size
        self.recompute_at = manifest.model.recompute_at
        self.state_by_length = any(t.role == "rope_lengths" for g in manifest.graphs.values() for t in g.inputs)
        # "append" is prefill with decode's products, where prefill has others
        self._append = "append" if "append" in manifest.graphs else "prefill"
        self.prefill_chunk = _CHUNK if self._append == "prefill" else _INTEGER_CHUNK
        self.verifies_batches = manifest.graphs["prefill"].input_named("query_seqlens") is not None
        self._verify_steps: dict[tuple[int, int], _Step] = {}
        self._sessions = sessions
        self._state = state
        self._device = device
        self._decode_steps: dict[int, _Step] = {}
        self._run_options = import_onnxruntime().RunOptions()
        self._prefill_steps: dict[tuple[str, int, int, int], _Step] = {}

    def prefill(
        self, slot: int, token_ids: np.ndarray, start: int, positions: np.ndarray, prompt_length: int | None = None
    ) -> np.ndarray:
        name = self._append if len(token_ids) <= _FEW else "prefill"
        return self._run_prefill(name, slot, token_ids, start, positions, prompt_length)

    def prefill_each(self, slot: int, token_ids: np.ndarray, start: int, temperature: float = -1.0) -> StepLogits:
        """As `verify` judges them, at any number of tokens."""
        return HostLogits(self._run_prefill(self._append, slot, token_ids, start, np.arange(len(token_ids)), start + 1))

    def _run_prefill(
        self,
        name: str,
        slot: int,
        token_ids: np.ndarray,
        start: int,
        positions: np.ndarray,
        prompt_length: int | None,
    ) -> np.ndarray:
        count = len(token_ids)
        assert start >= 0 and start + count <= self.max_length and 0 <= slot < self.slots
        step = self._prefill_step(name, slot, count, len(positions))
        step.feed("input_ids", np.asarray(token_ids)[None])
        step.feed("position_ids", np.arange(start, start + count)[None])
        step.feed("logits_positions", np.asarray(positions)[None])
        step.feed("seqlens_k", start + count - 1)
        step.feed("total_sequence_length", start + count)
        step.feed("query_seqlens", count)
        step.feed("rope_lengths", np.maximum(prompt_length or start + count, np.arange(start, start + count) + 1)[None])
        logits = step.run(self._run_options)[0]
        self.last_hidden = step.hidden[0] if step.hidden is not None else None
        return logits

    def _prefill_step(self, name: str, slot: int, count: int, asked: int) -> _Step:
        """The bound call of a graph for this shape; the last few are kept, as chunks of one size follow each other."""
        key = (name, slot, count, asked)
        step = self._prefill_steps.pop(key, None)
        if step is None:
            graph = self.manifest.graphs[name]
            step = _Step(self._sessions[name], graph, self._state, slot, 1, count, asked, self.manifest)
            while len(self._prefill_steps) >= _KEPT_PREFILL_STEPS:
                self._prefill_steps.pop(next(iter(self._prefill_steps)))
        self._prefill_steps[key] = step  # most recently used last
        return step

    def decode(
        self,
        token_ids: np.ndarray,
        lengths: np.ndarray,
        active: np.ndarray | None = None,
        temperatures: np.ndarray | None = None,
    ) -> StepLogits:
        rows = len(token_ids)
        step = self._decode_steps.get(rows)
        if step is None:
            step = _Step(
                self._sessions["decode"], self.manifest.graphs["decode"], self._state, 0, rows, 1, 1, self.manifest
            )
            step.feed("query_seqlens", 1)
            self._decode_steps[rows] = step
        step.feed("input_ids", token_ids[:, None])
        step.feed("position_ids", lengths[:, None])
        step.feed("seqlens_k", lengths)
        step.feed("total_sequence_length", (lengths[0] if rows == 1 else lengths.max()) + 1)
        if self.state_by_length:
            step.feed("rope_lengths", lengths[:, None] + 1)
        return HostLogits(step.run(self._run_options)[:, 0])

    def verify(self, token_ids: np.ndarray, lengths: np.ndarray, counts: np.ndarray) -> np.ndarray:
        rows, width = token_ids.shape
        step = self._verify_steps.pop((rows, width), None)
        if step is None:
            graph = self.manifest.graphs[self._append]
            step = _Step(self._sessions[self._append], graph, self._state, 0, rows, width, width, self.manifest)
            step.feed("logits_positions", np.arange(width)[None])
            while len(self._verify_steps) >= _KEPT_PREFILL_STEPS:
                self._verify_steps.pop(next(iter(self._verify_steps)))
        self._verify_steps[rows, width] = step  # most recently used last
        positions = lengths[:, None] + np.minimum(np.arange(width)[None], counts[:, None] - 1)
        step.feed("input_ids", token_ids)
        step.feed("position_ids", positions)
        step.feed("seqlens_k", lengths + counts - 1)
        step.feed("total_sequence_length", (lengths + counts).max())
        step.feed("query_seqlens", counts)
        step.feed("rope_lengths", positions + 1)
        return step.run(self._run_options)

    def encode(self, slot: int, source: np.ndarray) -> None:
        raise AssertionError("a decoder-only package has no encoder")

    def copy_slot(self, source: int, target: int, length: int, start: int = 0) -> None:
        self._state.copy_slot(source, target, length, start)

    def read_state(self, slot: int, start: int, end: int) -> list[np.ndarray]:
        return self._state.read(slot, start, end)

    def write_state(self, slot: int, start: int, state: list[np.ndarray]) -> None:
        self._state.write(slot, start, state)

    def free(self, slot: int) -> None:
        self._state.free(slot)

    def close(self) -> None:
        """Free sessions and state; the backend must not be used afterwards."""
        self._decode_steps.clear()
        self._prefill_steps.clear()
        self._verify_steps.clear()
        self._sessions.clear()
        self._state.close()


class _Step:
    """One bound call: `rows` slots from `first` on, `seq` tokens each, logits of `asked` columns."""

    def __init__(
        self,
        session: Any,
        graph: GraphInfo,
        state: StatePool,
        first: int,
        rows: int,
        seq: int,
        asked: int,
        manifest: Manifest,
    ) -> None:
        ort = import_onnxruntime()
        self._session = session
        self._binding = session.io_binding()
        self._arrays: dict[str, np.ndarray] = {}
        sizes = {"batch": rows, "seq": seq, "asked": asked}
        for info in graph.inputs:
            if info.role != "state":
                shape = [sizes[dim] if isinstance(dim, str) else dim for dim in info.shape]
                array = np.zeros(shape, numpy_dtype(info.dtype))
                self._arrays[info.role] = array
                self._binding.bind_ortvalue_input(info.name, ort.OrtValue.ortvalue_from_numpy(array))
        self.hidden: np.ndarray | None = None
        for info in graph.outputs[1:]:
            if info.role == "last_hidden_state":
                self.hidden = np.empty((rows, asked, int(info.shape[2])), numpy_dtype(info.dtype))
                self._binding.bind_ortvalue_output(info.name, ort_value(ort, self.hidden))
        self._logits = np.empty((rows, asked, manifest.model.vocab_size), numpy_dtype(graph.outputs[0].dtype))
        self._binding.bind_ortvalue_output(graph.outputs[0].name, ort_value(ort, self._logits))
        for tensor, view in zip(state.tensors, state.rows(first, rows), strict=True):
            self._bind_state(ort, tensor, view)

    def _bind_state(self, ort: Any, tensor: StateTensor, view: np.ndarray) -> None:
        value = ort_value(ort, view)
        self._binding.bind_ortvalue_input(tensor.input, value)
        self._binding.bind_ortvalue_output(tensor.output, value)

    def feed(self, role: str, value: Any) -> None:
        """Write an input's numbers in place; a role that the graph lacks is ignored."""
        array = self._arrays.get(role)
        if array is not None:
            array[...] = value

    def run(self, options: Any) -> np.ndarray:
        """Logits [rows, asked, vocab], overwritten by the next run of this step."""
        try:
            self._session.run_with_iobinding(self._binding, options)
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise run_error(error) from None
        return self._logits


def open_backend(
    folder: Path,
    manifest: Manifest,
    device: str = "auto",
    max_length: int | None = None,
    slots: int = 1,
    threads: int | None = None,
    spin: bool = True,
    mapped_cache: bool = True,
    cache_dir: Path | None = None,
    kv_cache_memory_bytes: int | None = None,
) -> Backend:
    """Sessions and state of a package. Memory is checked before anything is allocated."""
    resolved = resolve_device(device, why_not_on_device(manifest) is None)
    if resolved.kind == "cuda":
        from llmx.runtime.device_sessions import open_on_device

        return open_on_device(folder, manifest, resolved, max_length, slots, bound=kv_cache_memory_bytes)
    # mapped weights are the page cache's, which gives them back; otherwise each graph keeps its own prepacked copy
    mapped = resolved.kind == "cpu" and mapped_cache and wanted(manifest)
    weights = manifest.files["weights.data"].size if "weights.data" in manifest.files else 0
    plan = plan_state(manifest, max_length, slots, weights=0 if mapped else weights * 2, bound=kv_cache_memory_bytes)
    sessions = open_sessions(folder, manifest, resolved, SessionSettings(threads, spin, mapped_cache, cache_dir))
    if any(tensor.layout in CARRIED for tensor in manifest.state):
        from llmx.runtime.carried import CarriedBackend

        return CarriedBackend(manifest, sessions, plan)
    return OrtBackend(manifest, sessions, StatePool(manifest, plan), resolved)


def recompute(backend: Backend, slot: int, token_ids: np.ndarray, chunk: int) -> None:
    """Compute the state of a slot's tokens (int64 [n]) anew, as that of a sequence one token longer."""
    for start in range(0, len(token_ids), chunk):
        backend.prefill(slot, token_ids[start : start + chunk], start, np.zeros(0, np.int64), len(token_ids) + 1)


def score_tokens(backend: Backend, ids: np.ndarray, chunk: int, first: int = 1) -> list[float]:
    """Log-probabilities of ids[first:] (first >= 1), running the text through slot 0 in chunks."""
    scores: list[float] = []
    for start in range(0, len(ids) - 1, chunk):
        end = min(start + chunk, len(ids) - 1)
        begin = min(max(start, first - 1), end)
        asked = np.arange(begin - start, end - start)
        logits = backend.prefill(0, ids[start:end], start, asked, len(ids)).astype(np.float32)
        if not len(asked):
            continue
        logits -= logits.max(axis=1, keepdims=True)
        chosen = np.take_along_axis(logits, ids[begin + 1 : end + 1, None], axis=1)[:, 0]
        scores += (chosen - np.log(np.exp(logits).sum(axis=1, dtype=np.float64))).tolist()
    return scores
