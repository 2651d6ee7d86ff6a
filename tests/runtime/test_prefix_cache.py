"""Shared prefixes, budgets, turns, faults: whatever the engine spares or shares, a request gets what it gets alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from llmx.runtime import LLM, SamplingParams
from llmx.runtime.engine import Engine
from llmx.runtime.fake_backend import FakeBackend
from llmx.runtime.manifest import TokenizerInfo
from llmx.runtime.scheduler import Request
from llmx.runtime.tokenizer import Tokenizer
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models

VOCAB, CHUNK, LENGTH = 32, 4, 64
BAD = [1] * 9 + [31]  # no other request's prompt begins so
BLOCK_BYTES = CHUNK * 8  # the fake's state is its tokens


def make_engine(slots: int = 3, blocks: int = 8, backend: FakeBackend | None = None) -> Engine:
    raw = RawTokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    tokenizer = Tokenizer(raw, TokenizerInfo(eos_token_ids=[]))
    backend = backend or FakeBackend(slots, LENGTH, VOCAB)
    return Engine(backend, tokenizer, CHUNK, prefix_cache_bytes=blocks * BLOCK_BYTES)


def params(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 6, **options}).resolved({})


def run(engine: Engine) -> None:
    for _ in range(10_000):
        if not engine.has_work:
            return
        engine.step()
        engine.check_integrity()
    raise AssertionError("the engine does not come to an end")


class Faulty(FakeBackend):
    """One prompt makes NaN logits: a fault inside one request."""

    def next_logits(self, tokens: list[int]) -> np.ndarray:
        row = super().next_logits(tokens)
        return row * np.float32(np.nan) if tokens[:10] == BAD else row


class Traffic(RuleBasedStateMachine):
    """Arrivals, cancellations, shared prefixes, several continuations, faults, in any order over a small cache."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = make_engine(slots=3, blocks=5, backend=Faulty(3, LENGTH, VOCAB))
        self.reference = FakeBackend(1, LENGTH, VOCAB)
        self.requests: list[Request] = []
        self.streams: dict[int, list[list[int]]] = {}

    @rule(
        prefix=st.sampled_from([[1] * 9, [1] * 4 + [2] * 9, [3] * 13, []]),
        tail=st.lists(st.integers(0, 30), min_size=1, max_size=6),
        length=st.integers(1, 8),
        n=st.sampled_from([1, 1, 2, 3]),
        scored=st.sampled_from([None, None, None, 1]),
    )
    def arrive(self, prefix: list[int], tail: list[int], length: int, n: int, scored: int | None) -> None:
        streams: list[list[int]] = [[] for _ in range(n)]

        def emit(piece: Any) -> None:
            streams[piece.index].extend(piece.token_ids)

        chosen = params(max_tokens=length, n=n, prompt_logprobs=scored)
        self.requests.append(self.engine.add(None, prefix + tail, chosen, emit))
        self.streams[id(self.requests[-1])] = streams

    @rule()
    def arrive_with_a_fault(self) -> None:
        self.requests.append(self.engine.add(None, BAD, params(n=2)))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        self.engine.cancel(request)
        self.engine.step()
        assert all(s.slot is None for s in request.sequences), "a cancelled request holds a slot after a step"

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()
            self.engine.check_integrity()

    @invariant()
    def whole(self) -> None:
        self.engine.check_integrity()

    def teardown(self) -> None:
        run(self.engine)
        assert self.engine.scheduler.pool.held() == []
        for request in self.requests:
            if request.prompt_ids == BAD:
                assert request.cancelled or "NaN" in str(request.error)
                continue
            assert request.error is None
            for sequence in request.sequences:
                expected = self.reference.greedy(request.prompt_ids, request.params.max_tokens or 0)
                if sequence.finish_reason == "abort":
                    assert request.cancelled
                    expected = expected[: sequence.num_output]
                assert sequence.output_ids == expected == self.streams[id(request)][sequence.index]


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_shared_prefix_is_computed_once() -> None:
    engine = make_engine()
    prefix = list(range(12))
    first = engine.add(None, [*prefix, 20, 21], params())
    run(engine)
    assert (first.metrics.num_cached_tokens, engine.backend.num_prefills) == (0, 4)  # type: ignore[attr-defined]
    later = [engine.add(None, [*prefix, 22 + i], params()) for i in range(2)]
    run(engine)
    assert [r.metrics.num_cached_tokens for r in later] == [12, 12]
    assert engine.backend.num_prefills == 6  # type: ignore[attr-defined]
    assert engine.prefix_cache is not None and engine.prefix_cache.num_hits == 24


