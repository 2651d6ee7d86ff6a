"""Request bodies, as openai-python and vLLM's clients send them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from llmx.serve.fields import Body, Sampling
from pydantic import BaseModel, ConfigDict, Field

_Metadata = dict[str, Any] | None

T = TypeVar("T")

#: A list that is given up at its first wrong item: a body may hold millions, and the event loop waits meanwhile.
Many = Annotated[list[T], Field(fail_fast=True)]
MAX_PROMPTS = 2048  # OpenAI's for embeddings
Prompts = (
    str
    | Annotated[list[str], Field(max_length=MAX_PROMPTS, fail_fast=True)]
    | Many[int]
    | Annotated[list[Many[int]], Field(max_length=MAX_PROMPTS, fail_fast=True)]
)
Messages = Annotated[list["Message"], Field(min_length=1, max_length=16384, fail_fast=True)]


class Ignored(Body):
    """What clients send and a server of open models has no use for."""

    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: bool | None = None
    metadata: _Metadata = None
    service_tier: str | None = None


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool = False


class Part(BaseModel):
    """A piece of a message; only text is read."""

    model_config = ConfigDict(strict=True, extra="allow")
    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(Body):
    name: str
    arguments: str = ""


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(BaseModel):
    """A message; fields that a template may read are let through."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Many[Part] | None = None
    name: str | None = None
    tool_calls: Many[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None


class Function(Body):
    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"] = "function"
    function: NamedFunction


class JsonSchema(Body):
    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Sampling, Ignored):
    """POST /v1/chat/completions."""

    model: str | None = None
    messages: Messages
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    tools: Many[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    modalities: Many[Literal["text"]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: Many[dict[str, Any]] | None = None


class CompletionRequest(Sampling, Ignored):
    """POST /v1/completions."""

    model: str | None = None
    prompt: Prompts
    max_tokens: int | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    suffix: str | None = None


class EmbeddingRequest(Ignored):
    """POST /v1/embeddings."""

    model: str | None = None
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None


class Document(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    text: str


class RerankRequest(Ignored):
    """POST /v1/rerank."""

    model: str | None = None
    query: str
    documents: Annotated[list[str | Document], Field(min_length=1, max_length=2048, fail_fast=True)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = True


class TokenizeRequest(Body):
    """POST /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Many[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Many[Annotated[int, Field(ge=0, lt=2**31)]]
