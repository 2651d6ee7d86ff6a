"""Sampling parameters, log-probabilities and perplexity of exported packages against transformers' `generate`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmx.export import ExportOptions, export_model
from llmx.runtime import LLM, RequestError, SamplingParams
from llmx.runtime.history import History
from llmx.runtime.sampling import distribution, draw, make_generator
from scipy import stats
from transformers.generation import LogitsProcessor
from zoo.models import VOCAB, make_model, save_checkpoint

ARCHITECTURES = ["llama", "gpt2", "bloom"]
NEW_TOKENS = 24


@pytest.fixture(scope="module", params=ARCHITECTURES)
def both(request: pytest.FixtureRequest, package: Callable[[str], Path]) -> Iterator[tuple[Any, LLM]]:
    """(the PyTorch model, its package)."""
    with LLM(package(request.param), slots=3, prefill_chunk=16) as llm:
        yield make_model(request.param), llm


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(4)
    return [rng.integers(1, VOCAB, size).tolist() for size in (7, 45, 23)]


def generate(model: Any, prompt: list[int], **options: Any) -> Any:
    """transformers' `generate`, nothing from the checkpoint's defaults."""
    from transformers import GenerationConfig

    processors = options.pop("logits_processor", None)
    fn = options.pop("prefix_allowed_tokens_fn", None)
    config = GenerationConfig(**{"max_new_tokens": NEW_TOKENS, "pad_token_id": 0, "eos_token_id": 0, **options})
    ids = torch.tensor([prompt])
    original, model.generation_config = model.generation_config, config
    try:
        with torch.no_grad():
            return model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config, logits_processor=processors,
                prefix_allowed_tokens_fn=fn,
            )  # fmt: skip
    finally:
        model.generation_config = original


def greedy(model: Any, prompt: list[int], **options: Any) -> list[int]:
    tokens: list[int] = generate(model, prompt, do_sample=False, **options)[0, len(prompt) :].tolist()
    return tokens


class OpenAIPenalties(LogitsProcessor):
    """The formula of OpenAI's API reference, over the output."""

    def __init__(self, prompt: int, frequency: float, presence: float) -> None:
        self.prompt, self.frequency, self.presence = prompt, frequency, presence

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(input_ids[0, self.prompt :], minlength=scores.shape[-1])
        return scores - self.frequency * counts - self.presence * (counts > 0)


def cases(plain: list[int], prompt: list[int]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(our options, transformers') of parameters that change the greedy output `plain`."""
    often = max(set(plain), key=plain.count)
    words = [[plain[0]], plain[1:3], [often], [prompt[-1], plain[1]], [0]]
    bias = {plain[0]: -3.0, plain[5]: 2.5, 7: 1.0}
    allowed = sorted({*plain[::2], *range(40, 90)})
    openai = [OpenAIPenalties(len(prompt), 0.8, -0.4)]
    return [
        ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
        ({"repetition_penalty": 0.8}, {"repetition_penalty": 0.8}),
        ({"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 1}),
        ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
        ({"bad_words_ids": words}, {"bad_words_ids": words}),
        ({"logit_bias": bias}, {"sequence_bias": [[[t], b] for t, b in bias.items()]}),
        (
            {"suppress_tokens": [plain[0], often], "begin_suppress_tokens": [plain[1], 5]},
            {"suppress_tokens": [plain[0], often], "begin_suppress_tokens": [plain[1], 5]},
        ),
        ({"begin_suppress_tokens": [plain[0]]}, {"begin_suppress_tokens": [plain[0]]}),
        ({"allowed_token_ids": allowed}, {"prefix_allowed_tokens_fn": lambda *_: allowed}),
        ({"stop_token_ids": [plain[4], often]}, {"eos_token_id": [0, plain[4], often]}),
        ({"stop_token_ids": [plain[4], often], "min_tokens": 9}, {"eos_token_id": [0, plain[4], often], "min_new_tokens": 9}),
        ({"frequency_penalty": 0.8, "presence_penalty": -0.4}, {"logits_processor": openai}),
        (
            {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "bad_words_ids": words, "logit_bias": bias},
            {
                "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "bad_words_ids": words,
                "sequence_bias": [[[t], b] for t, b in bias.items()],
            },
        ),
    ]  # fmt: skip


def test_greedy_with_every_parameter_equals_transformers(both: tuple[Any, LLM]) -> None:
    """All cases of all prompts in one go of the engine: ragged, each row with its own parameters."""
    model, llm = both
    wanted: list[tuple[list[int], dict[str, Any], list[int]]] = []
    changed = 0
    for prompt in prompts():
        plain = greedy(model, prompt)
        for ours, theirs in cases(plain, prompt):
            expected = greedy(model, prompt, **theirs)
            changed += expected != plain
            wanted.append((prompt, ours, expected))
    assert changed >= 0.6 * len(wanted)  # else the cases show nothing
    params = [SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, **ours) for _, ours, _ in wanted]
    outs = llm.generate([prompt for prompt, _, _ in wanted], params)
    for (_, ours, expected), out in zip(wanted, outs, strict=True):
        assert out.outputs[0].token_ids == expected, ours


SAMPLED: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.0, "top_k": 8},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.08},
    {"temperature": 1.2, "typical_p": 0.7},
    {"temperature": 1.0, "epsilon_cutoff": 0.02},
    {"temperature": 1.0, "eta_cutoff": 0.03},
    {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "typical_p": 0.95, "epsilon_cutoff": 0.003, "eta_cutoff": 0.01},
    {"temperature": 0.8, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "top_p": 0.95},
]


