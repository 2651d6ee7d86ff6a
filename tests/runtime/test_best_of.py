"""`best_of`: the n most likely of the outputs that are drawn, as if all had been asked for."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmx.runtime import RequestError, SamplingParams
from llmx.runtime.engine import Engine
from llmx.runtime.fake_backend import FakeBackend
from llmx.runtime.outputs import StreamPiece
from test_prefix_cache import run
from test_speculation import make_tokenizer

VOCAB = 12


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8),
    n=st.integers(1, 4),
    more=st.integers(0, 4),
    seed=st.integers(0, 2**32),
    slots=st.integers(1, 5),
    options=st.fixed_dictionaries(
        {}, optional={"logprobs": st.integers(0, 2), "stop": st.just(["t3", "t1t2"]), "temperature": st.just(0.0)}
    ),
)
def test_it_is_the_best_of_all(
    prompt: list[int], n: int, more: int, seed: int, slots: int, options: dict[str, Any]
) -> None:
    common: dict[str, Any] = {"temperature": 1.0, "max_tokens": 9, "seed": seed, **options}
    engine = Engine(FakeBackend(slots, 40, VOCAB), make_tokenizer(VOCAB, [4]), 5)
    whole = engine.add(None, prompt, SamplingParams(**{**common, "logprobs": 0}, n=n + more).resolved({}))
    run(engine)
    shown: list[StreamPiece] = []
    best = engine.add(None, prompt, SamplingParams(**common, n=n, best_of=n + more).resolved({}), shown.append)
    run(engine)
    order = sorted(whole.sequences, key=lambda s: -s.cumulative_logprob) if more else whole.sequences
    told = [(s.output_ids, s.text, s.finish_reason, s.stop_reason) for s in order[:n]]
    assert [(s.output_ids, s.text, s.finish_reason, s.stop_reason) for s in best.sequences] == told
    assert [s.index for s in best.sequences] == list(range(n))
    assert best.metrics.num_output_tokens == whole.metrics.num_output_tokens
    for s in best.sequences:
        pieces = [piece for piece in shown if piece.index == s.index]
        assert "".join(piece.text for piece in pieces) == s.text and pieces[-1].finish_reason == s.finish_reason
        assert sum((piece.token_ids for piece in pieces), []) == s.output_ids
        assert len(s.logprobs) == (0 if "logprobs" not in options else len(s.output_ids))
        assert not more or len(pieces) == 1  # nothing is shown before it is known
    assert shown[-1].metrics is best.metrics


def test_one_that_is_cancelled_ends() -> None:
    engine = Engine(FakeBackend(2, 60, VOCAB), make_tokenizer(VOCAB), 5)
    shown: list[StreamPiece] = []
    params = SamplingParams(temperature=1.0, max_tokens=50, n=2, best_of=5).resolved({})
    request = engine.add(None, [1, 2], params, shown.append)
    for _ in range(6):
        engine.step()
    assert not shown and not request.finished
    engine.cancel(request)
    run(engine)
    assert [piece.finish_reason for piece in shown] == ["abort", "abort"] and request.finished


def test_a_failure_ends_it() -> None:
    engine = Engine(FakeBackend(2, 60, VOCAB), make_tokenizer(VOCAB), 5)
    params = SamplingParams(temperature=1.0, max_tokens=9, best_of=3, allowed_token_ids=[1], no_repeat_ngram_size=1)
    request = engine.add(None, [1, 2], params.resolved({}))
    run(engine)
    assert isinstance(request.error, RequestError) and request.finished


def test_what_is_refused() -> None:
    with pytest.raises(RequestError, match=r"best_of \(2\) must not be below n \(3\)"):
        SamplingParams(n=3, best_of=2)
    with pytest.raises(RequestError, match="best_of must be a whole number from 1 to 256"):
        SamplingParams(best_of=0)
    with pytest.raises(RequestError, match="num_beams and best_of do not go together"):
        SamplingParams(num_beams=2, best_of=3)
    assert SamplingParams(best_of=2).resolved({"num_beams": 4}).num_beams == 1  # who asks for samples gets them
