"""POST /v1/embeddings and /v1/rerank."""

from __future__ import annotations

import base64
from functools import partial
from typing import Any

import numpy as np
from llmx.runtime import FamilyError
from llmx.runtime.encoder import COMMANDS, Check, Encoder
from llmx.serve.body import read
from llmx.serve.common import in_time
from llmx.serve.errors import bad_request
from llmx.serve.models import Model
from llmx.serve.protocol import EmbeddingRequest, RerankRequest
from llmx.serve.wire import new_id
from starlette.requests import Request
from starlette.responses import JSONResponse, Response


async def embeddings(request: Request) -> Response:
    body = await read(request, EmbeddingRequest)
    model: Model = request.app.state.models.get(body.model)
    encoder = _encoder(model, "embed")
    texts = _inputs(body.input)
    return await in_time(request, model.run_encoder(partial(_embed, model.name, encoder, texts, body)))


def _encoder(model: Model, task: str) -> Encoder:
    encoder = model.llm.encoder
    if encoder is None or encoder.info.task != task:
        known = "generates text" if encoder is None else f"is for {COMMANDS[encoder.info.task]}"
        verb = {"embed": "embed", "classify": "rerank"}[task]
        raise FamilyError(f"The model {model.name} {known} and does not {verb}.")
    return encoder


def _inputs(given: str | list[Any]) -> list[Any]:
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given or not all(given):
        raise bad_request("input is empty; give a text, a list of texts, or token ids.", "input")
    return given


def _embed(name: str, encoder: Encoder, texts: list[Any], body: EmbeddingRequest, check: Check) -> Response:
    """Runs in a thread, the writing of millions of numbers too."""
    vectors = encoder.embed(texts, dimensions=body.dimensions, truncate=False, check=check)
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    count = sum(encoder.num_tokens(text) for text in texts)
    usage = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"object": "list", "model": name, "data": data, "usage": usage})


def _encoded(vector: np.ndarray, form: str | None) -> str | list[float]:
    """A list of numbers, or base64 of little-endian float32."""
    if form == "base64":
        return base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers


async def rerank(request: Request) -> Response:
    body = await read(request, RerankRequest)
    model: Model = request.app.state.models.get(body.model)
    encoder = _encoder(model, "classify")
    texts = [document if isinstance(document, str) else document.text for document in body.documents]
    if not all(texts) or not body.query:
        raise bad_request("A text is empty; give at least one character.", "documents" if body.query else "query")
    return await in_time(request, model.run_encoder(partial(_rerank, model.name, encoder, texts, body)))


def _rerank(name: str, encoder: Encoder, texts: list[str], body: RerankRequest, check: Check) -> Response:
    """Runs in a thread."""
    results = []
    for entry in encoder.rerank(body.query, texts, top_n=body.top_n, check=check):
        result: dict[str, Any] = {"index": entry.index, "relevance_score": entry.score}
        if body.return_documents:
            result["document"] = {"text": entry.document}
        results.append(result)
    count = sum(encoder.num_tokens((body.query, text)) for text in texts)
    usage = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"id": new_id("rerank"), "model": name, "results": results, "usage": usage})
