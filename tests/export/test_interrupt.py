"""Leaving `WeightsWriter` early: quickly, with the file closed and the thread at its end."""

# ruff: noqa: PT012 - what is left early is the block

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from llmx.export import writer as writers
from llmx.export.weights import SourceModel
from llmx.export.writer import WeightsWriter


class One(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.zeros(1 << 20))


class Slow(SourceModel):
    """Many chunks of one parameter, or one that is read until `release`."""

    def __init__(self, release: threading.Event | None = None) -> None:
        super().__init__(One(), {})
        self.release, self.read, self.reading = release, 0, threading.Event()

    def chunks(self, name: str, tensor: torch.Tensor) -> Iterator[bytearray]:  # type: ignore[override]
        for _ in range(1000):
            self.reading.set()
            if self.release is not None:
                self.release.wait(30)
            else:
                time.sleep(0.02)
            self.read += 1
            yield bytearray(1000)


def test_an_interrupt_is_answered_between_chunks(tmp_path: Path) -> None:
    source = Slow()
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt), WeightsWriter(tmp_path / "w", source) as writer:
        source.reading.wait(10)
        raise KeyboardInterrupt
    assert time.perf_counter() - start < 5
    assert source.read < 900
    assert writer._ended.is_set() and writer._file.closed


def test_an_interrupt_is_answered_within_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "_PIECE", 1000)
    writer = WeightsWriter(tmp_path / "w", SourceModel(One(), {}))
    writer._file = (tmp_path / "w").open("wb")
    writer._stop.set()
    with writer._file, pytest.raises(writers._Stopped):
        writer._append(bytes(5000))
    assert (tmp_path / "w").stat().st_size == 0


def test_no_sync_after_leaving_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(1))
    source = Slow()
    with pytest.raises(KeyboardInterrupt), WeightsWriter(tmp_path / "w", source):
        source.reading.wait(10)
        raise KeyboardInterrupt
    assert synced == []


def test_a_second_interrupt_while_waiting_for_the_thread(tmp_path: Path) -> None:
    release = threading.Event()
    source = Slow(release)
    again = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), WeightsWriter(tmp_path / "w", source) as writer:
            source.reading.wait(10)
            again.start()
            raise KeyboardInterrupt
        assert writer._file.closed
    finally:
        again.join()
        signal.signal(signal.SIGINT, before)
        release.set()
    assert writer._ended.wait(10)
    assert isinstance(writer._error, writers._Stopped) and source.read == 1
    assert (tmp_path / "w").stat().st_size == 0


def test_the_first_error_counts(tmp_path: Path) -> None:
    """What closing the file raises does not hide why the block was left."""

    class Full:
        closed = False

        def close(self) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(KeyboardInterrupt), WeightsWriter(tmp_path / "w", Slow()) as writer:
        writer._stop.set()
        writer._ended.wait()
        writer._file.close()
        writer._file = Full()
        raise KeyboardInterrupt


def test_an_interrupt_while_the_thread_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = threading.Thread.start

    def interrupted(self: threading.Thread) -> None:
        real(self)
        raise KeyboardInterrupt

    def none(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    for start, error in ((interrupted, KeyboardInterrupt), (none, RuntimeError)):
        writer = WeightsWriter(tmp_path / "w", Slow())
        monkeypatch.setattr(writer._thread, "start", start.__get__(writer._thread))
        with pytest.raises(error):
            writer.__enter__()
        assert writer._ended.is_set() and writer._file.closed
