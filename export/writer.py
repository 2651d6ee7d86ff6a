"""`weights.data`, written while the graphs are still being traced.

Reading, converting, hashing and writing a checkpoint's tensors releases the interpreter lock, and tracing needs no
values: a thread does the one beside the other. What no graph turns out to use is left out by writing again.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from llmx.export.quantization import Plan
from llmx.export.weights import SourceModel
from llmx.runtime.errors import ExportError

ALIGNMENT = 4096  # a page: the runtime maps tensors where they lie
INLINE_BELOW = 4096  # smaller tensors stay inside the graph files
_MOST_UNUSED = 0.005  # of the file; more, and it is written again without

_PIECE = 8 << 20  # written and hashed between two looks at whether to stop

Progress = Callable[[int, int], None]  # bytes done, bytes in all
Span = tuple[int, int]  # offset and length within the file


class _Stopped(Exception):  # noqa: N818 - ends the thread, and reaches nobody
    """The block was left before the file was complete."""


class WeightsWriter:
    """Owns `weights.data` from its first byte to its hash.

    Entering starts a thread that writes every parameter of `source` that is large enough: quantized, in parts, where `plan`
    names it. `finish` waits for it, adds further tensors and returns where each lies. Leaving the block early stops the
    thread. The caller leaves the parameters alone meanwhile.
    """

    def __init__(self, path: Path, source: SourceModel, plan: Plan | None = None) -> None:
        self.path = path
        self.sha256, self.size = "", 0
        self._source = source
        self._parameters = dict(source.module.named_parameters())
        self._plan = plan or {}
        self._large = [n for n, p in self._parameters.items() if n in self._plan or p.nbytes >= INLINE_BELOW]
        self._total = sum(sum(self._sizes(name).values()) for name in self._large)
        self._done = 0
        self._spans: dict[str, Span] = {}
        self._hash: Any = hashlib.sha256()
        self._stop, self._ended = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._file: Any = None
        self._thread = threading.Thread(target=self._run, name="llmx-weights", daemon=True)

    @property
    def expected_bytes(self) -> int:
        """Bytes of everything to write, as far as it is known beforehand."""
        return self._total

    @property
    def bytes_to_come(self) -> int:
        """Those of `expected_bytes` that are not written yet."""
        return max(0, self._total - self._done)

    def __enter__(self) -> WeightsWriter:
        self._file = self.path.open("w+b")
        try:
            self._thread.start()
        except BaseException as error:  # Ctrl-C while it starts, or no thread to be had
            if isinstance(error, RuntimeError):
                self._ended.set()
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        try:
            self._ended.wait()  # not join(): before Python 3.13 an interrupted one calls a running thread ended
        finally:  # also when a second Ctrl-C ends the wait: the thread fails at its next write to the closed file
            # Closing hides no error that the block was left by.
            with contextlib.suppress(OSError) if kind is not None else contextlib.nullcontext():
                self._file.close()

    def _run(self) -> None:
        try:
            with torch.no_grad():
                self._write_parameters(self._large)
            if not self._stop.is_set():
                self._sync()
        except BaseException as error:  # handed to whoever waits in finish()
            self._error = error
        finally:
            self._ended.set()

    def _sizes(self, name: str) -> dict[str, int]:
        """Bytes of what parameter `name` is written as: itself, or its quantized parts."""
        return self._plan[name].sizes if name in self._plan else {name: self._parameters[name].nbytes}

    def _write_parameters(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._plan:
                for part, chunks in self._plan[name].parts():
                    self._write(part, chunks, self._plan[name].sizes[part])
            else:
                self._write(name, self._source.chunks(name, self._parameters[name]), self._parameters[name].nbytes)

    def _write(self, key: str, chunks: Iterable[bytes | bytearray | memoryview], expected: int) -> None:
        start = self._start()
        for chunk in chunks:
            self._append(chunk)
        self._end(key, start, expected)

    def _rearrange(self, used: set[str], groups: Sequence[list[str]]) -> None:
        """Write the file anew from what it holds: what is used, each group together."""
        group_of = {key: group for group in groups for key in group}
        old, old_spans = self._file, self._spans
        new = self.path.with_name(self.path.name + ".new")
        self._hash, self._spans = hashlib.sha256(), {}
        try:
            with new.open("w+b") as self._file:
                for first in sorted(used, key=lambda key: old_spans[key]):
                    for key in [] if first in self._spans else group_of.get(first, [first]):
                        glued = key != group_of.get(first, [first])[0]
                        start = int(self._file.tell()) if glued else self._start()
                        offset, length = old_spans[key]
                        old.seek(offset)
                        for at in range(0, length, _PIECE):
                            self._append(old.read(min(_PIECE, length - at)))
                        self._end(key, start, length)
        finally:
            self._file = old
        old.close()
        os.replace(new, self.path)
        self._file = self.path.open("r+b")
        self._file.seek(0, os.SEEK_END)

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def _start(self) -> int:
        self._append(bytes(-self._file.tell() % ALIGNMENT))
        return int(self._file.tell())

    def _append(self, data: bytes | bytearray | memoryview) -> None:
        """Write and hash `data`, piece by piece. Raises _Stopped soon after the block was left."""
        view = memoryview(data)
        for at in range(0, len(view), _PIECE):
            if self._stop.is_set():
                raise _Stopped
            piece = view[at : at + _PIECE]
            self._file.write(piece)
            self._hash.update(piece)
            self._done += len(piece)

    def _end(self, name: str, start: int, expected: int) -> None:
        length = self._file.tell() - start
        if length != expected:
            raise ExportError(f"{name} has {length} bytes in the checkpoint and {expected} in the graph.")
        self._spans[name] = (start, length)

    def finish(
        self,
        used: set[str],
        further: dict[str, Callable[[], bytes]],
        progress: Progress,
        groups: Sequence[list[str]] = (),
    ) -> dict[str, Span]:
        """Offset and length of every `used` parameter or part of one, and of every `further` tensor (name -> its bytes), the
        file complete. A planned parameter that is used as it is gets written as well. What is in one of the `groups` lies
        side by side, in its order; groups that share something are equal.

        Raises what the thread raised: CheckpointError, ExportError or OSError.
        """
        while not self._ended.is_set():
            progress(min(self._done, self._total), self._total)
            self._ended.wait(0.1)
        if self._error is not None:
            raise self._error
        for name in sorted(used - self._spans.keys()):
            self._write(name, self._source.chunks(name, self._parameters[name]), self._parameters[name].nbytes)
        unused = sum(length for key, (_, length) in self._spans.items() if key not in used)
        apart = any(sum(self._spans[a]) != self._spans[b][0] for g in groups for a, b in itertools.pairwise(g))
        if apart or unused > _MOST_UNUSED * self._total:
            self._rearrange(used, groups)
        for name, read in further.items():
            data = read()
            self._write(name, [data], len(data))
        self._sync()
        self.sha256, self.size = self._hash.hexdigest(), self._file.tell()
        progress(self._total, self._total)
        return self._spans
