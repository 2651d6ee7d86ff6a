"""Reading a request's body: its size, its time, its type, its JSON."""

from __future__ import annotations

import asyncio
import gc
from typing import Any, TypeVar

from llmx.serve.errors import ApiError, validation_error
from llmx.serve.sse import ClientGoneError
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

M = TypeVar("M", bound=BaseModel)


async def read(request: Request, kind: type[M]) -> M:
    """The body as a `kind`. Raises ApiError: 415 (no JSON), 413 (too large), 408 (too slow), 400 (wrong).

    A page of another origin cannot make a browser send application/json without asking first (CORS), so other types are
    refused. The parser refuses JSON nested deeper than 200.
    """
    config = request.app.state.config
    kind_given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind_given != "application/json":
        raise ApiError(415, "unsupported_media_type", "Send JSON with the header Content-Type: application/json.")
    limit = int(config.max_body * 1e6)
    try:
        async with asyncio.timeout(config.body_timeout):
            body = await _collect(request, limit)
    except TimeoutError:
        raise ApiError(
            408,
            "body_timeout",
            f"The body did not arrive within {config.body_timeout:g} s.",
            headers={"connection": "close"},
        ) from None
    except ClientDisconnect:
        raise ClientGoneError from None
    return _parsed(kind, body)


def _parsed(kind: type[M], body: bytes) -> M:
    """Raises ApiError. The event loop waits meanwhile, and collecting garbage among millions of new lists would take longer
    than making them (8 MB of `[[],[],…`: 3.4 s instead of 0.8).
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise validation_error(error) from None
    finally:
        if collecting:
            gc.enable()


async def _collect(request: Request, limit: int) -> bytes:
    announced = request.headers.get("content-length", "0")
    too_large = ApiError(
        413,
        "request_too_large",
        f"The body is larger than {limit:,} bytes, which this server takes.",
        headers={"connection": "close"},
    )
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


def takes(kind: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route whose body `read` parses."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