def test_a_prefix_that_is_being_computed_is_shared_too() -> None:
    engine = make_engine()
    both = [engine.add(None, [7] * 12 + [i], params()) for i in range(2)]
    run(engine)
    assert [r.metrics.num_cached_tokens for r in both] == [0, 12]


def test_the_last_token_is_always_computed() -> None:
    engine = make_engine()
    outputs = []
    for _ in range(2):
        request = engine.add(None, [5] * 8, params())
        run(engine)
        outputs.append(request.sequences[0].output_ids)
    assert request.metrics.num_cached_tokens == 4 and outputs[0] == outputs[1]


def test_least_recently_used_first_and_the_ends_of_prompts_before_their_beginnings() -> None:
    engine = make_engine(blocks=4)

    def cached(token: int) -> int:
        request = engine.add(None, [token] * 13, params(max_tokens=1))
        run(engine)
        return request.metrics.num_cached_tokens

    assert [cached(1), cached(1)] == [0, 12]
    assert cached(2) == 0  # three blocks of 2 fit beside one of 1: the ends of 1's prompt went
    assert cached(1) == 4
    assert len(engine.prefix_cache) == 4  # type: ignore[arg-type]


def test_a_prompt_larger_than_the_cache_keeps_its_beginning() -> None:
    engine = make_engine(blocks=2)
    for expected in (0, 8):
        request = engine.add(None, [4] * 20, params(max_tokens=1))
        run(engine)
        assert request.metrics.num_cached_tokens == expected


def test_rotations_by_length_share_among_prompts_of_one_length_alone() -> None:
    backend = FakeBackend(3, LENGTH, VOCAB)
    backend.state_by_length = True
    engine = make_engine(backend=backend)
    for prompt, expected in (([1] * 9, 0), ([1] * 10, 0), ([1] * 9, 8)):
        request = engine.add(None, prompt, params(max_tokens=1))
        run(engine)
        assert request.metrics.num_cached_tokens == expected


def test_state_that_was_computed_anew_is_never_kept() -> None:
    """Past `recompute_at` a slot holds what a longer sequence would make; only a prompt's own chunks are kept."""
    backend = FakeBackend(3, LENGTH, VOCAB)
    backend.recompute_at = 14
    engine = make_engine(backend=backend)
    engine.add(None, [1] * 12, params(max_tokens=20))
    reads: list[tuple[int, int]] = []
    original = backend.read_state
    backend.read_state = lambda slot, a, b: reads.append((a, b)) or original(slot, a, b)  # type: ignore[method-assign,func-returns-value]
    run(engine)
    assert reads == [(0, 4), (4, 8)]


def test_a_step_never_runs_more_prompt_tokens_than_its_budget_and_streams_go_on() -> None:
    engine = make_engine(slots=4)
    stream = engine.add(None, [9], params(max_tokens=30))
    engine.step()
    for prompt in ([1] * 30, [2] * 3, [3] * 1, [4] * 2):
        engine.add(None, prompt, params(max_tokens=2))
    counted: list[int] = []
    original = engine.backend.prefill

    def prefill(slot: int, tokens: np.ndarray, *rest: Any) -> np.ndarray:
        counted.append(len(tokens))
        return original(slot, tokens, *rest)

    engine.backend.prefill = prefill  # type: ignore[method-assign]
    shared = 0
    while engine._arrivals or any(r.sequences[0].prefilling for r in engine._live) or engine.scheduler.waiting:
        before = stream.sequences[0].num_output
        counted.clear()
        engine.step()
        assert stream.sequences[0].num_output == before + 1
        assert sum(counted) <= CHUNK
        shared += len(counted) > 1
    assert shared, "short prompts share a step"


def test_first_come_first_served() -> None:
    """Slots, and then prompt tokens, go to the request that came first, whatever slot it got."""
    engine = make_engine(slots=3)
    order: list[str] = []
    short = engine.add(None, [9], params(max_tokens=3))
    names = ("a", "b", "c", "d")

    def receiver(name: str) -> Any:
        return lambda piece: order.append(name) if piece.finish_reason else None

    engine.step()
    for name, prompt in zip(names, ([1] * 20, [2] * 16, [3] * 12, [4] * 8), strict=True):
        engine.add(None, prompt, params(max_tokens=1), receiver(name))
    run(engine)
    assert short.finished and order == list(names)


@pytest.mark.parametrize("where", ["detokenizer", "stop", "receiver"])
def test_a_fault_in_one_request_ends_it_alone(where: str) -> None:
    engine = make_engine()
    bad = engine.add(None, [1, 2], params(n=2), (lambda piece: 1 / 0) if where == "receiver" else None)
    good = engine.add(None, [3, 4], params())
    if where != "receiver":
        setattr(bad.sequences[0], where, None)  # raises AttributeError when it is used
    run(engine)
    assert bad.finished and (bad.cancelled if where == "receiver" else isinstance(bad.error, AttributeError))
    assert good.sequences[0].output_ids == FakeBackend(1, LENGTH, VOCAB).greedy([3, 4], 6)


