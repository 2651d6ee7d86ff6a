"""Sampling against transformers' warpers: the same kept tokens, the same distribution."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmx.runtime import LlmxError, RequestError, SamplingParams, filters
from llmx.runtime.filters import Candidates, all_of, keep_top_p
from llmx.runtime.history import History
from llmx.runtime.rules import Rules
from llmx.runtime.sampling import Choice, choose, draw, make_generator, sample
from scipy import stats


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.sampled_from([2049, 5000, 20_000]),
    scale=st.sampled_from([0.0, 1e-4, 0.5, 3.0, 40.0]),
    rounded=st.booleans(),
    mass=st.floats(0.01, 1.0),
)
def test_large_rows_sort_no_more_than_needed(seed: int, size: int, scale: float, rounded: bool, mass: float) -> None:
    """Typical-p over a whole vocabulary, with flat rows, peaks and ties: as sorting it all."""
    rng = np.random.default_rng(seed)
    row = (rng.standard_normal(size) * scale).astype(np.float32)
    row = np.round(row) if rounded else row
    probs = filters.probabilities(row)
    distance = np.abs(rng.permutation(row) - np.float32(0.3))
    order = np.argsort(distance, kind="stable")
    sums = np.cumsum(probs[order], dtype=np.float64).astype(np.float32)
    below = int(np.count_nonzero(sums < np.float32(mass)))
    expected = distance[order[min(below, size - 1)]]
    found = filters._reaching(distance, probs, mass)
    # where the sum comes within its own rounding of the mass, the next one is as good
    near = np.flatnonzero(np.abs(sums.astype(np.float64) - mass) < 1e-7)
    assert found == expected or found in distance[order[np.clip([*near, *(near + 1)], 0, size - 1)]]


SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
]


def warped(row: np.ndarray, options: dict[str, float]) -> torch.Tensor:
    """Scores [1, vocab] after transformers' warpers, in vLLM's order."""
    from transformers.generation import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = torch.tensor(row)[None]
    scores = TemperatureLogitsWarper(options["temperature"])(None, scores)
    if "min_p" in options:
        scores = MinPLogitsWarper(options["min_p"])(None, scores)
    if "top_k" in options:
        scores = TopKLogitsWarper(int(options["top_k"]))(None, scores)
    if "top_p" in options:
        scores = TopPLogitsWarper(options["top_p"])(None, scores)
    return scores


def reference(row: np.ndarray, options: dict[str, float]) -> np.ndarray:
    """Probabilities [vocab] of `warped`."""
    return torch.softmax(warped(row, options), -1)[0].numpy()


def filtered(row: np.ndarray, params: SamplingParams) -> Candidates:
    return filters.filtered(all_of(row), params)


def banning(*tokens: int) -> History:
    return History((), Rules(suppressed=tokens))


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
        np.testing.assert_allclose(
            kept(row, {"temperature": 1.0, "top_p": top_p}),
            reference(row, {"temperature": 1.0, "top_p": top_p}),
            atol=1e-6,
        )


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


# -- kept sets, exactly ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 37, 3000])
@pytest.mark.parametrize("seed", range(4))
def test_kept_sets_are_exactly_those_of_transformers(size: int, seed: int) -> None:
    generator = np.random.default_rng([seed, size])
    for _ in range(25):
        row = (generator.standard_normal(size) * generator.uniform(0.2, 8)).astype(np.float32)
        options = {"temperature": float(generator.choice([0.3, 0.7, 1.0, 1.9]))}
        options |= {"top_k": int(generator.integers(1, size + 5))} if generator.random() < 0.5 else {}
        options |= {"top_p": float(generator.uniform(0.01, 0.995))} if generator.random() < 0.6 else {}
        options |= {"min_p": float(generator.uniform(0.001, 0.9))} if generator.random() < 0.5 else {}
        candidates = filtered(row, SamplingParams(**options).resolved({}))  # type: ignore[arg-type]
        assert candidates.ids.tolist() == torch.isfinite(warped(row, options)[0]).nonzero()[:, 0].tolist(), options


@pytest.mark.parametrize("count", [3, 7, 10, 64])
def test_top_p_of_equal_logits_keeps_as_many_as_transformers(count: int) -> None:
    row = np.full(count, 0.25, np.float32)
    for step in range(1, 20):
        options = {"temperature": 1.0, "top_p": step / 20}
        candidates = filtered(row, SamplingParams(**options).resolved({}))  # type: ignore[arg-type]
        assert len(candidates.ids) == np.count_nonzero(reference(row, options)), options
        assert candidates.ids.tolist() == list(range(len(candidates.ids)))  # of equals the lower ids


@pytest.mark.parametrize("scale", [0.05, 1.0, 3.0, 9.0])
def test_top_p_without_sorting_everything_equals_sorting_everything(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(5)
    rows = [(generator.standard_normal(20_000) * scale).astype(np.float32) for _ in range(3)]
    rows.append(np.round(rows[0], 1))  # ties, also at the border of the head
    whole = [Candidates(np.arange(len(row)), row) for row in rows]
    shares = (1e-6, 0.2, 0.5, 0.9, 0.99, 0.99999)
    quick = [keep_top_p(c, p).ids.tolist() for c in whole for p in shares]
    monkeypatch.setattr(filters, "_FIRST_CUT", 10**9)
    assert quick == [keep_top_p(c, p).ids.tolist() for c in whole for p in shares]


def test_impossible_tokens_stay_impossible() -> None:
    row = np.full(3000, -np.inf, np.float32)
    row[[7, 2999]] = [1.0, 2.0]
    for options in ({"top_k": 5}, {"top_p": 0.9999}, {"min_p": 0.0001}, {"top_k": 2, "top_p": 0.99}):
        params = SamplingParams(temperature=1.0, **options).resolved({})  # type: ignore[arg-type]
        generator = make_generator(1)
        assert {choose(row, params, generator).token for _ in range(50)} == {7, 2999}


@pytest.mark.parametrize("temperature", [1e-50, 1e-42, 1e-20, 1e-3])
def test_a_temperature_close_to_zero_leaves_the_most_likely_tokens(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_p=0.9).resolved({})
    generator = make_generator(2)
    for shift in (30.0, -30.0):
        row = np.array([1, 5, 4, 5, -np.inf], np.float32) + np.float32(shift)
        assert {choose(row, params, generator).token for _ in range(60)} == {1, 3}


# -- drawing -----------------------------------------------------------------------------------------------------------


class Fixed:
    """A generator whose next number is known."""

    def __init__(self, number: float) -> None:
        self.number = number

    def random(self) -> float:
        return self.number


@pytest.mark.parametrize("size", [1, 5, 1024, 1025, 5000])
def test_a_draw_inverts_the_cumulative_distribution(size: int) -> None:
    generator = np.random.default_rng(size)
    logits = (generator.standard_normal(size) * 2).astype(np.float32)
    logits[generator.random(size) < 0.4] = -np.inf
    logits[generator.integers(size)] = 0.0
    candidates = Candidates(np.arange(size) * 3, logits)
    cumulative = np.cumsum(np.exp((logits - logits.max()).astype(np.float64)))
    for number in [*generator.random(200), 0.0, 1 - 2**-53]:
        token = draw(candidates, Fixed(number))  # type: ignore[arg-type]
        assert token % 3 == 0
        place, wanted = token // 3, number * cumulative[-1]
        assert np.isfinite(logits[place])
        slack = 1e-5 * cumulative[-1]  # float32 exponentials
        assert cumulative[place] >= wanted - slack
        assert place == 0 or cumulative[place - 1] <= wanted + slack


def test_distribution_over_a_large_vocabulary() -> None:
    row = (np.random.default_rng(8).standard_normal(30_000) * 1.5).astype(np.float32)
    params, generator = SamplingParams(temperature=1.2).resolved({}), make_generator(77)
    draws = np.array([choose(row, params, generator).token for _ in range(20_000)])
    order = np.random.default_rng(0).integers(0, 50, len(row))  # 50 bins of tokens from everywhere
    expected = np.bincount(order, weights=reference(row, {"temperature": 1.2}).astype(np.float64), minlength=50)
    observed = np.bincount(order[draws], minlength=50)
    assert stats.chisquare(observed, expected / expected.sum() * 20_000).pvalue > 0.001
    edges = np.linspace(0, len(row), 41).astype(int)  # and 40 bins of neighbours
    expected = np.add.reduceat(reference(row, {"temperature": 1.2}).astype(np.float64), edges[:-1])
    observed = np.histogram(draws, edges)[0]
    assert stats.chisquare(observed, expected / expected.sum() * 20_000).pvalue > 0.001


# -- batches -----------------------------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "logprobs": 0},
    {"temperature": 0.7, "top_k": 40, "logprobs": 5},
    {"temperature": 1.4, "top_p": 0.8},
    {"temperature": 0.9, "top_p": 0.999, "min_p": 0.01, "logprobs": 3},
    {"temperature": 1.1, "top_k": 500, "top_p": 0.6},
    {"temperature": 0.0, "logprobs": 2},
]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("order", ["C", "F"])
def test_batched_equals_single_bit_for_bit(dtype: type, order: Any) -> None:
    params = [SamplingParams(**options).resolved({}) for options in ROWS]
    logits = np.asarray((np.random.default_rng(1).standard_normal((7, 5000)) * 3).astype(dtype), order=order)
    masked = [None, banning(3), None, banning(1, 2), None, None, banning(int(logits[6].astype(np.float32).argmax()))]

    def steps(members: list[int]) -> dict[int, list[Choice]]:
        """Five steps of a batch of some of the rows, each with its own generator."""
        generators = [make_generator(100 + row) for row in members]
        chosen: dict[int, list[Choice]] = {row: [] for row in members}
        for step in range(5):
            now = np.roll(logits, step, axis=1)[members]
            tokens, choices = sample(now, [params[r] for r in members], generators, [masked[r] for r in members])
            assert tokens.dtype == np.int64
            assert tokens.tolist() == [choice.token for choice in choices]
            for row, choice in zip(members, choices, strict=True):
                chosen[row].append(choice)
        return chosen

    together = steps(list(range(7)))
    backwards = steps([6, 5, 4, 3, 2, 1, 0])
    for row in range(7):
        assert steps([row])[row] == together[row] == backwards[row]  # floats compared exactly


def test_seeds_repeat_and_differ() -> None:
    row = np.zeros(1000, np.float32)
    params = SamplingParams(temperature=1.0).resolved({})

    def tokens(seed: int | None) -> list[int]:
        generator = make_generator(seed)
        return [choose(row, params, generator).token for _ in range(20)]

    assert tokens(7) == tokens(7)
    assert len({tuple(tokens(seed)) for seed in (0, 1, 7, 2**64 - 1, None, None)}) == 6


def test_greedy_draws_nothing_and_sampling_draws_one_number() -> None:
    row = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    generator, untouched = make_generator(5), make_generator(5)
    choose(row, SamplingParams(temperature=0.0).resolved({}), generator)
    for options in ROWS[1:5]:
        choose(row, SamplingParams(**options).resolved({}), generator)
        untouched.random()
    assert generator.random() == untouched.random()


def test_greedy_ties_as_torch() -> None:
    generator = np.random.default_rng(3)
    params = SamplingParams(temperature=0.0).resolved({})
    for size in (5, 100, 40_000):
        row = generator.integers(0, 4, size).astype(np.float32)
        assert choose(row, params, make_generator(0)).token == int(torch.tensor(row).argmax())


def test_the_bad_row_of_a_batch_is_named() -> None:
    logits = np.zeros((3, 8), np.float32)
    params, generators = [SamplingParams(temperature=1.0).resolved({})] * 3, [make_generator(0)] * 3
    for bad in (np.nan, np.inf):
        logits[2, 5] = bad
        with pytest.raises(LlmxError, match="^Row 2 of the batch: The model returned NaN or infinite"):
            sample(logits, params, generators)
    logits[2] = -np.inf
    with pytest.raises(LlmxError, match="^Row 2 of the batch"):
        sample(logits, params, generators)
    with pytest.raises(LlmxError, match="masked"):
        choose(np.zeros(2, np.float32), params[0], generators[0], banning(0, 1))


# -- log-probabilities -------------------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_unmodified_logits() -> None:
    row = (np.random.default_rng(4).standard_normal(3000) * 4).astype(np.float32)
    expected = torch.log_softmax(torch.tensor(row, dtype=torch.float64), -1).numpy()
    params = SamplingParams(temperature=1.8, top_k=200, min_p=0.001, logprobs=6).resolved({})
    generator = make_generator(9)
    for _ in range(30):
        choice = choose(row, params, generator)
        assert choice.logprob == pytest.approx(expected[choice.token], abs=2e-6)
        assert choice.rank == 1 + (row > row[choice.token]).sum()
        assert choice.top is not None
        assert [token for token, _ in choice.top] == np.argsort(-row)[:6].tolist()
        np.testing.assert_allclose([p for _, p in choice.top], expected[np.argsort(-row)[:6]], atol=2e-6)


def test_logprobs_on_request_alone_and_of_masked_tokens() -> None:
    row = np.array([3.0, 1.0, 3.0, 2.0], np.float32)
    greedy = SamplingParams(temperature=0.0).resolved({})
    assert choose(row, greedy, make_generator(0)) == Choice(0)
    choice = choose(row, SamplingParams(temperature=0.0, logprobs=3).resolved({}), make_generator(0), banning(0, 2))
    assert (choice.token, choice.rank) == (3, 3)
    assert choice.top is not None
    assert [token for token, _ in choice.top] == [0, 2, 3]  # the model's own order, the lower id first among equals
    assert choose(row, SamplingParams(temperature=0.0, logprobs=0).resolved({}), make_generator(0)).top == []
    many = choose(row, SamplingParams(temperature=0.0, logprobs=1000).resolved({}), make_generator(0)).top
    assert many is not None
    assert len(many) == 4
    assert sum(np.exp(p) for _, p in many) == pytest.approx(1.0)
