"""From the engine's thread to an event loop: what a step made, in one wake-up."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any


class Mailbox:
    """Items for one reader. Only the event loop touches it."""

    def __init__(self) -> None:
        self._items: list[Any] = []
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Any) -> None:
        self._items.append(item)
        self._wake()

    def fail(self, error: BaseException) -> None:
        """The reader gets `error` instead of what it has not taken yet."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Any]:
        """All items that are there; waits where there are none."""
        if not self._items and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._error is not None:
            raise self._error
        items, self._items = self._items, []
        return items


class Pump:
    """Brings items to the mailboxes of a loop. The engine calls `wake` when it has handed over all of a step (`Engine.wakers`):
    a loop that is woken for each would take the interpreter from the engine's thread in the middle of a step.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[tuple[Mailbox, Any]] = deque()
        self._woken = False

    def put(self, mailbox: Mailbox, item: Any) -> None:
        """From the engine's thread. Raises RuntimeError where the loop is closed."""
        if self._loop.is_closed():
            raise RuntimeError("the event loop is closed")
        self._items.append((mailbox, item))

    def wake(self) -> None:
        """From the engine's thread. Raises RuntimeError where the loop is closed."""
        if self._items and not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._drain)
        elif self._loop.is_closed():
            raise RuntimeError("the event loop is closed")

    def _drain(self) -> None:
        self._woken = False  # before the items are taken: a later one wakes again
        while self._items:
            mailbox, item = self._items.popleft()
            mailbox.put(item)
