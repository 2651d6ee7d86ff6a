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
    ("min_tokens", [-1, 1.0, False, 2**31], "min_tokens must be a whole number from 0 to"),
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
    ("typical_p", [0.0, 1.1, NAN, True, "1"], "typical_p must be a number above 0, up to 1, and is"),
    ("epsilon_cutoff", [-0.1, 1.1, NAN, True], "epsilon_cutoff must be a number from 0 to 1, and is"),
    ("eta_cutoff", [-0.1, 1.1, NAN, "0"], "eta_cutoff must be a number from 0 to 1, and is"),
    ("top_n_sigma", [-1, 1001, NAN, INF, "1"], "top_n_sigma must be a number from 0 to 1000, and is"),
    ("repetition_penalty", [0, -1.0, 101, NAN, INF, True], "repetition_penalty must be a number above 0, up to 100"),
    ("presence_penalty", [-2.1, 2.1, NAN, True, "0"], "presence_penalty must be a number from -2 to 2, and is"),
    ("frequency_penalty", [-2.1, 2.1, NAN, [0]], "frequency_penalty must be a number from -2 to 2, and is"),
    ("no_repeat_ngram_size", [-1, 1.5, True, 2**31], "no_repeat_ngram_size must be a whole number from 0 to"),
    ("logit_bias", [5, "ab", [3], {1, 2}], "logit_bias must map token ids to numbers, and is"),
    ("logit_bias", [{-1: 0}, {"x": 1}, {1.5: 1}, {True: 1}], "each key of logit_bias must be a whole number from 0"),
    (
        "logit_bias",
        [{1: 101}, {1: -101}, {1: NAN}, {1: INF}, {1: "2"}, {1: None}],
        "each value of logit_bias must be a number from -100 to 100, and is",
    ),
    ("allowed_token_ids", [[-1], ["a"], [1.0]], "each of allowed_token_ids must be a whole number from 0"),
    ("allowed_token_ids", [[]], "allowed_token_ids must list at least one token id, or be left out"),
    ("allowed_token_ids", [7, "12", {1: 2}], "allowed_token_ids must be a list of token ids"),
    ("bad_words", ["word", 7, None, {"a": 1}], "bad_words must be a list of strings, and is"),
    ("bad_words", [[""], [" "], ["a", 3]], "each of bad_words must be a string that is not blank, and is"),
    ("bad_words_ids", [7, "1", {1: 2}], "bad_words_ids must be a list of lists of token ids, and is"),
    ("bad_words_ids", [[7], ["1"]], "each list of bad_words_ids must be a list of token ids, and is"),
    ("bad_words_ids", [[[]], [[1], []]], "each of bad_words_ids must list at least one token id"),
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
        {"typical_p": 1.0, "epsilon_cutoff": 0, "eta_cutoff": 0.99, "top_n_sigma": 0},
        {"repetition_penalty": 0.1, "presence_penalty": -2, "frequency_penalty": 2.0, "no_repeat_ngram_size": 0},
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
    assert hash(params) == hash(SamplingParams(1, 3, None, 0.5, 7, 0.5, stop=("a", "b"), stop_token_ids=(3, 4)))
    with pytest.raises(FrozenInstanceError):
        params.n = 2  # type: ignore[misc]


def test_lists_of_lists_and_mappings_are_stored_immutable() -> None:
    params = SamplingParams(
        logit_bias={"7": 1, np.int64(3): np.float32(-0.5)},  # type: ignore[dict-item]
        bad_words_ids=[[1, 2], np.array([3])],  # type: ignore[list-item]
        bad_words=["a", "b c"],
        allowed_token_ids=range(3),
    )
    assert params.logit_bias == ((3, -0.5), (7, 1.0))
    assert params.bad_words_ids == ((1, 2), (3,))
    assert (params.bad_words, params.allowed_token_ids) == (("a", "b c"), (0, 1, 2))
    assert params.resolved({}).logit_bias == params.logit_bias
    assert isinstance(hash(params), int)


@pytest.mark.parametrize(("stop", "strings"), [(None, []), ([], []), ("ab", ["ab"]), (("b", "a"), ["b", "a"])])
def test_stop_strings(stop: Any, strings: list[str]) -> None:
    assert SamplingParams(stop=stop).stop_strings == strings


def test_min_tokens_must_not_exceed_max_tokens() -> None:
    with pytest.raises(RequestError, match=r"min_tokens \(4\) must not exceed max_tokens \(3\)"):
        SamplingParams(min_tokens=4, max_tokens=3)
    with pytest.raises(RequestError, match=r"min_tokens \(300\) must not exceed max_tokens \(256\)"):
        SamplingParams(min_tokens=300).resolved({})


def test_greedy_where_nothing_is_given() -> None:
    params = SamplingParams().resolved({})
    assert (params.temperature, params.top_k, params.top_p, params.min_p, params.max_tokens) == (0.0, 0, 1.0, 0.0, 256)
    assert (params.seed, params.stop, params.logprobs, params.prompt_logprobs) == (None, None, None, None)


def test_the_caller_wins_over_the_package_over_greedy() -> None:
    package = {"temperature": 0.8, "top_k": 50, "max_tokens": None, "unknown": 4, "top_p": 0.9}
    params = SamplingParams(top_k=0, top_p=1.0).resolved(package)
    assert (params.temperature, params.top_k, params.top_p, params.min_p, params.max_tokens) == (0.8, 0, 1.0, 0.0, 256)
    again = params.resolved({"temperature": 0.1, "max_tokens": 3})
    assert again == params  # resolved for good


def test_a_package_default_out_of_range_is_refused() -> None:
    with pytest.raises(RequestError, match="top_p"):
        SamplingParams().resolved({"top_p": 7.0})


def test_default_beams_and_lengths() -> None:
    """A request's wish for samples goes before the package's beams, and a default length does not contradict a request."""
    beams = {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True, "min_tokens": 56, "temperature": 0.7}
    found = SamplingParams().resolved(beams)
    assert (found.num_beams, found.length_penalty, found.early_stopping, found.temperature) == (4, 2.0, True, 0.0)
    assert (found.min_tokens, SamplingParams(max_tokens=11).resolved(beams).min_tokens) == (56, 11)
    assert SamplingParams(n=4).resolved(beams).num_beams == 4
    for options in ({"temperature": 0.5}, {"n": 5}, {"num_beams": 1}):
        assert SamplingParams(**options).resolved(beams).num_beams == 1  # type: ignore[arg-type]
    assert SamplingParams(num_beams=2).resolved({"temperature": 0.7}).temperature == 0.0
