"""Reasoning and tool calls taken out of the output's text: every format, whole, in pieces, and broken."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmx.runtime import RequestError
from llmx.runtime.chat_formats import REASONING, TOOL_CALLS, ChatFormat, find_format
from llmx.runtime.chat_output import ChatDelta, ChatMessage

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "exact": {"type": ["boolean", "null"]},
                "hours": {"anyOf": [{"type": "array"}, {"type": "null"}]},
            },
        },
    },
}
TOOLS = [WEATHER, {"name": "now", "parameters": {"type": "object", "properties": {}}}]

#: format -> output text with two calls: of get_weather for Zürich and 3 days, and of now without arguments.
TWO_CALLS = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "llama3_json": '{"name": "get_weather", "parameters": {"city": "Zürich", "days": 3}}; {"name": "now", "parameters": {}}',
    "mistral": '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}, {"name": "now", "arguments": {}}]',
    "mistral, v11": '[TOOL_CALLS]get_weather[ARGS]{"city": "Zürich", "days": 3}[TOOL_CALLS]now[ARGS]{}',
    "qwen3_coder": "<tool_call>\n<function=get_weather>\n<parameter=city>\nZürich\n</parameter>\n<parameter=days>\n3\n"
    "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    '{"city": "Zürich", "days": 3}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n'
    "```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek, V3.1": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Zürich", "days": 3}'
    "<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_dsml": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" '
    'string="true">Zürich</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
    '</｜DSML｜invoke>\n<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
    "glm": "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Zürich</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
    "minimax": '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Zürich</parameter>\n'
    '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
    "kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Zürich", "days": 3}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}'
    "<|tool_call_end|><|tool_calls_section_end|>",
    "gemma4": '<|tool_call>call:get_weather{city:<|"|>Zürich<|"|>,days:3}<tool_call|><|tool_call>call:now{}<tool_call|>',
    "pythonic": '[get_weather(city="Zürich", days=3), now()]',
    "cohere": '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Zürich", '
    '"days": 3}},\n    {"tool_call_id": "1", "tool_name": "now", "parameters": {}}\n]<|END_ACTION|>',
    "command_r": 'Action: ```json\n[\n    {\n        "tool_name": "get_weather",\n        "parameters": {"city": "Zürich", '
    '"days": 3}\n    },\n    {\n        "tool_name": "now",\n        "parameters": {}\n    }\n]```',
    "granite": '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}, {"name": "now", "arguments": {}}]',
    "phi4": '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}, {"name": "now", '
    '"arguments": {}}]<|/tool_call|>',
    "phi4, functools": 'functools[{"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}, {"name": "now", "arguments": {}}]',
    "seed": "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Zürich</parameter>\n<parameter=days>3</parameter>\n"
    "</function>\n</seed:tool_call>\n<seed:tool_call>\n<function=now>\n</function>\n</seed:tool_call>",
    "jamba": '<tool_calls>[\n{"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}},\n{"name": "now", '
    '"arguments": {}}\n]</tool_calls>',
    "internlm": '<|action_start|><|plugin|>\n{"name": "get_weather", "parameters": {"city": "Zürich", "days": 3}}'
    '<|action_end|><|action_start|><|plugin|>{"name": "now", "parameters": {}}<|action_end|>',
    "json": '[{"name": "get_weather", "parameters": {"city": "Zürich", "days": 3}}, {"name": "now"}]',
    "harmony": "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    '{"city": "Zürich", "days": 3}<|call|><|start|>assistant<|channel|>commentary to=functions.now<|message|>{}<|call|>',
}  # fmt: skip


def parser(name: str, reasoning: str | None = None, **options: Any) -> Any:
    ids = iter(range(1000))
    options = {"tools": TOOLS, "make_id": lambda: f"id{next(ids)}", **options}
    return ChatFormat(name.split(",")[0], reasoning).parser(**options)


def parse(name: str, *pieces: str, **options: Any) -> ChatMessage:
    """The message of `pieces`; the deltas must add up to it, as a client adds them up."""
    reader = parser(name, **options)
    deltas = [*(reader.push(piece) for piece in pieces), reader.finish()]
    assert client_side(deltas) == reader.message.to_dict()
    return reader.message


def client_side(deltas: list[ChatDelta]) -> dict[str, Any]:
    """The message as a client of OpenAI's stream puts it together from the JSON of its deltas."""
    message: dict[str, Any] = {"role": "assistant", "content": None}
    for delta in [d.to_dict() for d in deltas]:
        for name in ("content", "reasoning_content"):
            if name in delta:
                message[name] = (message.get(name) or "") + delta[name]
        for call in delta.get("tool_calls", []):
            calls = message.setdefault("tool_calls", [])
            if call["index"] == len(calls):
                calls.append({"id": call["id"], "type": call["type"], "function": dict(call["function"])})
            else:
                assert set(call) == {"index", "function"} and set(call["function"]) == {"arguments"}
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    if message["content"] is None and "tool_calls" not in message:
        message["content"] = ""
    return message


