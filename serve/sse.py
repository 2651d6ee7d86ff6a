"""Server-sent events, and ending work whose client has left."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

_GRACE = 1.0  # seconds for an error event to be sent at the time limit
DONE = b"data: [DONE]\n\n"


class ClientGoneError(Exception):
    """The client closed its connection before the answer was complete."""


_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def to_json(value: Any, depth: int = 5) -> str:
    """JSON in parts, by containers down to `depth`: what json makes of one is made in one go, and no other thread runs
    meanwhile. The log-probabilities of a long prompt are tens of megabytes.
    """
    if depth and isinstance(value, dict):
        return "{" + ",".join([f"{_to_json(str(k))}:{to_json(v, depth - 1)}" for k, v in value.items()]) + "}"
    if depth and isinstance(value, list):
        return "[" + ",".join([to_json(item, depth - 1) for item in value]) + "]"
    return _to_json(value)


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """One event. JSON has no raw newline, so one `data:` line holds it."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {_to_json(data)}\n\n".encode()


class Template:
    """Events that differ in one text: what is the same in all is written once."""

    def __init__(self, make: Callable[[str], dict[str, Any]]) -> None:
        """`make(text)` is the data of the event of `text`, which is in it once."""
        mark = secrets.token_hex(16)
        self._head, self._tail = event(make(mark)).split(f'"{mark}"'.encode())

    def fill(self, text: str) -> bytes:
        """`event(make(text))`."""
        return b"%b%b%b" % (self._head, _to_json(text).encode(), self._tail)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_left(request: Request, work: Awaitable[T]) -> T:
    """`work`'s result; where the client leaves first, `work` is cancelled and ClientGoneError raised."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        leaving.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class EventStream(Response):
    """Sends `events` as they come. `close` is called however it ends: at the end, by an error, or as the client leaves.

    At `limit` (time.monotonic) a client that has stopped reading is cut off: a connection that waits for it would wait
    for ever.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None], limit: float) -> None:
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._events, self._close, self._limit = events, close, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            timeout = max(0.0, self._limit - time.monotonic()) + _GRACE
            await asyncio.wait({sending, leaving}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            elif not leaving.done():
                scope.get("state", {}).get("abort", lambda: None)()
                raise ClientGoneError
        finally:
            self._close()
            leaving.cancel()
            sending.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for item in self._events:
            await send({"type": "http.response.body", "body": item, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
