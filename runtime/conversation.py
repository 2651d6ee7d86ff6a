"""A package's chats: the prompt of a conversation, and what takes the answer apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmx.runtime.chat import Arguments, ChatTemplate, Message, check_messages
from llmx.runtime.chat_formats import ChatFormat, OutputParser, find_format
from llmx.runtime.chat_json import loads
from llmx.runtime.errors import RequestError
from llmx.runtime.outputs import RequestOutput, StreamPiece
from llmx.runtime.params import SamplingParams
from llmx.runtime.tokenizer import Tokenizer
from llmx.runtime.tracing import span

_KEPT_TEMPLATES = 32  # compiled ones; a template that a caller gives as text is one


@dataclass(frozen=True)
class ChatRequest:
    """A conversation, ready to run: generate from `token_ids` with `params(…)`, and give the text of each continuation
    to a `parser()` of its own.
    """

    prompt: str
    token_ids: list[int]
    format: ChatFormat
    tools: Sequence[Mapping[str, Any]] | None
    continued: str
    keep_special_tokens: tuple[int, ...]

    def params(self, params: SamplingParams | None = None) -> SamplingParams:
        """`params`, with the format's markers kept in the text."""
        params = params or SamplingParams()
        return replace(params, keep_special_tokens=(*params.keep_special_tokens, *self.keep_special_tokens))

    def parser(self) -> OutputParser:
        """A new parser of one continuation's text."""
        return self.format.parser(self.tools, self.prompt, self.continued)

    def parsed(self, output: RequestOutput) -> RequestOutput:
        """`output` with the message of each continuation."""
        for completion in output.outputs:
            parser = self.parser()
            parser.finish(completion.text)
            completion.message = parser.message
        return output

    def reader(self) -> Callable[[StreamPiece], StreamPiece]:
        """Takes the pieces of one output in order; returns each with the delta that it adds to its message."""
        parsers: dict[int, OutputParser] = {}

        def read(piece: StreamPiece) -> StreamPiece:
            if piece.index not in parsers:
                parsers[piece.index] = self.parser()
            parser = parsers[piece.index]
            ended = piece.finish_reason is not None
            piece.delta = parser.finish(piece.text) if ended else parser.push(piece.text)
            return piece

        return read


class Conversations:
    """The chat templates of the package in `folder`, compiled as they are first used, and the format of its answers."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self._folder, self._tokenizer = folder, tokenizer
        info = tokenizer.info
        default = {"default": info.chat_template} if info.chat_template is not None else {}
        #: Names of the package's chat templates, and their files.
        self.files: dict[str, str] = {**default, **info.chat_templates}
        self._compiled: dict[str, ChatTemplate] = {}
        self._format: ChatFormat | None = None

    def request(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        continue_final_message: bool | str = False,
        tool_calls: str | None = "auto",
        reasoning: str | None = "auto",
        **variables: Any,
    ) -> ChatRequest:
        """The request that `messages` make; arguments as LLM.chat's. Raises RequestError."""
        found = self.format(tool_calls, reasoning, chat_template)
        text = self.prompt(messages, chat_template, tools, continue_final_message=continue_final_message, **variables)
        with span("tokenise"):
            ids = self._tokenizer.encode(text, add_special_tokens=False)
        kept = found.tokens(bool(tools))
        ids_kept = tuple(
            sorted(
                token_id
                for token_id in self._tokenizer.special_ids
                if self._tokenizer.added_tokens.get(token_id) in kept
            )
        )
        return ChatRequest(text, ids, found, tools, _continued(messages, continue_final_message, found), ids_kept)

    def prompt(
        self,
        messages: Sequence[Message],
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text that the template makes of `messages`, variables as ChatTemplate.render's. Raises RequestError."""
        template = self.template(chat_template, tools is not None)
        check_messages(messages)
        return template.render([_with_arguments(message) for message in messages], tools=tools, **variables)

    def template(self, chosen: str | None = None, tools: bool = False) -> ChatTemplate:
        """The template named `chosen`, or whose text it is; None: "tool_use" for a request with `tools`, else "default".

        transformers' `get_chat_template`. Raises RequestError where there is none.
        """
        if chosen is not None and chosen not in self.files and _is_source(chosen):
            if chosen not in self._compiled:
                if len(self._compiled) >= _KEPT_TEMPLATES:
                    self._compiled.clear()
                self._compiled[chosen] = ChatTemplate(chosen, self._tokenizer.info.special_tokens)
            return self._compiled[chosen]
        name = chosen if chosen is not None else "tool_use" if tools and "tool_use" in self.files else "default"
        if name not in self.files:
            names = ", ".join(sorted(self.files))
            if not names:
                raise RequestError("The package has no chat template; use a plain prompt, or give a chat_template.")
            missing = "no default chat template" if chosen is None else f"no chat template named {name!r}"
            raise RequestError(f"The package has {missing}; take one of {names}, or give a template's text.")
        if name not in self._compiled:
            source = (self._folder / self.files[name]).read_text(encoding="utf-8")
            self._compiled[name] = ChatTemplate(source, self._tokenizer.info.special_tokens)
        return self._compiled[name]

    def format(
        self, tool_calls: str | None = "auto", reasoning: str | None = "auto", chat_template: str | None = None
    ) -> ChatFormat:
        """The named formats of tool calls and reasoning; "auto": those that the package's templates show (or the given
        template, where it is a text). Raises RequestError for an unknown name.
        """
        if chat_template is not None and chat_template not in self.files and _is_source(chat_template):
            return find_format([chat_template], self._tokenizer.added_tokens.values(), tool_calls, reasoning)
        if (tool_calls, reasoning) != ("auto", "auto"):
            return find_format(self._sources(), self._tokenizer.added_tokens.values(), tool_calls, reasoning)
        if self._format is None:
            self._format = find_format(self._sources(), self._tokenizer.added_tokens.values())
        return self._format

    def _sources(self) -> list[str]:
        return [(self._folder / file).read_text(encoding="utf-8") for file in self.files.values()]


def _is_source(template: str) -> bool:
    return "{{" in template or "{%" in template


def _with_arguments(message: Message) -> Message:
    """`message` with the arguments of its tool calls as templates need them, where OpenAI's API has them as JSON text."""
    calls = message.get("tool_calls")
    if not isinstance(calls, Sequence) or isinstance(calls, (str, bytes)):
        return message
    return {**message, "tool_calls": [_call_with_arguments(call) for call in calls]}


def _call_with_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(text := function.get("arguments"), str):
        return call
    try:
        arguments = loads(text)
    except ValueError:
        return call
    return (
        {**call, "function": {**function, "arguments": Arguments(arguments, text)}}
        if isinstance(arguments, dict)
        else call
    )


def _continued(messages: Sequence[Message], field: bool | str, found: ChatFormat) -> str:
    """The assistant's text that the output goes on from, with the opening tag where that is reasoning."""
    if not field:
        return ""
    text = messages[-1].get(field if isinstance(field, str) else "content")
    if not isinstance(text, str):
        parts = [part.get("text") for part in text or () if isinstance(part, Mapping)]
        text = "".join(part for part in parts if isinstance(part, str))
    inside = isinstance(field, str) and field != "content"
    return found.opening + text if inside else text
