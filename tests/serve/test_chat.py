"""Structured answers, tool calls and reasoning, through openai-python."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from harness import Running, running
from llmx.serve import ServeConfig
from pydantic import BaseModel

pytest.importorskip("llguidance")
TEMPLATE = """{% if tools %}<tool_call>{{ tools | tojson }}</tool_call>{% endif %}
{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}
{% endfor %}{# <think></think> #}{% if add_generation_prompt %}assistant: {% if think %}<think>
{% endif %}{% endif %}"""
MESSAGES: Any = [{"role": "user", "content": "What news?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"enum": ["Rome", "Verona"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["place", "days"],
            "additionalProperties": False,
        },
    },
}
NEWS: Any = {"type": "function", "function": {"name": "news"}}


class Scene(BaseModel):
    place: Literal["Rome", "Verona"]
    people: list[Literal["Romeo", "Juliet"]]
    night: bool


@pytest.fixture(scope="module")
def server(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The demo model with a template whose calls are Hermes', and reasoning between think tags."""
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    with running(ServeConfig(onnx=[f"demo={demo}"], slots=2, chat_template=str(template))) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def says(text: str) -> dict[str, Any]:
    """Makes the model say `text`."""
    return {"model": "demo", "messages": MESSAGES, "extra_body": {"structured_outputs": {"choice": [text]}}}


def test_parse_with_a_pydantic_model(client: openai.OpenAI) -> None:
    for seed in range(3):
        answer = client.chat.completions.parse(
            model="demo", messages=MESSAGES, response_format=Scene, temperature=1, seed=seed, max_tokens=200
        )
        scene = answer.choices[0].message.parsed
        assert isinstance(scene, Scene) and answer.choices[0].finish_reason == "stop"
    with client.chat.completions.stream(
        model="demo", messages=MESSAGES, response_format=Scene, temperature=1, seed=2, max_tokens=200
    ) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == scene


def test_a_form_where_the_template_opens_reasoning(client: openai.OpenAI) -> None:
    """What the grammar makes is the answer, though the prompt ends with an opening tag; without one it is reasoning."""
    options: Any = {"model": "demo", "messages": MESSAGES, "seed": 1, "max_tokens": 200}
    thinking: Any = {"chat_template_kwargs": {"think": True}}
    answer = client.chat.completions.parse(**options, response_format=Scene, extra_body=thinking).choices[0].message
    assert isinstance(answer.parsed, Scene)
    called = client.chat.completions.create(**options, tools=[WEATHER], tool_choice="required", extra_body=thinking)
    assert called.choices[0].message.tool_calls[0].function.name == "weather"
    free = client.chat.completions.create(**options, extra_body=thinking).choices[0].message
    assert free.reasoning_content and not free.content  # type: ignore[attr-defined]


def test_json_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, response_format={"type": "json_object"}, temperature=1, seed=1, max_tokens=300
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


def test_a_schema_that_cannot_be_compiled_is_the_clients(client: openai.OpenAI) -> None:
    wrong: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="demo", messages=MESSAGES, response_format=wrong)
    assert refused.value.param == "response_format"
    with pytest.raises(openai.BadRequestError) as missing:
        client.chat.completions.create(
            model="demo",
            messages=MESSAGES,
            response_format={"type": "json_schema", "json_schema": {"name": "x"}},  # type: ignore[arg-type]
        )
    assert missing.value.param == "response_format.json_schema.schema"


def test_a_required_call(client: openai.OpenAI) -> None:
    options: Any = {
        "model": "demo",
        "messages": MESSAGES,
        "tools": [WEATHER, NEWS],
        "temperature": 1,
        "max_tokens": 400,
    }
    for choice, names in (
        ("required", {"weather", "news"}),
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
    ):
        whole = client.chat.completions.create(**options, tool_choice=choice, parallel_tool_calls=False, seed=3)
        [call] = whole.choices[0].message.tool_calls
        assert whole.choices[0].finish_reason == "tool_calls" and not whole.choices[0].message.content
        assert call.function.name in names
        arguments = json.loads(call.function.arguments)
        if call.function.name == "weather":
            assert arguments["place"] in ("Rome", "Verona") and 1 <= arguments["days"] <= 9
        name, text, reason = "", "", None
        stream = client.chat.completions.create(
            **options, tool_choice=choice, parallel_tool_calls=False, seed=3, stream=True
        )
        for chunk in stream:
            reason = chunk.choices[0].finish_reason or reason
            for delta in chunk.choices[0].delta.tool_calls or []:
                name += delta.function.name or ""
                text += delta.function.arguments or ""
        assert (name, text, reason) == (call.function.name, call.function.arguments, "tool_calls")


def test_a_call_that_the_model_chooses(client: openai.OpenAI) -> None:
    text = '<think>Where?</think>Let me see.<tool_call>\n{"name": "weather", "arguments": {"place": "Rome", "days": 2}}\n</tool_call>'
    answer = client.chat.completions.create(**says(text), tools=[WEATHER]).choices[0]
    [call] = answer.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"place": "Rome", "days": 2})
    assert (answer.message.content or "").strip() == "Let me see." and answer.finish_reason == "tool_calls"
    assert answer.message.reasoning_content.strip() == "Where?"  # type: ignore[attr-defined]
    with client.chat.completions.stream(**says(text), tools=[WEATHER]) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.message.tool_calls[0].function.arguments == call.function.arguments
    assert (streamed.message.content, streamed.finish_reason) == (answer.message.content, "tool_calls")
    plain = client.chat.completions.create(**says(text), tools=[WEATHER], tool_choice="none").choices[0]
    assert not plain.message.tool_calls and plain.finish_reason == "stop"


def test_the_next_turn_takes_the_answer_back(client: openai.OpenAI, server: Running) -> None:
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"place": "Rome", "days": 2}'},
    }
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    ids = server.post("/tokenize", {"messages": messages, "tools": [WEATHER]}).json()["tokens"]
    prompt = server.post("/detokenize", {"tokens": ids}).json()["prompt"]
    assert '"place": "Rome"' in prompt and "tool: rain" in prompt
    assert client.chat.completions.create(model="demo", messages=messages, max_tokens=2).choices[0].message.content  # type: ignore[arg-type]


def test_tools_of_openai_python(client: openai.OpenAI) -> None:
    """Its own helper makes the tool from a pydantic model and parses the call back."""

    class GetWeather(BaseModel):
        place: Literal["Rome", "Verona"]

    answer = client.chat.completions.parse(
        model="demo", messages=MESSAGES, tools=[openai.pydantic_function_tool(GetWeather)], tool_choice="required",
        temperature=1, seed=4, max_tokens=200, parallel_tool_calls=False,
    )  # fmt: skip
    [call] = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, GetWeather)


def test_a_template_that_refuses_is_the_clients_fault(serving: Callable[..., Running]) -> None:
    answer = serving().post("/v1/chat/completions", {"messages": [{"role": "wizard", "content": "x"}]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    assert "wizard" in answer.json()["error"]["message"]
