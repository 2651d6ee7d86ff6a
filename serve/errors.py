"""Errors as OpenAI's API shapes them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import re
from typing import Any

from llmx.runtime.errors import (
    ClosedError,
    ContextLengthError,
    EngineDeadError,
    FamilyError,
    LlmxError,
    MissingDependencyError,
    OutOfMemoryError,
    RequestError,
)
from pydantic import ValidationError
from starlette.responses import JSONResponse

_NAMED = re.compile(r"(?:each (?:\w+ )?of )?(\w+)")  # how a RequestError begins: "each of stop_token_ids must …"
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than 2xx. `param` names the field at fault, `code` is what programs look at."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.headers = status, code, message, param, headers or {}

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, code, message, param)


def busy(message: str, retry_after: int = 1) -> ApiError:
    return ApiError(429, "rate_limit_exceeded", message, headers={"retry-after": str(retry_after)})


def api_error(error: BaseException, fields: frozenset[str] = frozenset(), prompt: str | None = None) -> ApiError:
    """What a client is told of `error`. `fields`: the request's field names, of which a RequestError's message begins with
    the one at fault; `prompt`: the field that holds the prompt.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextLengthError):
        # LiteLLM and others know it by OpenAI's words
        message = f"This model's maximum context length is exceeded: {error}"
        return ApiError(400, "context_length_exceeded", message, prompt)
    if isinstance(error, RequestError):
        named = _NAMED.match(str(error))
        field = named[1] if named is not None and named[1] in fields else prompt
        return ApiError(400, "invalid_value", str(error), field)
    if isinstance(error, FamilyError):
        return ApiError(400, "unsupported_model", str(error), "model")
    if isinstance(error, TimeoutError):
        return ApiError(
            504, "timeout", "The request took longer than the server allows; ask for fewer tokens, or of fewer texts."
        )
    if isinstance(error, ClosedError):
        return ApiError(
            503, "shutting_down", "The server is shutting down; send it again.", headers={"retry-after": "1"}
        )
    if isinstance(error, EngineDeadError):
        return ApiError(503, "engine_dead", str(error), headers={"retry-after": "5"})
    if isinstance(error, OutOfMemoryError):
        return ApiError(503, "out_of_memory", str(error), headers={"retry-after": "5"})
    if isinstance(error, MissingDependencyError):
        return ApiError(501, "not_installed", str(error))
    if isinstance(error, LlmxError):
        return ApiError(500, "model_error", str(error))
    return ApiError(500, "internal_error", "The server failed at this request; its log has the reason.")


def validation_error(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a body, its field named as in `messages[0].content`."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    first = found[0]
    if first["type"] == "json_invalid":
        return bad_request(
            f"The body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}.", None, "invalid_json"
        )
    param = _field(first["loc"])
    if first["type"] == "extra_forbidden":
        return bad_request(f"Unknown parameter: {param}.", param, "unknown_parameter")
    if first["type"] == "missing":
        return bad_request(f"Missing required parameter: {param}.", param, "missing_required_parameter")
    # Of a union, each member's complaint is listed; the field is the same.
    reasons = list(dict.fromkeys(e["msg"] for e in found if _field(e["loc"]) == param))
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    return bad_request(f"{param or 'The body'} is wrong: {'; or '.join(reasons[:3])}.", param, code)


def _field(loc: tuple[int | str, ...]) -> str | None:
    """("messages", 0, "content", "str") -> "messages[0].content": the names of a union's members are left out."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part not in _MEMBERS and not part[0].isupper():
            text += f".{part}" if text else part
    return text or None


_MEMBERS = {"str", "int", "float", "bool", "list", "dict", "none", "constrained-str", "constrained-int"}
