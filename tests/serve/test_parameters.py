"""Decoding through the server: every parameter arrives, `best_of`, speculative decoding."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from harness import Running
from llmx.runtime import RequestError, SamplingParams
from llmx.serve import ServeConfig, load_models
from llmx.serve.fields import sampling_params
from llmx.serve.protocol import ChatRequest, CompletionRequest

VALUES: dict[str, Any] = {
    "n": 2, "max_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1, "seed": 7,
    "stop": ["a", "b"], "stop_token_ids": [4, 5], "ignore_eos": True, "skip_special_tokens": False,
    "include_stop_str_in_output": True, "prompt_logprobs": 2, "typical_p": 0.8, "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.02, "top_n_sigma": 1.5, "repetition_penalty": 1.2, "presence_penalty": -0.5,
    "frequency_penalty": 0.25, "no_repeat_ngram_size": 3, "logit_bias": {"7": -2.5}, "allowed_token_ids": [1, 2],
    "bad_words": ["one"], "bad_words_ids": [[4, 5], [6]], "keep_special_tokens": [1], "max_time": 1.5,
    "structured_outputs": {"regex": "a+"}, "best_of": 3, "suppress_tokens": [7], "begin_suppress_tokens": [8],
}  # fmt: skip
BEAMS: dict[str, Any] = {"num_beams": 4, "length_penalty": 0.5, "early_stopping": "never"}


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
def test_every_parameter_arrives(kind: type[Any]) -> None:
    body = {"prompt": "x"} if kind is CompletionRequest else {"messages": [{"role": "user", "content": "x"}]}
    for values in (VALUES, BEAMS):
        request = kind.model_validate_json(json.dumps({**body, **values}))
        assert sampling_params(request) == SamplingParams(**values)
    assert {*VALUES, *BEAMS, "logprobs"} == {field.name for field in fields(SamplingParams)}


@pytest.mark.parametrize("stream", [False, True])
def test_best_of(served: Running, stream: bool) -> None:
    body = {"prompt": "KING:", "max_tokens": 8, "temperature": 0.9, "seed": 5, "n": 4, "logprobs": 0}
    whole = served.post("/v1/completions", body).json()["choices"]
    order = sorted(whole, key=lambda choice: -sum(choice["logprobs"]["token_logprobs"]))
    wanted = {**body, "n": 2, "best_of": 4, "stream": stream}
    if not stream:
        answer = served.post("/v1/completions", wanted).json()
        assert [choice["text"] for choice in answer["choices"]] == [choice["text"] for choice in order[:2]]
        assert answer["usage"]["completion_tokens"] == 32  # of all that were drawn, as OpenAI counts
    else:
        texts = ["", ""]
        with served.http.stream("POST", "/v1/completions", json=wanted) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        texts[choice["index"]] += choice["text"]
        assert texts == [choice["text"] for choice in order[:2]]
    served.wait_idle()


def test_speculative_decoding(served: Running, serving: Callable[..., Running]) -> None:
    guessing = serving(prompt_lookup=True, num_speculative_tokens=3, slots=4)
    body = {"prompt": "to be or not to be or not to be or not to", "max_tokens": 24, "temperature": 0}
    plain, fast = (server.post("/v1/completions", body).json() for server in (served, guessing))
    assert plain["choices"][0]["text"] == fast["choices"][0]["text"]
    details = fast["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"] > 0
    assert "completion_tokens_details" not in plain["usage"]
    metrics = guessing.http.get("/metrics").text
    accepted = details["accepted_prediction_tokens"]
    assert f'vllm:spec_decode_num_accepted_tokens_total{{model_name="demo"}} {accepted}.0' in metrics


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draft": "x", "prompt_lookup": True}, "Give --draft or --prompt-lookup, not both"),
        ({"num_speculative_tokens": 2}, "--num-speculative-tokens goes with --draft or --prompt-lookup"),
    ],
)
def test_settings_that_do_not_fit(demo: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load_models(ServeConfig(onnx=[str(demo)], **settings))
