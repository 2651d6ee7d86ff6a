"""The backend that keeps everything on a device, on the CPU provider: the graphs, bindings and bookkeeping are the same."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmx.runtime import PackageError, ProviderError
from llmx.runtime.backend import Backend, open_backend
from llmx.runtime.device_backend import DeviceBackend
from llmx.runtime.device_memory import HostMemory
from llmx.runtime.device_sessions import (
    open_device_sessions,
    open_on_device,
    upload_weights,
)
from llmx.runtime.device_steps import Block, buckets
from llmx.runtime.manifest import Manifest, load_manifest
from llmx.runtime.manifest_check import why_not_on_device
from llmx.runtime.providers import Device, resolve_device
from llmx.runtime.state import plan_state
from llmx.runtime.step_logits import StepLogits

LENGTH, SLOTS = 48, 5


class CountingMemory(HostMemory):
    """Counts what a step costs on a device."""

    num_launches = num_uploads = num_downloads = 0

    def launch(self, captured: object) -> None:
        self.num_launches += 1
        super().launch(captured)

    def upload(self, address: int, array: np.ndarray) -> None:
        self.num_uploads += 1
        super().upload(address, array)

    def download(self, array: np.ndarray, address: int) -> None:
        self.num_downloads += 1
        super().download(array, address)


@pytest.fixture(scope="module")
def folder(device_package: Callable[[str], Path]) -> Path:
    return device_package("llama")


def device_backend(folder: Path, ahead: bool = True, slots: int = SLOTS) -> DeviceBackend:
    manifest, memory = load_manifest(folder), CountingMemory()
    sessions = open_device_sessions(folder, manifest, memory, ["CPUExecutionProvider"])
    return DeviceBackend(manifest, sessions, memory, plan_state(manifest, LENGTH, slots), ahead)


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[tuple[DeviceBackend, Backend]]:
    device, host = device_backend(folder), open_backend(folder, load_manifest(folder), "cpu", LENGTH, SLOTS)
    yield device, host
    device.close()
    host.close()


def memory_of(backend: DeviceBackend) -> CountingMemory:
    memory = backend._memory
    assert isinstance(memory, CountingMemory)
    return memory


def prompts(rng: np.random.Generator, lengths: list[int], vocab: int) -> list[np.ndarray]:
    return [rng.integers(1, vocab, length) for length in lengths]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_calls_give_what_the_host_backend_gives(data: st.DataObject, pair: tuple[DeviceBackend, Backend]) -> None:
    """Ragged rows, idle rows, changing row counts, chunked prompts in between, copied slots, greedy and sampled asks."""
    device, host = pair
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    vocab = device.vocab_size
    lengths = np.zeros(SLOTS, np.int64)
    tokens = np.zeros(SLOTS, np.int64)
    for slot in range(SLOTS):
        ids = rng.integers(1, vocab, int(rng.integers(1, 12)))
        cut = int(rng.integers(0, len(ids)))
        for backend in pair:
            if cut:
                backend.prefill(slot, ids[:cut], 0, np.zeros(0, np.int64))
        want = host.prefill(slot, ids[cut:], cut, np.array([len(ids) - cut - 1]))[0]
        got = device.prefill_last(slot, ids[cut:], cut)
        np.testing.assert_array_equal(got.row(0), want)
        assert got.greedy(0) == int(want.argmax())
        lengths[slot], tokens[slot] = len(ids), int(want.argmax())
    for _ in range(data.draw(st.integers(1, 12))):
        what = data.draw(st.sampled_from(["step", "step", "step", "step", "prefill", "copy"]))
        if what == "prefill":
            slot, ids = int(rng.integers(SLOTS)), rng.integers(1, vocab, int(rng.integers(1, 9)))
            if data.draw(st.booleans()):
                rows = [b.prefill(slot, ids, 0, np.array([len(ids) - 1]))[0] for b in pair]
            else:
                rows = [
                    b.prefill_last(slot, ids, 0, None, data.draw(st.sampled_from([0.0, -1.0]))).row(0) for b in pair
                ]
            np.testing.assert_array_equal(rows[0], rows[1])
            lengths[slot], tokens[slot] = len(ids), int(rows[1].argmax())
            continue
        if what == "copy":
            source, target = (int(n) for n in rng.integers(SLOTS, size=2))
            for backend in pair:
                backend.copy_slot(source, target, int(lengths[source]))
            lengths[target], tokens[target] = lengths[source], tokens[source]
            continue
        count = data.draw(st.integers(1, SLOTS))
        active = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
        asks = np.array(data.draw(st.sampled_from([[0.0] * count, [-1.0] * count, [0.0, 0.7, -1.0, 0.0, 2.0][:count]])))
        rows = host.decode(tokens[:count], lengths[:count], active).rows()
        step = device.decode(tokens[:count], lengths[:count], active, asks.astype(np.float32))
        for slot in np.flatnonzero(active):
            check_row(step, int(slot), rows[slot], float(asks[slot]))
            tokens[slot], lengths[slot] = int(rows[slot].argmax()), lengths[slot] + 1


def check_row(step: StepLogits, slot: int, want: np.ndarray, ask: float) -> None:
    assert step.greedy(slot) == int(want.argmax())
    top = step.top(slot)
    assert (top is not None) == (ask > 0)
    if top is not None:
        order = np.argsort(-want, kind="stable")[: len(top.ids)]
        np.testing.assert_array_equal(top.ids, order)
        np.testing.assert_array_equal(top.logits, want[order].astype(np.float32))
        scaled = (want.astype(np.float64) - want.max()) / ask
        assert abs(top.log_sum - np.log(np.exp(scaled).sum())) < 1e-4
    np.testing.assert_array_equal(step.row(slot), want)


@pytest.mark.parametrize("ahead", [True, False])
def test_a_greedy_step_is_one_launch_and_one_small_copy(folder: Path, ahead: bool) -> None:
    backend = device_backend(folder, ahead)
    memory = memory_of(backend)
    lengths = np.array([3, 7, 5])
    for slot, length in enumerate(lengths):
        backend.prefill(slot, np.arange(1, length + 1), 0, np.zeros(0, np.int64))
    tokens, asks = np.array([5, 6, 7]), np.zeros(3, np.float32)
    for step in range(20):
        before = (memory.num_launches, memory.num_uploads, memory.num_downloads)
        made = backend.decode(tokens, lengths, None, asks)
        tokens, lengths = np.array([made.greedy(row) for row in range(3)]), lengths + 1
        after = (memory.num_launches, memory.num_uploads, memory.num_downloads)
        if step > 0:
            assert tuple(b - a for a, b in zip(before, after, strict=True)) == (1, 0, 1)
    backend.close()


def test_a_prompt_that_ends_between_two_steps_wastes_none(pair: tuple[DeviceBackend, Backend]) -> None:
    """A slot gets another prompt while the next step runs, which serves the other rows; the one after has the new row."""
    device, host = pair
    memory = memory_of(device)
    for backend in pair:
        for slot in range(3):
            backend.prefill(slot, np.arange(1, 12), 0, np.zeros(0, np.int64))
    lengths, tokens, meant = np.full(3, 11), np.array([3, 4, 5]), np.ones(3, bool)
    for number in range(12):
        if number in (4, 8):
            ids = np.arange(30, 30 + (5 if number == 4 else 20))  # shorter than what the slot held, and longer
            for backend in pair:
                first = backend.prefill_last(1, ids, 0, None, 0.0).greedy(0)
            device_first = device.prefill_last(1, ids, 0, None, 0.0).greedy(0)
            want = host.prefill(1, ids, 0, np.array([len(ids) - 1]))[0]
            assert device_first == int(want.argmax()) and first in (None, device_first)
            tokens[1], lengths[1] = device_first, len(ids)
        active = meant & (np.arange(3) != 1) if number in (4, 8) else meant
        before = memory.num_launches
        step = device.decode(tokens, lengths, active, np.zeros(3, np.float32))
        rows = host.decode(tokens, lengths, active).rows()
        assert number == 0 or memory.num_launches == before + 1
        for slot in np.flatnonzero(active):
            assert step.greedy(slot) == int(rows[slot].argmax())
            tokens[slot], lengths[slot] = int(rows[slot].argmax()), lengths[slot] + 1


@pytest.mark.parametrize("change", ["copy", "prefill", "write"])
def test_a_step_that_ran_ahead_of_a_change_is_not_used(change: str, pair: tuple[DeviceBackend, Backend]) -> None:
    """A slot's state changes while the next step runs, and that step's token and length happen to be the ones asked for."""
    device, host = pair
    ids = [np.arange(1, 9), np.arange(21, 29)]
    for backend in pair:
        for slot, prompt in enumerate(ids):
            backend.prefill(slot, prompt, 0, np.zeros(0, np.int64))
    lengths, tokens = np.array([8, 8]), np.array([3, 4])
    for _ in range(2):
        step = device.decode(tokens, lengths, None, np.zeros(2, np.float32))
        host.decode(tokens, lengths)
        tokens, lengths = np.array([step.greedy(0), step.greedy(1)]), lengths + 1
    for backend in pair:
        if change == "copy":
            backend.copy_slot(0, 1, 10)
        elif change == "prefill":
            backend.prefill(1, np.arange(41, 51), 0, np.zeros(0, np.int64))
        else:
            backend.write_state(1, 0, backend.read_state(0, 0, 10))
    got = device.decode(tokens, lengths, None, np.zeros(2, np.float32))
    want = host.decode(tokens, lengths).rows()
    assert [got.greedy(0), got.greedy(1)] == want.argmax(1).tolist()
    np.testing.assert_array_equal(got.rows(), want)


def test_rows_run_to_the_last_position(folder: Path) -> None:
    device, host = device_backend(folder, slots=1), open_backend(folder, load_manifest(folder), "cpu", LENGTH, 1)
    ids = np.arange(1, LENGTH - 3)
    token = int(host.prefill(0, ids, 0, np.array([len(ids) - 1]))[0].argmax())
    assert device.prefill_last(0, ids, 0).greedy(0) == token
    for length in range(len(ids), LENGTH):
        want = int(host.decode(np.array([token]), np.array([length])).row(0).argmax())
        token = device.decode(np.array([token]), np.array([length]), None, np.zeros(1, np.float32)).greedy(0) or 0
        assert token == want
    for backend in (device, host):
        backend.close()


def test_state_is_read_and_written(folder: Path) -> None:
    device = device_backend(folder)
    ids = np.arange(1, 14)
    device.prefill(0, ids, 0, np.zeros(0, np.int64))
    want = device.prefill_last(0, ids[:4], 13).row(0).copy()
    device.write_state(3, 0, device.read_state(0, 0, 6))
    device.write_state(3, 6, device.read_state(0, 6, 13))
    np.testing.assert_array_equal(device.prefill_last(3, ids[:4], 13).row(0), want)
    device.close()


def test_weights_are_uploaded_once_and_shared(folder: Path) -> None:
    manifest, memory = load_manifest(folder), HostMemory()
    values = upload_weights(folder, manifest, memory)
    raw = np.fromfile(folder / "weights.data", np.uint8)
    spans = [(w.offset, w.offset + w.nbytes) for w in manifest.weights]
    assert spans == sorted(spans)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))  # packed ones took the place of their parts
    for weight in manifest.weights:
        got = values[weight.name].numpy()
        assert list(got.shape) == weight.shape
        np.testing.assert_array_equal(
            got.reshape(-1).view(np.uint8), raw[weight.offset : weight.offset + weight.nbytes]
        )


def test_blocks_and_buckets() -> None:
    for rows in (1, 3, 128):
        block = Block.of(rows, np.dtype(np.float16))
        spans = sorted((offset, offset + rows * dtype.itemsize) for offset, dtype in block.parts.values())
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans)) and spans[-1][1] <= block.nbytes
        assert block.parts["greedy_logits"][0] + 2 * rows <= block.head <= block.parts["position_ids"][0]
    for slots in range(1, 200):
        sizes = buckets(slots)
        assert sizes[-1] == slots and sizes == sorted(set(sizes)) and sizes[0] == 1
        assert all(next(s for s in sizes if s >= rows) <= 1.5 * rows for rows in range(1, slots + 1))


def test_what_does_not_run_on_cuda_is_refused(demo: Path, folder: Path) -> None:
    with pytest.raises(PackageError, match="--target cuda"):
        open_on_device(demo, load_manifest(demo), Device("cuda", 0), None, 1)
    manifest: Manifest = load_manifest(folder)
    with pytest.raises(PackageError, match="no float32 kernel"):
        open_on_device(folder, manifest, Device("cuda", 0), None, 1)
    assert resolve_device("auto", why_not_on_device(manifest) is None).kind == "cpu"
    manifest = dataclasses.replace(manifest, dtype="float16")
    with pytest.raises(ProviderError, match=r"no NVIDIA driver|does not start|no CUDA device 99"):
        open_on_device(folder, manifest, Device("cuda", 99), None, 1)