def test_the_demo_model_says_the_same_from_the_cache(demo: Path) -> None:
    """Restored state is bit for bit the computed one; outputs of a busy engine are those of a prompt alone."""
    generator = np.random.default_rng(0)
    greedy = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=0)
    with LLM(demo, slots=1) as alone, LLM(demo, slots=4, prefix_cache_bytes=1 << 24, prefill_chunk=64) as llm:
        system = generator.integers(3, 1000, 200).tolist()
        prompts = [system + generator.integers(3, 1000, int(n)).tolist() for n in generator.integers(1, 90, 12)]
        outputs = llm.generate(prompts, greedy)
        assert [o.metrics.num_cached_tokens for o in outputs[1:]] == [192] * 11
        for prompt, output in zip(prompts, outputs, strict=True):
            [expected] = alone.generate([prompt], greedy)
            assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        backend: Any = llm.backend
        llm.generate([prompts[3]], SamplingParams(max_tokens=1))
        restored = backend.read_state(0, 0, 192)
        llm.engine.prefix_cache.clear()  # type: ignore[union-attr]
        llm.generate([prompts[3]], SamplingParams(max_tokens=1))
        for kept, computed in zip(restored, backend.read_state(0, 0, 192), strict=True):
            np.testing.assert_array_equal(kept, computed)


def test_the_demo_model_says_the_same_in_any_traffic(demo: Path) -> None:
    """Random arrivals, prefixes in common, cancellations, several continuations: bit for bit what each prompt gets alone."""
    generator = np.random.default_rng(1)

    def draw(count: int) -> list[int]:
        ids: list[int] = generator.integers(3, 1000, count).tolist()
        return ids

    with LLM(demo, slots=1) as alone, LLM(demo, slots=4, prefix_cache_bytes=1 << 20, prefill_chunk=16) as llm:
        engine, heads = llm.engine, [draw(40), draw(70), []]
        waiting = [(heads[generator.integers(3)] + draw(int(generator.integers(1, 50)))) for _ in range(40)]
        requests: list[Request] = []
        while waiting or engine.has_work:
            if waiting and generator.random() < 0.3:
                chosen = SamplingParams(
                    max_tokens=int(generator.integers(1, 40)), temperature=0.0, ignore_eos=True, n=int(generator.integers(1, 3))
                )  # fmt: skip
                requests.append(engine.add(None, waiting.pop(), chosen.resolved({})))
            if requests and generator.random() < 0.02:
                engine.cancel(requests[generator.integers(len(requests))])
            engine.step()
            engine.check_integrity()
        cancelled = 0
        for request in requests:
            assert request.error is None
            greedy = SamplingParams(max_tokens=request.params.max_tokens, temperature=0.0, ignore_eos=True)
            expected = alone.generate([request.prompt_ids], greedy)[0].outputs[0].token_ids
            for sequence in request.sequences:
                cancelled += sequence.finish_reason == "abort"
                assert sequence.output_ids == expected[: sequence.num_output]
                assert sequence.finish_reason == "abort" or sequence.output_ids == expected
        assert cancelled and engine.prefix_cache is not None and engine.prefix_cache.num_hits > 200


def test_a_sequence_that_has_a_slot_runs_to_its_end() -> None:
    """Why nothing is preempted: a slot has room for the longest sequence, so each runs every step until it ends by itself."""
    engine = make_engine(slots=3, blocks=2)
    requests = [engine.add(None, [i] * (1 + 5 * i), params(max_tokens=1000)) for i in range(9)]
    decoding: dict[int, int] = {}  # sequences that decode, and how much they had said
    while engine.has_work:
        engine.step()
        engine.check_integrity()
        for sequence in (r.sequences[0] for r in requests):
            if id(sequence) in decoding and sequence.finish_reason is None:
                assert sequence.slot is not None and sequence.num_output == decoding[id(sequence)] + 1
            if sequence.num_output and sequence.finish_reason is None:
                decoding[id(sequence)] = sequence.num_output
    reference = FakeBackend(1, LENGTH, VOCAB)
    for request in requests:
        [sequence] = request.sequences
        assert (len(sequence.tokens), sequence.finish_reason) == (LENGTH, "length")
        assert sequence.output_ids == reference.greedy(request.prompt_ids, LENGTH - request.num_prompt)
