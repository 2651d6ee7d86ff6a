"""What an output must look like: vLLM's `StructuredOutputsParams`, checked and made comparable."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llmx.runtime.errors import RequestError

_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_FORMS = "json, regex, choice, grammar or json_object"


@dataclass(frozen=True)
class StructuredOutputsParams:
    """The form of an output; exactly one of the first five. Names are vLLM's. Needs the `structured` extra.

    Args:
        json: a JSON schema: a mapping, its text, or a pydantic model class. Stored as text.
        regex: a regular expression (Rust's syntax, no look-around) for the whole output.
        choice: the output is one of these strings.
        grammar: a context-free grammar in Lark's syntax, or GBNF; its start rule is `start` (GBNF: `root`).
        json_object: any JSON object.
        disable_any_whitespace: JSON without spaces and line breaks outside of strings: fewer tokens, most of them forced.
        disable_additional_properties: objects of the schema have no other properties than it names.
        whitespace_pattern: a regular expression for the spaces that JSON may have at one place [default: one space, or a
            line break and up to 20 spaces of indentation].

    Raises RequestError naming the field. Whether the grammar can be compiled, the LLM says when it is given.
    """

    json: str | Mapping[str, Any] | type | None = None
    regex: str | None = None
    choice: Iterable[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        if self.json_object is False:
            object.__setattr__(self, "json_object", None)
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            found = f"and has {' and '.join(given)}" if given else "and has none"
            raise RequestError(f"structured_outputs must have exactly one of {_FORMS}, {found}.")
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise RequestError(f"structured_outputs.{name} must be a string that is not empty.")
        for name in ("json_object", "disable_any_whitespace", "disable_additional_properties"):
            if getattr(self, name) not in (None, True, False):
                raise RequestError(f"structured_outputs.{name} must be true or false.")
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))

    @staticmethod
    def of(value: Any) -> StructuredOutputsParams:
        """`value`, or what a mapping of its fields (a request's JSON) says. Raises RequestError."""
        if isinstance(value, StructuredOutputsParams):
            return value
        if not isinstance(value, Mapping):
            raise RequestError(f"structured_outputs must be StructuredOutputsParams or a mapping with {_FORMS}.")
        unknown = [str(key) for key in value if key not in StructuredOutputsParams.__dataclass_fields__]
        if unknown:
            raise RequestError(f"structured_outputs has no field {unknown[0]!r}; give one of {_FORMS}.")
        return StructuredOutputsParams(**value)


def _choices(value: Any) -> tuple[str, ...]:
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)):
        choices = tuple(value)
        if choices and all(isinstance(choice, str) and choice for choice in choices):
            return choices
    raise RequestError("structured_outputs.choice must be a list of at least one string, none of them empty.")


def _schema_text(value: Any) -> str:
    if isinstance(value, type) and hasattr(value, "model_json_schema"):
        value = value.model_json_schema()
    try:
        schema = json_module.loads(value) if isinstance(value, (str, bytes)) else value
        if isinstance(schema, (Mapping, bool)):
            return json_module.dumps(schema, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise RequestError(f"structured_outputs.json is no JSON schema: {reason}.") from None
    raise RequestError("structured_outputs.json must be a JSON schema: a mapping, its text, or a pydantic model class.")
