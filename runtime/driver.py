"""Who steps the engine, and when: whoever waits for tokens does, one thread at a time."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llmx.runtime.errors import ClosedError, LlmxError
from llmx.runtime.outputs import StreamPiece
from llmx.runtime.scheduler import Request

if TYPE_CHECKING:
    from llmx.runtime.engine import Engine

CLOSED = "This LLM was closed; create a new one."


class Driver:
    """Owns the right to step `engine` (None: an encoder, which takes no steps), and its end.

    Invariants: at most one thread steps, or holds the engine at rest; each change of that wakes everyone who waits.
    A fork copies the lock in whatever state it is, so every method looks at the process before it takes the lock.
    """

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self._turn = threading.Condition()
        self._busy = False
        self._resting = 0  # callers that wait for the engine to rest, or have it at rest
        self._closed = False
        self._pid = os.getpid()

    def check_usable(self) -> None:
        """Raises ClosedError in another process than the creator's, and after `close`."""
        if os.getpid() != self._pid:
            raise ClosedError("This LLM was created before a fork; create one in each process that uses it.")
        if self._closed:
            raise ClosedError(CLOSED)

    def drive(self, ready: Callable[[], bool]) -> None:
        """Return once `ready()`; until then step the engine, or wait for the thread that does."""
        self.check_usable()
        with self._turn:
            while not ready():
                self.check_usable()
                if self._busy or not self._can_step():
                    self._turn.wait(timeout=1.0)
                else:
                    self._step()

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """The engine with no slot held and no step in progress meanwhile; slot 0 may be written.

        Nothing is admitted from the call on: running requests end, queued ones wait, so it comes about however busy the
        engine is.
        """
        self.check_usable()
        with self._turn:
            self._resting += 1
            try:
                self._reach_rest()
            except BaseException:
                self._resting -= 1
                self._turn.notify_all()
                raise
            self._busy = True
        try:
            yield
        finally:
            if self.engine is not None:
                self.engine.leave_rest()
            with self._turn:
                self._busy = False
                self._resting -= 1
                self._turn.notify_all()

    def _reach_rest(self) -> None:
        while True:
            self.check_usable()
            if self._busy:
                self._turn.wait(timeout=1.0)
            elif self._running():
                self._step()
            else:
                return

    def wake(self) -> None:
        """Let those who wait look again: something arrived."""
        with self._turn:
            self._turn.notify_all()

    def close(self, release: Callable[[], None]) -> None:
        """After the step in progress, end every request with ClosedError and call `release`. Idempotent.

        In another process than the creator's nothing is released: what the fork copied is not this process's.
        """
        if os.getpid() != self._pid:
            self._closed = True
            return
        with self._turn:
            while self._busy:
                self._turn.wait(timeout=1.0)
            if not self._closed:
                self._closed = True
                if self.engine is not None:
                    self.engine.end_all(ClosedError, CLOSED)
                release()
            self._turn.notify_all()
        if self.engine is not None:
            self.engine.hand_over()

    def fail(self, kind: type[LlmxError], reason: str) -> None:
        """After the step in progress, end every request with `kind(reason)`, and refuse later ones."""
        assert self.engine is not None
        with self._turn:
            while self._busy:
                self._turn.wait(timeout=1.0)
            self.engine.end_all(kind, reason)
            self._turn.notify_all()
        self.engine.hand_over()

    @property
    def has_work(self) -> bool:
        """Whether a request runs or waits."""
        return self.engine is not None and self.engine.has_work

    def _running(self) -> bool:
        return self.engine is not None and bool(self.engine.scheduler.pool.held())

    def _can_step(self) -> bool:
        return self._running() if self._resting else self.has_work

    def _step(self) -> None:
        """One step without the lock, which the caller holds."""
        assert self.engine is not None and not self._busy
        admit = not self._resting
        self._busy = True
        self._turn.release()
        try:
            self.engine.step(admit)
        finally:
            self._turn.acquire()
            self._busy = False
            self._turn.notify_all()


class PieceStream(Iterator[StreamPiece]):
    """One request's pieces as they come. Closing it, or dropping it, frees the request's slot, even if it never began.

    `cancel` and `close` may be called from any thread, whoever waits for the next piece.
    """

    def __init__(self, driver: Driver, request: Request, pieces: deque[StreamPiece]) -> None:
        self._driver, self._request, self._pieces = driver, request, pieces
        self._closed = False
        self._map: Callable[[StreamPiece], StreamPiece] | None = None

    def map(self, function: Callable[[StreamPiece], StreamPiece]) -> PieceStream:
        """This stream, each of its pieces passed through `function`."""
        self._map = function
        return self

    def __next__(self) -> StreamPiece:
        request, pieces = self._request, self._pieces
        if self._closed:
            raise StopIteration
        try:
            self._driver.drive(lambda: bool(pieces) or request.finished)
        except BaseException:
            self.close()
            raise
        if request.error is not None:
            self.close()
            raise request.error
        if not pieces:
            self.close()
            raise StopIteration
        piece = pieces.popleft()
        return piece if self._map is None else self._map(piece)

    def cancel(self) -> None:
        """End the request; its slot is free before the next step. The iterator goes on to its last piece, whose
        `finish_reason` is "abort" unless the request had ended already. Idempotent.
        """
        if not self._request.finished:
            self._request.cancelled = True
            self._driver.wake()

    def close(self) -> None:
        """End the request; its slot is free before the next step. No further piece comes. Idempotent."""
        self._closed = True
        if not self._request.finished:
            self._request.cancelled = True

    def __enter__(self) -> PieceStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
