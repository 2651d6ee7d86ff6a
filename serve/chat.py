"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from llmx.runtime import SamplingParams, StreamPiece
from llmx.runtime.conversation import ChatRequest as ChatPrompt
from llmx.serve.body import read
from llmx.serve.common import respond
from llmx.serve.errors import bad_request
from llmx.serve.fields import places, sampling_params
from llmx.serve.models import Generation, Model, Wanted
from llmx.serve.prompts import chat_request
from llmx.serve.protocol import ChatRequest
from llmx.serve.sse import Template, event
from llmx.serve.structure import CALL_FORMAT, check_supported, of_calls, of_format, required_tools
from llmx.serve.wire import chat_logprobs, new_id, prompt_logprobs, usage
from starlette.requests import Request as HttpRequest
from starlette.responses import Response


async def chat_completions(request: HttpRequest) -> Response:
    body = await read(request, ChatRequest)
    model: Model = request.app.state.models.get(body.model)
    chat = Chat(model, body)
    request.state.aliases = chat.aliases
    return await respond(request, model, places(body), chat.prepare, chat.answer, chat.events if body.stream else None)


class Chat:
    """One chat request: its prompt, and its answer in either form."""

    def __init__(self, model: Model, body: ChatRequest) -> None:
        self.model, self.body = model, body
        self.id, self.created = new_id("chatcmpl"), int(time.time())
        self.request: ChatPrompt  # once prepared
        self.top = (body.top_logprobs or 0) if body.logprobs else 0
        self._check()

    def _check(self) -> None:
        body = self.body
        if body.top_logprobs is not None and not body.logprobs:
            raise bad_request("top_logprobs needs logprobs: true.", "top_logprobs")
        if body.stream_options is not None and not body.stream:
            raise bad_request("stream_options needs stream: true.", "stream_options")
        self.form, self.called = of_format(body.response_format), required_tools(body)
        check_supported(self.form, "response_format")
        if self.called:
            single = len(self.called) == 1 and body.tool_choice != "required"
            self.form = of_calls(self.called, single or body.parallel_tool_calls is False)
            check_supported(self.form, "tool_choice")
        if self.form is not None and body.structured_outputs is not None:
            raise bad_request(
                "structured_outputs goes with neither response_format nor tool_choice.", "structured_outputs"
            )

    @property
    def aliases(self) -> dict[str, str]:
        """SamplingParams' names of what this request calls otherwise."""
        named = {"structured_outputs": "tools" if self.called else "response_format"} if self.form is not None else {}
        return {
            **named,
            **({"max_tokens": "max_completion_tokens"} if self.body.max_completion_tokens is not None else {}),
        }

    def prepare(self) -> Wanted:
        """Runs in a thread."""
        body = self.body
        variables: dict[str, Any] = dict(body.chat_template_kwargs or {})
        if body.reasoning_effort is not None:
            variables["reasoning_effort"] = body.reasoning_effort
        self.request = chat_request(
            self.model,
            body.messages,
            None if body.tool_choice == "none" else body.tools,
            variables,
            documents=body.documents,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=bool(body.continue_final_message),
            **({"tool_calls": CALL_FORMAT} if self.called else {}),
            # The grammar holds from the first token on, also where the template has opened reasoning.
            **({"reasoning": None} if self.form is not None else {}),
        )
        return [(self.request.token_ids, self._params(len(self.request.token_ids)))]

    def _params(self, num_prompt: int) -> SamplingParams:
        body, llm = self.body, self.model.llm
        most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        if most is None:
            most = llm.manifest.generation.get("max_tokens") or max(1, llm.max_length - num_prompt)
        logprobs = self.top if body.logprobs else None
        form = {} if self.form is None else {"structured_outputs": self.form}
        return self.request.params(sampling_params(body, max_tokens=most, logprobs=logprobs, **form))

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
            parser = self.request.parser()
            parser.finish(sequence.text)
            message = parser.message
            choices.append(
                {
                    "index": sequence.index,
                    "message": {**message.to_dict(), "refusal": None},
                    "logprobs": None if content is None else {"content": content, "refusal": None},
                    "finish_reason": _reason(sequence.finish_reason, bool(message.tool_calls)),
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
        opening = [self._choice(index, {"role": "assistant", "content": ""}) for index in range(self.body.n or 1)]
        yield b"".join(event({**head, "choices": [choice], **more}) for choice in opening)
        templates = [self._template(index, head, more) for index in range(self.body.n or 1)]
        read, called = self.request.reader(), set()
        async for batch in generation.pieces():
            made: list[bytes] = []
            for _, plain in batch:
                piece = read(plain)
                delta = piece.delta
                ends = piece.finish_reason is not None or piece.logprobs is not None
                if delta is not None and not (ends or running or delta.reasoning_content or delta.tool_calls):
                    if delta.content:
                        made.append(templates[piece.index].fill(delta.content))
                    continue
                if delta is not None and delta.tool_calls:
                    called.add(piece.index)
                if delta or ends:
                    if running:
                        more = {"usage": usage(generation.requests)}
                    made.append(event({**head, "choices": [self._chunk(piece, piece.index in called)], **more}))
            if made:
                yield b"".join(made)
        if with_usage:
            yield event({**head, "choices": [], "usage": usage(generation.requests)})

    def _template(self, index: int, head: dict[str, Any], more: dict[str, Any]) -> Template:
        """Of pieces that are content and nothing else."""
        return Template(lambda text: {**head, "choices": [self._choice(index, {"content": text})], **more})

    def _chunk(self, piece: StreamPiece, called: bool) -> dict[str, Any]:
        delta = piece.delta.to_dict() if piece.delta else {}
        choice = self._choice(piece.index, delta, _reason(piece.finish_reason, called))
        if self.body.logprobs and piece.logprobs:
            content = chat_logprobs(self.model.llm.tokenizer, piece.token_ids, piece.logprobs, self.top)
            choice["logprobs"] = {"content": content, "refusal": None}
        if piece.finish_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        return choice

    @staticmethod
    def _choice(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


def _reason(reason: str | None, called: bool) -> str | None:
    """OpenAI says tool_calls where the model stopped to call a tool; a cut answer stays "length"."""
    return "tool_calls" if called and reason == "stop" else reason
