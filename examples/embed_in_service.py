"""A user's own service with a model inside: FastAPI, an AsyncLLM, no PyTorch.

pip install "llmx[cpu]" fastapi uvicorn
LLMX_PACKAGE=artifacts/demo uvicorn --app-dir examples embed_in_service:app

curl -s localhost:8000/complete -H 'content-type: application/json' -d '{"prompt": "ROMEO:", "max_tokens": 32}'
curl -sN 'localhost:8000/stream?prompt=ROMEO:'
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse
from llmx.runtime import AsyncLLM, RequestError, SamplingParams
from pydantic import BaseModel


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load the model once, in the worker process (after any fork), and free it at the end."""
    async with AsyncLLM(os.environ["LLMX_PACKAGE"], slots=4) as llm:
        llm.llm.warmup()
        app.state.llm = llm
        yield


app = FastAPI(title="A service with a model in it", lifespan=lifespan)


class Completion(BaseModel):
    prompt: str
    max_tokens: int = 64
    temperature: float = 0.8
    seed: int | None = None


@app.post("/complete")
async def complete(body: Completion, request: Request) -> dict[str, object]:
    """Many of these at once share the model's batch."""
    try:
        params = SamplingParams(max_tokens=body.max_tokens, temperature=body.temperature, seed=body.seed)
        [out] = await request.app.state.llm.generate(body.prompt, params)
    except RequestError as error:  # the client's mistake, in one sentence
        raise HTTPException(400, str(error)) from None
    return {"text": out.outputs[0].text, "finish_reason": out.outputs[0].finish_reason}


@app.get("/stream")
async def stream(prompt: str, request: Request, max_tokens: int = 64) -> StreamingResponse:
    """Text as it is generated; a client that leaves frees its slot."""

    async def pieces() -> AsyncIterator[str]:
        async for piece in request.app.state.llm.stream(prompt, SamplingParams(max_tokens=max_tokens)):
            yield piece.text

    return StreamingResponse(pieces(), media_type="text/plain")
