"""A server that says what a test wants: the page's files, and scripted answers of the API that it speaks."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI
from llmx.serve.web import add_page
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse


@dataclass
class Script:
    """What the fake server answers. `deltas` are sent in turn, `pause` seconds apart; `requests` are the bodies seen."""

    deltas: list[dict[str, Any]] = field(default_factory=lambda: [{"content": "Hello"}, {"content": " there."}])
    pause: float = 0.0
    finish: str = "stop"
    error: str | None = None  # sent as an event after the deltas
    refusal: tuple[int, str] | None = None  # the answer's status and message, instead of a stream
    key: str | None = None
    models: list[str] = field(default_factory=lambda: ["demo"])
    metrics: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys_seen: list[str | None] = field(default_factory=list)
    disconnected: threading.Event = field(default_factory=threading.Event)


def make_app(script: Script) -> FastAPI:
    app = FastAPI()
    add_page(app)

    def refused(request: Request) -> Response | None:
        given = request.headers.get("authorization")
        script.keys_seen.append(given)
        if script.key is None or given == f"Bearer {script.key}":
            return None
        return JSONResponse({"error": {"message": "Send a key.", "code": "invalid_api_key"}}, 401)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        return refused(request) or JSONResponse({"data": [{"id": name} for name in script.models]})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        return refused(request) or PlainTextResponse(script.metrics)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        script.requests.append(await request.json())
        if (refusal := refused(request)) is not None:
            return refusal
        if script.refusal is not None:
            return JSONResponse({"error": {"message": script.refusal[1], "code": "invalid_value"}}, script.refusal[0])
        return StreamingResponse(_events(script), media_type="text/event-stream")

    return app


async def _events(script: Script) -> AsyncIterator[str]:
    def event(**chunk: Any) -> str:
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

    try:
        for number, delta in enumerate(script.deltas, 1):
            usage = {"prompt_tokens": 7, "completion_tokens": number}
            yield event(choices=[{"index": 0, "delta": delta, "finish_reason": None}], usage=usage)
            await asyncio.sleep(script.pause)
        if script.error is not None:
            yield "event: error\n" + event(error={"message": script.error, "code": "internal"})
            return
        yield event(choices=[{"index": 0, "delta": {}, "finish_reason": script.finish}])
        details = {
            "prompt_tokens": 7,
            "completion_tokens": len(script.deltas),
            "prompt_tokens_details": {"cached_tokens": 4},
        }
        yield event(choices=[], usage=details)
        yield "data: [DONE]\n\n"
    except asyncio.CancelledError:
        script.disconnected.set()
        raise


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """The address of `app` on a free port of this machine."""
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline and thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
