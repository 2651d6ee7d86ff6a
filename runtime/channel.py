"""Messages between a process and the one that runs its engine: pickled, each with its length before it."""

from __future__ import annotations

import contextlib
import pickle
import socket
import struct
import threading
from collections import deque
from typing import Any

_LENGTH = struct.Struct("<Q")
_CHUNK = 1 << 18
_MOST = 4 * _CHUNK  # bytes read at a time by one who has other things to do


class Channel:
    """Owns one end of a connected pair of sockets. Both ends are llmx's own, so what comes may be unpickled.

    Any thread may send, which never blocks: what the other side has no room for yet is kept, and a thread sends it. One
    thread receives. Invariant: while something is kept, that thread alone writes.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._kept: deque[memoryview] = deque()
        self._buffer = bytearray()
        self.ended = False  # whether the other side is gone

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: Any) -> None:
        """Nothing is raised where the other side is gone: who receives finds out."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        frame = memoryview(_LENGTH.pack(len(data)) + data)
        with self._lock:
            if not self._kept:
                frame = frame[self._write(frame) :]
                if not frame:
                    return
                threading.Thread(target=self._send_kept, name="llmx-channel", daemon=True).start()
            self._kept.append(frame)

    def _write(self, frame: memoryview) -> int:
        """Bytes that went out without waiting."""
        try:
            return self._sock.send(frame, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            return len(frame)

    def _send_kept(self) -> None:
        with self._lock:
            frame = self._kept[0]
        while True:
            try:
                self._sock.sendall(frame)
            except OSError:
                with self._lock:
                    self._kept.clear()
                return
            with self._lock:  # once: who finds nothing kept starts another thread
                self._kept.popleft()
                if not self._kept:
                    return
                frame = self._kept[0]

    def receive(self) -> Any:
        """The next message; waits for it. Raises EOFError where the other side is gone."""
        while True:
            message = self._next()
            if message is not None:
                return message
            self._read(0)
            if self.ended:
                raise EOFError

    def available(self) -> list[Any]:
        """Messages that are there. `ended` says whether the other side is gone."""
        limit = len(self._buffer) + _MOST
        while not self.ended and len(self._buffer) < limit and self._read(socket.MSG_DONTWAIT):
            pass
        messages = []
        while (message := self._next()) is not None:
            messages.append(message)
        return messages

    def _read(self, flags: int) -> bool:
        """Whether there may be more."""
        try:
            data = self._sock.recv(_CHUNK, flags)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        self.ended = not data
        self._buffer += data
        return len(data) == _CHUNK

    def _next(self) -> Any:
        """A message that has come whole, or None (which is no message)."""
        if len(self._buffer) < _LENGTH.size:
            return None
        end = _LENGTH.size + _LENGTH.unpack_from(self._buffer)[0]
        if len(self._buffer) < end:
            return None
        message = pickle.loads(memoryview(self._buffer)[_LENGTH.size : end])  # a view is gone before the next line
        del self._buffer[:end]
        return message

    def close(self) -> None:
        """Let whoever waits here or there know that this is the end."""
        with contextlib.suppress(OSError):  # the other side was first
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
