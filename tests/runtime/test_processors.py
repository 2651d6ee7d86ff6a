"""Penalties, bans and biases against transformers' processors, and the filters that only transformers has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmx.runtime import LlmxError, RequestError, SamplingParams, filters
from llmx.runtime.filters import all_of
from llmx.runtime.history import History
from llmx.runtime.manifest import Seq2SeqInfo, TokenizerInfo
from llmx.runtime.processors import processed
from llmx.runtime.rules import make_rules
from llmx.runtime.sampling import choose, distribution, make_generator, needs_full_row
from llmx.runtime.tokenizer import Tokenizer
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers
from transformers.generation import logits_process as hf

VOCAB = 40


def tokenizer(eos: list[int] | None = None) -> Tokenizer:
    """Words w0 … w39, split at spaces."""
    raw = RawTokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(raw, TokenizerInfo(eos_token_ids=eos or []))


def history_of(
    params: SamplingParams, prompt: list[int], output: list[int], eos: list[int] | None = None, vocab: int = VOCAB
) -> History:
    history = History(prompt, make_rules(params, tokenizer(eos), vocab))
    for token in output:
        history.append(token)
    return history


def hf_processed(row: np.ndarray, options: dict[str, Any], tokens: list[int], eos: list[int]) -> np.ndarray:
    """transformers' scores, its processors in `generate`'s order."""
    chain: list[Any] = []
    if options.get("logit_bias"):
        chain.append(hf.SequenceBiasLogitsProcessor([[[t], b] for t, b in options["logit_bias"].items()]))
    if "repetition_penalty" in options:
        chain.append(hf.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if options.get("no_repeat_ngram_size"):
        chain.append(hf.NoRepeatNGramLogitsProcessor(options["no_repeat_ngram_size"]))
    if options.get("bad_words_ids"):
        chain.append(hf.NoBadWordsLogitsProcessor(options["bad_words_ids"], eos))
    scores = torch.tensor(row)[None]
    for step in chain:
        scores = step(torch.tensor([tokens]), scores)
    return scores[0].numpy()


TOKENS = st.integers(0, 9)  # few, so that they repeat


@settings(max_examples=250, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    prompt=st.lists(TOKENS, min_size=1, max_size=15),
    output=st.lists(TOKENS, max_size=25),
    repetition=st.one_of(st.none(), st.floats(0.3, 3.0)),
    size=st.integers(0, 4),
    bias=st.dictionaries(TOKENS, st.floats(-100, 100), max_size=4),
    words=st.lists(st.lists(TOKENS, min_size=1, max_size=3), max_size=5, unique_by=tuple),
)
def test_processors_equal_transformers(
    seed: int,
    prompt: list[int],
    output: list[int],
    repetition: float | None,
    size: int,
    bias: dict[int, float],
    words: list[list[int]],
) -> None:
    row = (np.random.default_rng(seed).standard_normal(VOCAB) * 5).astype(np.float32)
    options: dict[str, Any] = {"no_repeat_ngram_size": size, "logit_bias": bias, "bad_words_ids": words}
    options |= {} if repetition is None else {"repetition_penalty": repetition}
    params = SamplingParams(**options).resolved({})
    before = row.copy()
    got = processed(row, params, history_of(params, prompt, output, [3, 4]))
    np.testing.assert_allclose(got, hf_processed(row, options, prompt + output, [3, 4]), rtol=1e-6, atol=1e-6)
    assert (row == before).all()


@settings(max_examples=100, deadline=None)
@given(
    prompt=st.lists(TOKENS, max_size=9),
    output=st.lists(TOKENS, max_size=25),
    repetition=st.floats(0.3, 3.0),
    frequency=st.floats(-2, 2),
    presence=st.floats(-2, 2),
)
def test_penalties_equal_vllms_formula(
    prompt: list[int], output: list[int], repetition: float, frequency: float, presence: float
) -> None:
    row = (np.random.default_rng(1).standard_normal(VOCAB) * 5).astype(np.float32)
    want = torch.tensor(row)
    seen = torch.zeros(VOCAB, dtype=torch.bool)
    seen[torch.tensor([*prompt, *output], dtype=torch.int64)] = True
    counts = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=VOCAB)
    want = torch.where(seen, torch.where(want > 0, want / repetition, want * repetition), want)
    want = want - frequency * counts - presence * (counts > 0)
    params = SamplingParams(
        repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence
    ).resolved({})
    got = processed(row, params, history_of(params, prompt, output))
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=1e-5)


def test_one_row_by_hand() -> None:
    row = np.array([2.0, -2.0, 1.0, 0.5, 0.0], np.float32)
    options = {"repetition_penalty": 2.0, "frequency_penalty": 0.5, "presence_penalty": 0.25, "logit_bias": {3: 1.5}}
    params = SamplingParams(**options).resolved({})  # type: ignore[arg-type]
    got = processed(row, params, history_of(params, [0], [1, 1, 3]))
    assert got.tolist() == [1.0, -2 * 2 - 0.5 * 2 - 0.25, 1.0, 2.0 / 2 - 0.5 - 0.25, 0.0]


# -- filters -----------------------------------------------------------------------------------------------------------

FILTERS: list[tuple[str, Any]] = [
    ("typical_p", lambda value: hf.TypicalLogitsWarper(value)),
    ("epsilon_cutoff", lambda value: hf.EpsilonLogitsWarper(value)),
    ("eta_cutoff", lambda value: hf.EtaLogitsWarper(value)),
]


@pytest.mark.parametrize(("name", "warper"), FILTERS, ids=[name for name, _ in FILTERS])
@pytest.mark.parametrize("size", [2, 37, 3000])
def test_filters_keep_what_transformers_keeps(name: str, warper: Any, size: int) -> None:
    generator = np.random.default_rng(size)
    for _ in range(60):
        row = (generator.standard_normal(size) * generator.uniform(0.2, 6)).astype(np.float32)
        value = float(generator.uniform(0.02, 0.98) if name == "typical_p" else 10 ** generator.uniform(-4.5, -0.1))
        temperature = float(generator.choice([0.5, 1.0, 1.7]))
        top_k = int(generator.integers(1, size + 1)) if generator.random() < 0.5 else 0
        scores = hf.TemperatureLogitsWarper(temperature)(None, torch.tensor(row)[None])
        scores = hf.TopKLogitsWarper(top_k)(None, scores) if top_k else scores
        expected = torch.isfinite(warper(value)(None, scores)[0]).nonzero()[:, 0].tolist()
        params = SamplingParams(temperature=temperature, top_k=top_k, **{name: value}).resolved({})  # type: ignore[arg-type]
        assert filters.filtered(all_of(row), params).ids.tolist() == expected, (value, temperature, top_k)


def test_all_filters_together_equal_transformers_chain() -> None:
    generator = np.random.default_rng(8)
    for _ in range(100):
        row = (generator.standard_normal(200) * 2).astype(np.float32)
        row[generator.integers(0, 200, 20)] = -np.inf
        chain = [
            hf.TemperatureLogitsWarper(1.3), hf.MinPLogitsWarper(0.01), hf.TopKLogitsWarper(80),
            hf.TopPLogitsWarper(0.97), hf.TypicalLogitsWarper(0.9), hf.EpsilonLogitsWarper(0.004),
            hf.EtaLogitsWarper(0.01),
        ]  # fmt: skip
        scores = torch.tensor(row)[None]
        for step in chain:
            scores = step(None, scores)
        params = SamplingParams(
            temperature=1.3, min_p=0.01, top_k=80, top_p=0.97, typical_p=0.9, epsilon_cutoff=0.004, eta_cutoff=0.01
        ).resolved({})
        got = filters.filtered(all_of(row), params)
        assert got.ids.tolist() == torch.isfinite(scores[0]).nonzero()[:, 0].tolist()
        np.testing.assert_allclose(got.logits, scores[0][got.ids].numpy(), rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_top_n_sigma_is_the_papers_at_every_temperature(temperature: float) -> None:
    generator = np.random.default_rng(2)
    for n in (0.3, 1.0, 2.2):
        row = (generator.standard_normal(500) * 3).astype(np.float32)
        row[:50] = -np.inf  # impossible tokens do not count
        kept = row >= row.max() - n * row[50:].std(dtype=np.float64)
        params = SamplingParams(temperature=temperature, top_n_sigma=n).resolved({})
        assert filters.filtered(all_of(row), params).ids.tolist() == np.flatnonzero(kept).tolist()


# -- rules -------------------------------------------------------------------------------------------------------------


def test_allowed_token_ids_alone_may_come() -> None:
    row = np.arange(VOCAB, dtype=np.float32)
    params = SamplingParams(allowed_token_ids=[7, 3, 7]).resolved({})
    assert choose(row, params, make_generator(0), history_of(params, [1], [])).token == 7
    hot = SamplingParams(allowed_token_ids=[7, 3, 7], temperature=50.0).resolved({})
    history, generator = history_of(hot, [1], []), make_generator(0)
    assert {choose(row, hot, generator, history).token for _ in range(60)} == {3, 7}
    got = distribution(row, hot, history)
    assert got.ids.tolist() == [3, 7]
    np.testing.assert_allclose(got.logits, row[[3, 7]] / 50)


def test_bad_words_in_vllms_sense() -> None:
    row = np.zeros(VOCAB, np.float32)
    params = SamplingParams(bad_words=["w5", "w6 w7", " w8"]).resolved({})

    def out(prompt: list[int], output: list[int]) -> list[int]:
        return np.flatnonzero(np.isinf(processed(row, params, history_of(params, prompt, output)))).tolist()

    assert out([1], []) == [5, 8]
    assert out([1], [6]) == [5, 7, 8]
    assert out([6], []) == [5, 8]  # the prompt does not begin a bad word
    assert out([6], [6]) == [5, 7, 8]
    assert out([1], [6, 9]) == [5, 8]


def test_a_bad_word_is_spelled_with_and_without_a_space() -> None:
    raw = RawTokenizer(models.BPE({"a": 0, "b": 1, "Ġ": 2, "Ġa": 3}, [("Ġ", "a")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = Tokenizer(raw, TokenizerInfo())

    def spelled(*texts: str) -> tuple[list[int], list[tuple[int, ...]]]:
        rules = make_rules(SamplingParams(bad_words=texts), words, 4)
        return list(rules.suppressed), [word.ids for word in rules.bad_words]

    assert spelled("a") == ([0, 3], [])
    assert spelled("ab") == ([], [(0, 1), (3, 1)])
    assert spelled("b") == ([1], [])  # " b" is two tokens, which vLLM leaves alone


def test_min_tokens_mask_the_ends() -> None:
    row = np.zeros(VOCAB, np.float32)
    params = SamplingParams(min_tokens=2, stop_token_ids=[9], ignore_eos=True).resolved({})
    for count, masked in ((0, [3, 9]), (1, [3, 9]), (2, [])):
        history = history_of(params, [1], [5] * count, [3])
        assert np.flatnonzero(np.isinf(processed(row, params, history))).tolist() == masked


def test_an_encoder_decoders_rules() -> None:
    info = Seq2SeqInfo(
        max_source_length=9, source_vocab_size=VOCAB, decoder_prompt=[0], suppress_tokens=[4, 99],
        begin_suppress_tokens=[5], forced_eos_token_id=6, audio=None,
    )  # fmt: skip
    row, params = np.zeros(VOCAB, np.float32), SamplingParams(max_tokens=3).resolved({})
    rules = make_rules(params, tokenizer(), VOCAB, info)
    history = History([0], rules)
    assert np.flatnonzero(np.isinf(processed(row, params, history))).tolist() == [4, 5]
    history.append(1)
    assert np.flatnonzero(np.isinf(processed(row, params, history))).tolist() == [4]
    history.append(1)
    assert choose(row, params, make_generator(0), history).token == 6
    free = SamplingParams(max_tokens=3, ignore_eos=True).resolved({})
    assert make_rules(free, tokenizer(), VOCAB, info).forced_last is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_token_ids": [VOCAB]}, "stop_token_ids must lie between 0 and 39"),
        ({"allowed_token_ids": [2, VOCAB]}, "allowed_token_ids must lie between 0 and 39"),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias must lie between 0 and 39"),
        ({"bad_words_ids": [[1, VOCAB]]}, "bad_words_ids must lie between 0 and 39"),
    ],
)
def test_tokens_beyond_the_vocabulary_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make_rules(SamplingParams(**options), tokenizer(), VOCAB)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rules_that_leave_no_token_fail_in_one_sentence(temperature: float) -> None:
    row = np.zeros(VOCAB, np.float32)
    params = SamplingParams(temperature=temperature, allowed_token_ids=[4], no_repeat_ngram_size=1).resolved({})
    with pytest.raises(RequestError, match="No token is left to choose: all are masked by allowed_token_ids"):
        choose(row, params, make_generator(0), history_of(params, [4], []))
    with pytest.raises(LlmxError, match="NaN"):
        choose(np.full(VOCAB, np.nan, np.float32), params, make_generator(0), history_of(params, [1], []))


def test_what_needs_the_full_row() -> None:
    light = [{}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1}, {"seed": 3, "logprobs": 2, "stop": "x"}]
    heavy: list[dict[str, Any]] = [
        {"typical_p": 0.9}, {"epsilon_cutoff": 0.1}, {"eta_cutoff": 0.1}, {"top_n_sigma": 1.0},
        {"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": -0.1}, {"bad_words": ["w1"]},
        {"no_repeat_ngram_size": 2}, {"logit_bias": {1: 2}}, {"allowed_token_ids": [1]}, {"bad_words_ids": [[1]]},
    ]  # fmt: skip
    for options, wanted in [(o, False) for o in light] + [(o, True) for o in heavy]:
        params = SamplingParams(**options).resolved({})
        assert needs_full_row(params) == wanted, options
        assert needs_full_row(params, history_of(params, [1], [])) == wanted, options
    early = SamplingParams(min_tokens=1).resolved({})
    assert not needs_full_row(early)
    assert needs_full_row(early, history_of(early, [1], []))
    assert not needs_full_row(early, history_of(early, [1], [2]))