@pytest.mark.parametrize("options", SAMPLED, ids=lambda options: "-".join(options))
def test_sampling_has_transformers_distribution(both: tuple[Any, LLM], options: dict[str, Any]) -> None:
    """The distribution of the next token is that of `generate`; 20,000 draws of a fixed seed have it."""
    model, llm = both
    prompt = prompts()[2]
    neutral = {"top_k": 0, "top_p": 1.0}
    found = generate(
        model, prompt, do_sample=True, max_new_tokens=1, output_scores=True, return_dict_in_generate=True,
        **(neutral | options),
    )  # fmt: skip
    expected = torch.softmax(found.scores[0][0].double(), -1).numpy()
    params = SamplingParams(**options).resolved({})
    row = llm.backend.prefill(0, np.array(prompt), 0, np.array([len(prompt) - 1]))[0].copy()
    candidates = distribution(row, params, History(prompt))
    assert candidates.ids.tolist() == np.flatnonzero(expected).tolist()
    weights = np.exp(candidates.logits.astype(np.float64) - candidates.logits.max())
    np.testing.assert_allclose(weights / weights.sum(), expected[candidates.ids], atol=2e-5)
    generator = make_generator(99)
    drawn = np.bincount([draw(candidates, generator) for _ in range(20_000)], minlength=VOCAB)
    likely = expected * 20_000 >= 5
    observed, wanted = (
        np.append(drawn[likely], drawn[~likely].sum()),
        np.append(expected[likely], expected[~likely].sum()),
    )
    if wanted[-1] * 20_000 < 1:
        assert observed[-1] <= 5
        observed, wanted = observed[:-1], wanted[:-1]
    assert stats.chisquare(observed, wanted / wanted.sum() * observed.sum()).pvalue > 0.001


def test_an_engines_draws_have_the_distribution_too(package: Callable[[str], Path]) -> None:
    """Two tokens from `generate`, 20,000 times, against PyTorch's probabilities of the first and of the second given it."""
    model = make_model("llama")
    prompt, options = prompts()[0], {"temperature": 0.7, "top_k": 4}
    with LLM(package("llama"), slots=16) as llm:
        pairs: list[tuple[int, ...]] = []
        for seed in range(0, 20_000, 50):
            [out] = llm.generate([prompt], SamplingParams(n=50, seed=seed, max_tokens=2, ignore_eos=True, **options))
            pairs += [tuple(each.token_ids) for each in out.outputs]
    expected: dict[tuple[int, ...], float] = {}
    with torch.no_grad():
        for first, p in top(model, prompt).items():
            expected |= {(first, second): p * q for second, q in top(model, [*prompt, first]).items()}
    assert set(pairs) <= set(expected)
    counts = np.array([pairs.count(pair) for pair in expected])
    wanted = np.array(list(expected.values())) * len(pairs)
    assert len(pairs) == 20_000
    assert stats.chisquare(counts, wanted * counts.sum() / wanted.sum()).pvalue > 0.001


def top(model: Any, tokens: list[int]) -> dict[int, float]:
    """Temperature 0.7, the best four."""
    logits = model(torch.tensor([tokens])).logits[0, -1].double() / 0.7
    values, ids = logits.topk(4)
    return dict(zip(ids.tolist(), torch.softmax(values, -1).tolist(), strict=True))


