"""What a server is told once, before it starts."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

_Seconds = Annotated[float, Field(gt=0)]


class ServeConfig(BaseModel):
    """A server's settings, frozen. Each is a flag of `llmx serve`, an environment variable (`LLMX_` and the name in
    capitals) and a key of the configuration file; the descriptions are the flags' help.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    onnx: list[str] = Field(
        [], description="A package folder or hub id, or NAME=DIR to serve it as NAME; several may be given."
    )
    chat_template: str | None = Field(
        None, description="A Jinja file, or the name of one of the package's templates, instead of its default."
    )
    tool_call_parser: str | None = Field(
        "auto", description="The format of the models' tool calls (docs/chat.md), auto, or none."
    )
    reasoning_parser: str | None = Field(
        "auto", description="The format of the models' reasoning (docs/chat.md), auto, or none."
    )
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    api_key: list[SecretStr] = Field(
        [], description="A key that clients must send (Authorization: Bearer); several may be given."
    )
    device: str = Field("auto", description="Where to run: auto, cpu or cuda.")
    engine_process: bool | None = Field(
        None,
        description="Run each model's engine in a process of its own, out of the way of the server's Python; "
        "default: on CUDA.",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; default: the CPUs that the process may use.")
    spin: bool = Field(True, description="Busy-wait within a step; false is slower, and kinder to other processes.")
    max_length: int | None = Field(None, ge=2, description="Positions of a request, prompt and output together.")
    slots: int = Field(8, ge=1, le=1024, description="Requests that run at the same time.")
    prefill_chunk: int | None = Field(
        None,
        ge=1,
        description="Prompt tokens that one step may run beside the others' decoding; default: 192 on a CPU (128 where prompts multiply integers), 2048 on CUDA.",
    )
    draft: str | None = Field(
        None, description="Speculative decoding: a small package of the same vocabulary that guesses ahead."
    )
    prompt_lookup: bool = Field(
        False, description="Speculative decoding: guess what followed the last words where they were before."
    )
    num_speculative_tokens: int | None = Field(
        None, ge=1, le=64, description="Guesses a pass; default: as many as pay, none where none do."
    )
    prefix_cache: float = Field(
        512.0,
        ge=0,
        allow_inf_nan=False,
        description="Megabytes for the state of prompt prefixes that later prompts share; 0: none.",
    )
    kv_cache_memory: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Megabytes for the state of all slots together; the youngest requests wait while older ones need them.",
    )
    max_queue: int = Field(64, ge=0, description="Requests that may wait for a slot; the next gets 429 at once.")
    max_body: float = Field(8.0, gt=0, description="Megabytes of a request body.")
    header_timeout: _Seconds = Field(10.0, description="Seconds that a client may take to send a request's headers.")
    body_timeout: _Seconds = Field(30.0, description="Seconds that a client may take to send a request's body.")
    request_timeout: _Seconds = Field(600.0, description="Seconds that a request may take in all.")
    keep_alive: _Seconds = Field(30.0, description="Seconds that an idle connection is kept.")
    max_connections: int = Field(2048, ge=1, description="Connections open at the same time; the next gets 503.")
    drain_timeout: _Seconds = Field(60.0, description="Seconds that running requests get to end after SIGTERM.")
    cors_origin: list[str] = Field([], description="An origin whose pages may call the server; several may be given.")
    otlp_endpoint: str | None = Field(
        None,
        description="Send OpenTelemetry traces there (OTLP over HTTP, http://host:4318/v1/traces); needs llmx[otel].",
    )
    log_format: Literal["json", "text"] = Field("json", description="How log lines are written: json or text.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The least level that is logged."
    )
    log_prompts: bool = Field(False, description="Log prompts and answers as well (they are left out otherwise).")

    @field_validator("onnx", "api_key", "cors_origin", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        """A variable's text is one entry, or a JSON list of them."""
        if not isinstance(value, str):
            return value
        return json.loads(value) if value.lstrip().startswith("[") else [value]
