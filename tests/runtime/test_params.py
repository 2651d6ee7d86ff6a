"""SamplingParams: what is accepted, what is refused with which sentence, and where defaults come from."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from llmx.runtime.errors import LlmxError, RequestError
from llmx.runtime.params import SamplingParams

NAN, INF = float("nan"), float("inf")

BAD: list[tuple[str, list[Any], str]] = [
    ("n", [0, -1, 257, 1.0, True, "1", None, NAN], "n must be a whole number from 1 to 256, and is"),
    ("max_tokens", [0, -5, 2.5, True, "9", 2**31, 10**5000, NAN], "max_tokens must be a whole number from 1 to"),
    ("min_tokens", [-1, 1.0, False, None, 2**31], "min_tokens must be a whole number from 0 to"),
    (
        "temperature",
        [-0.01, NAN, INF, -INF, 101, True, "0.5", 1j, 10**400],
        "temperature must be a number from 0 to 100",
    ),
    ("top_k", [-2, 0.5, True, "5", 10**12, np.float32(3)], "top_k must be a whole number from -1 to"),
    ("top_p", [0, 0.0, -0.1, 1.0001, NAN, True, "1", [0.5]], "top_p must be a number above 0, up to 1, and is"),
    ("min_p", [-0.1, 1.5, NAN, False, "0"], "min_p must be a number from 0 to 1, and is"),
    ("seed", [-1, 2**64, 1.5, True, "7"], "seed must be a whole number from 0 to 18446744073709551615"),
    (
        "stop",
        ["", [""], ["a", ""], ["a", 3], 5, b"x", {"a": 1}, ["x"] * 257],
        "stop must be a non-empty string or a list",
    ),
    ("stop_token_ids", [[-1], [1.5], [True], ["a"], [2**31]], "each of stop_token_ids must be a whole number from 0"),
    ("stop_token_ids", ["12", 7, None, {1: 2}], "stop_token_ids must be a list of token ids"),
    ("stop_token_ids", [range(257)], "stop_token_ids must list at most 256 token ids, and lists 257"),
    ("ignore_eos", [0, 1, None, "true"], "ignore_eos must be true or false"),
    ("skip_special_tokens", [1, None], "skip_special_tokens must be true or false"),
    ("include_stop_str_in_output", [1, None], "include_stop_str_in_output must be true or false"),
    ("logprobs", [-1, 1025, True, 2.0], "logprobs must be a whole number from 0 to 1024"),
    ("prompt_logprobs", [-1, 1025, True, 2.0], "prompt_logprobs must be a whole number from 0 to 1024"),
]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        pytest.param(name, value, message, id=f"{name}-{n}")
        for name, values, message in BAD
        for n, value in enumerate(values)
    ],
)
def test_refusals_name_the_field_and_its_range(name: str, value: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    text = str(caught.value)
    assert text.startswith(message)
    assert text.endswith(".")
    assert "\n" not in text
    assert len(text) < 220
    assert isinstance(caught.value, LlmxError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "options",
    [
        {"n": 256, "max_tokens": 2**31 - 1, "min_tokens": 0},
        {"temperature": 0, "top_k": -1, "top_p": 1, "min_p": 0},
        {"temperature": 100.0, "top_k": 0, "top_p": 1e-9, "min_p": 1.0},
        {"seed": 2**64 - 1, "logprobs": 0, "prompt_logprobs": 1024},
        {"stop": "x", "stop_token_ids": [0]},
        {"min_tokens": 5, "max_tokens": 5},
    ],
)
def test_edges_of_the_ranges_are_accepted(options: dict[str, Any]) -> None:
    params = SamplingParams(**options)
    for name, value in options.items():
        stored = getattr(params, name)
        assert (list(stored) if isinstance(value, list) else stored) == value


def test_values_are_stored_as_plain_and_immutable() -> None:
    stop, ids = ["a", "b"], np.array([3, 4])
    params = SamplingParams(
        temperature=np.float32(0.5), top_p=Fraction(1, 2), top_k=np.int64(7), max_tokens=np.int32(3), stop=stop,
        stop_token_ids=ids,  # type: ignore[arg-type]
    )  # fmt: skip
    stop.append("")
    ids[0] = -1
    assert params.stop_strings == ["a", "b"]
    assert params.stop_token_ids == (3, 4)
    kinds = [type(getattr(params, name)) for name in ("temperature", "top_p", "top_k", "max_tokens")]
    assert kinds == [float, float, int, int]
    assert all(type(token) is int for token in params.stop_token_ids)
    assert hash(params) == hash(SamplingParams(1, 3, 0, 0.5, 7, 0.5, stop=("a", "b"), stop_token_ids=(3, 4)))
    with pytest.raises(FrozenInstanceError):
        params.n = 2  # type: ignore[misc]


@pytest.mark.parametrize(("stop", "strings"), [(None, []), ([], []), ("ab", ["ab"]), (("b", "a"), ["b", "a"])])
def test_stop_strings(stop: Any, strings: list[str]) -> None:
    assert SamplingParams(stop=stop).stop_strings == strings


def test_min_tokens_must_not_exceed_max_tokens() -> None:
    with pytest.raises(RequestError, match=r"min_tokens \(4\) must not exceed max_tokens \(3\)"):
        SamplingParams(min_tokens=4, max_tokens=3)
    with pytest.raises(RequestError, match=r"min_tokens \(300\) must not exceed max_tokens \(256\)"):
        SamplingParams(min_tokens=300).resolved({})


def test_fields_of_later_issues_do_not_exist_yet() -> None:
    with pytest.raises(TypeError):
        SamplingParams(repetition_penalty=1.1)  # type: ignore[call-arg]


def test_greedy_where_nothing_is_given() -> None:
    params = SamplingParams().resolved({})
    assert (params.temperature, params.top_k, params.top_p, params.min_p, params.max_tokens) == (0.0, 0, 1.0, 0.0, 256)
    assert (params.seed, params.stop, params.logprobs, params.prompt_logprobs) == (None, None, None, None)


def test_the_caller_wins_over_the_package_over_greedy() -> None:
    package = {"temperature": 0.8, "top_k": 50, "max_tokens": None, "num_beams": 4, "top_p": 0.9}
    params = SamplingParams(top_k=0, top_p=1.0).resolved(package)
    assert (params.temperature, params.top_k, params.top_p, params.min_p, params.max_tokens) == (0.8, 0, 1.0, 0.0, 256)
    again = params.resolved({"temperature": 0.1, "max_tokens": 3})
    assert again == params  # resolved for good


def test_a_package_default_out_of_range_is_refused() -> None:
    with pytest.raises(RequestError, match="top_p"):
        SamplingParams().resolved({"top_p": 7.0})
