"""Exported packages against transformers: greedy tokens, ragged batches, chunked prefill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from llmx.runtime import LLM, SamplingParams
from zoo.models import CARRIED, CORE, KINDS, ROPES, TINY, VOCAB, greedy, make_model

NEW_TOKENS = 48
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
OTHERS = [name for name in TINY if name not in CORE + KINDS + CARRIED + ROPES]


def random_prompts(seed: int) -> list[list[int]]:
    """Ragged lengths; the longest exceeds every tiny model's sliding window (24) and original length (32), one is
    shorter than both and grows past them.
    """
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCAB, size).tolist() for size in (7, 61, 23)]


@pytest.mark.parametrize(
    "name", CORE + KINDS + CARRIED + ROPES + [pytest.param(name, marks=pytest.mark.slow) for name in OTHERS]
)
def test_greedy_equals_transformers(name: str, package: Callable[[str], Path]) -> None:
    model = make_model(name)
    prompts = random_prompts(1)
    expected = [greedy(model, prompt, NEW_TOKENS) for prompt in prompts]
    with LLM(package(name), slots=3, prefill_chunk=16) as llm:
        single = [llm.generate(prompt, GREEDY)[0].outputs[0].token_ids for prompt in prompts]
        batch = [out.outputs[0].token_ids for out in llm.generate(prompts, GREEDY)]
    assert single == expected
    assert batch == expected


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_chunked_prefill_equals_whole(name: str, package: Callable[[str], Path]) -> None:
    prompt = random_prompts(2)[1]
    logits = []
    for chunk in (1, 7, 64):
        with LLM(package(name), slots=1) as llm:
            for start in range(0, len(prompt), chunk):
                piece = np.array(prompt[start : start + chunk])
                got = llm.backend.prefill(0, piece, start, np.array([len(piece) - 1]))[0].copy()
            logits.append(got)
    np.testing.assert_allclose(logits[0], logits[2], atol=2e-5)
    np.testing.assert_allclose(logits[1], logits[2], atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_logits_of_every_position(name: str, package: Callable[[str], Path]) -> None:
    prompt = random_prompts(3)[1]
    with torch.no_grad():
        expected = make_model(name)(torch.tensor([prompt])).logits[0].numpy()
    with LLM(package(name), slots=1) as llm:
        got = llm.backend.prefill(0, np.array(prompt), 0, np.arange(len(prompt)))
        np.testing.assert_allclose(got, expected, atol=1e-4)
        scores = llm.score([prompt])[0]
    reference = torch.log_softmax(torch.tensor(expected), -1)
    want = [float(reference[i, token]) for i, token in enumerate(prompt[1:])]
    np.testing.assert_allclose(scores, want, atol=1e-4)


def test_windows_reach_the_manifest(package: Callable[[str], Path]) -> None:
    from llmx.runtime import load_manifest

    windows = {t.layer: t.window for t in load_manifest(package("gemma3_text")).state}
    assert set(windows.values()) == {24, None}
    assert {t.window for t in load_manifest(package("mistral")).state} == {24}
    assert {t.window for t in load_manifest(package("llama")).state} == {None}
