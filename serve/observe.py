"""One place that sees every request begin and end: its id, its log line, its metrics."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from typing import Any

from llmx.serve.errors import api_error
from llmx.serve.logs import LOGGER, log
from llmx.serve.metrics import Metrics
from llmx.serve.otel import Tracer
from llmx.serve.sse import ClientGoneError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_QUIET = {"/health", "/ready", "/metrics"}


class Observer:
    """ASGI middleware, the outermost. What no handler caught becomes a 500 in OpenAI's shape, and its traceback a log line."""

    def __init__(self, app: ASGIApp, metrics: Metrics, log_prompts: bool = False, tracer: Tracer | None = None) -> None:
        self._app, self._metrics, self._log_prompts, self._tracer = app, metrics, log_prompts, tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0
        request_id = _request_id(scope)
        state = scope.setdefault("state", {})

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, observed)
        except (ClientGoneError, asyncio.CancelledError) as error:
            state["error"] = error
            if isinstance(error, asyncio.CancelledError):
                raise
        except Exception as error:
            state["error"] = error
            if not status:
                await api_error(error).response()(scope, receive, observed)
        finally:
            self._note(scope, state, request_id, status, start)
            # Its traceback holds the request, which holds it: memory until the next collection.
            state.pop("error", None)

    def _note(self, scope: Scope, state: dict[str, Any], request_id: str, status: int, start: float) -> None:
        end = time.perf_counter()
        generation, error = state.get("generation"), state.get("error")
        gone = isinstance(error, ClientGoneError | asyncio.CancelledError)
        fields: dict[str, Any] = {
            "request_id": request_id,
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": 499 if gone else status,
            "duration_ms": round((end - start) * 1e3, 1),
            "client": (scope.get("client") or ("?",))[0],
        }
        if error is not None and not gone:
            fields["error"] = api_error(error).code
            if fields["error"] == "internal_error":  # the client was told that its reason is here
                LOGGER.error("request failed", exc_info=error, extra={"fields": {"request_id": request_id}})
        if generation is not None:
            self._metrics.observe(generation)
            metrics = [r.metrics for r in generation.requests]
            fields["model"] = generation.model.name
            fields["prompt_tokens"] = sum(m.num_prompt_tokens for m in metrics)
            fields["completion_tokens"] = sum(m.num_output_tokens for m in metrics)
            fields["finish_reasons"] = [s.finish_reason or "abort" for r in generation.requests for s in r.sequences]
            if metrics and metrics[0].first_token:
                fields["ttft_ms"] = round(metrics[0].ttft * 1e3, 1)
            if self._log_prompts:
                fields["prompts"] = [r.prompt if r.prompt is not None else r.prompt_ids for r in generation.requests]
                fields["answers"] = [s.text for r in generation.requests for s in r.sequences]
        if self._tracer is not None and scope["path"] not in _QUIET:
            self._tracer.record(dict(scope), fields["status"], start, end, generation, fields.get("error"))
        log(logging.DEBUG if scope["path"] in _QUIET else logging.INFO, "request", **fields)


def _request_id(scope: Scope) -> str:
    """The client's x-request-id where it is a plain word, else a new one."""
    given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
    return given if _ID.fullmatch(given) else uuid.uuid4().hex
