"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from llmx.runtime import StreamPiece
from llmx.runtime.remote import AnyRequest, AnySequence
from llmx.serve.body import read
from llmx.serve.common import respond
from llmx.serve.errors import bad_request
from llmx.serve.fields import places, sampling_params
from llmx.serve.models import Generation, Model, Wanted
from llmx.serve.protocol import CompletionRequest
from llmx.serve.sse import Template, event
from llmx.serve.structure import check_supported, of_format
from llmx.serve.wire import LegacyLogprobs, new_id, prompt_logprobs, usage
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

DEFAULT_MAX_TOKENS = 16  # OpenAI's for this endpoint


async def completions(request: HttpRequest) -> Response:
    body = await read(request, CompletionRequest)
    model: Model = request.app.state.models.get(body.model)
    completion = Completion(model, body)
    if completion.form is not None:
        request.state.aliases = {"structured_outputs": "response_format"}
    return await respond(
        request,
        model,
        places(body, len(completion.prompts)),
        completion.prepare,
        completion.answer,
        completion.events if body.stream else None,
    )


class Completion:
    """One completion request of one prompt or several; choice `p * n + i` is prompt p's continuation i."""

    def __init__(self, model: Model, body: CompletionRequest) -> None:
        self.model, self.body, self.n = model, body, body.n or 1
        self.id, self.created = new_id("cmpl"), int(time.time())
        self.prompts = _prompts(body.prompt)
        self.silent = body.max_tokens == 0  # with echo: only the prompt and its log-probabilities
        self._check()

    def _check(self) -> None:
        body = self.body
        if body.suffix:
            raise bad_request("suffix is not supported; leave it out.", "suffix", "unsupported_parameter")
        if self.silent and not body.echo:
            raise bad_request("max_tokens must be at least 1 (0 goes with echo: true).", "max_tokens")
        if body.stream_options is not None and not body.stream:
            raise bad_request("stream_options needs stream: true.", "stream_options")
        self.form = of_format(body.response_format)
        check_supported(self.form, "response_format")

    def prepare(self) -> Wanted:
        """Runs in a thread."""
        body = self.body
        most = 1 if self.silent else DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        given: dict[str, Any] = {"max_tokens": most, "logprobs": body.logprobs}
        if self.form is not None:
            given["structured_outputs"] = self.form
        if body.echo and body.logprobs is not None:
            given["prompt_logprobs"] = body.logprobs
        params = sampling_params(body, **given)
        return [(prompt, params) for prompt in self.prompts]

    # -- one answer ---------------------------------------------------------------------------------------------------

    def answer(self, generation: Generation) -> dict[str, Any]:
        choices = [
            self._whole(p * self.n + sequence.index, request, sequence)
            for p, request in enumerate(generation.requests)
            for sequence in request.sequences
        ]
        return {**self._head(), "choices": choices, "usage": self._usage(generation)}

    def _usage(self, generation: Generation) -> dict[str, Any]:
        return usage(generation.requests, sum(len(r.sequences) for r in generation.requests) if self.silent else 0)

    def _whole(self, index: int, request: AnyRequest, sequence: AnySequence) -> dict[str, Any]:
        text, logprobs = "", None
        if self.body.logprobs is not None:
            legacy = LegacyLogprobs(self.model.llm.tokenizer)
            ids: list[int] = []
            entries: list[Any] = []
            if self.body.echo:
                ids, entries = list(request.prompt_ids), list(request.prompt_logprobs or [])
            if not self.silent:
                ids, entries = [*ids, *sequence.output_ids], [*entries, *sequence.logprobs]
            logprobs = legacy.add(ids, entries)
        if self.body.echo:
            text += self._echo(request)
        if not self.silent:
            text += sequence.text
        choice = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": "length" if self.silent else sequence.finish_reason,
            "stop_reason": None if self.silent else sequence.stop_reason,
        }
        if self.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(request)
        return choice

    def _echo(self, request: AnyRequest) -> str:
        if request.prompt is not None:
            return request.prompt
        return self.model.llm.tokenizer.decode(request.prompt_ids, skip_special_tokens=False)

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model.name}

    # -- a stream -----------------------------------------------------------------------------------------------------

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        options = self.body.stream_options
        with_usage = options is not None and options.include_usage
        more: dict[str, Any] = {"usage": None} if with_usage else {}
        running = options is not None and options.continuous_usage_stats
        legacy: dict[int, LegacyLogprobs] = {}
        templates: dict[int, Template] = {}
        async for batch in generation.pieces():
            made: list[bytes] = []
            for p, piece in batch:
                index = p * self.n + piece.index
                plain = templates.get(index)
                if plain is not None and piece.finish_reason is None and piece.logprobs is None:
                    if piece.text:
                        made.append(plain.fill(piece.text))
                    continue
                if index not in legacy:
                    legacy[index] = LegacyLogprobs(self.model.llm.tokenizer)
                    if self.body.echo:
                        request = generation.requests[p]
                        chunk = await self.model.off_loop(self._prompt_chunk, index, request, legacy[index])
                        made.append(event({**self._head(), "choices": [chunk], **more}))
                    if not self.silent and not running:
                        templates[index] = self._template(index, more)
                if self.silent:
                    piece = StreamPiece("", [], piece.index, piece.finish_reason and "length")
                if piece.text or piece.finish_reason or piece.logprobs:
                    if running:
                        more = {"usage": self._usage(generation)}
                    made.append(event({**self._head(), "choices": [self._chunk(index, piece, legacy[index])], **more}))
            if made:
                yield b"".join(made)
        if with_usage:
            yield event({**self._head(), "choices": [], "usage": self._usage(generation)})

    def _template(self, index: int, more: dict[str, Any]) -> Template:
        """Of pieces that are a text and nothing else."""
        empty = LegacyLogprobs(self.model.llm.tokenizer)

        def make(text: str) -> dict[str, Any]:
            return {**self._head(), "choices": [self._chunk(index, StreamPiece(text, []), empty)], **more}

        return Template(make)

    def _prompt_chunk(self, index: int, request: AnyRequest, legacy: LegacyLogprobs) -> dict[str, Any]:
        logprobs = None
        if self.body.logprobs is not None:
            logprobs = legacy.add(request.prompt_ids, list(request.prompt_logprobs or []))
        return {"index": index, "text": self._echo(request), "logprobs": logprobs, "finish_reason": None}

    def _chunk(self, index: int, piece: StreamPiece, legacy: LegacyLogprobs) -> dict[str, Any]:
        logprobs = None
        if self.body.logprobs is not None and piece.logprobs:
            logprobs = legacy.add(piece.token_ids, list(piece.logprobs))
        return {
            "index": index,
            "text": piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }


def _prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    """One prompt or several, of text or token ids. Raises ApiError."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise bad_request("prompt is empty; give a text, a list of texts, or token ids.", "prompt")
    if isinstance(prompt[0], int):
        return [prompt]
    return prompt
