"""What an answer must look like: `response_format`, and tool_choice where a call is required, as structured outputs."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from llmx.runtime.params import SamplingParams
from llmx.serve.errors import bad_request
from llmx.serve.protocol import ChatRequest, NamedTool, ResponseFormat, Tool

#: The format in which a required call is written: JSON without the model's own markers.
CALL_FORMAT = "json"

#: OpenAI: a function without parameters takes none.
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def of_format(format: ResponseFormat | None) -> dict[str, Any] | None:
    """SamplingParams' `structured_outputs` of a response_format. Raises ApiError."""
    if format is None or format.type == "text":
        return None
    if format.type == "json_object":
        return {"json_object": True}
    if format.json_schema is None or format.json_schema.schema_ is None:
        raise bad_request("response_format needs a json_schema with a schema.", "response_format.json_schema.schema")
    return {"json": format.json_schema.schema_}


def required_tools(body: ChatRequest) -> list[Tool]:
    """The tools of which one must be called; none where the model may choose not to. Raises ApiError."""
    choice = body.tool_choice
    if choice in (None, "none", "auto"):
        return []
    if not body.tools:
        raise bad_request("tool_choice needs tools.", "tool_choice")
    if isinstance(choice, NamedTool):
        named = [tool for tool in body.tools if tool.function.name == choice.function.name]
        if not named:
            raise bad_request(f"tools has no function {choice.function.name!r}.", "tool_choice.function.name")
        return named[:1]
    return body.tools


def of_calls(tools: list[Tool], single: bool) -> dict[str, Any]:
    """`structured_outputs` for one call of `tools`, or a list of calls: compact, and with no arguments that are not named."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or _NO_ARGUMENTS,
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    call = calls[0] if len(calls) == 1 else {"anyOf": calls}
    form = call if single else {"type": "array", "items": call, "minItems": 1}
    return {"json": form, "disable_any_whitespace": True, "disable_additional_properties": True}


def check_supported(wanted: dict[str, Any] | None, param: str) -> None:
    """Raises ApiError where this llmx has no structured outputs."""
    if wanted is not None and "structured_outputs" not in {field.name for field in fields(SamplingParams)}:
        raise bad_request(f"{param} is not supported by this version; leave it out.", param, "unsupported_parameter")
