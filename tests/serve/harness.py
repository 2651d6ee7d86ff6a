"""A server in this process, on a free port: real sockets, and the engine within reach of the tests."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from llmx.serve import Model, Models, ServeConfig, create_app, load_models
from llmx.serve.engines import ProcessEngine, ThreadEngine
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
        while any(m.queue.taken or self._has_work(m) for m in self.models):
            assert time.monotonic() < deadline, "slots or places are still taken"
            time.sleep(0.01)
        for model in self.models:
            if isinstance(model.engine, ThreadEngine):
                assert model.llm.engine.scheduler.pool.held() == []
                model.llm.engine.scheduler.pool.check_integrity()

    def _has_work(self, model: Model) -> bool:
        if isinstance(model.engine, ProcessEngine):
            asked = asyncio.run_coroutine_threadsafe(model.engine.stats(), self.server.servers[0].get_loop())
            stats = asked.result(10)
            return bool(stats.num_running or stats.num_waiting)
        return model.engine is not None and model.llm.engine.has_work


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


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.002)


@contextmanager
def process(demo: Path, port: int, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "llmx.cli", "serve", "--onnx", f"demo={demo}", "--port", str(port), *options]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        wait_for(port, server)
        yield server
    finally:
        server.kill()
        server.communicate()


def wait_for(port: int, server: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            assert httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5).status_code == 200
            return
        except httpx.TransportError:
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
