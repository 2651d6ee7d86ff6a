"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from llmx.runtime import StreamPiece
from llmx.serve.body import read
from llmx.serve.common import respond
from llmx.serve.errors import bad_request
from llmx.serve.fields import sampling_params
from llmx.serve.models import Generation, Model, Wanted
from llmx.serve.prompts import chat_ids, plain_messages
from llmx.serve.protocol import ChatRequest
from llmx.serve.sse import event
from llmx.serve.wire import chat_logprobs, new_id, prompt_logprobs, usage
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

_RESERVED = {
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tool_calls",
    "reasoning",
}  # fmt: skip


async def chat_completions(request: HttpRequest) -> Response:
    body = await read(request, ChatRequest)
    model: Model = request.app.state.models.get(body.model)
    chat = Chat(model, body)
    return await respond(
        request, model, (body.n or 1, "n"), chat.prepare, chat.answer, chat.events if body.stream else None
    )


class Chat:
    """One chat request: its prompt, and its answer in either form."""

    def __init__(self, model: Model, body: ChatRequest) -> None:
        self.model, self.body = model, body
        self.id, self.created = new_id("chatcmpl"), int(time.time())
        self.top = (body.top_logprobs or 0) if body.logprobs else 0
        self._check()

    def _check(self) -> None:
        body = self.body
        if body.top_logprobs is not None and not body.logprobs:
            raise bad_request("top_logprobs needs logprobs: true.", "top_logprobs")
        if body.stream_options is not None and not body.stream:
            raise bad_request("stream_options needs stream: true.", "stream_options")
        if body.response_format is not None and body.response_format.type != "text":
            raise bad_request(
                "response_format is not supported by this version.", "response_format", "unsupported_parameter"
            )
        if body.tool_choice not in (None, "none", "auto"):
            raise bad_request(
                "tool_choice must be none or auto in this version.", "tool_choice", "unsupported_parameter"
            )
        reserved = _RESERVED & set(body.chat_template_kwargs or {})
        if reserved:
            raise bad_request(f"chat_template_kwargs must not hold {sorted(reserved)[0]}.", "chat_template_kwargs")

    def prepare(self) -> Wanted:
        """Runs in a thread."""
        body, llm = self.body, self.model.llm
        variables: dict[str, Any] = dict(body.chat_template_kwargs or {})
        if body.reasoning_effort is not None:
            variables["reasoning_effort"] = body.reasoning_effort
        ids = chat_ids(
            llm,
            plain_messages(body.messages),
            None if body.tool_choice == "none" else body.tools,
            documents=body.documents,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=bool(body.continue_final_message),
            **variables,
        )
        return [(ids, self._params(len(ids)))]

    def _params(self, num_prompt: int) -> Any:
        body, llm = self.body, self.model.llm
        most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        if most is None:
            most = llm.manifest.generation.get("max_tokens") or max(1, llm.max_length - num_prompt)
        logprobs = self.top if body.logprobs else None
        return sampling_params(body, max_tokens=most, logprobs=logprobs)

    # -- one answer ---------------------------------------------------------------------------------------------------

    def answer(self, generation: Generation) -> dict[str, Any]:
        [request] = generation.requests
        choices = []
        for sequence in request.sequences:
            content = (
                chat_logprobs(self.model.llm.tokenizer, sequence.output_ids, sequence.logprobs, self.top)
                if self.body.logprobs
                else None
            )
            choices.append(
                {
                    "index": sequence.index,
                    "message": {"role": "assistant", "content": sequence.text, "refusal": None},
                    "logprobs": None if content is None else {"content": content, "refusal": None},
                    "finish_reason": sequence.finish_reason,
                    "stop_reason": sequence.stop_reason,
                }
            )
        result = {**self._head("chat.completion"), "choices": choices, "usage": usage(generation.requests)}
        if self.body.prompt_logprobs is not None:
            result["prompt_logprobs"] = prompt_logprobs(request)
        return result

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model.name}

    # -- a stream -----------------------------------------------------------------------------------------------------

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        options = self.body.stream_options
        with_usage = options is not None and options.include_usage
        running = options is not None and options.continuous_usage_stats
        head = self._head("chat.completion.chunk")
        more: dict[str, Any] = {"usage": None} if with_usage else {}
        for index in range(self.body.n or 1):
            delta = {"role": "assistant", "content": ""}
            yield event({**head, "choices": [self._choice(index, delta)], **more})
        async for _, piece in generation.pieces():
            if piece.text or piece.finish_reason or piece.logprobs:
                if running:
                    more = {"usage": usage(generation.requests)}
                yield event({**head, "choices": [self._chunk(piece)], **more})
        if with_usage:
            yield event({**head, "choices": [], "usage": usage(generation.requests)})

    def _chunk(self, piece: StreamPiece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text or piece.finish_reason is None else {}
        choice = self._choice(piece.index, delta, piece.finish_reason)
        if self.body.logprobs and piece.logprobs:
            content = chat_logprobs(self.model.llm.tokenizer, piece.token_ids, piece.logprobs, self.top)
            choice["logprobs"] = {"content": content, "refusal": None}
        if piece.finish_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        return choice

    @staticmethod
    def _choice(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
