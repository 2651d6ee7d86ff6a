"""uvicorn with the limits that it does not have itself, and a drain that refuses what comes too late."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
from types import FrameType

import h11
import uvicorn
from llmx.runtime.errors import EngineDeadError, MachineError
from llmx.serve.app import create_app
from llmx.serve.config import ServeConfig
from llmx.serve.logs import configure, log
from llmx.serve.models import Models
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_HEADERS = 32 * 1024  # bytes of a request line with all headers


def _protocol(header_timeout: float) -> type[H11Protocol]:
    """A connection that is closed where a request's headers take longer than `header_timeout` seconds to arrive.

    uvicorn limits neither the first request's headers nor a slow trickle of them, which costs a server its connections
    (slowloris).
    """

    class LimitedProtocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.app_state = {**self.app_state, "abort": transport.abort}  # reaches a request as scope["state"]
            self._expect()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._stop_clock()
            elif self.conn.trailing_data[0] and self._deadline is None:
                self._expect()  # the next request has begun

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_clock()
            super().connection_lost(exc)

        def _expect(self) -> None:
            self._deadline = self.loop.call_later(header_timeout, self._too_slow)

        def _stop_clock(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _too_slow(self) -> None:
            self._deadline = None
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self.transport.close()

    return LimitedProtocol


class Server(uvicorn.Server):
    """A uvicorn server that stops taking requests when it is told to end, and lets those that run end."""

    def __init__(self, config: uvicorn.Config, models: Models) -> None:
        super().__init__(config)
        self._models = models
        models.died = self._engine_died

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._refuse()
        super().handle_exit(sig, frame)

    def _refuse(self) -> None:
        for model in self._models:
            model.queue.closed = True

    def _engine_died(self) -> None:
        """There is nothing to go on with: other models' requests may end, then whoever supervises this starts it again."""
        self._refuse()
        self.should_exit = True


def uvicorn_config(app: ASGIApp, config: ServeConfig) -> uvicorn.Config:
    """uvicorn's settings. h11 is the parser that limits headers."""
    return uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        http=_protocol(config.header_timeout),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADERS,
        timeout_keep_alive=max(1, round(config.keep_alive)),
        timeout_graceful_shutdown=max(1, round(config.drain_timeout)),
        limit_concurrency=config.max_connections,
    )


def bind(config: ServeConfig) -> socket.socket:
    """The address taken, before anything is loaded; nobody can connect before it is served. Raises MachineError.

    Small writes go out at once (accepted connections inherit it): otherwise one that follows another waits until the client
    acknowledges that, which takes 40 ms. asyncio sees to it for sockets of its own.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.bind(address)
    except OSError as error:
        raise MachineError(
            f"{config.host}:{config.port} cannot be listened on: {error.strerror}; choose another --host or --port."
        ) from None
    return sock


def serve(models: Models, config: ServeConfig, sock: socket.socket) -> None:
    """Serve at `bind`'s socket until SIGTERM or SIGINT; running requests get `drain_timeout` seconds to end.

    Raises EngineDeadError where an engine ended instead.
    """
    configure(config.log_format, config.log_level)
    server = Server(uvicorn_config(create_app(models, config), config), models)
    # What is there now stays. Left out of collections, it neither makes them long, which stalls streams, nor rare.
    gc.collect()
    gc.freeze()
    names = [model.name for model in models]
    pids = {
        model.name: model.engine.pid for model in models if model.engine is not None and model.engine.pid is not None
    }
    more = {"engine_pids": pids} if pids else {}
    log(logging.INFO, "serving", models=names, host=config.host, port=sock.getsockname()[1], **more)
    server.run(sockets=[sock])
    for model in models:
        if model.engine is not None and model.engine.died:
            raise EngineDeadError(f"{model.name}: {model.engine.how_it_ended()}; start the server again.")
