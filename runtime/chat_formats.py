"""The formats in which models write reasoning and tool calls, by name, and how a package's own is recognised.

The sources are the models' chat templates, which show earlier calls to the model in the form that it is to write.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from llmx.runtime.chat_calls import FirstOf, JsonCalls, NamedCalls, Tools
from llmx.runtime.chat_harmony import HarmonyParser
from llmx.runtime.chat_output import ChatDelta, ChatMessage
from llmx.runtime.chat_parser import ChatParser, Opener, Reasoning, new_call_id
from llmx.runtime.chat_tagged import GemmaCalls, PythonCalls, TaggedCalls
from llmx.runtime.errors import RequestError

#: Tags around reasoning, by name.
REASONING = {
    "think": Reasoning("<think>", "</think>"),  # DeepSeek R1, Qwen 3, GLM 4.5, MiniMax, SmolLM 3, …
    "mistral": Reasoning("[THINK]", "[/THINK]"),
    "seed": Reasoning("<seed:think>", "</seed:think>"),
    "cohere": Reasoning("<|START_THINKING|>", "<|END_THINKING|>"),
    "gemma4": Reasoning("<|channel>thought\n", "<channel|>"),
    "granite": Reasoning("Here is my thought process:", "Here is my response:"),
}

_MISTRAL_HEAD = re.compile(r"\s*(?P<name>[\w.:-]+)\s*(?:\[CALL_ID\]\s*(?P<id>\w+)\s*)?(?:\[ARGS\]\s*)?")
_DEEPSEEK_HEAD = re.compile(
    r"\s*(?:function\s*<｜tool▁sep｜>)?\s*(?P<name>[\w.:-]+)\s*(?:<｜tool▁sep｜>)?\s*(?:```(?:json)?)?\s*"
)
_KIMI_HEAD = re.compile(r"\s*(?P<id>(?:functions\.)?(?P<name>[\w.-]+):\d+)\s*<\|tool_call_argument_begin\|>\s*")


def _hermes(tools: Tools) -> list[Opener]:
    return [Opener("<tool_call>", partial(JsonCalls, end="</tool_call>"))]


def _llama3_json(tools: Tools) -> list[Opener]:
    known = frozenset(tools.parameters)
    bare = partial(JsonCalls, separator=";", known=known)
    return [
        Opener("<|python_tag|>", lambda: FirstOf(JsonCalls(separator=";"), PythonCalls(tools))),
        Opener("{", bare, first=True, kept=True),
    ]


def _pythonic(tools: Tools) -> list[Opener]:
    return [
        Opener("<|python_start|>", None),
        Opener("<|python_end|>", None),
        Opener("[", partial(PythonCalls, tools), first=True, kept=True),
    ]


def _mistral(tools: Tools) -> list[Opener]:
    return [Opener("[TOOL_CALLS]", lambda: FirstOf(JsonCalls(), NamedCalls(_MISTRAL_HEAD)))]


def _deepseek(tools: Tools) -> list[Opener]:
    return [
        Opener("<｜tool▁calls▁begin｜>", None),
        Opener("<｜tool▁calls▁end｜>", None),
        Opener("<｜tool▁call▁begin｜>", partial(NamedCalls, _DEEPSEEK_HEAD, "<｜tool▁call▁end｜>", " \t\r\n`")),
    ]


def _deepseek_dsml(tools: Tools) -> list[Opener]:
    reader = partial(
        TaggedCalls,
        re.compile(r'(?P<name>[^"<>]+)">'),
        "<｜DSML｜parameter ",
        "</｜DSML｜parameter>",
        re.compile(
            r'<｜DSML｜parameter name="(?P<key>[^"]+)"(?: string="(?P<string>true|false)")?>(?P<value>.*?)</｜DSML｜parameter>',
            re.DOTALL,
        ),
        "</｜DSML｜invoke>",
        tools,
    )
    return [
        Opener("<｜DSML｜function_calls>", None),
        Opener("</｜DSML｜function_calls>", None),
        Opener('<｜DSML｜invoke name="', reader),
    ]


def _qwen3_coder(tools: Tools) -> list[Opener]:
    reader = partial(
        TaggedCalls,
        re.compile(r"\s*<function=(?P<name>[^<>\s]+)\s*>"),
        "<parameter=",
        "</parameter>",
        re.compile(r"<parameter=(?P<key>[^<>\n]+)>\n?(?P<value>.*?)\n?</parameter>", re.DOTALL),
        "</tool_call>",
        tools,
        inner="</function>",
    )
    return [Opener("<tool_call>", reader)]


def _seed(tools: Tools) -> list[Opener]:
    reader = partial(
        TaggedCalls,
        re.compile(r"\s*<function=(?P<name>[^<>\s]+)\s*>"),
        "<parameter=",
        "</parameter>",
        re.compile(r"<parameter=(?P<key>[^<>\n]+)>(?P<value>.*?)</parameter>", re.DOTALL),
        "</seed:tool_call>",
        tools,
        inner="</function>",
    )
    return [Opener("<seed:tool_call>", reader)]


def _phi4(tools: Tools) -> list[Opener]:
    return [
        Opener("<|tool_call|>", partial(JsonCalls, end="<|/tool_call|>")),
        Opener("functools", JsonCalls, first=True),
    ]


def _glm(tools: Tools) -> list[Opener]:
    reader = partial(
        TaggedCalls,
        re.compile(r"\s*(?P<name>[^\s<>{}]+)\s*(?=<)"),
        "<arg_key>",
        "</arg_value>",
        re.compile(r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>", re.DOTALL),
        "</tool_call>",
        tools,
    )
    return [Opener("<tool_call>", reader)]


def _minimax(tools: Tools) -> list[Opener]:
    reader = partial(
        TaggedCalls,
        re.compile(r'(?P<name>[^"<>]+)">'),
        "<parameter ",
        "</parameter>",
        re.compile(r'<parameter name="(?P<key>[^"]+)">(?P<value>.*?)</parameter>', re.DOTALL),
        "</invoke>",
        tools,
    )
    return [
        Opener("<minimax:tool_call>", None),
        Opener("</minimax:tool_call>", None),
        Opener('<invoke name="', reader),
    ]


def _kimi(tools: Tools) -> list[Opener]:
    return [
        Opener("<|tool_calls_section_begin|>", None),
        Opener("<|tool_calls_section_end|>", None),
        Opener("<|tool_call_begin|>", partial(NamedCalls, _KIMI_HEAD, "<|tool_call_end|>")),
    ]


def _cohere(tools: Tools) -> list[Opener]:
    return [
        Opener("<|START_ACTION|>", partial(JsonCalls, end="<|END_ACTION|>", names=("tool_name", "name"))),
        Opener("<|START_RESPONSE|>", None),
        Opener("<|END_RESPONSE|>", None),
    ]


def _command_r(tools: Tools) -> list[Opener]:
    reader = partial(JsonCalls, end="```", names=("tool_name", "name"))
    return [Opener(f"Action:{space}```json", reader) for space in (" ", "\n")]


def _gemma4(tools: Tools) -> list[Opener]:
    return [Opener("<|tool_call>", partial(GemmaCalls, tools, "<tool_call|>"))]


def _json_between(begin: str, end: str | None) -> Callable[[Tools], list[Opener]]:
    return lambda tools: [Opener(begin, partial(JsonCalls, end=end))]


def _json(tools: Tools) -> list[Opener]:
    """Calls without any marker, as an object or a list: what a grammar for tool_choice "required" produces."""
    known = frozenset(tools.parameters)
    return [Opener(bracket, partial(JsonCalls, known=known), first=True, kept=True) for bracket in "[{"]


@dataclass(frozen=True)
class ToolFormat:
    """`openers` makes what opens a call, given the request's tools. `tokens`: markers that may be special tokens, which
    the output's text must keep. `signs`: recognised in a template that holds all of one of these.
    """

    openers: Callable[[Tools], list[Opener]]
    tokens: tuple[str, ...] = ()
    signs: tuple[tuple[str, ...], ...] = ()


def _tags(*names: str) -> tuple[str, ...]:
    return tuple(tag for name in names for tag in (f"<{name}>", f"</{name}>"))


#: Formats of tool calls, by name; the first whose signs a template shows is its own.
TOOL_CALLS: dict[str, ToolFormat] = {
    "gemma4": ToolFormat(_gemma4, ("<|tool_call>", "<tool_call|>", '<|"|>'), (("<|tool_call>",),)),
    "deepseek_dsml": ToolFormat(_deepseek_dsml, ("｜DSML｜",), (("｜DSML｜",),)),
    "deepseek": ToolFormat(
        _deepseek,
        (
            "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
        ),
        (("<｜tool▁calls▁begin｜>",),),
    ),
    "kimi": ToolFormat(
        _kimi,
        (
            "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
            "<|tool_call_argument_begin|>", "<|tool_call_end|>",
        ),
        (("<|tool_call_begin|>",),),
    ),
    "minimax": ToolFormat(_minimax, _tags("minimax:tool_call"), (("<minimax:tool_call>",),)),
    "cohere": ToolFormat(
        _cohere,
        ("<|START_ACTION|>", "<|END_ACTION|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        (("<|START_ACTION|>",),),
    ),
    "command_r": ToolFormat(_command_r, (), (("Action:", "```json", "tool_name"),)),
    "mistral": ToolFormat(_mistral, ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"), (("[TOOL_CALLS]",),)),
    "qwen3_coder": ToolFormat(_qwen3_coder, _tags("tool_call"), (("<tool_call>", "<function=", "<parameter="),)),
    "glm": ToolFormat(_glm, _tags("tool_call", "arg_key", "arg_value"), (("<tool_call>", "<arg_key>"),)),
    "hermes": ToolFormat(_hermes, _tags("tool_call"), (("<tool_call>",),)),
    "jamba": ToolFormat(_json_between("<tool_calls>", "</tool_calls>"), _tags("tool_calls"), (("<tool_calls>",),)),
    "phi4": ToolFormat(
        _phi4,
        ("<|tool_call|>", "<|/tool_call|>"),
        (("<|tool_call|>", "<|/tool_call|>"), ("<|tool|>", "<|/tool|>"), ("functools[",)),
    ),
    "seed": ToolFormat(_seed, _tags("seed:tool_call"), (("<seed:tool_call>",),)),
    "granite": ToolFormat(_json_between("<|tool_call|>", None), ("<|tool_call|>",), (("<|tool_call|>",),)),
    "internlm": ToolFormat(
        _json_between("<|action_start|><|plugin|>", "<|action_end|>"),
        ("<|action_start|>", "<|plugin|>", "<|action_end|>"),
        (("<|plugin|>",),),
    ),
    "pythonic": ToolFormat(
        _pythonic, ("<|python_start|>", "<|python_end|>"), (("[func_name1(",), ("<|header_start|>", "<|python_start|>"))
    ),
    "llama3_json": ToolFormat(
        _llama3_json, ("<|python_tag|>",), (("<|python_tag|>",), ("<|start_header_id|>", '"parameters"'))
    ),
    "json": ToolFormat(_json),
}  # fmt: skip

_REASONING_SIGNS = {
    "gemma4": ("<|channel>",),
    "cohere": ("<|START_THINKING|>",),
    "mistral": ("[THINK]",),
    "seed": ("<seed:think>",),
    "granite": ("Here is my thought process:",),
    "think": ("<think>", "</think>"),
}
_HARMONY_TOKENS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")


class OutputParser(Protocol):
    """Takes a model's output apart: `push` its text as it comes, `finish` at its end (with the last of the text);
    `message` is what was said so far.
    """

    message: ChatMessage

    def push(self, text: str) -> ChatDelta: ...

    def finish(self, text: str = "") -> ChatDelta: ...


@dataclass(frozen=True)
class ChatFormat:
    """In which form a model writes tool calls and reasoning: names of TOOL_CALLS and REASONING ("harmony" is both), or
    None for what is not looked for.
    """

    tool_calls: str | None = None
    reasoning: str | None = None

    def parser(
        self,
        tools: Sequence[Mapping[str, Any]] | None = None,
        prompt: str = "",
        continued: str = "",
        make_id: Callable[[], str] | None = None,
    ) -> OutputParser:
        """A parser for one output.

        Args:
            tools: the request's tools; without any, calls are not looked for and stay text.
            prompt: the rendered prompt: where it ends with an opening tag, the output begins inside reasoning.
            continued: the assistant's text that the output goes on from (continue_final_message), tags included.
            make_id: ids for calls that bring none.
        """
        make_id = make_id or (partial(new_call_id, 9, "") if self.tool_calls == "mistral" else new_call_id)
        if "harmony" in (self.tool_calls, self.reasoning):
            return HarmonyParser(bool(tools) and self.tool_calls == "harmony", prompt, make_id)
        openers = TOOL_CALLS[self.tool_calls].openers(Tools(tools)) if self.tool_calls and tools else []
        tags = REASONING[self.reasoning] if self.reasoning else None
        reasons = tags is not None and (
            prompt.rstrip().endswith(tags.begin.rstrip()) or continued.rfind(tags.begin) > continued.rfind(tags.end)
        )
        return ChatParser(openers, tags, reasons, make_id)

    @property
    def opening(self) -> str:
        """The tag that opens reasoning, or "" where the format has none."""
        return REASONING[self.reasoning].begin if self.reasoning in REASONING else ""

    def tokens(self, tools: bool) -> frozenset[str]:
        """Markers that the output's text must keep although they may be special tokens."""
        if "harmony" in (self.tool_calls, self.reasoning):
            return frozenset(_HARMONY_TOKENS)
        kept = set(TOOL_CALLS[self.tool_calls].tokens) if self.tool_calls and tools else set()
        if self.reasoning:
            tags = REASONING[self.reasoning]
            kept |= {tags.begin, tags.end, "<|channel>"}
        return frozenset(kept)


