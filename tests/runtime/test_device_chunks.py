"""Prompts and guesses over captured graphs, on the CPU provider: padding and copies change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from llmx.runtime import device_chunks
from llmx.runtime.backend import Backend, open_backend
from llmx.runtime.device_backend import DeviceBackend
from llmx.runtime.device_memory import HostMemory, Region
from llmx.runtime.device_sessions import open_device_sessions
from llmx.runtime.device_steps import CandidatesStep
from llmx.runtime.manifest import load_manifest
from llmx.runtime.state import plan_state

LENGTH, SLOTS = 72, 3
NONE = np.zeros(0, np.int64)


@pytest.fixture(scope="module")
def folder(device_package: Callable[[str], Path]) -> Path:
    return device_package("llama")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[tuple[DeviceBackend, Backend]]:
    manifest, memory = load_manifest(folder), HostMemory()
    sessions = open_device_sessions(folder, manifest, memory, ["CPUExecutionProvider"])
    device = DeviceBackend(manifest, sessions, memory, plan_state(manifest, LENGTH, SLOTS))
    host = open_backend(folder, manifest, "cpu", LENGTH, SLOTS)
    yield device, host
    device.close()
    host.close()


def test_a_padded_prompt_leaves_what_it_leaves_unpadded(pair: tuple[DeviceBackend, Backend]) -> None:
    """Lengths around the sizes that graphs are made for, each plainly and captured, in slots that held longer ones."""
    device, host = pair
    rng = np.random.default_rng(0)
    for length in (1, 15, 16, 17, 31, 33, 63, 64, 65, 70):
        for slot in (2, 0):
            ids, more = rng.integers(1, device.vocab_size, length), rng.integers(1, device.vocab_size, 2)
            want = host.prefill(slot, ids, 0, np.array([length - 1]))[0].copy()
            got = device.prefill_last(slot, ids, 0)
            np.testing.assert_allclose(got.row(0), want, rtol=0, atol=1e-5)
            assert got.greedy(0) == int(want.argmax())
            for backend in pair:
                backend.prefill(slot, more, length, NONE)
            for mine, theirs in zip(
                device.read_state(slot, 0, length + 2), host.read_state(slot, 0, length + 2), strict=True
            ):
                np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)


def test_other_slots_keep_their_state(pair: tuple[DeviceBackend, Backend]) -> None:
    device, _ = pair
    rng = np.random.default_rng(1)
    for slot in range(SLOTS):
        device.prefill_last(slot, rng.integers(1, device.vocab_size, 40), 0)
    before = [device.read_state(slot, 0, 40) for slot in range(SLOTS)]
    device.prefill_last(1, rng.integers(1, device.vocab_size, 60), 0)
    device.prefill_each(1, rng.integers(1, device.vocab_size, 4), 60)
    for slot in (0, 2):
        for old, new in zip(before[slot], device.read_state(slot, 0, 40), strict=True):
            np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("temperature", [0.0, 0.7, -1.0])
def test_judged_rows_are_those_of_steps(temperature: float, pair: tuple[DeviceBackend, Backend]) -> None:
    """Guesses of every count, at any place: after the first token, up to the last position, and too many for a graph."""
    device, host = pair
    rng = np.random.default_rng(2)
    for start, count in ((1, 1), (1, 3), (20, 2), (20, 5), (20, 9), (20, 20), (LENGTH - 4, 4), (LENGTH - 1, 1), (0, 3)):
        ids, guesses = rng.integers(1, device.vocab_size, start), rng.integers(1, device.vocab_size, count)
        for backend in pair:
            if start:
                backend.prefill(1, ids, 0, NONE)
        for _ in range(3):  # plainly, while it is captured, and from then on
            got = device.prefill_each(1, guesses, start, temperature)
            want = host.prefill_each(1, guesses, start).rows()
            assert len(got) == count
            np.testing.assert_allclose(got.rows(), want, rtol=0, atol=1e-5)
            for index in range(count):
                top = got.top(index)
                assert got.greedy(index) in (None, int(want[index].argmax()))
                if top is not None:
                    assert temperature > 0
                    assert top.ids[0] == want[index].argmax()
                    scaled = (want[index].astype(np.float64) - want[index].max()) / temperature
                    assert abs(top.log_sum - np.log(np.exp(scaled).sum())) < 1e-4


def test_only_the_latest_graphs_of_guesses_are_kept(
    pair: tuple[DeviceBackend, Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    device, host = pair
    monkeypatch.setattr(device_chunks, "_KEPT_JUDGED", 2)
    rng = np.random.default_rng(3)
    for backend in pair:
        for slot in range(SLOTS):
            backend.prefill(slot, np.arange(1, 11), 0, NONE)
    for slot in (0, 1, 2, 0, 2, 2, 1):
        guesses = rng.integers(1, device.vocab_size, 3)
        got, want = (backend.prefill_each(slot, guesses, 10).rows() for backend in pair)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
        assert len(device._chunks._judged) <= 2 + 1


def test_candidates_are_found_a_few_rows_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmx.runtime import device_steps
    from llmx.runtime.providers import import_onnxruntime

    monkeypatch.setattr(device_steps, "_CANDIDATE_ROWS", 3)
    manifest, memory = load_manifest(folder), HostMemory()
    session = open_device_sessions(folder, manifest, memory, ["CPUExecutionProvider"])["candidates"]
    rows, vocab = 8, manifest.model.vocab_size
    logits = np.random.default_rng(4).normal(size=(rows, vocab)).astype(np.float32)
    buffer = memory.allocate(logits.nbytes)
    memory.upload(buffer.address, logits)
    step = CandidatesStep(session, manifest, memory, rows, buffer)
    asks = np.linspace(0.3, 2.0, rows).astype(np.float32)
    for _ in range(2):
        step.queue(asks, import_onnxruntime().RunOptions())
        for row in range(rows):
            order = np.argsort(-logits[row], kind="stable")[: step.ids.shape[1]]
            np.testing.assert_array_equal(step.ids[row], order)
            scaled = (logits[row].astype(np.float64) - logits[row].max()) / asks[row]
            assert abs(step.log_sums[row] - np.log(np.exp(scaled).sum())) < 1e-4


def test_planes_are_copied_between_different_pitches() -> None:
    memory = HostMemory()
    source, target = memory.allocate(2 * 3 * 8), memory.allocate(2 * 4 * 16)
    values = np.arange(48, dtype=np.uint8)
    memory.upload(source.address, values)
    memory.copy_planes(Region(target.address + 2, 16, 64), Region(source.address, 8, 24), 5, 3, 2)
    got = np.zeros(128, np.uint8)
    memory.download(got, target.address)
    want = np.zeros((2, 4, 16), np.uint8)
    want[:, :3, 2:7] = values.reshape(2, 3, 8)[:, :, :5]
    np.testing.assert_array_equal(got.reshape(2, 4, 16), want)
