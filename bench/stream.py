"""Streamed answers over HTTP/1.1: h11 on asyncio's protocols. A chunk goes to its reader as it arrives, without a task that
wakes for it: a load generator must cost less for a token than the server it measures.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from urllib.parse import urlsplit

import h11

Feed = Callable[[bytes], None]


class Connections:
    """Connections to one server, used again where it keeps them open."""

    def __init__(self, base_url: str, headers: dict[str, str], timeout: float) -> None:
        """`timeout`: seconds without a byte after which a request fails."""
        parts = urlsplit(base_url)
        self._host, self._path = parts.hostname or "", parts.path.rstrip("/")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._headers = [
            ("host", parts.netloc.rpartition("@")[2]),
            ("content-type", "application/json"),
            *headers.items(),
        ]
        self._timeout = timeout
        self._idle: list[_Connection] = []

    async def post(self, path: str, body: bytes, feed: Feed) -> tuple[int, bytes]:
        """The answer's status, and its body unless that is 200: then `feed` gets the pieces as they come. What `feed` raises
        ends the request, and is raised. Raises OSError, TimeoutError or h11.ProtocolError.
        """
        connection = await self._free()
        head = h11.Request(
            method="POST", target=self._path + path, headers=[*self._headers, ("content-length", str(len(body)))]
        )
        try:
            answer = await connection.request(head, body, feed, self._timeout)
        except BaseException:
            connection.close()
            raise
        if connection.reusable():
            self._idle.append(connection)
        else:
            connection.close()
        return answer

    async def _free(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.lost:
                return connection
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._timeout):
            _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        return connection

    def close(self) -> None:
        """Close those that are idle."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._http = h11.Connection(h11.CLIENT)
        self._feed: Feed = lambda _: None
        self._status, self._body = 0, b""
        self._done: asyncio.Future[tuple[int, bytes]] | None = None
        self._heard = 0.0  # when the last byte came, on the loop's clock
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    async def request(self, head: h11.Request, body: bytes, feed: Feed, timeout: float) -> tuple[int, bytes]:
        loop = asyncio.get_running_loop()
        self._feed, self._status, self._body = feed, 0, b""
        self._done = done = loop.create_future()
        parts = [self._http.send(head), self._http.send(h11.Data(data=body)), self._http.send(h11.EndOfMessage())]
        self._transport.write(b"".join(part for part in parts if part))
        self._heard = loop.time()
        self._timer = loop.call_later(timeout, self._look, timeout)
        try:
            return await done
        finally:
            self._timer.cancel()
            self._done = None

    def _look(self, timeout: float) -> None:
        """End the request where nothing has come for `timeout` seconds, else look again when that may be."""
        loop = asyncio.get_running_loop()
        left = self._heard + timeout - loop.time()
        if left <= 0:
            self._end(TimeoutError(f"nothing came for {timeout:g} s"))
        elif self._done is not None:
            self._timer = loop.call_later(left, self._look, timeout)

    def data_received(self, data: bytes) -> None:
        self._heard = asyncio.get_running_loop().time()
        self._receive(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if exc is not None:
            self._end(exc)
        else:
            self._receive(b"")

    def _receive(self, data: bytes) -> None:
        if self._done is None or self._done.done():
            if data:
                self.close()  # more than the answer
            return
        try:
            self._http.receive_data(data)
            while (event := self._http.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
                self._take(event)
                if self._done.done():
                    return
        except Exception as error:  # h11's, or the reader's
            self._end(error)

    def _take(self, event: object) -> None:
        if isinstance(event, h11.Data):
            if self._status == 200:
                self._feed(bytes(event.data))
            else:
                self._body += bytes(event.data)
        elif isinstance(event, h11.Response):
            self._status = event.status_code
        elif isinstance(event, h11.EndOfMessage):
            assert self._done is not None
            self._done.set_result((self._status, self._body))
        elif isinstance(event, h11.ConnectionClosed):
            self._end(ConnectionResetError("the server closed the connection"))

    def _end(self, error: BaseException) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    def reusable(self) -> bool:
        """Whether another request may follow; makes the connection ready for it."""
        if self.lost or self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    def close(self) -> None:
        self.lost = True
        self._transport.close()
