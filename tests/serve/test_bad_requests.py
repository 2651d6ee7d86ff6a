"""Every malformed request gets the right 4xx, in OpenAI's shape, with the field named."""

from __future__ import annotations

import gc
import json
from typing import Any

import pytest
from harness import Running
from llmx.serve.protocol import ChatRequest, CompletionRequest, EmbeddingRequest
from pydantic import BaseModel, ValidationError

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": MESSAGES, "max_tokens": 2, **fields}


def text(**fields: Any) -> tuple[str, dict[str, Any]]:
    return TEXT, {"prompt": "hi", "max_tokens": 2, **fields}


@pytest.mark.parametrize(
    ("request_", "status", "code", "param"),
    [
        (chat(messages=[]), 400, "invalid_value", "messages"),
        (chat(messages="hi"), 400, "invalid_type", "messages"),
        (chat(messages=[{"content": "x"}]), 400, "missing_required_parameter", "messages[0].role"),
        (chat(messages=[{"role": "user"}]), 400, "invalid_value", "messages"),
        (chat(messages=[*MESSAGES, {"role": "user", "content": 3}]), 400, "invalid_type", "messages[1].content"),
        (
            chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
            400, "unsupported_content", "messages[0].content[0].type",
        ),
        ((CHAT, {"max_tokens": 3}), 400, "missing_required_parameter", "messages"),
        (chat(model="gpt"), 404, "model_not_found", "model"),
        (chat(model=7), 400, "invalid_type", "model"),
        (chat(temperature=-1), 400, "invalid_value", "temperature"),
        (chat(temperature="hot"), 400, "invalid_type", "temperature"),
        (chat(top_p=0), 400, "invalid_value", "top_p"),
        (chat(top_k=1.5), 400, "invalid_type", "top_k"),
        (chat(n=0), 400, "invalid_value", "n"),
        (chat(n=200), 400, "invalid_value", "n"),
        (chat(max_completion_tokens=0), 400, "invalid_value", "max_completion_tokens"),
        (chat(seed=-1), 400, "invalid_value", "seed"),
        (chat(stop=[""]), 400, "invalid_value", "stop"),
        (chat(stop=5), 400, "invalid_type", "stop"),
        (chat(logit_bias={"a": 1}), 400, "invalid_value", "logit_bias"),
        (chat(logit_bias={"5": 1000}), 400, "invalid_value", "logit_bias"),
        (chat(presence_penalty=9), 400, "invalid_value", "presence_penalty"),
        (chat(top_logprobs=3), 400, "invalid_value", "top_logprobs"),
        (chat(logprobs=True, top_logprobs=99), 400, "invalid_value", "top_logprobs"),
        (chat(stream_options={"include_usage": True}), 400, "invalid_value", "stream_options"),
        (chat(stream=True, stream_options={"usage": 1}), 400, "unknown_parameter", "stream_options.usage"),
        (chat(temprature=1), 400, "unknown_parameter", "temprature"),
        (chat(response_format={"type": "xml"}), 400, "invalid_value", "response_format.type"),
        (chat(tools=[{"type": "function"}]), 400, "missing_required_parameter", "tools[0].function"),
        (chat(tool_choice="required"), 400, "invalid_value", "tool_choice"),
        (chat(chat_template_kwargs={"chat_template": "{{ 1 }}"}), 400, "invalid_value", "chat_template_kwargs"),
        (chat(messages=[{"role": "user", "content": "word " * 3000}]), 400, "context_length_exceeded", "messages"),
        (text(prompt=[]), 400, "invalid_value", "prompt"),
        (text(prompt=""), 400, "invalid_value", "prompt"),
        (text(prompt=[[]]), 400, "invalid_value", "prompt"),
        (text(prompt=[10**6]), 400, "invalid_value", "prompt"),
        (text(prompt=[-1]), 400, "invalid_value", "prompt"),
        (text(prompt=[1, "x"]), 400, "invalid_type", "prompt"),
        (text(prompt=["x"] * 2000), 400, "invalid_value", "prompt"),
        (text(max_tokens=0), 400, "invalid_value", "max_tokens"),
        (text(suffix="end"), 400, "unsupported_parameter", "suffix"),
        (text(best_of=2, n=3), 400, "invalid_value", "best_of"),
        (text(best_of=200), 400, "invalid_value", "best_of"),
        (text(bad_words_ids=[[]]), 400, "invalid_value", "bad_words_ids"),
        (text(suppress_tokens=[10**7]), 400, "invalid_value", "suppress_tokens"),
        (text(logprobs=50), 400, "invalid_value", "logprobs"),
        (("/v1/embeddings", {"input": "x"}), 400, "unsupported_model", "model"),
        (("/v1/embeddings", {}), 400, "missing_required_parameter", "input"),
        (("/v1/rerank", {"query": "x", "documents": ["y"]}), 400, "unsupported_model", "model"),
        (("/tokenize", {}), 400, "invalid_value", "prompt"),
        (("/detokenize", {"tokens": [-1]}), 400, "invalid_value", "tokens[0]"),
        (("/v1/nothing", {}), 404, "not_found", None),
        (("/health", {}), 405, "method_not_allowed", None),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(
    served: Running, request_: tuple[str, dict[str, Any]], status: int, code: str, param: str | None
) -> None:
    answer = served.post(*request_)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param), error
    assert error["message"].endswith((".", ".)")) and isinstance(error["type"], str)
    served.wait_idle()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "invalid_json"),
        (b"", "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b'{"prompt": "\\ud800"}', "invalid_json"),
        (b"[" * 100_000 + b"]" * 100_000, "invalid_json"),
        (b'{"prompt": "x", "metadata": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001, "invalid_json"),
        (b"[]", "invalid_type"),
        (b"null", "invalid_type"),
        (b'{"prompt": "x", "temperature": NaN}', "invalid_value"),
        (b'{"prompt": "x", "temperature": 1e999}', "invalid_value"),
        (b'{"prompt": "x", "seed": 1' + b"0" * 5000 + b"}", "invalid_json"),
    ],
)
def test_bodies_that_are_no_request(served: Running, body: bytes, code: str) -> None:
    answer = served.http.post(TEXT, content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code), answer.text


def test_only_json_is_read(served: Running) -> None:
    """A page of another origin can make a browser send these without asking; they are refused."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = served.http.post(TEXT, content=b'{"prompt": "x"}', headers={"content-type": kind})
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_the_server_goes_on(served: Running) -> None:
    assert served.post(*text()).status_code == 200
    assert served.http.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"prompt": [None] * 2000}),
        (CompletionRequest, {"prompt": [[None] * 2000] * 2000}),
        (CompletionRequest, {"prompt": ["x"] * 5000}),
        (EmbeddingRequest, {"input": [[5]] * 5000}),
        (ChatRequest, {"messages": [3] * 2000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [3] * 2000}]}),
    ],
)
def test_a_list_is_given_up_at_its_first_wrong_item(kind: type[BaseModel], body: dict[str, Any]) -> None:
    """A complaint for each of millions would hold the event loop for seconds."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(json.dumps(body))
    assert caught.value.error_count() <= 4  # one for each member of a union


def test_garbage_is_collected_after_a_body_that_is_wrong(served: Running) -> None:
    gc.enable()  # whatever a command that ran in this process left behind
    assert served.post(TEXT, {"prompt": [1, "x"]}).status_code == 400
    assert gc.isenabled()
