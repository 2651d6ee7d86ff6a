"""A small OpenAI server that answers as told: known delays, errors, events cut anywhere."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any


class FakeServer:
    """Streams `max_tokens` tokens: the first after `first` seconds, the others `gap` apart. Runs in a thread. After the very
    first request, answers begin once `together` requests wait (or 10 seconds later).

    `fail(n)` -> what the n-th request gets instead: a status and a body, "cut" (the connection ends after two tokens) or
    "event" (an error event after two tokens).
    """

    def __init__(self, first: float = 0.05, gap: float = 0.01, piece: int = 0, newline: str = "\n") -> None:
        self.first, self.gap, self.piece, self.newline = first, gap, piece, newline
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.now = self.most = self.connections = 0
        self.together = 1
        self.fail: Any = lambda _: None
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> FakeServer:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._main())

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                length = next(
                    (int(v.split(":")[1]) for v in head.split("\r\n") if v.lower().startswith("content-l")), 0
                )
                body = json.loads(await reader.readexactly(length)) if length else {}
                if head.startswith("GET /v1/models"):
                    self._plain(writer, 200, {"data": [{"id": "fake-model"}]})
                    continue
                self.bodies.append(body)
                self.headers.append(head)
                await self._answer(writer, body, self.fail(len(self.bodies) - 1), "chat" in head.split("\r\n")[0])
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _plain(self, writer: asyncio.StreamWriter, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)

    async def _answer(self, writer: asyncio.StreamWriter, body: dict[str, Any], fault: Any, chat: bool) -> None:
        if isinstance(fault, tuple):
            self._plain(writer, *fault)
            return
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            late = self._loop.time() + 10
            while len(self.bodies) > 1 and self.most < self.together and self._loop.time() < late:
                await asyncio.sleep(0.005)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            if chat:
                await self._event(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            for number in range(body["max_tokens"]):
                await asyncio.sleep(self.gap if number else self.first)
                if fault and number == 2:
                    if fault == "event":
                        await self._event(writer, {"error": {"message": "the engine broke", "code": "x"}})
                        writer.write(b"0\r\n\r\n")
                    return
                choice = {"delta": {"content": "x"}} if chat else {"text": "" if number % 2 else "x"}
                await self._event(writer, {"choices": [{"index": 0, "finish_reason": None, **choice}]})
            end = {"delta": {}} if chat else {"text": ""}
            await self._event(writer, {"choices": [{"index": 0, "finish_reason": "length", **end}]})
            usage = {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}
            await self._event(writer, {"choices": [], "usage": usage})
            await self._send(writer, f"data: [DONE]{self.newline * 2}".encode())
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        finally:
            self.now -= 1
            if fault == "cut":
                writer.close()

    async def _event(self, writer: asyncio.StreamWriter, data: dict[str, Any]) -> None:
        await self._send(writer, f": comment{self.newline}data: {json.dumps(data)}{self.newline * 2}".encode())

    async def _send(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        size = self.piece or len(data)
        for start in range(0, len(data), size):
            part = data[start : start + size]
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            await writer.drain()