def calls(message: ChatMessage) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in message.tool_calls]


@pytest.mark.parametrize("name", list(TWO_CALLS))
@pytest.mark.parametrize("size", [1, 2, 5, 10_000])
def test_calls_of_every_format(name: str, size: int) -> None:
    text = TWO_CALLS[name]
    message = parse(name, *(text[at : at + size] for at in range(0, len(text), size)))
    assert calls(message) == [("get_weather", {"city": "Zürich", "days": 3}), ("now", {})]
    assert message.content == "" and message.to_dict()["content"] is None
    assert len({call.id for call in message.tool_calls}) == 2
    assert all(call.error is None for call in message.tool_calls)


def test_every_format_has_an_example() -> None:
    assert {name.split(",")[0] for name in TWO_CALLS} == {*TOOL_CALLS, "harmony"}


@pytest.mark.parametrize(
    "name", [n for n in TWO_CALLS if n not in ("llama3_json", "pythonic", "json", "harmony", "phi4, functools")]
)
def test_text_before_and_after_calls(name: str) -> None:
    message = parse(name, "  One <b> moment.\n\n" + TWO_CALLS[name] + "\nThere you are. ")
    assert message.content == "  One <b> moment.There you are. "
    assert len(message.tool_calls) == 2


@pytest.mark.parametrize("name", list(TWO_CALLS))
def test_without_tools_calls_are_text(name: str) -> None:
    if name != "harmony":
        assert parse(name, TWO_CALLS[name], tools=None).to_dict() == {"role": "assistant", "content": TWO_CALLS[name]}
    else:
        assert parse(name, TWO_CALLS[name], tools=None).content == '{"city": "Zürich", "days": 3}\n{}'


@pytest.mark.parametrize("name", [*TOOL_CALLS, "harmony"])
@pytest.mark.parametrize(
    "text", ["", " ", "\n", "Hello.\n\n", " a < b && c > d\n", '{"a": [1, "}"]}', "[1](x) '", "<tool", "[TOOL"]
)
def test_plain_text_is_passed_on_as_it_is(name: str, text: str) -> None:
    expected = "" if name == "harmony" and text.isspace() else text  # white space before a header that does not come
    assert parse(name, *text).to_dict() == {"role": "assistant", "content": expected}


def test_arguments_stream_as_they_are_written() -> None:
    reader = parser("hermes")
    deltas = [
        reader.push(piece).to_dict() for piece in ("A", '<tool_call>{"name": "now', '", "arguments": {"a', '": [1')
    ]
    function = {"name": "now", "arguments": '{"a'}
    assert deltas == [
        {"content": "A"},
        {},
        {"tool_calls": [{"index": 0, "id": "id0", "type": "function", "function": function}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '": [1'}}]},
    ]


def test_ids_that_a_call_brings_and_ids_made() -> None:
    assert [c.id for c in parse("kimi", TWO_CALLS["kimi"]).tool_calls] == ["functions.get_weather:0", "functions.now:1"]
    assert parse("mistral", "[TOOL_CALLS]now[CALL_ID]a1B2c3D4e[ARGS]{}").tool_calls[0].id == "a1B2c3D4e"
    assert [c.id for c in parse("cohere", TWO_CALLS["cohere"]).tool_calls] == ["0", "1"]
    made = ChatFormat("mistral").parser(TOOLS)
    made.push(TWO_CALLS["mistral"])
    assert all(
        len(call.id) == 9 and call.id.isalnum() for call in made.message.tool_calls
    )  # what its template asks for
    other = ChatFormat("hermes").parser(TOOLS)
    other.push(TWO_CALLS["hermes"])
    assert all(call.id.startswith("call_") for call in other.message.tool_calls)


