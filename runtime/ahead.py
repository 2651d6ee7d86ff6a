"""A call on a thread of its own, beside what the caller does meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Runs `call` from now on; `inline` runs it at once, on the caller's thread, and raises there.

    What concurrent.futures does, without importing it: that takes longer than what is run here when a process starts.
    Owns its thread: whoever makes one calls `join` or `result`, whatever happens.
    """

    def __init__(self, call: Callable[[], T], inline: bool = False) -> None:
        self._value: T | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if inline:
            self._value = call()
        else:
            self._thread = threading.Thread(target=self._run, args=(call,), name="llmx-ahead")
            self._thread.start()

    def _run(self, call: Callable[[], T]) -> None:
        try:
            self._value = call()
        except BaseException as error:  # raised to whoever asks for the result
            self._error = error

    def join(self) -> None:
        """Wait for its end."""
        if self._thread is not None:
            self._thread.join()

    def result(self) -> T:
        """What `call` returned. Raises what it raised."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]
