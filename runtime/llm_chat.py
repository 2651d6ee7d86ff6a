"""LLM's methods for conversations."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llmx.runtime.driver import PieceStream
from llmx.runtime.llm_base import Loaded
from llmx.runtime.outputs import RequestOutput
from llmx.runtime.params import SamplingParams

if TYPE_CHECKING:
    from llmx.runtime.conversation import ChatRequest, Conversations
    from llmx.runtime.llm import LLM
    from llmx.runtime.session import Session


class ChatMethods(Loaded):
    """Chat templates, answers taken apart, sessions."""

    def chat(
        self,
        messages: Seq[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        stream: bool = False,
        **options: Any,
    ) -> RequestOutput | PieceStream:
        """Answer a conversation through the package's chat template; `stream=True` yields pieces instead.

        The answer is taken apart: `outputs[i].message` (a ChatMessage: content, reasoning_content, tool_calls), and
        `delta` of each piece. Options as `chat_request`'s.
        """
        return self.answer(self.chat_request(messages, **options), params, stream=stream)

    def answer(
        self, request: ChatRequest, params: SamplingParams | None = None, *, stream: bool = False
    ) -> RequestOutput | PieceStream:
        """As `chat`, of a request made before."""
        llm = cast("LLM", self)
        if stream:
            return llm.stream(request.token_ids, request.params(params)).map(request.reader())
        return request.parsed(llm.generate([request.token_ids], request.params(params))[0])

    def chat_request(self, messages: Seq[Mapping[str, Any]], **options: Any) -> ChatRequest:
        """What `chat` runs: the conversation's prompt, and the parser of the answer. Options:

        tools: JSON schemas of functions, as OpenAI's API has them. documents: mappings with title and text.
        chat_template: the name of one of the package's templates, or a template's text.
        continue_final_message: go on with the last message instead of beginning a new one (a string: this field of it).
        add_generation_prompt: end with the header of the assistant's turn (None: yes, unless continuing).
        tool_calls, reasoning: the format of the answer (docs/chat.md), None to leave it in the text.
        Anything else is a variable of the template. Raises RequestError.
        """
        return self.conversations.request(messages, **options)

    @cached_property
    def conversations(self) -> Conversations:
        """The package's chat templates, and the format of its answers."""
        from llmx.runtime.conversation import Conversations

        self.need_generation()
        return Conversations(self.folder, self.tokenizer)

    def chat_prompt(self, messages: Seq[Mapping[str, Any]], **options: Any) -> str:
        """The text that the chat template makes of `messages`; options as `chat_request`'s."""
        return self.chat_request(messages, **options).prompt

    def chat_ids(self, messages: Seq[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of `chat_prompt` (the template writes its special tokens itself)."""
        return self.chat_request(messages, **options).token_ids

    def session(self, on_full: str = "stop", keep_first: int = 0) -> Session:
        """A conversation that computes its past once: append, generate, chat, rewind, fork, save. docs/decoding.md.

        `on_full`: where the context has no room for an answer, "stop" refuses it and "shift" forgets the oldest tokens
        but the first `keep_first`. Raises FamilyError where the package does not continue texts.
        """
        from llmx.runtime.session import Session

        return Session(cast("LLM", self), on_full, keep_first)

    def load_session(self, path: str | Path) -> Session:
        """A session that `Session.save` wrote. Raises RequestError for another package's or a damaged file,
        ContextLengthError where this LLM's context is too short.
        """
        from llmx.runtime.session import Session

        return Session.load(cast("LLM", self), path)
