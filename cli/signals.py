"""Signals that end a command as Ctrl-C does: what is half-done is cleaned up first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Terminated(KeyboardInterrupt):
    """A signal other than Ctrl-C asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.strsignal(number))
        self.number = number


def exit_code(interrupt: BaseException | None) -> int:
    """What a shell shows for a process that this interrupt ended: 143 after SIGTERM, 130 after Ctrl-C."""
    return 128 + (interrupt.number if isinstance(interrupt, Terminated) else signal.SIGINT)


def _terminate(number: int, _: FrameType | None) -> None:
    raise Terminated(number)


@contextlib.contextmanager
def termination_interrupts() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP raise Terminated; handlers that someone else set stay, and so does `nohup`.

    Does nothing outside the main thread, where no handler can be set.
    """
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
    numbers = [getattr(signal, name) for name in names]
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        ours = []
    try:
        for number in ours:
            signal.signal(number, _terminate)
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