def test_order_of_members_and_odd_arguments() -> None:
    def one(text: str) -> tuple[str, Any]:
        [call] = parse("hermes", *f"<tool_call>{text}</tool_call>").tool_calls
        return call.name, json.loads(call.arguments)

    assert one('{"arguments": {"a": {"b": "}"}}, "name": "f"}') == ("f", {"a": {"b": "}"}})
    assert one('{"name": "f"}') == ("f", {})
    assert one('{"name": "f", "arguments": null}') == ("f", {})
    assert one('{"name": "f", "arguments": "{\\"a\\": 1}"}') == ("f", {"a": 1})
    assert one('{"id": 7, "name": "\\u00fc", "arguments": {}, "x": -1.5e3 }') == ("ü", {})
    assert one('{"name": "f", "arguments": {"code": "a\n\tb"}}') == ("f", {"code": "a\n\tb"})  # raw line breaks


def test_values_take_the_types_of_the_schema() -> None:
    def value(key: str, text: str) -> Any:
        text = (
            f"<tool_call>\n<function=get_weather>\n<parameter={key}>\n{text}\n</parameter>\n</function>\n</tool_call>"
        )
        return calls(parse("qwen3_coder", text))[0][1][key]

    assert value("city", "12") == "12"
    assert value("city", "a\n\n  b </x>\n") == "a\n\n  b </x>\n"
    assert value("days", "12") == 12
    assert value("days", "many") == "many"
    assert value("exact", "True") is True
    assert value("exact", "null") is None
    assert value("hours", "[1, 2]") == [1, 2]
    assert value("unknown", "12") == "12"


MALFORMED = {
    "hermes": ["<tool_call>{}</tool_call>", "<tool_call>nothing</tool_call>", '<tool_call>{"name": 3}', "<tool_call>[1, 2]", "<tool_call>"],
    "llama3_json": ['{"name": "unknown", "parameters": {}}', '{"city": "x"}', "{", "<|python_tag|>print(1)"],
    "mistral": ["[TOOL_CALLS]", "[TOOL_CALLS]get weather", "[TOOL_CALLS][]", '[TOOL_CALLS][{"nome": "f"}]'],
    "deepseek": ["<｜tool▁call▁begin｜>function<｜tool▁call▁end｜>{", "<｜tool▁call▁begin｜>" + "x" * 300 + "{}"],
    "qwen3_coder": ["<tool_call><function=>", "<tool_call>\n{}", "<tool_call><function=" + "x" * 300],
    "gemma4": ["<|tool_call>call:f{a:}<tool_call|>", "<|tool_call>f{}<tool_call|>"],
    "pythonic": ["[get_weather(3)]", "[unknown()]", "[get_weather(city=x)]", "[get_weather(city={1, 2})]", "[", "[get_weather(**{})]"],
    "harmony": ["<|end|", "to be or not to be"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in MALFORMED.items() for text in texts])
def test_what_is_no_call_is_text(name: str, text: str) -> None:
    assert parse(name, *text).to_dict() == {"role": "assistant", "content": text}


def test_a_call_after_a_malformed_one() -> None:
    message = parse("hermes", '<tool_call>{"nome": 1}</tool_call>\n<tool_call>{"name": "now"}</tool_call>')
    assert (message.content, calls(message)) == ('<tool_call>{"nome": 1}</tool_call>', [("now", {})])


def test_broken_arguments_are_told() -> None:
    message = parse("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1]}</tool_call> Well.')
    assert message.tool_calls[0].arguments == '{"a": 1'
    assert "'f' are not valid JSON" in (message.tool_calls[0].error or "")
    assert message.content == "]}</tool_call> Well."
    [cut] = parse("hermes", '<tool_call>{"name": "f", "arguments": {"a": "on').tool_calls
    assert cut.arguments == '{"a": "on' and cut.error is not None
    [number] = parse("hermes", '<tool_call>{"name": "f", "arguments": 3}</tool_call>').tool_calls
    assert "not a JSON object" in (number.error or "")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": ' + '{"a": ' * 20_000),
        ("hermes", "<tool_call>" + "[" * 20_000 + '{"name": ' + "[" * 100_000),
        ("qwen3_coder", f"<tool_call><function=get_weather><parameter=hours>{'[' * 100_000}</parameter></function></tool_call>"),
        ("qwen3_coder", f"<tool_call><function=get_weather><parameter=days>{'9' * 10_000}</parameter></function></tool_call>"),
        ("gemma4", f"<|tool_call>call:f{{a:{'[' * 100_000}}}<tool_call|>"),
        ("pythonic", "[" * 50_000 + "]" * 50_000),
        ("pythonic", f"[get_weather(city={'-' * 50_000}1)]"),
        ("mistral", "[TOOL_CALLS]f" + "{" * 100_000),
        ("harmony", "<|channel|>analysis" * 5000),
    ],
)  # fmt: skip
def test_deep_and_long_outputs_end_in_time(name: str, text: str) -> None:
    """No recursion error, and work that grows with the length alone: a quadratic reader would take minutes."""
    message = parse(name, *(text[at : at + 4] for at in range(0, len(text), 4)))
    assert all(call.error is None or "not valid JSON" in call.error for call in message.tool_calls)


