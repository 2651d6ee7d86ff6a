"""The ASGI application: routes, middleware, what they share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from llmx.runtime import LlmxError
from llmx.runtime.pump import Pump
from llmx.serve import protocol, responses
from llmx.serve.auth import OPEN, Keys
from llmx.serve.body import takes
from llmx.serve.chat import chat_completions
from llmx.serve.completions import completions
from llmx.serve.config import ServeConfig
from llmx.serve.encoders import embeddings, rerank
from llmx.serve.errors import ApiError, api_error
from llmx.serve.metrics import Metrics
from llmx.serve.models import Model, Models
from llmx.serve.observe import Observer
from llmx.serve.otel import Tracer
from llmx.serve.tokens import detokenize, tokenize
from llmx.serve.web import PATHS, add_docs, add_page
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

_FIELDS = frozenset(
    name
    for kind in (protocol.ChatRequest, protocol.CompletionRequest, protocol.EmbeddingRequest, protocol.RerankRequest)
    for name in kind.model_fields
)
_PROMPT = {
    "/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/embeddings": "input", "/v1/rerank": "documents",
    "/tokenize": "prompt", "/detokenize": "tokens",
}  # fmt: skip
_POSTS = (
    (
        "/v1/chat/completions",
        chat_completions,
        protocol.ChatRequest,
        responses.ChatCompletion,
        "Answer a conversation.",
    ),
    ("/v1/completions", completions, protocol.CompletionRequest, responses.Completion, "Continue a text."),
    ("/v1/embeddings", embeddings, protocol.EmbeddingRequest, responses.Embeddings, "Turn texts into vectors."),
    ("/v1/rerank", rerank, protocol.RerankRequest, responses.Reranked, "Order documents by how well they answer."),
    ("/tokenize", tokenize, protocol.TokenizeRequest, responses.Tokens, "Token ids of a prompt or of messages."),
    ("/detokenize", detokenize, protocol.DetokenizeRequest, responses.Text, "Text of token ids."),
)
_STREAMED = {"/v1/chat/completions", "/v1/completions"}


def create_app(models: Models, config: ServeConfig, tracer: Tracer | None = None) -> FastAPI:
    """The server of `models`, which it closes at its end. `tracer`: instead of that of `otlp_endpoint`.

    Raises MissingDependencyError where traces are asked for and OpenTelemetry is not there.
    """
    if tracer is None and config.otlp_endpoint is not None:
        tracer = Tracer(config.otlp_endpoint)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        models.start(Pump(asyncio.get_running_loop()))
        try:
            yield
        finally:
            await models.aclose()
            if tracer is not None:
                await asyncio.to_thread(tracer.close)

    app = FastAPI(title="llmx", version=version("llmx"), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.models, app.state.config = models, config
    app.state.metrics = Metrics(models)
    app.state.started = time.time()
    _add_routes(app)
    add_page(app)
    add_docs(app)
    app.add_exception_handler(Exception, _failed)
    for kind in (ApiError, LlmxError, TimeoutError, HTTPException):
        app.add_exception_handler(kind, _failed)
    app.add_middleware(Keys, keys=[key.get_secret_value() for key in config.api_key], open_paths=OPEN | PATHS)
    if config.cors_origin:
        app.add_middleware(
            CORSMiddleware, allow_origins=config.cors_origin, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    app.add_middleware(Observer, metrics=app.state.metrics, log_prompts=config.log_prompts, tracer=tracer)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _add_routes(app: FastAPI) -> None:
    wrong: dict[int | str, dict[str, Any]] = {
        status: {"model": responses.Error} for status in (400, 401, 404, 408, 413, 415, 429, 500, 501, 503, 504)
    }
    for path, handler, body, result, summary in _POSTS:
        answers = dict(wrong)
        answers[200] = {"model": result}
        if path in _STREAMED:
            answers[200]["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
        app.add_api_route(
            path, handler, methods=["POST"], summary=summary, responses=answers, openapi_extra=takes(body), response_model=None
        )  # fmt: skip
    gets: tuple[tuple[str, Any, type[BaseModel] | None, str], ...] = (
        ("/health", health, None, "Whether the server lives; needs no key."),
        ("/ready", ready, None, "Whether it takes requests."),
        ("/version", show_version, responses.Version, "Its version."),
        ("/v1/models", list_models, responses.ModelList, "The models that it serves."),
        ("/v1/models/{model:path}", show_model, responses.ModelCard, "One of them."),
        ("/metrics", metrics, None, "Prometheus metrics."),
    )
    for path, handler, shown, summary in gets:
        answers = {status: wrong[status] for status in (401, 404, 500, 503)}
        if shown is not None:
            answers[200] = {"model": shown}
        if path == "/metrics":
            answers[200] = {"content": {"text/plain": {"schema": {"type": "string"}}}}
        kind = PlainTextResponse if path == "/metrics" else JSONResponse
        app.add_api_route(
            path, handler, methods=["GET"], summary=summary, responses=answers, response_model=None, response_class=kind
        )


async def _failed(request: Request, error: Exception) -> Response:
    """Every error in OpenAI's shape. What nobody foresaw is raised on, to be logged with its traceback."""
    if isinstance(error, HTTPException):
        path = f"{request.method} {request.url.path[:200]}"
        code, message = {
            404: ("not_found", f"There is no {path} here; /docs lists what there is."),
            405: ("method_not_allowed", f"{path} is not how this path is used; /docs says how."),
        }.get(error.status_code, ("http_error", f"{error.detail}."))
        return ApiError(error.status_code, code, message, headers=dict(error.headers or {})).response()
    if not isinstance(error, ApiError | LlmxError | TimeoutError):
        raise error
    request.state.error = error
    answer = api_error(error, _FIELDS, _PROMPT.get(request.url.path))
    answer.param = getattr(request.state, "aliases", {}).get(answer.param, answer.param)
    return answer.response()


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document with the schemas of the bodies that routes parse themselves."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        bodies: list[Any] = [(kind, "validation") for _, _, kind, _, _ in _POSTS]
        _, schemas = models_json_schema(bodies, ref_template="#/components/schemas/{model}")
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        app.openapi_schema = document
    return app.openapi_schema


# -- small endpoints --------------------------------------------------------------------------------------------------


async def health(request: Request) -> Response:
    if all(model.alive for model in request.app.state.models):
        return JSONResponse({"status": "ok"})
    return ApiError(503, "engine_dead", "The engine has ended; restart the server.").response()


async def ready(request: Request) -> Response:
    if all(model.alive and not model.queue.closed for model in request.app.state.models):
        return JSONResponse({"status": "ready"})
    return ApiError(503, "shutting_down", "The server is shutting down.", headers={"retry-after": "1"}).response()


async def show_version(request: Request) -> Response:
    return JSONResponse({"version": request.app.version})


async def metrics(request: Request) -> Response:
    return PlainTextResponse(
        await request.app.state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
    )


async def list_models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_card(model) for model in request.app.state.models]})


async def show_model(request: Request, model: str) -> Response:
    return JSONResponse(_card(request.app.state.models.get(model)))


def _card(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "llmx",
        "root": model.name,
        "parent": None,
        "max_model_len": model.llm.max_length,
    }
