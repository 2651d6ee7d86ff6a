"""Sampling against transformers' warpers: the same kept tokens, the same distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from llmx.runtime import LlmxError, RequestError, SamplingParams
from llmx.runtime.sampling import choose, filtered, make_generator

SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
]


def reference(row: np.ndarray, options: dict[str, float]) -> np.ndarray:
    """Probabilities [vocab] after transformers' warpers, in `generate`'s order."""
    from transformers.generation import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = torch.tensor(row)[None]
    scores = TemperatureLogitsWarper(options["temperature"])(None, scores)
    if "top_k" in options:
        scores = TopKLogitsWarper(int(options["top_k"]))(None, scores)
    if "top_p" in options:
        scores = TopPLogitsWarper(options["top_p"])(None, scores)
    if "min_p" in options:
        scores = MinPLogitsWarper(options["min_p"])(None, scores)
    return torch.softmax(scores, -1)[0].numpy()


def kept(row: np.ndarray, options: dict[str, float]) -> np.ndarray:
    candidates = filtered(row, SamplingParams(**options).resolved({}))  # type: ignore[arg-type]
    weights = np.exp(candidates.logits - candidates.logits.max())
    full = np.zeros(len(row), np.float64)
    full[candidates.ids] = weights / weights.sum()
    return full


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([3, 50, 5000]),
    scale=st.floats(0.1, 12),
    temperature=st.floats(0.2, 2.0),
    top_k=st.one_of(st.none(), st.integers(1, 80)),
    top_p=st.one_of(st.none(), st.floats(0.05, 0.99)),
    min_p=st.one_of(st.none(), st.floats(0.01, 0.9)),
)
def test_kept_tokens_equal_transformers(
    seed: int, size: int, scale: float, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    row = (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    options = {name: value for name, value in given.items() if value is not None}
    np.testing.assert_allclose(kept(row, options), reference(row, options), atol=2e-5)


def test_ties_with_the_kth_are_kept() -> None:
    row = np.array([1.0, 3.0, 2.0, 2.0, 2.0, 0.0], np.float32)
    assert np.flatnonzero(kept(row, {"temperature": 1.0, "top_k": 2})).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("options", SETTINGS)
def test_distribution(options: dict[str, float]) -> None:
    row = (np.random.default_rng(3).standard_normal(60)).astype(np.float32)
    params = SamplingParams(**options).resolved({})  # type: ignore[arg-type]
    generator = make_generator(1234)
    draws = np.bincount([choose(row, params, generator).token for _ in range(20_000)], minlength=60)
    expected = reference(row, options).astype(np.float64)
    assert draws[expected == 0].sum() == 0
    likely = expected * 20_000 >= 5
    observed = np.append(draws[likely], draws[~likely].sum())
    wanted = np.append(expected[likely], expected[~likely].sum()) * 20_000
    if wanted[-1] < 1:
        observed, wanted = observed[:-1], wanted[:-1]
    assert stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 0.001


def test_large_vocabulary_top_p() -> None:
    row = (np.random.default_rng(0).standard_normal(128_000) * 3).astype(np.float32)
    for top_p in (0.1, 0.6, 0.95):
        np.testing.assert_allclose(kept(row, {"temperature": 1.0, "top_p": top_p}), reference(row, {"temperature": 1.0, "top_p": top_p}), atol=1e-6)


def test_greedy_takes_the_first_of_ties() -> None:
    params = SamplingParams(temperature=0.0).resolved({})
    assert choose(np.array([0, 5, 5, 1], np.float32), params, make_generator(0)).token == 1
    assert choose(np.array([0, 5, 5, 1], np.float16), params, make_generator(0)).token == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_impossible_logits_are_refused(temperature: float) -> None:
    params = SamplingParams(temperature=temperature).resolved({})
    for row in (np.full(4, -np.inf, np.float32), np.array([0, np.nan, 1], np.float32)):
        with pytest.raises(LlmxError, match="NaN or infinite"):
            choose(row, params, make_generator(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be a number from 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p must be a number above 0"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k must be a whole number"),
        ({"min_p": 2}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 2, "min_tokens": 3}, "min_tokens"),
        ({"n": 0}, "n must"),
        ({"seed": -1}, "seed"),
        ({"stop": ""}, "stop must"),
        ({"stop": ["a", 3]}, "stop must"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"logprobs": -1}, "logprobs"),
        ({"ignore_eos": 1}, "ignore_eos"),
    ],
)
def test_invalid_values_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**options)  # type: ignore[arg-type]


def test_defaults_come_from_the_caller_then_the_package_then_greedy() -> None:
    package = {"temperature": 0.8, "top_p": 0.9}
    assert SamplingParams().resolved({}).temperature == 0.0
    assert SamplingParams().resolved(package).temperature == 0.8
    assert SamplingParams(temperature=0.0).resolved(package).temperature == 0.0
    assert SamplingParams(max_tokens=3).resolved(package).max_tokens == 3
    assert SamplingParams().resolved({}).max_tokens == 256
