"""The engine over the fake backend: whatever is scheduled together, each request gets what it gets alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmx.runtime import ContextLengthError, LlmxError, RequestError, SamplingParams
from llmx.runtime.engine import Engine
from llmx.runtime.fake_backend import FakeBackend
from llmx.runtime.manifest import TokenizerInfo
from llmx.runtime.scheduler import Request
from llmx.runtime.tokenizer import Tokenizer
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models

VOCAB = 32


def make_engine(slots: int = 3, chunk: int = 4, eos: list[int] | None = None, max_length: int = 64) -> Engine:
    raw = RawTokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    return Engine(FakeBackend(slots, max_length, VOCAB), Tokenizer(raw, TokenizerInfo(eos_token_ids=eos or [])), chunk)


def params(**options: object) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **options}).resolved({})  # type: ignore[arg-type]


def run(engine: Engine) -> None:
    for _ in range(10_000):
        if not engine.has_work:
            return
        engine.step()
        engine.scheduler.pool.check_integrity()
    raise AssertionError("the engine does not come to an end")


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20), min_size=1, max_size=8),
    lengths=st.lists(st.integers(1, 12), min_size=8, max_size=8),
    joins=st.lists(st.integers(0, 6), min_size=8, max_size=8),
    cancels=st.sets(st.integers(0, 7)),
    slots=st.integers(1, 4),
    chunk=st.integers(1, 7),
)
def test_batched_equals_single(
    prompts: list[list[int]], lengths: list[int], joins: list[int], cancels: set[int], slots: int, chunk: int
) -> None:
    engine = make_engine(slots, chunk)
    reference = FakeBackend(1, 64, VOCAB)
    requests: list[Request] = []
    for index, prompt in enumerate(prompts):
        requests.append(engine.add(None, prompt, params(max_tokens=lengths[index])))
        for _ in range(joins[index]):
            engine.step()
            engine.scheduler.pool.check_integrity()
        if index in cancels:
            engine.cancel(requests[index // 2])
    run(engine)
    for index, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
        [sequence] = request.sequences
        expected = reference.greedy(prompt, lengths[index])
        if sequence.finish_reason == "abort":
            assert request.cancelled
            assert sequence.output_ids == expected[: sequence.num_output]
        else:
            assert sequence.finish_reason == "length"
            assert sequence.output_ids == expected
    assert engine.scheduler.pool.held() == []


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_n_shares_the_prefill_and_draws_apart(slots: int) -> None:
    engine = make_engine(slots, chunk=4)
    request = engine.add(None, [1, 2, 3, 4, 5, 6], params(n=4, temperature=1.0, seed=5, max_tokens=6))
    run(engine)
    together = [s.output_ids for s in request.sequences]
    assert len({tuple(ids) for ids in together}) == 4
    if slots == 5:
        assert engine.backend.num_prefills == 2  # type: ignore[attr-defined]  # two chunks of one prompt
    for index, ids in enumerate(together):
        alone = make_engine(1)
        single = alone.add(None, [1, 2, 3, 4, 5, 6], params(temperature=1.0, seed=5 + index, max_tokens=6))
        run(alone)
        assert single.sequences[0].output_ids == ids


def test_seed_does_not_depend_on_the_batch() -> None:
    def sample(others: int) -> list[int]:
        engine = make_engine(4)
        for i in range(others):
            engine.add(None, [i + 1], params(temperature=1.0, max_tokens=5))
        request = engine.add(None, [9, 8, 7], params(temperature=0.9, top_p=0.9, seed=11, max_tokens=10))
        run(engine)
        return request.sequences[0].output_ids

    assert sample(0) == sample(1) == sample(3)


def test_end_tokens_and_stop_token_ids() -> None:
    fake = FakeBackend(1, 64, VOCAB)
    prompt = next([3, i] for i in range(VOCAB) if len(set(fake.greedy([3, i], 8))) == 8)
    path = fake.greedy(prompt, 8)
    engine = make_engine(eos=[path[4]])
    stops = engine.add(None, prompt, params())
    goes_on = engine.add(None, prompt, params(ignore_eos=True))
    earlier = engine.add(None, prompt, params(stop_token_ids=[path[2]]))
    run(engine)
    assert (stops.sequences[0].output_ids, stops.sequences[0].finish_reason) == (path[:5], "stop")
    assert stops.sequences[0].stop_reason is None
    assert (goes_on.sequences[0].output_ids, goes_on.sequences[0].finish_reason) == (path, "length")
    assert earlier.sequences[0].stop_reason == path[2]


def test_min_tokens_masks_end_tokens() -> None:
    path = FakeBackend(1, 64, VOCAB).greedy([3, 1], 1)
    engine = make_engine(eos=[path[0]])
    request = engine.add(None, [3, 1], params(min_tokens=3))
    run(engine)
    assert path[0] not in request.sequences[0].output_ids[:3]


def test_context_full() -> None:
    engine = make_engine(max_length=10)
    request = engine.add(None, [1, 2, 3], params(max_tokens=50))
    run(engine)
    assert (request.sequences[0].num_output, request.sequences[0].finish_reason) == (7, "length")
    with pytest.raises(ContextLengthError, match="10 tokens and the context holds 10"):
        engine.add(None, list(range(10)), params())


@pytest.mark.parametrize(("ids", "message"), [([], "empty"), ([VOCAB], "between 0 and 31"), ([-1], "between 0 and 31")])
def test_bad_prompts(ids: list[int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make_engine().add(None, ids, params())


def test_a_failing_backend_ends_its_requests_alone() -> None:
    engine = make_engine()
    good = engine.backend.decode

    def broken(*_: object) -> None:
        raise LlmxError("the device is gone")

    engine.backend.decode = broken  # type: ignore[assignment,method-assign]
    request = engine.add(None, [1], params())
    run(engine)
    assert "device is gone" in str(request.error)
    engine.backend.decode = good  # type: ignore[method-assign]
    later = engine.add(None, [1], params())
    run(engine)
    assert later.error is None and later.sequences[0].finish_reason == "length"


def test_nan_logits_end_one_request() -> None:
    engine = make_engine()
    original = engine.backend.next_logits  # type: ignore[attr-defined]

    def logits(tokens: list[int]) -> object:
        row = original(tokens)
        return row * float("nan") if tokens[0] == 7 else row

    engine.backend.next_logits = logits  # type: ignore[attr-defined]
    bad, fine = engine.add(None, [7], params()), engine.add(None, [8], params())
    run(engine)
    assert "NaN" in str(bad.error)
    assert fine.sequences[0].output_ids == FakeBackend(1, 64, VOCAB).greedy([8], 8)


def test_compaction_moves_live_rows_down() -> None:
    engine = make_engine(slots=4)
    for i in range(3):
        engine.add(None, [i + 1], params(max_tokens=2))
    last = engine.add(None, [9], params(max_tokens=20))
    run(engine)
    assert last.sequences[0].output_ids == FakeBackend(1, 64, VOCAB).greedy([9], 20)


def test_logprobs() -> None:
    import numpy as np

    engine = make_engine()
    request = engine.add(None, [1, 2], params(logprobs=3, max_tokens=2))
    run(engine)
    row = FakeBackend(1, 64, VOCAB).next_logits([1, 2]).astype(np.float64)
    logprobs = row - np.log(np.exp(row).sum())
    entry = request.sequences[0].logprobs[0]
    assert sorted(entry, key=lambda t: -entry[t].logprob) == np.argsort(-row)[:3].tolist()
    for token, info in entry.items():
        assert info.logprob == pytest.approx(logprobs[token], abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20), chunk=st.integers(1, 7), n=st.integers(1, 3)
)
def test_prompt_logprobs(prompt: list[int], chunk: int, n: int) -> None:
    """Each prompt token's log-probability given those before it, whatever the chunks; the output is the same."""
    engine, reference = make_engine(2, chunk), FakeBackend(1, 64, VOCAB)
    request = engine.add(None, prompt, params(prompt_logprobs=2, n=n))
    run(engine)
    assert [s.output_ids for s in request.sequences] == [reference.greedy(prompt, 8)] * n
    assert request.prompt_logprobs is not None and len(request.prompt_logprobs) == len(prompt)
    assert request.prompt_logprobs[0] is None
    for position in range(1, len(prompt)):
        logits = reference.next_logits(prompt[:position]).astype(np.float64)
        entry = request.prompt_logprobs[position]
        assert entry is not None and {*entry} == {prompt[position], *np.argsort(-logits)[:2].tolist()}
        expected = logits[prompt[position]] - np.log(np.exp(logits).sum())
        assert entry[prompt[position]].logprob == pytest.approx(expected, abs=1e-5)