def test_a_checkpoints_defaults_are_generates(tmp_path: Path) -> None:
    """generation_config.json's penalties and bans, without a word from the caller."""
    model = make_model("llama")
    prompt = prompts()[1]
    plain = greedy(model, prompt)
    folder = save_checkpoint(model, tmp_path / "checkpoint")
    config = {
        "repetition_penalty": 1.25, "no_repeat_ngram_size": 2, "bad_words_ids": [[plain[0]], plain[1:3]],
        "eos_token_id": 0, "pad_token_id": 0, "max_new_tokens": NEW_TOKENS,
    }  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(config))
    result = export_model(ExportOptions(str(folder), tmp_path / "out"))  # verified greedily, whatever the defaults
    expected = greedy(model, prompt, **config)
    with LLM(result.path, slots=1) as llm:
        assert llm.generate([prompt])[0].outputs[0].token_ids == expected != plain


# -- log-probabilities and perplexity ----------------------------------------------------------------------------------


def test_output_logprobs_are_the_models_own(both: tuple[Any, LLM]) -> None:
    """Before temperature, filters and penalties, as vLLM's `raw_logprobs`."""
    model, llm = both
    prompt = prompts()[0]
    params = SamplingParams(
        max_tokens=12, temperature=1.7, seed=3, top_k=40, repetition_penalty=1.5, logprobs=3, prompt_logprobs=2, ignore_eos=True
    )  # fmt: skip
    out = llm.generate([prompt], params)[0]
    result = out.outputs[0]
    with torch.no_grad():
        reference = torch.log_softmax(model(torch.tensor([prompt + result.token_ids])).logits[0], -1).numpy()
    assert out.prompt_logprobs is not None and result.logprobs is not None
    positions = [(at, out.prompt_logprobs[at + 1], prompt[at + 1], 2) for at in range(len(prompt) - 1)]
    start = len(prompt) - 1
    positions += [(start + n, result.logprobs[n], token, 3) for n, token in enumerate(result.token_ids)]
    for at, entry, token, count in positions:
        assert entry is not None
        best = np.argsort(-reference[at], kind="stable")[:count].tolist()
        assert set(entry) == {token, *best}
        assert [entry[t].rank for t in best] == list(range(1, count + 1))
        np.testing.assert_allclose([e.logprob for e in entry.values()], reference[at][list(entry)], atol=1e-4)
    assert result.cumulative_logprob == pytest.approx(
        sum(reference[start + n, t] for n, t in enumerate(result.token_ids)), abs=1e-3
    )


def sliding_window(model: Any, ids: list[int], max_length: int, stride: int, weigh: bool) -> float:
    """The loop of transformers' "Perplexity of fixed-length models"; `weigh`: as its page weighs the windows, else by the
    tokens that each scored.
    """
    total, count, before = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        piece = torch.tensor([ids[begin:end]])
        target = piece.clone()
        target[:, : -(end - before)] = -100
        scored = int((target[:, 1:] != -100).sum())
        with torch.no_grad():
            loss = float(model(piece, labels=target).loss) if scored else 0.0
        weight = int((target != -100).sum()) - 1 if weigh else scored
        total, count, before = total + loss * weight, count + weight, end
        if end == len(ids):
            break
    return math.exp(total / count)


@pytest.mark.parametrize(("length", "stride"), [(64, 32), (50, 7), (40, 40), (33, 4), (400, 100)])
def test_perplexity_equals_pytorchs_sliding_window(both: tuple[Any, LLM], length: int, stride: int) -> None:
    model, llm = both
    ids = np.random.default_rng(1).integers(1, VOCAB, 130).tolist()
    found = llm.perplexity(ids, stride=stride, max_length=length)
    assert found.perplexity == pytest.approx(sliding_window(model, ids, length, stride, False), rel=1e-4)
    if stride == length:  # without overlap the page's weights are the tokens scored
        assert found.perplexity == pytest.approx(sliding_window(model, ids, length, stride, True), rel=1e-4)
        assert found.num_tokens == 130 - math.ceil(130 / length)
    else:
        assert found.num_tokens == 129
    if length >= 130:
        assert found.mean_nll == pytest.approx(-np.mean(llm.score([ids])[0]), rel=1e-6)


def test_perplexity_refuses(both: tuple[Any, LLM]) -> None:
    _, llm = both
    text = [1, 2, 3, 4]
    for options, message in [
        ({"max_length": 1}, "max_length must lie between 2 and"),
        ({"max_length": llm.max_length + 1}, "max_length must lie between 2 and"),
        ({"stride": 0}, "stride must lie between 1 and"),
        ({"max_length": 8, "stride": 9}, "stride must lie between 1 and the window's 8 tokens, and is 9"),
    ]:
        with pytest.raises(RequestError, match=message):
            llm.perplexity(text, **options)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="one token, and perplexity needs two"):
        llm.perplexity([5])
