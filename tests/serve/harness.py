"""A server in this process, on a free port: real sockets, and the engine within reach of the tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
from llmx.serve import Models, ServeConfig, create_app, load_models
from llmx.serve.server import Server, bind, uvicorn_config


@dataclass
class Running:
    url: str
    models: Models
    server: uvicorn.Server
    http: httpx.Client

    @property
    def address(self) -> tuple[str, int]:
        return self.http.base_url.host, int(self.http.base_url.port or 80)

    @property
    def engine(self) -> Any:
        return next(iter(self.models)).llm.engine

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def wait_idle(self, seconds: float = 10) -> None:
        """Fail unless every slot and place is free within `seconds`."""
        deadline = time.monotonic() + seconds
        while any(m.queue.taken or (m.aio and m.llm.engine.has_work) for m in self.models):
            assert time.monotonic() < deadline, "slots or places are still taken"
            time.sleep(0.01)
        for model in self.models:
            if model.aio:
                assert model.llm.engine.scheduler.pool.held() == []
                model.llm.engine.scheduler.pool.check_integrity()


@contextmanager
def running(config: ServeConfig, models: Models | None = None, tracer: Any = None) -> Iterator[Running]:
    models = models or load_models(config)
    with bind(config.model_copy(update={"port": 0})) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        server = Server(uvicorn_config(create_app(models, config, tracer), config), models)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.005)
            with httpx.Client(base_url=url, timeout=60) as client:
                yield Running(url, models, server, client)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