def find_format(
    templates: Iterable[str], tokens: Iterable[str], tool_calls: str | None = "auto", reasoning: str | None = "auto"
) -> ChatFormat:
    """The format with these names; "auto" is recognised by what the chat templates write, or else by which added tokens
    the tokenizer has. Raises RequestError for an unknown name.
    """
    text, spellings = "\n".join(templates), "\n".join(tokens)
    harmony = all(token in text for token in ("<|channel|>", "<|message|>", "<|start|>"))
    if tool_calls == "auto":
        tool_calls = "harmony" if harmony else _recognise({n: f.signs for n, f in TOOL_CALLS.items()}, text, spellings)
    if reasoning == "auto":
        signs = {name: tuple((sign,) for sign in group) for name, group in _REASONING_SIGNS.items()}
        reasoning = "harmony" if harmony else _recognise(signs, text, spellings)
    for name, kind, known in ((tool_calls, "tool call", TOOL_CALLS), (reasoning, "reasoning", REASONING)):
        if name is not None and name not in known and name != "harmony":
            raise RequestError(
                f"There is no {kind} format {name!r}; take auto, harmony, {', '.join(known)}, or none at all."
            )
    return ChatFormat(tool_calls, reasoning)


def _recognise(signs: Mapping[str, tuple[tuple[str, ...], ...]], template: str, spellings: str) -> str | None:
    for text in (template, spellings):
        for name, groups in signs.items():
            if any(all(sign in text for sign in group) for group in groups):
                return name
    return None
