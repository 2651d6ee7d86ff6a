"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from functools import partial

from llmx.serve.body import read
from llmx.serve.common import in_time
from llmx.serve.errors import bad_request
from llmx.serve.models import Model
from llmx.serve.prompts import chat_request
from llmx.serve.protocol import DetokenizeRequest, TokenizeRequest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response


async def tokenize(request: Request) -> Response:
    body = await read(request, TokenizeRequest)
    model: Model = request.app.state.models.get(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("Give prompt or messages, one of them.", "prompt")
    return await in_time(request, model.off_loop(_tokens, model, body))


def _tokens(model: Model, body: TokenizeRequest) -> Response:
    """Runs in a thread."""
    ids = _ids(model, body)
    result = {"count": len(ids), "max_model_len": model.llm.max_length, "tokens": ids}
    if body.return_token_strs:
        result["token_strs"] = [model.llm.tokenizer.token(i) for i in ids]
    return JSONResponse(result)


def _ids(model: Model, body: TokenizeRequest) -> list[int]:
    if body.prompt is not None:
        return model.llm.tokenizer.encode(body.prompt, body.add_special_tokens is not False)
    return chat_request(
        model,
        body.messages or [],
        body.tools,
        body.chat_template_kwargs,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
    ).token_ids


async def detokenize(request: Request) -> Response:
    body = await read(request, DetokenizeRequest)
    model: Model = request.app.state.models.get(body.model)
    decode = partial(model.llm.tokenizer.decode, body.tokens, skip_special_tokens=False)
    text = await in_time(request, model.off_loop(decode))
    return JSONResponse({"prompt": text})