def test_long_values_are_read_once() -> None:
    body = "x = [1]\n" * 30_000
    text = f"<tool_call><function=get_weather><parameter=city>\n{body}\n</parameter></function></tool_call>"
    [call] = parse("qwen3_coder", *(text[at : at + 4] for at in range(0, len(text), 4))).tool_calls
    assert json.loads(call.arguments) == {"city": body}
    text = f"[get_weather(city={body!r})]"
    [call] = parse("pythonic", *(text[at : at + 4] for at in range(0, len(text), 4))).tool_calls
    assert json.loads(call.arguments) == {"city": body}


def test_numbers_that_json_has_not() -> None:
    text = "<tool_call><function=get_weather><parameter=days>NaN</parameter></function></tool_call>"
    assert calls(parse("qwen3_coder", text)) == [("get_weather", {"days": "NaN"})]
    [call] = parse("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>').tool_calls
    assert "NaN is no JSON" in (call.error or "")


# -- reasoning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(REASONING))
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_reasoning_of_every_format(name: str, size: int) -> None:
    tags = REASONING[name]
    text = f"{tags.begin}\n Let me see: 1 < 2.\n\nYes. \n{tags.end}\n\nThe answer.\n"
    message = parse("none", *(text[at : at + size] for at in range(0, len(text), size)), tools=None, reasoning=name)
    assert (message.reasoning_content, message.content) == ("Let me see: 1 < 2.\n\nYes.", "The answer.\n")


def test_reasoning_opened_by_the_prompt() -> None:
    begun = parse("hermes", *"\nHm.\n</think>\n\nYes.", reasoning="think", prompt="<|im_start|>assistant\n<think>\n")
    assert (begun.reasoning_content, begun.content) == ("Hm.", "Yes.")
    closed = parse("hermes", "Yes.", reasoning="think", prompt="<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert (closed.reasoning_content, closed.content) == ("", "Yes.")
    said = parse(
        "hermes",
        "Yes.",
        reasoning="think",
        prompt="<|im_start|>user\nWhat is <think>?<|im_end|>\n<|im_start|>assistant\n",
    )
    assert (said.reasoning_content, said.content) == ("", "Yes.")
    continued = parse("hermes", "m.</think>Yes.", reasoning="think", prompt="…<think>H", continued="<think>H")
    assert (continued.reasoning_content, continued.content) == ("m.", "Yes.")


def test_reasoning_that_is_cut_empty_or_only_mentioned() -> None:
    assert parse("hermes", "<think>Hm", reasoning="think").to_dict() == {
        "role": "assistant", "content": "", "reasoning_content": "Hm",
    }  # fmt: skip
    assert parse("hermes", "<think>\n\n</think>\n\nYes.", reasoning="think").to_dict() == {
        "role": "assistant", "content": "Yes.",
    }  # fmt: skip
    mentioned = "The tag <think> opens it, </think> closes it."
    assert parse("hermes", mentioned, reasoning="think").to_dict() == {"role": "assistant", "content": mentioned}


def test_calls_in_reasoning_are_reasoning() -> None:
    message = parse("hermes", "<think><tool_call>{}</think>" + TWO_CALLS["hermes"], reasoning="think")
    assert message.reasoning_content == "<tool_call>{}" and len(message.tool_calls) == 2


def test_harmony() -> None:
    text = (
        "<|channel|>analysis<|message|>They want\nthe weather.<|end|><|start|>assistant<|channel|>commentary<|message|>"
        "I look it up.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        '{"city": "x"}<|call|>'
    )
    prompt = "<|start|>user<|message|>Hi<|end|><|start|>assistant"
    message = parse("harmony", *text, prompt=prompt)
    assert message.reasoning_content == "They want\nthe weather."
    assert message.content == "I look it up."
    assert calls(message) == [("get_weather", {"city": "x"})]
    recipient_first = " to=functions.now<|channel|>commentary json<|message|>{}<|call|>"
    assert calls(parse("harmony", *recipient_first, prompt=prompt)) == [("now", {})]
    assert parse("harmony", " world.", prompt=prompt + "<|channel|>final<|message|>Hello,").content == " world."
    thought = parse(
        "harmony",
        "m.<|end|><|start|>assistant<|channel|>final<|message|>Yes",
        prompt=prompt + "<|channel|>analysis<|message|>H",
    )
    assert (thought.reasoning_content, thought.content) == ("m.", "Yes")
    assert (
        parse("harmony", "<|channel|>analysis<|message|>Cut in a header<|end|><|start|>assi", prompt=prompt).content
        == ""
    )


# -- any text, cut anywhere -------------------------------------------------------------------------------------------

_WORDS = [
    " ",
    "\n",
    "a",
    "}",
    "{",
    "]",
    "[",
    '"',
    ":",
    ",",
    "<",
    "|",
    "`",
    "\\",
    '{"name": "now"',
    '"arguments": {',
    "é",
    "x" * 130,
]


def _fragments(name: str) -> list[str]:
    """Pieces of the format's example, cut at each of its marks, and words that may stand between them."""
    import re

    example = TWO_CALLS[name]
    return [*re.split(r"(?<=[>\]{}｜|\s\"])", example), *_WORDS, "<think>", "</think>"]


@pytest.mark.parametrize("name", list(TWO_CALLS))
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_streaming_equals_the_whole_for_every_cut(name: str, data: st.DataObject) -> None:
    fragments = _fragments(name)
    if data.draw(st.booleans()):  # an example with something put in, or left out
        text = data.draw(st.sampled_from(["", "Hi ", "<think>hm</think>"])) + TWO_CALLS[name]
        at = data.draw(st.integers(0, len(text)))
        text = text[:at] + data.draw(st.sampled_from(fragments)) + text[at + data.draw(st.integers(0, 9)) :]
    else:
        text = "".join(data.draw(st.lists(st.sampled_from(fragments), max_size=24)))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=20)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    reasoning = data.draw(st.sampled_from([None, "think"])) if name != "harmony" else "harmony"
    whole = parse(name, text, reasoning=reasoning)
    assert parse(name, *pieces, reasoning=reasoning).to_dict() == whole.to_dict()
    assert parse(name, *text, reasoning=reasoning).to_dict() == whole.to_dict()


# -- recognising a package's format -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "tokens", "tool_calls", "reasoning"),
    [
        ("{{ '<|im_start|>' }}", [], None, None),
        ("<tools> return in <tool_call></tool_call> tags", ["<|im_start|>"], "hermes", None),
        ("<tool_call> … <think>", [], "hermes", "think"),
        ("<tool_call>\n<function=f>\n<parameter=p>", [], "qwen3_coder", None),
        ("<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key> </think>", [], "glm", "think"),
        ("{{ '[TOOL_CALLS]' }}", ["[THINK]", "[/THINK]"], "mistral", "mistral"),
        ("<｜tool▁calls▁begin｜> … split('</think>')", [], "deepseek", "think"),
        ("<|start|>assistant<|channel|>final<|message|>", [], "harmony", "harmony"),
        ("<|start_header_id|> {\"name\": …, \"parameters\": …}", [], "llama3_json", None),
        ("<|start_header_id|>", ["<|python_tag|>"], "llama3_json", None),
        ("<|tool|>{{ tools }}<|/tool|>", [], "phi4", None),
        ("{{ tools }}", ["<|tool_call|>"], "granite", None),
        ("<|START_ACTION|> <|START_THINKING|>", [], "cohere", "cohere"),
        ("<|tool_call>call: <|channel>thought", [], "gemma4", "gemma4"),
    ],
)  # fmt: skip
def test_auto(template: str, tokens: list[str], tool_calls: str | None, reasoning: str | None) -> None:
    assert find_format([template], tokens) == ChatFormat(tool_calls, reasoning)


def test_named_formats() -> None:
    assert find_format(["<tool_call>"], [], "mistral", None) == ChatFormat("mistral", None)
    with pytest.raises(RequestError, match="no tool call format 'qwen'; take auto, harmony, gemma4"):
        find_format([], [], "qwen")
    with pytest.raises(RequestError, match="no reasoning format 'r1'"):
        find_format([], [], None, "r1")
