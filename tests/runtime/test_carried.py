"""State that is carried from call to call: the scheduler over a backend that cannot go back, and the real one's slots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmx.runtime import LLM, SamplingParams
from llmx.runtime.carried import CarriedBackend
from llmx.runtime.engine import Engine
from llmx.runtime.fake_backend import FakeBackend
from llmx.runtime.manifest import TokenizerInfo
from llmx.runtime.tokenizer import Tokenizer
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models

VOCAB = 32


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20), min_size=1, max_size=6),
    lengths=st.lists(st.integers(1, 12), min_size=6, max_size=6),
    siblings=st.lists(st.integers(1, 3), min_size=6, max_size=6),
    joins=st.lists(st.integers(0, 6), min_size=6, max_size=6),
    slots=st.integers(1, 4),
    chunk=st.integers(1, 7),
    chunked=st.booleans(),
)
def test_a_recurrence_is_never_asked_to_go_back(
    prompts: list[list[int]],
    lengths: list[int],
    siblings: list[int],
    joins: list[int],
    slots: int,
    chunk: int,
    chunked: bool,
) -> None:
    """The fake asserts it: no slot is cut back, no idle row is run, no state of another length is copied."""
    raw = RawTokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    backend = FakeBackend(slots, 64, VOCAB, rewinds=False)
    backend.chunked = chunked
    engine = Engine(backend, Tokenizer(raw, TokenizerInfo()), chunk)
    requests = []
    for index, prompt in enumerate(prompts):
        wanted = SamplingParams(temperature=0.0, max_tokens=lengths[index], n=siblings[index]).resolved({})
        requests.append(engine.add(None, prompt, wanted))
        for _ in range(joins[index]):
            engine.step()
    for _ in range(5000):
        if not engine.has_work:
            break
        engine.step()
        engine.scheduler.pool.check_integrity()
    for request, prompt, length in zip(requests, prompts, lengths, strict=False):
        assert request.error is None
        expected = FakeBackend(1, 64, VOCAB).greedy(prompt, length)
        assert [s.output_ids for s in request.sequences] == [expected] * len(request.sequences)
    if not chunked:
        assert backend.num_prefills <= sum(siblings[: len(prompts)])


@pytest.mark.parametrize("name", ["bloom", "mamba", "lfm2"])
def test_slots_are_copied_and_scored(name: str, package: Callable[[str], Path]) -> None:
    rng = np.random.default_rng(4)
    prompt = rng.integers(1, 300, 30)
    with LLM(package(name), slots=3) as llm:
        backend = llm.backend
        assert isinstance(backend, CarriedBackend)
        whole = backend.prefill(0, prompt, 0, np.arange(30)).copy()
        backend.copy_slot(0, 2, 30)
        steps = [backend.prefill(1, prompt[i : i + 1], i, np.array([0]))[0].copy() for i in range(30)]
        np.testing.assert_allclose(steps, whole, atol=2e-4)
        tokens, lengths = np.array([5, 0, 5]), np.array([30, 30, 30])
        logits = backend.decode(tokens, lengths, np.array([True, False, True])).rows().copy()
        np.testing.assert_array_equal(logits[0], logits[2])
        np.testing.assert_allclose(backend.prefill(1, np.array([5]), 30, np.array([0]))[0], logits[0], atol=2e-4)
        if backend.rewinds:
            backend.copy_slot(0, 1, 12)
            np.testing.assert_allclose(backend.prefill(1, prompt[12:], 12, np.array([17]))[0], whole[29], atol=2e-4)
        else:
            with pytest.raises(AssertionError, match="keeps no past"):
                backend.copy_slot(0, 1, 12)
        scores = llm.score([prompt.tolist()])[0]
        logs = (
            whole
            - np.log(np.exp(whole - whole.max(1, keepdims=True)).sum(1, keepdims=True))
            - whole.max(1, keepdims=True)
        )
        np.testing.assert_allclose(scores, [logs[i, t] for i, t in enumerate(prompt[1:])], atol=1e-3)


@pytest.mark.parametrize("name", ["bloom", "mamba"])
def test_continuations_share_a_prompt(name: str, package: Callable[[str], Path]) -> None:
    """n > 1 and more rows than slots: every continuation is what its seed gives alone."""
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3, n=4, ignore_eos=True)
    with LLM(package(name), slots=3) as llm:
        [together] = llm.generate("ROMEO: what", params)
        for index, output in enumerate(together.outputs):
            alone = SamplingParams(max_tokens=12, temperature=1.0, seed=3 + index, ignore_eos=True)
            assert llm.generate("ROMEO: what", alone)[0].outputs[0].token_ids == output.token_ids
